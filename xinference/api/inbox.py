# SPDX-License-Identifier: Apache-2.0
"""From a cluster's stream to batches of events, for as long as the client stays.

One producer feeds streamed and whole answers of every protocol: `answer_events` sends the
request to the cluster and yields what comes back, all that is ready at a time. It watches the
client's side of the connection from the first moment (waiting for ACCEPT, too), and when the
client leaves, the request is aborted at once.

It knows nothing of JSON, server-sent events, or OpenAI.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass

from starlette.types import Receive

from xinference.cluster.interface import Cluster
from xinference.errors import InternalError, RequestAborted, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
)

from .patience import Patience

logger = logging.getLogger(__name__)

FOR_EVER = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Some time has passed, and the request lives."""


AnswerEvent = Accepted | Delta | Tick | Finished | Failed
"""One Accepted, any number of deltas and ticks, one Finished or Failed; or one Failed alone."""

MAX_WAITING_EVENTS = 256
"""Events kept for a client that reads slowly; then its stream is not read until it catches up."""


class Inbox:
    """Events between the task that gets them and the task that writes them.

    Invariant: at most `MAX_WAITING_EVENTS` wait. `take` returns all of them, and an empty list
    once, when `close` was called and nothing is left.
    """

    def __init__(self) -> None:
        self._events: list[AnswerEvent] = []
        self._is_closed = False
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    async def put(self, event: AnswerEvent) -> None:
        """Add an event; waits only while the inbox is full."""
        while len(self._events) >= MAX_WAITING_EVENTS:
            self._emptied.clear()
            await self._emptied.wait()
        self._events.append(event)
        self._filled.set()

    async def tick(self, seconds: float) -> None:
        """Add a `Tick` now and then, unless there is something to take anyway."""
        while True:
            await asyncio.sleep(seconds)
            if not self._events and not self._is_closed:
                self._events.append(Tick())
                self._filled.set()

    def close(self) -> None:
        """Say that no more events come."""
        self._is_closed = True
        self._filled.set()

    async def take(self) -> list[AnswerEvent]:
        """Wait for events and return all that are there; empty at the end."""
        await self._filled.wait()
        taken, self._events = self._events, []
        if not self._is_closed:
            self._filled.clear()
        self._emptied.set()
        return taken


async def answer_events(
    cluster: Cluster,
    model: ModelUid,
    request: GenerationRequest,
    receive: Receive,
    *,
    tick_seconds: float | None = None,
    patience: Patience = FOR_EVER,
) -> AsyncGenerator[list[AnswerEvent], None]:
    """Yield what the cluster answers, in batches; end without an ending if the client leaves.

    Close the iterator (`aclosing`) when it is not read to its end; that aborts the request.

    Args:
        receive: the client's side of the connection, its body already read.
        tick_seconds: how often to yield a `Tick` after Accepted, while nothing comes. None: never.
        patience: how long the answer may take to come; the last event is Failed if it has not.
    """
    inbox = Inbox()
    feed = asyncio.create_task(_feed(inbox, cluster, model, request, tick_seconds, patience))
    watch = asyncio.create_task(_wait_disconnected(receive))
    watch.add_done_callback(lambda _: feed.cancel())
    try:
        while batch := await inbox.take():
            yield batch
    finally:
        watch.cancel()
        if not feed.done():
            feed.cancel()
            await asyncio.wait([feed])


async def _feed(
    inbox: Inbox,
    cluster: Cluster,
    model: ModelUid,
    request: GenerationRequest,
    tick_seconds: float | None,
    patience: Patience,
) -> None:
    """Put every event of one request into the inbox; cancelling it aborts the request."""
    ticking: asyncio.Task[None] | None = None
    try:
        async with patience.waiting(model) as wait:
            stream = await cluster.generate(model, request)
            try:
                await inbox.put(stream.accepted)
                if tick_seconds is not None:
                    ticking = asyncio.create_task(inbox.tick(tick_seconds))
                async for event in stream:
                    wait.began()
                    if isinstance(event, Finished) and event.reason is FinishReason.ABORT:
                        raise RequestAborted(request_id=request.request_id)
                    await inbox.put(event)
            finally:
                await stream.aclose()
    except XinferenceError as error:
        await inbox.put(Failed(error=error))
    except Exception:
        logger.exception("Request %s of model %s failed", request.request_id, model)
        problem = f"request {request.request_id} failed; the log says more"
        await inbox.put(Failed(error=InternalError(where="the gateway", problem=problem)))
    finally:
        if ticking is not None:
            ticking.cancel()
        inbox.close()


async def _wait_disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
