# SPDX-License-Identifier: Apache-2.0
"""Stamps that make a call count once. Pure: stamps in, verdicts out.

A frame of the control plane proves that its sender knows the cluster key, not that it is new: who
has recorded one may send it again. So each call carries a stamp: which life of the receiver it is
meant for, who sends it, and its number among the sender's. A receiver takes each stamp once.
"""

import itertools
import secrets
from dataclasses import dataclass

WINDOW = 4096
"""So far calls of one sender may overtake each other; many more than it may have under way."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Of one call."""

    receiver: str
    """A life of the receiving process, as it names itself."""
    sender: str
    """A life of the sending one."""
    number: int


class Stamper:
    """Makes the stamps of one process."""

    def __init__(self) -> None:
        self._sender = secrets.token_hex(16)
        self._numbers = itertools.count(1)

    def stamp(self, receiver: str) -> Stamp:
        """Return a stamp that was never used."""
        return Stamp(receiver, self._sender, next(self._numbers))


@dataclass(slots=True)
class _Sender:
    highest: int = 0
    seen: int = 0
    """A bit for each of the last numbers: the lowest bit for `highest`."""


class StampCheck:
    """What one process knows of the stamps it has taken.

    It remembers each sender for as long as it lives, some 200 bytes: forgetting one would let its
    calls in again.
    """

    def __init__(self) -> None:
        self.receiver = secrets.token_hex(16)
        self._senders: dict[str, _Sender] = {}

    def take(self, stamp: Stamp) -> bool:
        """Return whether a stamp is meant for this process and new; it is not new any more."""
        if stamp.receiver != self.receiver:
            return False
        sender = self._senders.setdefault(stamp.sender, _Sender())
        ahead = stamp.number - sender.highest
        if ahead > 0:
            kept = sender.seen << ahead if ahead < WINDOW else 0
            sender.seen = (kept | 1) & ((1 << WINDOW) - 1)
            sender.highest = stamp.number
            return True
        bit = 1 << -ahead
        if -ahead >= WINDOW or sender.seen & bit:
            return False
        sender.seen |= bit
        return True
