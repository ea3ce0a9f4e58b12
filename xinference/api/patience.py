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
    """One caller's. An asynchronous context manager; used once.

    Why not `asyncio.timeout`: every request waits, and that costs three times as much.
    """

    def __init__(self, patience: Patience, model: ModelUid) -> None:
        self._patience = patience
        self._model = model
        self._timer: asyncio.TimerHandle | None = None
        self._is_late = False
        self._has_begun = False

    async def __aenter__(self) -> Self:
        self._loop = asyncio.get_running_loop()
        task = asyncio.current_task()
        assert task is not None, "a block of a task"
        self._task = task
        self._num_cancelled = task.cancelling()
        self._started = self._loop.time()
        begin, whole = self._patience.begin_seconds, self._patience.whole_seconds
        self._set(whole if begin is None else begin if whole is None else min(begin, whole))
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Raises DeadlinePassed if the block was cancelled because its time was over."""
        self._set(None)
        if not self._is_late:
            return
        # Somebody else may have cancelled the task as well.
        is_ours = self._task.uncancel() <= self._num_cancelled
        if is_ours and kind is asyncio.CancelledError:
            seconds = self._loop.time() - self._started
            raise DeadlinePassed(model=self._model, seconds=round(seconds, 3)) from None

    def began(self) -> None:
        """Note that a piece of the answer is there; may be called again."""
        if not self._has_begun:
            self._has_begun = True
            self._set(self._patience.whole_seconds)

    def _set(self, seconds: float | None) -> None:
        """End the wait so long after its start, and no longer when it was to end before."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if seconds is not None:
            self._timer = self._loop.call_at(self._started + seconds, self._end)

    def _end(self) -> None:
        self._is_late = True
        self._task.cancel()


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
