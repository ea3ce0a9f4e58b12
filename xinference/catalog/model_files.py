# SPDX-License-Identifier: Apache-2.0
"""What a model's files say of it: its config, and how large its weights are.

Reads the small JSON files of a directory and the heads of its safetensors files, never the
weights. Files that are not there, or not readable, say nothing; nothing here raises.
"""

import json
import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .memory import ModelShape, shape_of

logger = logging.getLogger(__name__)

MAX_HEAD_BYTES = 100 * 2**20
"""Of a safetensors file, as its format has it."""

_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
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
