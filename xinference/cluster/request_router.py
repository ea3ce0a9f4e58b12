# SPDX-License-Identifier: Apache-2.0
"""`RequestRouter`: sends a gateway's requests to replicas, and elsewhere when one fails them.

In: requests, the routing table, connections. Out: streams that outlive a replica. What has
delivered nothing is sent again; a stream of text that has goes on at another replica from the
tokens that were delivered, with the same seed. Vectors and scores are delivered when all of them
are there, so they can be computed anew. All of it is bounded: by the request's deadline, by a
budget over all requests, and by the request itself, which is refused once it has been there at two
crashes.

Which replica it is, is decided in `routing.py`; how a request travels, in `dataplane/`.
"""

import asyncio
import contextlib
import logging
import time
from collections import deque
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

from xinference.errors import (
    DuplicateRequest,
    InternalError,
    ModelNotFound,
    ModelNotReady,
    ModelOverloaded,
    ReplicaLost,
    RequestCrashesModel,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, RequestId
from xinference.protocol.deployment import ModelState
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Finished,
    GenerationRequest,
    ReasoningDelta,
    TextDelta,
    new_seed,
)
from xinference.protocol.vectors import ModelRequest, VectorPiece, VectorRequest
from xinference.tracing import current_span

from .dataplane.client import ReplicaConnection, ReplicaStream
from .messages import Route, RoutingTable
from .routing import Balancer, Lease, RequestCost, RetryBudget, cost_of, ready_routes

logger = logging.getLogger(__name__)

ACCEPT_TIMEOUT_SECONDS = 120.0
"""For a request to be accepted, at the first replica or at another."""
PARK_SECONDS = 10.0
"""A request whose replica was lost waits so long for another."""
PARK_LOOK_SECONDS = 0.5
PING_TIMEOUT_SECONDS = 3.0
MAX_CRASHES = 2
MAX_WAKING = 1024
"""Requests of a gateway that wait for models to wake."""

Connect = Callable[[Route], Awaitable[ReplicaConnection]]


@dataclass(slots=True, eq=False, kw_only=True)
class _Flight:
    """A request from its arrival to its end, over all replicas that it meets."""

    model: ModelUid
    request: ModelRequest
    cost: RequestCost
    deadline: float
    park_until: float = 0.0
    """Set when it first finds no replica."""
    tried: set[InstanceId] = field(default_factory=set)
    problem: XinferenceError | None = None
    """Why it is not where it was sent last."""
    route: Route | None = None
    connection: ReplicaConnection | None = None
    stream: ReplicaStream[Any] | None = None
    lease: Lease | None = None
    num_crashes: int = 0
    is_suspect: bool = False
    """Its last replica crashed before it gave anything: this request may be why."""
    trial: InstanceId | None = None
    """Where it is tried alone of all suspects."""
    token_ids: list[int] = field(default_factory=list)
    """All that its consumer was given."""
    has_delivered: bool = False
    is_answering: bool = False
    """Whether the replica that it is on now has given something."""

    def to_send(self) -> ModelRequest:
        """Return the request as the next replica is to have it."""
        if not isinstance(self.request, GenerationRequest) or not self.token_ids:
            return self.request
        return replace(self.request, resume_token_ids=tuple(self.token_ids))


class _RoutedStream:
    """An accepted request that may change replicas unnoticed."""

    def __init__(self, router: "RequestRouter", flight: _Flight) -> None:
        self._router = router
        self._flight = flight
        assert flight.stream is not None, "it was placed"
        self._stream = flight.stream
        self._accepted = flight.stream.accepted

    @property
    def accepted(self) -> Accepted:
        """What the first replica said when it took the request."""
        return self._accepted

    def __aiter__(self) -> Self:
        """Iterate once."""
        return self

    async def _next(self) -> Any:
        """Return the next event of the replica it is on; None: it is on another one now.

        Raises:
            ReplicaLost: the replica is gone, and no other could go on with the answer.
            RequestCrashesModel: it was there when two replicas crashed.
            XinferenceError: the engine failed this request.
        """
        try:
            event = await self._stream.__anext__()
        except ReplicaLost as lost:
            await self._move(lost)
            return None
        except StopAsyncIteration:
            self._router.end(self._flight)
            raise
        except InternalError:
            self._router.fail(self._flight)
            raise
        except XinferenceError:
            self._router.end(self._flight)
            raise
        if isinstance(event, Finished):
            self._router.end(self._flight, is_good=True)
        return event

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Returns at once; may be called again."""
        await self._stream.aclose()
        self._router.end(self._flight)

    async def _move(self, lost: ReplicaLost) -> None:
        await self._router.move(self._flight, lost)
        assert self._flight.stream is not None, "it was placed"
        self._stream = self._flight.stream


class RoutedStream(_RoutedStream):
    """An accepted request for text; see `interface.GenerationStream`."""

    async def __anext__(self) -> Delta | Finished:
        """Return the next event.

        Raises:
            ReplicaLost: the replica is gone, and no other could go on with the answer.
            RequestCrashesModel: it was there when two replicas crashed.
            XinferenceError: the engine failed this request.
        """
        event: Delta | Finished | None = None
        while event is None:
            event = await self._next()
        if not isinstance(event, Finished):
            self._router.note(self._flight, event)
        return event


class RoutedVectors(_RoutedStream):
    """An accepted request for vectors or scores; see `interface.VectorStream`.

    Pieces are given when all of them are there: whoever waits for them needs them all, and another
    replica can compute them anew if this one is lost.
    """

    def __init__(self, router: "RequestRouter", flight: _Flight) -> None:
        super().__init__(router, flight)
        self._pieces: deque[VectorPiece] = deque()
        self._end: Finished | None = None

    async def __anext__(self) -> VectorPiece | Finished:
        """Return the next piece.

        Raises:
            ReplicaLost: the replica is gone, and there is no other.
            RequestCrashesModel: it was there when two replicas crashed.
            XinferenceError: the model failed this request.
        """
        while self._end is None:
            event = await self._next()
            if event is None:
                self._pieces.clear()
            elif isinstance(event, Finished):
                self._end = event
            else:
                self._router.note_answering(self._flight)
                self._pieces.append(event)
        return self._pieces.popleft() if self._pieces else self._take_end()

    def _take_end(self) -> Finished:
        end, self._end = self._end, None
        assert end is not None, "it is taken once"
        return end


class RequestRouter:
    """Places requests on replicas. Belongs to one event loop."""

    def __init__(
        self,
        *,
        table: Callable[[], RoutingTable],
        table_changed: Callable[[], asyncio.Event],
        connect: Connect,
        wake: Callable[[ModelUid], Awaitable[None]],
        continues_streams: bool = True,
    ) -> None:
        """Route by what `table` returns.

        Args:
            table_changed: returns an event that the next change of the table sets.
            connect: returns an open connection, or raises `ReplicaLost`.
            wake: lets a model that sleeps be started, and returns when the table says so.
            continues_streams: whether an answer that was begun may go on at another replica.
        """
        self.balancer = Balancer()
        self.num_retried = 0
        """Requests that were sent again, having delivered nothing."""
        self.num_continued = 0
        """Streams that went on at another replica."""
        self._table = table
        self._table_changed = table_changed
        self._connect = connect
        self._wake = wake
        self._continues_streams = continues_streams
        self._budget = RetryBudget(now=time.monotonic())
        self._num_waking = 0
        self._live: set[tuple[ModelUid, RequestId]] = set()
        self._trials: dict[ModelUid, asyncio.Lock] = {}
        self._on_trial: dict[InstanceId, _Flight] = {}

    async def start(self, model: ModelUid, request: GenerationRequest) -> RoutedStream:
        """Send a request to a replica; return when one has accepted it.

        Raises:
            ModelNotFound, ModelNotReady, LoadFailed: there is no replica to send it to.
            ModelOverloaded: too many wait for a model that sleeps.
            DuplicateRequest: a live request of this gateway has its id.
            ReplicaLost: its replica is gone, and there is no other.
            XinferenceError: a replica refused it.
        """
        sampling = request.sampling
        if self._continues_streams and sampling.seed is None:
            # Why here: another replica must draw as this one would have.
            sampling = replace(sampling, seed=new_seed())
            request = replace(request, sampling=sampling)
        return RoutedStream(self, await self._take_off(model, request))

    async def compute(self, model: ModelUid, request: VectorRequest) -> RoutedVectors:
        """Send a request for vectors or scores to a replica; return when one has accepted it.

        Raises:
            As `start`.
        """
        return RoutedVectors(self, await self._take_off(model, request))

    async def _take_off(self, model: ModelUid, request: ModelRequest) -> _Flight:
        await self._wake_up(model)
        ready_routes(self._table(), model)
        name = (model, request.request_id)
        if name in self._live:
            raise DuplicateRequest(request_id=request.request_id)
        self._budget.note_request()
        flight = _Flight(
            model=model,
            request=request,
            cost=cost_of(model, request),
            deadline=time.monotonic() + ACCEPT_TIMEOUT_SECONDS,
        )
        self._live.add(name)
        try:
            await self._place(flight)
        except BaseException:
            self.end(flight)
            raise
        return flight

    async def _wake_up(self, model: ModelUid) -> None:
        """Let a model that sleeps be started; return when it is ready, or will not be in time.

        Raises:
            ModelOverloaded: too many requests wait so.
        """
        if not self._is(model, ModelState.ASLEEP, ModelState.LOADING):
            return
        if self._num_waking >= MAX_WAKING:
            retry_after = self._table().models[model].retry_after_seconds
            raise ModelOverloaded(
                model=model, num_waiting=self._num_waking, retry_after_seconds=retry_after
            )
        self._num_waking += 1
        try:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ACCEPT_TIMEOUT_SECONDS):
                    if self._is(model, ModelState.ASLEEP):
                        await self._wake(model)
                    while self._is(model, ModelState.ASLEEP, ModelState.LOADING):
                        await self._table_changed().wait()
        finally:
            self._num_waking -= 1

    def _is(self, model: ModelUid, *states: ModelState) -> bool:
        """Return whether a model that a request may wait for is in one of these states."""
        entry = self._table().models.get(model)
        return entry is not None and entry.is_on_demand and entry.state in states

    async def move(self, flight: _Flight, lost: ReplicaLost) -> None:
        """Place a request elsewhere whose replica is gone.

        Raises:
            ReplicaLost, RequestCrashesModel, LoadFailed: it ends here.
        """
        flight.problem = lost
        flight.park_until = 0.0
        try:
            self._leave(flight)
            flight.tried = set() if flight.route is None else {flight.route.instance}
            if flight.has_delivered and not self._can_continue(flight):
                raise lost
            if not self._budget.take(now=time.monotonic()):
                raise lost
            flight.deadline = time.monotonic() + ACCEPT_TIMEOUT_SECONDS
            await self._place(flight)
        except BaseException:
            self.end(flight)
            raise
        if flight.has_delivered:
            self.num_continued += 1
            logger.info(
                "request %s goes on at another replica after %d tokens",
                flight.request.request_id,
                len(flight.token_ids),
            )
        span = current_span()
        if span is not None:
            span.note("moved to another replica", {"num_tokens": len(flight.token_ids)})

    def _can_continue(self, flight: _Flight) -> bool:
        request = flight.request
        if not isinstance(request, GenerationRequest):
            return False
        # Of several answers nobody can tell which of their tokens belong together, and of a prompt
        # that is told of nobody can tell how much was.
        is_plain = request.num_made == 1 and not (
            request.sampling.echo and request.sampling.logprobs is not None
        )
        return self._continues_streams and is_plain and bool(flight.token_ids)

    def note(self, flight: _Flight, event: Delta) -> None:
        """Take in a piece of an answer that goes to its consumer."""
        flight.has_delivered = True
        self.note_answering(flight)
        if isinstance(event, TextDelta | ReasoningDelta) and event.token_ids:
            flight.token_ids += event.token_ids
            if flight.lease is not None:
                self.balancer.progress(flight.lease, len(event.token_ids))

    def note_answering(self, flight: _Flight) -> None:
        """Take in that the replica which a request is on has given something."""
        if not flight.is_answering:
            flight.is_answering = True
            flight.is_suspect = False
            self._end_trial(flight, passed=True)

    def fail(self, flight: _Flight) -> None:
        """Note that a replica failed a request by a fault of its own, and end it."""
        if flight.route is not None:
            now = time.monotonic()
            self.balancer.failed(flight.route.instance, now=now, is_lost=False)
        self.end(flight)

    def end(self, flight: _Flight, *, is_good: bool = False) -> None:
        """Forget a request that is over; may be called again."""
        self._live.discard((flight.model, flight.request.request_id))
        if flight.lease is not None:
            self.balancer.end(flight.lease, is_good=is_good)
            flight.lease = None
        self._end_trial(flight, passed=is_good or flight.is_answering)

    def forget(self, instances: set[InstanceId]) -> None:
        """Forget every replica but these."""
        self.balancer.keep(instances)
        for instance in [one for one in self._on_trial if one not in instances]:
            del self._on_trial[instance]

    # --- one placement after the other

    async def _place(self, flight: _Flight) -> None:
        """Return when a replica has accepted the request; its `stream` is set."""
        while True:
            route = self._choose(flight)
            if route is None:
                await self._park(flight)
                continue
            if flight.problem is not None and not flight.has_delivered:
                self.num_retried += 1
            try:
                await self._send(flight, route)
            except (ReplicaLost, ModelNotReady, ModelOverloaded) as error:
                flight.problem = error
            except DuplicateRequest as error:
                # Where it was before, it has not quite ended; a first placement is another's id.
                if flight.problem is None:
                    raise
                flight.problem = ReplicaLost(model=flight.model, problem=str(error))
            else:
                return
            flight.tried.add(route.instance)
            if time.monotonic() > flight.deadline or not self._budget.take(now=time.monotonic()):
                raise flight.problem

    def _choose(self, flight: _Flight) -> Route | None:
        """Return an untried replica; None if there is none now but may be soon."""
        table = self._table()
        try:
            routes = ready_routes(table, flight.model)
        except ModelNotReady:
            if flight.problem is None:
                raise
            if table.models[flight.model].state is ModelState.TERMINATING:
                raise flight.problem from None
            return None
        except ModelNotFound as error:
            raise flight.problem or error from None
        return self.balancer.choose(routes, flight.cost, excluded=flight.tried)

    async def _park(self, flight: _Flight) -> None:
        """Wait for the table to change, or a little.

        Raises:
            XinferenceError: the problem that the request has, when its time is over.
        """
        assert flight.problem is not None, "the first choice is of all ready replicas"
        now = time.monotonic()
        if isinstance(flight.problem, ModelOverloaded):
            raise flight.problem  # every replica has refused it
        if self._is(flight.model, ModelState.ASLEEP):
            # It fell asleep just when this came, so nobody else wakes it.
            await self._wake_up(flight.model)
            flight.park_until = 0.0
            flight.tried.clear()
            if time.monotonic() >= flight.deadline:
                raise flight.problem
            return
        if not flight.park_until:
            flight.park_until = now + PARK_SECONDS
        if now >= min(flight.park_until, flight.deadline):
            raise flight.problem
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(PARK_LOOK_SECONDS):
                await self._table_changed().wait()
        # Why: a replica that could not be reached a moment ago may be the only one.
        flight.tried.clear()

    async def _send(self, flight: _Flight, route: Route) -> None:
        """Send the request to one replica and wait until it is accepted."""
        if flight.is_suspect:
            await self._begin_trial(flight, route)
        try:
            flight.connection = None
            connection = await self._connect(route)
            if flight.num_crashes:
                # Why: a replica that died at the same time is none that this request has crashed.
                await connection.ping(PING_TIMEOUT_SECONDS)
            flight.connection = connection
            flight.route, flight.is_answering = route, False
            flight.lease = self.balancer.begin(route, flight.cost)
            left = max(0.0, flight.deadline - time.monotonic())
            flight.stream = await flight.connection.request(flight.to_send(), timeout_seconds=left)
        except ReplicaLost:
            if flight.connection is None:
                now = time.monotonic()
                self.balancer.failed(route.instance, now=now, is_lost=True)
                self._end_trial(flight, passed=False)
            else:
                self._leave(flight)
            raise
        except BaseException as error:
            if isinstance(error, InternalError):
                self.balancer.failed(route.instance, now=time.monotonic(), is_lost=False)
            if flight.lease is not None:
                self.balancer.end(flight.lease)
                flight.lease = None
            self._end_trial(flight, passed=False)
            raise

    def _leave(self, flight: _Flight) -> None:
        """Take a request off a replica that is gone, and see who is to blame.

        Raises:
            RequestCrashesModel: it was there at too many crashes.
        """
        route, connection = flight.route, flight.connection
        assert route is not None and connection is not None, "it was sent there"  # noqa: PT018
        if flight.lease is not None:
            self.balancer.end(flight.lease)
            flight.lease = None
        if connection.is_closed and not connection.has_said_goodbye:
            self.balancer.failed(route.instance, now=time.monotonic(), is_lost=True)
            flight.num_crashes += self._on_trial.get(route.instance, flight) is flight
            flight.is_suspect = not flight.is_answering
        self._end_trial(flight, passed=False)
        if flight.num_crashes >= MAX_CRASHES:
            raise RequestCrashesModel(model=flight.model, request_id=flight.request.request_id)

    # --- trials: requests that may have crashed a replica go one at a time

    async def _begin_trial(self, flight: _Flight, route: Route) -> None:
        """Wait until no other suspect of the model is being tried.

        Why: of those that were there when a replica crashed only one is to blame. Tried together
        they would all be there at the next crash.
        """
        lock = self._trials.setdefault(flight.model, asyncio.Lock())
        try:
            async with asyncio.timeout(max(0.0, flight.deadline - time.monotonic())):
                await lock.acquire()
        except TimeoutError:
            assert flight.problem is not None, "a suspect has been somewhere"
            raise flight.problem from None
        flight.trial = route.instance
        self._on_trial[route.instance] = flight

    def _end_trial(self, flight: _Flight, *, passed: bool) -> None:
        """Let the next suspect be tried."""
        if flight.trial is None:
            return
        # Why only then: the others that were on a replica that crashed still ask who was tried.
        if passed and self._on_trial.get(flight.trial) is flight:
            del self._on_trial[flight.trial]
        flight.trial = None
        self._trials[flight.model].release()
