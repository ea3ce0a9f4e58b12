# SPDX-License-Identifier: Apache-2.0
"""Whether a client is still there while its answer is being made."""

import asyncio
from collections.abc import Callable
from types import TracebackType
from typing import Self

from starlette.types import Receive, Scope

DEPARTURE = "xinference.departure"
"""In an ASGI scope: the `Departure` of its client, where the server tells of that by a call."""


class Departure:
    """When a client leaves: when somebody says that it `happen`s. At most one watches it."""

    def __init__(self) -> None:
        self._has_happened = False
        self._then: Callable[[], None] | None = None

    def happen(self) -> None:
        """Say that the client has left; may be called again."""
        if not self._has_happened:
            self._has_happened = True
            if self._then is not None:
                self._then()

    def watch(self, then: Callable[[], None]) -> None:
        """Have `then` called once when it happens; soon, if it has."""
        self._then = then
        if self._has_happened:
            asyncio.get_running_loop().call_soon(then)

    def unwatch(self) -> None:
        """Have nobody called any more."""
        self._then = None


class _ReceivedDeparture(Departure):
    """One that the client's side of the connection tells of, to whoever waits for it.

    Its body must have been read. It takes a task.
    """

    def __init__(self, receive: Receive) -> None:
        super().__init__()
        self._receive = receive
        self._waiting: asyncio.Task[None] | None = None

    def watch(self, then: Callable[[], None]) -> None:
        super().watch(then)
        self._waiting = asyncio.create_task(wait_disconnected(self._receive))
        self._waiting.add_done_callback(self._end)

    def unwatch(self) -> None:
        super().unwatch()
        if self._waiting is not None:
            self._waiting.cancel()

    def _end(self, waiting: "asyncio.Task[None]") -> None:
        if not waiting.cancelled():
            self.happen()


def departure_of(scope: Scope, receive: Receive) -> Departure:
    """Return when the client of a request leaves whose body was read."""
    told: Departure | None = scope.get(DEPARTURE)
    return _ReceivedDeparture(receive) if told is None else told


class WhileConnected:
    """A block that is cancelled when the client leaves, and that ends quietly then.

    with WhileConnected(departure_of(scope, receive)) as client:
        answer = await work()
    if client.has_left:
        return
    """

    def __init__(self, departure: Departure) -> None:
        self.has_left = False
        self._departure = departure

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a block of a task"
        self._task = task
        self._num_cancelled = task.cancelling()
        self._is_inside = True
        self._departure.watch(self._leave)
        return self

    def _leave(self) -> None:
        if self._is_inside and not self.has_left:
            self.has_left = True
            self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._is_inside = False
        self._departure.unwatch()
        if not self.has_left:
            return False
        # Somebody else may have cancelled the task as well.
        is_ours = self._task.uncancel() <= self._num_cancelled
        return is_ours and kind is asyncio.CancelledError


async def wait_disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
