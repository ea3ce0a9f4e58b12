# SPDX-License-Identifier: Apache-2.0
"""Limits per minute as token buckets. Pure.

A bucket holds one minute's allowance and fills evenly. Requests are taken before they start.
Tokens are known only when an answer has ended: a request may start while anything is left, what it
used is taken afterwards, and the next ones wait until that is made up for.
"""

import math
from dataclasses import dataclass

SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Bucket:
    """What is left of a limit; below 0, more was used than there was."""

    level: float
    at: float
    """Unix seconds of `level`."""

    @classmethod
    def full(cls, limit: int, *, now: float) -> "Bucket":
        """Return a bucket that nothing was taken from."""
        return cls(float(limit), now)

    def filled(self, limit: int, *, now: float) -> "Bucket":
        """Return it as it is now.

        Why max: a clock that was set back must not empty it.
        """
        gained = max(0.0, now - self.at) * limit / SECONDS
        return Bucket(min(float(limit), self.level + gained), now)

    def without(self, amount: float) -> "Bucket":
        """Return it after this was taken."""
        return Bucket(self.level - amount, self.at)

    def seconds_until(self, amount: float, limit: int) -> int:
        """Return after how many whole seconds it holds so much; 0: it does."""
        missing = amount - self.level
        return 0 if missing <= 0 else math.ceil(missing * SECONDS / limit)
