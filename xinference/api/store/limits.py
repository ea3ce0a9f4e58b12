# SPDX-License-Identifier: Apache-2.0
"""How much is kept, and how long."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StoreLimits:
    """The bounds of one store."""

    answer_days: float = 30
    """A stored answer goes so long after its last use."""
    max_answer_bytes: int = 2 * 2**30
    """Of all stored answers; beyond it those go that were used longest ago."""
    max_file_bytes: int = 200 * 2**20
    """Of one file."""
    max_files_bytes: int = 8 * 2**30
    """Of all files; beyond it uploads are refused."""
    batch_days: float = 30
    """A batch goes so long after it was made, if it has ended."""
