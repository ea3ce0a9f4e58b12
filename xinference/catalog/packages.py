# SPDX-License-Identifier: Apache-2.0
"""Models whose files come inside a Python package.

`package:<folder>` is a folder of this catalogue, `package:<module>/<folder>` one of another
installed distribution, which is found without being imported.
"""

from importlib.util import find_spec
from pathlib import Path

PREFIX = "package:"


def packaged_directory(uri: str) -> Path | None:
    """Return the directory that a URI names; None: no such package is installed here.

    A folder of this catalogue may not exist.
    """
    module, slash, folder = uri.removeprefix(PREFIX).partition("/")
    if not slash:
        return Path(__file__).with_name(module)
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        return None
    return Path(spec.origin).parent / folder


def distribution_of(uri: str) -> str:
    """Return what to install for a URI of the second form."""
    return uri.removeprefix(PREFIX).partition("/")[0].replace("_", "-")
