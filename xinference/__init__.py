# SPDX-License-Identifier: Apache-2.0
"""Serve open models behind one OpenAI-compatible endpoint.

Importing this costs nothing: the names below load on first use (PEP 562).
"""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {"AsyncClient": "xinference.client", "Client": "xinference.client"}

__all__ = ["AsyncClient", "Client", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
