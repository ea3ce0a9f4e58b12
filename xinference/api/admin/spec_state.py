# SPDX-License-Identifier: Apache-2.0
"""What the catalogue cannot know of a spec: whether its files are here, and whether it fits. Pure.

Over the JSON that registrations are, as `family_filter`.
"""

from collections.abc import Iterable
from typing import Any

from xinference.protocol.downloads import CachedModel

from .family_filter import Family

_ONE_OF_MANY = "ggufv2"
"""Of this format a repository holds several quantizations, each a spec of its own."""
_VARIANT = ("model_format", "model_size_in_billions", "quantization", "model_file_name_template")
"""What two specs have in common that differ in their hub alone."""


def with_state(
    families: Iterable[Family], kept: Iterable[CachedModel], room_bytes: int
) -> list[Family]:
    """Return the families with `cache_status` and `fits` in each spec.

    `cache_status` is true where a launch downloads nothing: all files are on a worker, in the
    package, or at a path. `fits` is true where `memory_bytes` are free, null where it is not
    known how many it takes.

    Args:
        kept: what the workers say they keep.
        room_bytes: what is free on the roomiest device.
    """
    whole = {
        _contents(
            one.source.hub,
            one.source.model_id,
            one.source.revision,
            one.model_format,
            one.quantization,
        )
        for one in kept
        if one.is_complete
    }
    return [_family_with_state(family, whole, room_bytes) for family in families]


_Contents = tuple[str | None, ...]


def _family_with_state(family: Family, whole: set[_Contents], room_bytes: int) -> Family:
    specs = family.get("model_specs", ())
    # Why by variant: what came from one hub is not fetched from the other.
    here = {_variant(spec) for spec in specs if _has_path(spec) or _contents_of(spec) in whole}
    return {
        **family,
        "model_specs": [
            {
                **spec,
                "cache_status": _variant(spec) in here,
                "fits": _fits(spec.get("memory_bytes"), room_bytes),
            }
            for spec in specs
        ],
    }


def _fits(memory_bytes: int | None, room_bytes: int) -> bool | None:
    return memory_bytes <= room_bytes if memory_bytes else None


def _variant(spec: dict[str, Any]) -> tuple[object, ...]:
    return tuple(spec.get(name) for name in _VARIANT)


def _has_path(spec: dict[str, Any]) -> bool:
    return spec.get("model_uri") is not None


def _contents_of(spec: dict[str, Any]) -> _Contents:
    return _contents(
        spec.get("model_hub"),
        spec.get("model_id"),
        spec.get("model_revision"),
        spec.get("model_format"),
        spec.get("quantization"),
    )


def _contents(
    hub: str | None,
    model_id: str | None,
    revision: str | None,
    model_format: str | None,
    quantization: str | None,
) -> _Contents:
    """Return what tells the files of a spec from those of any other."""
    return hub, model_id, revision, quantization if model_format == _ONE_OF_MANY else None
