# SPDX-License-Identifier: Apache-2.0
"""Which repositories hold the files of a variant, and which of their files it needs.

Pure. One variant may be on several hubs; they are equals, and the host that downloads takes the
first that answers.
"""

from collections.abc import Sequence
from glob import escape

from xinference.errors import DownloadUnavailable, UnsupportedVariant
from xinference.protocol.downloads import HUBS, DownloadRequest, HubSource

from .family import Variant, size_text

GGUF = "ggufv2"


def download_of(
    variant: Variant,
    variants: Sequence[Variant],
    *,
    model_version: str,
    model_name: str,
    model_type: str,
    hub: str | None,
) -> DownloadRequest:
    """Return what a host needs to run a variant.

    Args:
        variants: all of the family; those that differ from `variant` in their hub alone count.
        hub: the only one that may be asked; None: each.

    Raises:
        UnsupportedVariant: `hub` does not have it.
        DownloadUnavailable: it is only on hubs that this version does not know.
    """
    patterns = files_of(variant)
    equals = [
        one
        for one in variants
        if one.model_id is not None
        and (one.model_format, one.size, one.quantization)
        == (variant.model_format, variant.size, variant.quantization)
        # Why: a repository whose files have other names is not the same one elsewhere.
        and files_of(one) == patterns
    ]
    hubs = [one.model_hub for one in equals]
    if hub is not None and hub not in hubs:
        raise UnsupportedVariant(
            family=model_name, problem=f"{variant} is not on {hub}", suggestions=sorted(set(hubs))
        )
    sources = tuple(
        HubSource(hub=name, model_id=str(one.model_id), revision=one.model_revision)
        for name in (HUBS if hub is None else (hub,))
        for one in equals
        if one.model_hub == name
    )
    if not sources:
        raise DownloadUnavailable(
            family=model_name,
            model_id=variant.model_id or "",
            problem=f"it is on {', '.join(sorted(set(hubs)))}, which this version does not ask",
        )
    return DownloadRequest(
        model_version=model_version,
        model_name=model_name,
        model_type=model_type,
        model_size_in_billions=size_text(variant.size),
        model_format=variant.model_format,
        quantization=variant.quantization,
        sources=sources,
        patterns=patterns,
        main_file=patterns[0] if variant.model_format == GGUF and patterns else None,
    )


def files_of(variant: Variant) -> tuple[str, ...]:
    """Return globs of the files of a variant whose repository holds others, too, in order.

    A model in parts is loaded from its first. Empty: the repository is the variant.
    """
    carried, quantization = variant.carried, variant.quantization
    parts = (carried.get("quantization_parts") or {}).get(quantization)
    template = carried.get("model_file_name_split_template")
    if not parts or not template:
        parts, template = ("",), carried.get("model_file_name_template")
    if not template:
        return ()
    named = str(template).replace("{quantization}", quantization)
    return tuple(escape(named.replace("{part}", part)) for part in parts)
