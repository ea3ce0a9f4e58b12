# SPDX-License-Identifier: Apache-2.0
"""What a GGUF file says of its model before its weights, in the words of a `config.json`.

Read from the front, so a connection to a hub does as well as a file. Of lists, such as the
vocabulary, the length alone is kept.
"""

import re
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

MAX_HEAD_BYTES = 128 * 2**20
"""The longest vocabularies take a tenth of that."""
_MAGIC = b"GGUF"
_MAX_TEXT_BYTES = 2**20
_MAX_ITEMS = 10**7
_STRING, _ARRAY = 8, 9
_NUMBERS = {
    0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q",
    12: "<d",
}  # fmt: skip
"""By the number of their type: how values of a fixed length are packed."""

_CONFIG_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.kv_lora_rank": "kv_lora_rank",
    "vocab_size": "vocab_size",
}
"""By the key after the architecture's name: how a `config.json` calls it."""

_QUANTIZATION = re.compile(
    r"(?:^|[-_.])((?:UD-)?(?:I?Q\d\w*|TQ\d\w*|MXFP4\w*|BF16|F16|FP16|F32))$", re.IGNORECASE
)
_PART = re.compile(r"-(\d{5})-of-(\d{5})$")

Read = Callable[[int], bytes]
"""Returns so many bytes more, or fewer at the end."""


class NotGguf(ValueError):
    """The bytes are not those of a GGUF file, or of none that can be read. Never leaves the
    catalogue."""


def documents_of(read: Read) -> dict[str, dict[str, Any]]:
    """Return what the head of a file says, as `config.json` and `tokenizer_config.json`.

    Raises:
        NotGguf
    """
    head = _Head(read)
    said = head.values()
    architecture = said.get("general.architecture")
    config: dict[str, Any] = {"model_type": architecture}
    for key, name in _CONFIG_KEYS.items():
        value = said.get(f"{architecture}.{key}")
        if isinstance(value, int):
            config[name] = value
    config.setdefault("vocab_size", head.lengths.get("tokenizer.ggml.tokens", 0))
    if f"{architecture}.pooling_type" in said:
        config["pooling_type"] = said[f"{architecture}.pooling_type"]
    template = said.get("tokenizer.chat_template")
    tokenizer = {"chat_template": template} if isinstance(template, str) else {}
    return {"config.json": config, "tokenizer_config.json": tokenizer}


def quantizations_of(sizes: Mapping[str, int]) -> dict[str, list[str]]:
    """Return the files of each quantization, in their order, by what their names say.

    Projectors of pictures are no models; a file whose name says nothing is "none". Where a second
    model has a quantization that is there already, it is called by its whole name.
    """
    models: dict[str, list[str]] = {}
    for name in sorted(sizes):
        if name.endswith(".gguf") and "mmproj" not in name:
            models.setdefault(_PART.sub("", name.removesuffix(".gguf")), []).append(name)
    found: dict[str, list[str]] = {}
    for model, names in models.items():
        named = _QUANTIZATION.search(model)
        quantization = named[1] if named else "none"
        found[model.rsplit("/", 1)[-1] if quantization in found else quantization] = names
    return found


def gguf_file(path: Path) -> Path:
    """Return the file to load: the path itself, or the only model in a directory.

    Of a model in several files it is the first; projectors of images (mmproj) are no models.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there is more than one.
    """
    if not path.is_dir():
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file on this node")
        return path
    found = sorted(one for one in path.rglob("*.gguf") if is_model(one.name))
    if not found:
        raise FileNotFoundError(f"{path} has no GGUF file")
    if len(found) > 1:
        names = ", ".join(one.name for one in found[:8])
        raise ValueError(f"{path} has several models ({names}); give one of the files")
    return found[0]


def is_model(name: str) -> bool:
    """Return whether a model is loaded from a file of this name."""
    is_first = "-of-" not in name or "-00001-of-" in name
    return name.endswith(".gguf") and "mmproj" not in name and is_first


class _Head:
    """The keys and values at the front of a file."""

    def __init__(self, read: Read) -> None:
        self.lengths: dict[str, int] = {}
        """Of the lists, once `values` was called."""
        self._source = read
        self._left = MAX_HEAD_BYTES

    def values(self) -> dict[str, Any]:
        """Return the numbers and texts, by their keys."""
        if self._read(4) != _MAGIC:
            raise NotGguf("it does not begin as a GGUF file does")
        version = self._number("<I")
        if version not in (2, 3):
            raise NotGguf(f"its version is {version}; 2 and 3 are read")
        self._number("<Q")  # of tensors
        values: dict[str, Any] = {}
        for _ in range(self._count()):
            name, kind = self._text(), self._number("<I")
            if kind == _ARRAY:
                self.lengths[name] = self._skip_list()
            else:
                values[name] = self._value(kind)
        return values

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._text()
        if kind not in _NUMBERS:
            raise NotGguf(f"it has a value of the unknown type {kind}")
        return self._number(_NUMBERS[kind])

    def _skip_list(self) -> int:
        kind, length = self._number("<I"), self._count()
        if kind in _NUMBERS:
            self._read(length * struct.calcsize(_NUMBERS[kind]))
        elif kind == _STRING:
            for _ in range(length):
                self._read(self._count())
        else:
            raise NotGguf("it has a list of lists")
        return length

    def _text(self) -> str:
        length = self._count()
        if length > _MAX_TEXT_BYTES:
            raise NotGguf(f"it has a text of {length:,} bytes")
        return self._read(length).decode("utf-8", errors="replace")

    def _count(self) -> int:
        count = self._number("<Q")
        if count > _MAX_ITEMS:
            raise NotGguf(f"it has {count:,} of something")
        return int(count)

    def _number(self, form: str) -> Any:
        (number,) = struct.unpack(form, self._read(struct.calcsize(form)))
        return number

    def _read(self, num_bytes: int) -> bytes:
        self._left -= num_bytes
        if self._left < 0:
            raise NotGguf(f"its head is longer than {MAX_HEAD_BYTES:,} bytes")
        data = self._source(num_bytes)
        if len(data) < num_bytes:
            raise NotGguf("it ends before its head does")
        return data
