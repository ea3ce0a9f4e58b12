# SPDX-License-Identifier: Apache-2.0
"""From a cluster's stream to events that are written, for as long as the client stays.

One producer feeds streamed and whole answers of every protocol: `deliver` sends the request to the
cluster and puts what comes back where it is told to. It watches the client's side of the
connection from the first moment (waiting for ACCEPT, too), and when the client leaves, the request
is aborted at once. `answer_events` has an inbox between, and yields all that is ready at a time.

It knows nothing of JSON, server-sent events, or OpenAI.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import Protocol

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

from .connection import Departure, WhileConnected
from .patience import Patience

logger = logging.getLogger(__name__)

FOR_EVER = Patience()


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Some time has passed, and the request lives."""


AnswerEvent = Accepted | Delta | Tick | Finished | Failed
"""One Accepted, any number of deltas and ticks, one Finished or Failed; or one Failed alone."""


class Sink(Protocol):
    """Where the events of an answer go."""

    async def put(self, event: AnswerEvent) -> None:
        """Take the next event."""


async def deliver(
    sink: Sink,
    cluster: Cluster,
    model: ModelUid,
    request: GenerationRequest,
    departure: Departure,
    *,
    patience: Patience = FOR_EVER,
) -> bool:
    """Put every event of one request into `sink`; return whether the client stayed for the last.

    Cancelling this aborts the request.

    Args:
        departure: when the client leaves.
        patience: how long the answer may take to come; the last event is Failed if it has not.
    """
    with WhileConnected(departure) as client:
        try:
            async with patience.waiting(model) as wait:
                stream = await cluster.generate(model, request)
                try:
                    await sink.put(stream.accepted)
                    async for event in stream:
                        wait.began()
                        if not isinstance(event, Finished):
                            await sink.put(event)
                            continue
                        if event.reason is FinishReason.ABORT:
                            raise RequestAborted(request_id=request.request_id)
                        await sink.put(event)
                        # Why not until the iterator ends: that costs every request once more.
                        break
                finally:
                    await stream.aclose()
        except XinferenceError as error:
            await sink.put(Failed(error=error))
        except Exception:
            logger.exception("Request %s of model %s failed", request.request_id, model)
            problem = f"request {request.request_id} failed; the log says more"
            await sink.put(Failed(error=InternalError(where="the gateway", problem=problem)))
    return not client.has_left


MAX_WAITING_EVENTS = 256
"""Events kept for a client that reads slowly; then its stream is not read until it catches up."""


class Inbox:
    """Events between the task that gets them and the task that writes them.

    Invariant: at most `MAX_WAITING_EVENTS` wait. `take` returns all of them, and an empty list
    once, when `close` was called and nothing is left.
    """

    def __init__(self) -> None:
        self._events: list[AnswerEvent] = []
        self._has_begun = False
        self._is_closed = False
        self._filled = asyncio.Event()
        self._emptied = asyncio.Event()

    async def put(self, event: AnswerEvent) -> None:
        """Add an event; waits only while the inbox is full."""
        while len(self._events) >= MAX_WAITING_EVENTS:
            self._emptied.clear()
            await self._emptied.wait()
        self._has_begun = True
        self._events.append(event)
        self._filled.set()

    async def tick(self, seconds: float) -> None:
        """Add a `Tick` now and then behind the first event, unless there is something to take."""
        while True:
            await asyncio.sleep(seconds)
            if self._has_begun and not self._events and not self._is_closed:
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
    departure: Departure,
    *,
    tick_seconds: float,
    patience: Patience = FOR_EVER,
) -> AsyncGenerator[list[AnswerEvent], None]:
    """Yield what the cluster answers, in batches; end without an ending if the client leaves.

    Close the iterator (`aclosing`) when it is not read to its end; that aborts the request.

    Args:
        departure: when the client leaves.
        tick_seconds: how often to yield a `Tick` after Accepted, while nothing comes.
        patience: how long the answer may take to come; the last event is Failed if it has not.
    """
    inbox = Inbox()
    feed = asyncio.create_task(
        deliver(inbox, cluster, model, request, departure, patience=patience)
    )
    feed.add_done_callback(lambda _: inbox.close())
    ticking = asyncio.create_task(inbox.tick(tick_seconds))
    try:
        while batch := await inbox.take():
            yield batch
    finally:
        ticking.cancel()
        if not feed.done():
            feed.cancel()
            await asyncio.wait([feed])
