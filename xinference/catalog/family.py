# SPDX-License-Identifier: Apache-2.0
"""What the catalogue knows of a published model: a *family* and its *variants*.

A family is one model as its makers name it; a variant is the family in one format, size,
quantization and hub. Both are values: `schema` reads them from JSON, `matching` chooses among
the variants, `registry` keeps them. Nothing here reads a file.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from .memory import estimate, typical_shape, weights_bytes

DEFAULT_CONTEXT_LENGTH = 2048
"""Of a registered family that does not say and whose files are not readable here."""

GUIDE_URI = "package:guide"
"""The path of the model whose files are inside this package."""

_SIZE = re.compile(r"\d{1,6}([._]\d{1,6})?", re.ASCII)


def parse_size(text: str) -> Decimal | None:
    """Read billions of parameters from "4", "0.5" or "0_5"; None if it is no such number."""
    if not _SIZE.fullmatch(text):
        return None
    return Decimal(text.replace("_", "."))


def size_text(size: Decimal) -> str:
    """Spell a size as families do: "4", "0_5"."""
    digits = f"{size:f}"
    if "." in digits:
        digits = digits.rstrip("0").removesuffix(".")
    return digits.replace(".", "_")


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """A family in one format, size, quantization and hub."""

    model_format: str
    size: Decimal
    """Parameters, in billions."""
    activated_size: Decimal | None = None
    """Of a mixture of experts: the parameters that one token uses, in billions."""
    quantization: str
    model_hub: str
    """huggingface, modelscope, …; "local" for files on the worker, "package" for ours."""
    model_id: str | None
    """The repository on the hub. None: there is none, and `path` is set."""
    model_revision: str | None = None
    path: str | None = None
    """A directory on the worker, or `GUIDE_URI`. None: the files are on the hub."""
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Fields of a spec that are kept and shown, such as file name templates of GGUF."""

    @property
    def weights(self) -> str | None:
        """What the weights are stored as, where that is not what the format has by default."""
        metadata = self.carried.get("model_metadata")
        return metadata.get("weights") if isinstance(metadata, Mapping) else None

    @property
    def memory_bytes(self) -> int:
        """About what a replica takes at the least, judged by the size; 0 if that is unknown."""
        if not self.size:
            return 0
        shape = typical_shape(self.size)
        weights = weights_bytes(self.size, self.model_format, self.quantization, shape)
        needed = estimate(shape, weights_bytes=weights, context_length=1)
        return needed.total_bytes - needed.kv_cache_bytes

    def __str__(self) -> str:
        plain = f"{size_text(self.size).replace('_', '.')}B {self.model_format}"
        return plain if self.quantization == "none" else f"{plain} {self.quantization}"

    def to_json(self) -> dict[str, Any]:
        """Return the spec as registrations show it."""
        return {
            "model_format": self.model_format,
            "model_size_in_billions": _size_json(self.size),
            "activated_size_in_billions": _size_json(self.activated_size),
            "quantization": self.quantization,
            "model_hub": self.model_hub,
            "model_id": self.model_id,
            "model_revision": self.model_revision,
            "model_uri": self.path,
            "memory_bytes": self.memory_bytes,
            **self.carried,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFamily:
    """A published model. `variants` is never empty and keeps the order of the data."""

    model_name: str
    model_description: str
    context_length: int | None
    """None: what the files say, or `DEFAULT_CONTEXT_LENGTH`."""
    model_lang: tuple[str, ...]
    model_ability: tuple[str, ...]
    license: str | None
    model_family: str
    architectures: tuple[str, ...]
    chat_template: str | None
    """None: the tokenizer's own."""
    stop_token_ids: tuple[int, ...]
    stop: tuple[str, ...]
    reasoning_start_tag: str | None
    reasoning_end_tag: str | None
    tool_parser: str | None
    variants: tuple[Variant, ...]
    is_builtin: bool
    carried: Mapping[str, Any] = field(default_factory=dict)
    """Fields that are kept and shown, and that nothing here acts on."""

    def to_json(self) -> dict[str, Any]:
        """Return the whole family as registrations show it."""
        return {
            "version": 2,
            "model_name": self.model_name,
            "model_description": self.model_description,
            "context_length": self.context_length or DEFAULT_CONTEXT_LENGTH,
            "model_lang": list(self.model_lang),
            "model_ability": list(self.model_ability),
            "license": self.license,
            "model_family": self.model_family,
            "architectures": list(self.architectures),
            "chat_template": self.chat_template,
            "stop_token_ids": list(self.stop_token_ids),
            "stop": list(self.stop),
            "reasoning_start_tag": self.reasoning_start_tag,
            "reasoning_end_tag": self.reasoning_end_tag,
            "tool_parser": self.tool_parser,
            **self.carried,
            "model_specs": [variant.to_json() for variant in self.variants],
            "is_builtin": self.is_builtin,
        }


def _size_json(size: Decimal | None) -> int | str | None:
    if size is None:
        return None
    return int(size) if size == size.to_integral_value() else size_text(size)
