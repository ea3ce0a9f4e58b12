# SPDX-License-Identifier: Apache-2.0
"""Which models exist, and where their files are."""

from .registry import Catalog, Resolved, directory_of

__all__ = ["Catalog", "Resolved", "directory_of"]
