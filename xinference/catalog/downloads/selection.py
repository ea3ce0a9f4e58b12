# SPDX-License-Identifier: Apache-2.0
"""Which files of a repository a model needs. Pure: names in, names out.

Where a request has no patterns, the files are those that `transformers` and
`sentence-transformers` read: configuration, tokenizer, code, and the weights in one format.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from xinference.errors import DownloadFailed


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file of a repository, as its hub lists it."""

    path: str
    size_bytes: int
    checksum: str | None = None
    """"sha256:<hex>" of the content, or "git:<hex>", git's name of it. None: the hub has none."""


TEXTS = frozenset({".json", ".txt", ".model", ".jinja", ".tiktoken", ".py", ".vocab", ".bpe"})
"""Suffixes of configuration, tokenizers and code."""
HEADS = frozenset({"sparse_linear.pt", "colbert_linear.pt"})
"""Small layers of embedding models that come beside their weights."""
OTHER_RUNTIMES = frozenset(
    {"onnx", "openvino", "coreml", "original", "metal", "runs", "flax", "gguf", "assets"}
)
"""Folders whose files another runtime reads."""

_TWICE = re.compile(r"consolidated.*|.*\.fp(16|32)\..*|training_args\.bin|optimizer.*")
"""Weights that are there a second time, or are none."""


def needed_files(
    listed: Iterable[RemoteFile], patterns: Sequence[str], *, model: str
) -> tuple[RemoteFile, ...]:
    """Return what has to be downloaded, in the order of the list.

    Raises:
        DownloadFailed: a pattern matches nothing, nothing is left, or a name leads out of the
            directory.
    """
    files = tuple(listed)
    for file in files:
        _check_name(file.path, model)
    if patterns:
        for pattern in patterns:
            if not any(fnmatchcase(file.path, pattern) for file in files):
                raise DownloadFailed(
                    model=model, problem=f"the repository has no file that matches {pattern}"
                )
        chosen = [file for file in files if any(fnmatchcase(file.path, one) for one in patterns)]
    else:
        chosen = [file for file in files if _is_read(file.path)]
        chosen = _weights_once(chosen)
    if not chosen:
        raise DownloadFailed(model=model, problem="the repository has no file that is needed")
    return tuple(chosen)


def main_file_of(names: Iterable[str], pattern: str) -> str | None:
    """Return the file that a model is loaded from: the first, by name, that matches."""
    return min((name for name in names if fnmatchcase(name, pattern)), default=None)


def _check_name(name: str, model: str) -> None:
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or not path.parts:
        raise DownloadFailed(model=model, problem=f"the repository lists a file named {name!r}")


def _is_read(name: str) -> bool:
    path = PurePosixPath(name)
    if any(part.startswith(".") or part in OTHER_RUNTIMES for part in path.parts):
        return False
    if path.suffix in {".safetensors", ".bin"}:
        return not _TWICE.fullmatch(path.name)
    return path.suffix in TEXTS or path.name in HEADS


def _weights_once(files: list[RemoteFile]) -> list[RemoteFile]:
    """Drop the weights of a folder in the older format where the newer one is there."""
    folders = {
        PurePosixPath(file.path).parent
        for file in files
        if PurePosixPath(file.path).suffix == ".safetensors"
    }

    def is_superseded(file: RemoteFile) -> bool:
        path = PurePosixPath(file.path)
        is_older = path.suffix == ".bin" or path.name.endswith(".bin.index.json")
        return is_older and path.parent in folders

    return [file for file in files if not is_superseded(file)]
