# SPDX-License-Identifier: Apache-2.0
"""Where the files of a model are on this node."""

from pathlib import Path

from xinference.catalog.packages import PREFIX, distribution_of, packaged_directory
from xinference.errors import LoadFailed


def model_directory(path: str, *, model_name: str) -> Path:
    """Return the directory that a source names; "package:…" is one inside a Python package.

    Raises:
        LoadFailed: it is not there.
    """
    directory: Path | None
    if path.startswith(PREFIX):
        directory = packaged_directory(path)
        if directory is None:
            problem = f"its files are in a package; run pip install {distribution_of(path)}"
            raise LoadFailed(model=model_name, problem=problem)
    else:
        directory = Path(path).expanduser()
    if not directory.is_dir():
        raise LoadFailed(model=model_name, problem=f"{directory} is not a directory on this node")
    return directory
