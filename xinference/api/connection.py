# SPDX-License-Identifier: Apache-2.0
"""Whether a client is still there while its answer is being made."""

import asyncio
from types import TracebackType
from typing import Self

from starlette.types import Receive


class WhileConnected:
    """A block that is cancelled when the client leaves, and that ends quietly then.

        with WhileConnected(receive) as client:
            answer = await work()
        if client.has_left:
            return

    Args:
        receive: the client's side of the connection, its body already read.
    """

    def __init__(self, receive: Receive) -> None:
        self.has_left = False
        self._receive = receive

    def __enter__(self) -> Self:
        task = asyncio.current_task()
        assert task is not None, "a block of a task"
        self._task = task
        self._num_cancelled = task.cancelling()
        self._is_inside = True
        self._watch = asyncio.create_task(wait_disconnected(self._receive))
        self._watch.add_done_callback(self._leave)
        return self

    def _leave(self, watch: "asyncio.Task[None]") -> None:
        if self._is_inside and not watch.cancelled():
            self.has_left = True
            self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        self._is_inside = False
        self._watch.cancel()
        if not self.has_left:
            return False
        # Somebody else may have cancelled the task as well.
        is_ours = self._task.uncancel() <= self._num_cancelled
        return is_ours and kind is asyncio.CancelledError


async def wait_disconnected(receive: Receive) -> None:
    """Return when the client has left."""
    while (await receive())["type"] != "http.disconnect":
        pass
