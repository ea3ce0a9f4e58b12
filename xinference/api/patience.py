# SPDX-License-Identifier: Apache-2.0
"""How long a caller waits for an answer: as its header says, or as this gateway is configured.

    X-Request-Timeout: 30        seconds

What is not there by then is not worth its computing: the request is aborted, in the queue or in the
middle of its prompt, and the caller told so.
"""

import asyncio
import math
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

from starlette.types import Scope

from xinference.errors import DeadlinePassed, InvalidRequest
from xinference.identifiers import ModelUid

HEADER = b"x-request-timeout"
MAX_SECONDS = 86400.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Patience:
    """Of one caller. None: for ever."""

    begin_seconds: float | None = None
    """For the first piece of the answer."""
    whole_seconds: float | None = None
    """For the last."""

    @asynccontextmanager
    async def waiting(self, model: ModelUid) -> AsyncIterator["Wait"]:
        """Wait no longer than this inside the block.

        Raises:
            DeadlinePassed: the block was cancelled, because its time was over.
        """
        now = asyncio.get_running_loop().time()
        given = [one for one in (self.begin_seconds, self.whole_seconds) if one is not None]
        try:
            async with asyncio.timeout(min(given, default=None)) as limit:
                whole = None if self.whole_seconds is None else now + self.whole_seconds
                yield Wait(limit, whole)
        except TimeoutError:
            if not limit.expired():
                raise
            seconds = asyncio.get_running_loop().time() - now
            raise DeadlinePassed(model=model, seconds=round(seconds, 3)) from None


class Wait:
    """One caller's, while it lasts."""

    def __init__(self, limit: asyncio.Timeout, whole_at: float | None) -> None:
        self._limit = limit
        self._whole_at = whole_at
        self._has_begun = False

    def began(self) -> None:
        """Note that a piece of the answer is there; may be called again."""
        if not self._has_begun:
            self._has_begun = True
            self._limit.reschedule(self._whole_at)


def patience_of(scope: Scope, *, stream: bool, default_seconds: float | None) -> Patience:
    """Return what a caller says, of the beginning of a stream or of all of a whole answer.

    Args:
        default_seconds: for the beginning of an answer, where the caller says nothing.

    Raises:
        InvalidRequest: it says something else than seconds.
    """
    said = next((value for name, value in scope["headers"] if name == HEADER), None)
    if said is None:
        return Patience(begin_seconds=default_seconds)
    try:
        seconds = float(said)
    except ValueError:
        seconds = math.nan
    if not 0.0 < seconds <= MAX_SECONDS:
        raise InvalidRequest(
            field="X-Request-Timeout", problem=f"must be seconds, above 0, at most {MAX_SECONDS:g}"
        )
    return Patience(begin_seconds=seconds) if stream else Patience(whole_seconds=seconds)
