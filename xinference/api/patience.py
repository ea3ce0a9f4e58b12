# SPDX-License-Identifier: Apache-2.0
"""How long a caller waits for an answer: as its header says, or as this gateway is configured.

    X-Request-Timeout: 30        seconds

What is not there by then is not worth its computing: the request is aborted, in the queue or in the
middle of its prompt, and the caller told so.
"""

import asyncio
import math
from dataclasses import dataclass
from types import TracebackType
from typing import Self

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

    def waiting(self, model: ModelUid) -> "Wait":
        """Return a block inside which a caller waits no longer than this."""
        return Wait(self, model)


class Wait:
    """One caller's. An asynchronous context manager; used once."""

    def __init__(self, patience: Patience, model: ModelUid) -> None:
        self._patience = patience
        self._model = model
        self._limit: asyncio.Timeout | None = None
        """None where no time is set, as for most: a timeout costs as much as a request's JSON."""
        self._started = 0.0
        self._has_begun = False

    async def __aenter__(self) -> Self:
        patience = self._patience
        given = [one for one in (patience.begin_seconds, patience.whole_seconds) if one is not None]
        if given:
            self._started = asyncio.get_running_loop().time()
            self._limit = await asyncio.timeout(min(given)).__aenter__()
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises DeadlinePassed if the block was cancelled because its time was over."""
        if self._limit is None:
            return
        try:
            await self._limit.__aexit__(kind, error, trace)
        except TimeoutError:
            seconds = asyncio.get_running_loop().time() - self._started
            raise DeadlinePassed(model=self._model, seconds=round(seconds, 3)) from None

    def began(self) -> None:
        """Note that a piece of the answer is there; may be called again."""
        if self._has_begun:
            return
        self._has_begun = True
        if self._limit is not None:
            whole = self._patience.whole_seconds
            self._limit.reschedule(None if whole is None else self._started + whole)


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
