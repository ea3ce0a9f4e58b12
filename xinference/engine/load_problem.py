# SPDX-License-Identifier: Apache-2.0
"""What is wrong with a directory that did not load, beyond what the libraries say of it.

In: the directory, and the error that something raised. Out: words for the person who launched it.
"""

from pathlib import Path

from safetensors import SafetensorError, safe_open

_TOKENIZER_FILES = ("*token*", "vocab*", "*.model", "merges*")


def load_problem(path: Path, error: Exception) -> str:
    """Return why a directory did not load, with the files that are to blame where that is known."""
    told = f"{type(error).__name__}: {error}"
    if not any(any(path.glob(pattern)) for pattern in _TOKENIZER_FILES):
        return f"there are no files of a tokenizer in {path}; {told}"
    if isinstance(error, SafetensorError):
        broken = [file.name for file in sorted(path.glob("*.safetensors")) if not _opens(file)]
        if broken:
            return f"{', '.join(broken)} in {path}: not whole, copy or download it again; {told}"
    return told


def _opens(file: Path) -> bool:
    """Return whether the head of a safetensors file fits the file. Reads no weights."""
    try:
        with safe_open(file, framework="pt"):
            return True
    except (SafetensorError, OSError):
        return False
