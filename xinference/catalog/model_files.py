# SPDX-License-Identifier: Apache-2.0
"""What a model's files say of it: its config, and how large its weights are.

They lie in a directory, of which the small JSON files are read and the heads of safetensors files,
never the weights; or in a repository, of which there is a card. Files that are not there, or not
readable, say nothing; nothing here raises.
"""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from glob import escape
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from xinference.protocol.downloads import HubSource
from xinference.protocol.repositories import RepositoryCard

from .gguf_head import documents_of
from .memory import ModelShape, shape_of

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 100 * 2**20
"""Of a safetensors file, as its format has it."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}
_WEIGHT_FILES = ("*.safetensors", "*.gguf", "pytorch_model*.bin")


@dataclass(frozen=True, slots=True, kw_only=True)
class Weights:
    """How large the weights of a model are."""

    num_bytes: int
    """In their files."""
    num_parameters: int | None = None
    """None: the files are not safetensors, or quantized."""
    dtype: str | None = None
    """What most of them are stored as: float32, bfloat16, …; None: unknown."""

    def bytes_as(self, dtype: str) -> int:
        """Return what they take when computed in a dtype; "auto" as they are stored."""
        bits = {"float32": 32, "bfloat16": 16, "float16": 16}.get(dtype)
        if bits is None or self.num_parameters is None:
            return self.num_bytes
        return self.num_parameters * bits // 8


class ModelFiles(Protocol):
    """The files of one model."""

    @property
    def path(self) -> str | None:
        """What the worker loads them from; None: they have to be downloaded."""
        ...

    @property
    def source(self) -> HubSource | None:
        """Where to download them from; None: they are there."""
        ...

    @property
    def gguf_sizes(self) -> Mapping[str, int]:
        """Bytes of the GGUF files by their names, where the model comes as such."""
        ...

    def document(self, name: str) -> dict[str, Any] | None:
        """Return the object in a JSON file; None if it is not there, or no object."""
        ...

    def has(self, name: str) -> bool:
        """Return whether there is a file of this name."""
        ...

    def chat_template(self) -> str | None:
        """Return the template that lies beside the tokenizer, if one does."""
        ...

    def weights(self) -> Weights | None:
        """Return how large the weights are; None: there are none."""
        ...

    def __str__(self) -> str:
        """Where they are."""
        ...


class DirectoryFiles:
    """The files in a directory that this process sees."""

    source = None
    gguf_sizes: Mapping[str, int] = MappingProxyType({})

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.path = str(directory)

    def document(self, name: str) -> dict[str, Any] | None:
        """See `ModelFiles`."""
        return json_file(self._directory / name)

    def has(self, name: str) -> bool:
        """See `ModelFiles`."""
        return (self._directory / name).exists()

    def chat_template(self) -> str | None:
        """See `ModelFiles`."""
        try:
            return (self._directory / "chat_template.jinja").read_text(encoding="utf-8")
        except (OSError, ValueError):
            return None

    def weights(self) -> Weights | None:
        """See `ModelFiles`."""
        return weights_in(self._directory)

    def __str__(self) -> str:
        return str(self._directory)


class GgufFiles:
    """A GGUF file that this process sees; of a model in several, the first."""

    source = None

    def __init__(self, file: Path) -> None:
        """Read its head.

        Raises:
            NotGguf, OSError
        """
        self.path = str(file)
        with file.open("rb") as opened:
            self._documents = documents_of(opened.read)
        self.gguf_sizes = {one.name: one.stat().st_size for one in _parts_of(file)}

    def document(self, name: str) -> dict[str, Any] | None:
        """See `ModelFiles`."""
        return self._documents.get(name)

    def has(self, name: str) -> bool:
        """See `ModelFiles`."""
        return name in self._documents

    def chat_template(self) -> str | None:
        """See `ModelFiles`."""
        return None

    def weights(self) -> Weights | None:
        """See `ModelFiles`."""
        return Weights(num_bytes=sum(self.gguf_sizes.values()))

    def __str__(self) -> str:
        return self.path


def _parts_of(file: Path) -> list[Path]:
    """Return the files of the model that begins with this one."""
    stem, _, rest = file.name.partition("-00001-of-")
    return sorted(file.parent.glob(f"{escape(stem)}-*-of-{escape(rest)}")) if rest else [file]


class CardFiles:
    """The files of a repository, as far as its card has them."""

    path = None

    def __init__(self, card: RepositoryCard) -> None:
        self._card = card
        self.source = card.source
        self.gguf_sizes: Mapping[str, int] = card.sizes if card.is_gguf else {}

    def document(self, name: str) -> dict[str, Any] | None:
        """See `ModelFiles`."""
        return self._card.documents.get(name)

    def has(self, name: str) -> bool:
        """See `ModelFiles`."""
        return name in self._card.sizes

    def chat_template(self) -> str | None:
        """See `ModelFiles`."""
        return self._card.chat_template

    def weights(self) -> Weights | None:
        """See `ModelFiles`; the parameters are counted by the type that the config names.

        Of several quantizations none counts: which one is not said here.
        """
        if self._card.is_gguf:
            return None
        for pattern in _WEIGHT_FILES:
            names = [name for name in self._card.sizes if fnmatchcase(name, pattern)]
            if names:
                num_bytes = sum(self._card.sizes[name] for name in names)
                return _counted(num_bytes, self.document("config.json") or {})
        return None

    def __str__(self) -> str:
        return f"{self._card.source} on {self._card.source.hub}"


def _counted(num_bytes: int, config: dict[str, Any]) -> Weights:
    text = config.get("text_config")
    given = config.get("dtype") or config.get("torch_dtype")
    if given is None and isinstance(text, dict):
        given = text.get("dtype") or text.get("torch_dtype")
    size = _ITEM_BYTES.get(str(given))
    if size is None or "quantization_config" in config:
        return Weights(num_bytes=num_bytes)
    return Weights(num_bytes=num_bytes, num_parameters=num_bytes // size, dtype=str(given))


def json_file(path: Path) -> dict[str, Any] | None:
    """Return the object in a JSON file; None if it is not there, or no object."""
    try:
        given = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def shape_in(directory: Path) -> ModelShape | None:
    """Return the shape that the `config.json` of a directory says; None if it says none."""
    config = json_file(directory / "config.json")
    return None if config is None else shape_of(config)


def weights_in(directory: Path) -> Weights | None:
    """Return how large the weights are in a directory, or are as a file; None: there are none."""
    try:
        if directory.is_file():
            return Weights(num_bytes=directory.stat().st_size)
        for pattern in _WEIGHT_FILES:
            files = sorted(directory.glob(pattern))
            if files:
                return _weights(files)
    except OSError as error:
        logger.info("The files in %s cannot be looked at from here: %s", directory, error)
    return None


def _weights(files: list[Path]) -> Weights:
    num_bytes = sum(file.stat().st_size for file in files)
    counts: dict[str, int] = {}
    for file in files:
        found = _parameters(file) if file.suffix == ".safetensors" else None
        if found is None:
            return Weights(num_bytes=num_bytes)
        for dtype, count in found.items():
            counts[dtype] = counts.get(dtype, 0) + count
    if not counts or not set(counts) <= _DTYPES.keys():
        return Weights(num_bytes=num_bytes)
    most = max(counts, key=lambda dtype: counts[dtype])
    return Weights(num_bytes=num_bytes, num_parameters=sum(counts.values()), dtype=_DTYPES[most])


def _parameters(file: Path) -> dict[str, int] | None:
    """Return the parameters in a safetensors file by their dtype; None if it is broken."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        if length > MAX_HEAD_BYTES:
            return None
        try:
            head = json.loads(opened.read(length))
        except (ValueError, RecursionError):
            return None
    counts: dict[str, int] = {}
    for name, tensor in head.items() if isinstance(head, dict) else ():
        if name == "__metadata__":
            continue
        try:
            counts[tensor["dtype"]] = counts.get(tensor["dtype"], 0) + math.prod(tensor["shape"])
        except (KeyError, TypeError):
            return None
    return counts
