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
