# SPDX-License-Identifier: Apache-2.0
"""Requests that outlive their replicas: sent again, continued, or ended with a reason."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes.otlp import otlp_receiver
from tests.fakes.replica import COUNTING, POISON, FakeReplica, serve_fake_replica
from xinference.cluster import request_router
from xinference.cluster.dataplane.client import ReplicaConnection
from xinference.cluster.messages import ModelRoutes, Route, RoutesVersion, RoutingTable
from xinference.cluster.request_router import RequestRouter, RoutedStream, RoutedVectors
from xinference.errors import (
    DuplicateRequest,
    ModelNotReady,
    ModelOverloaded,
    PeerUnreachable,
    ReplicaLost,
    RequestCrashesModel,
)
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId, new_request_id
from xinference.protocol.deployment import EngineOptions, ModelSource, ModelState, ReplicaSpec
from xinference.protocol.generation import (
    Finished,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
)
from xinference.protocol.vectors import DenseVectors, EmbeddingRequest
from xinference.tracing import open_tracer, working_for

KEY = b"k" * 32
DEADLINE_SECONDS = 10.0


class Replicas:
    """Fake replicas on real sockets, a routing table that tests edit, and a router."""

    def __init__(self, directory: Path, stack: contextlib.AsyncExitStack, **options: Any) -> None:
        self.fakes: dict[InstanceId, FakeReplica] = {}
        self._directory = directory
        self._stack = stack
        self._routes: list[Route] = []
        self.sleeps = self.is_on_demand = False
        self.num_woken = 0
        self._changed = asyncio.Event()
        self._connections: dict[InstanceId, ReplicaConnection] = {}
        self.router = RequestRouter(
            table=self.table,
            table_changed=lambda: self._changed,
            connect=self.connect,
            wake=self.wake,
            **options,
        )

    @property
    def state(self) -> ModelState:
        if self._routes:
            return ModelState.READY
        return ModelState.ASLEEP if self.sleeps else ModelState.LOADING

    async def wake(self, model: ModelUid) -> None:
        """What the supervisor does of a model that sleeps."""
        assert model == COUNTING
        self.num_woken += 1
        self.sleeps = False

    def table(self) -> RoutingTable:
        routes = ModelRoutes(
            state=self.state,
            retry_after_seconds=1,
            routes=tuple(self._routes),
            is_on_demand=self.is_on_demand,
        )
        return RoutingTable(version=RoutesVersion(), models={COUNTING: routes})

    async def add(self, **options: Any) -> InstanceId:
        index = len(self.fakes)
        instance = InstanceId(f"instance{index}")
        fake = await self._stack.enter_async_context(
            serve_fake_replica(
                f"unix:{self._directory / str(index)}",
                instance=instance,
                key=KEY,
                spec=spec_of(ReplicaUid(COUNTING, index), instance),
                **options,
            )
        )
        self.fakes[instance] = fake
        replica = ReplicaUid(COUNTING, index)
        self._routes.append(Route(replica=replica, instance=instance, address=fake.address))
        self._changed.set()
        self._changed = asyncio.Event()
        return instance

    def remove(self, instance: InstanceId) -> None:
        self._routes = [route for route in self._routes if route.instance != instance]

    async def connect(self, route: Route) -> ReplicaConnection:
        known = self._connections.get(route.instance)
        if known is not None and not known.is_closed:
            return known
        try:
            made = await ReplicaConnection.open(
                route.address,
                instance=route.instance,
                key=KEY,
                role="gateway",
                timeout_seconds=DEADLINE_SECONDS,
            )
        except PeerUnreachable as error:
            raise ReplicaLost(model=COUNTING, problem=str(error)) from error
        self._connections[route.instance] = made
        self._stack.push_async_callback(made.aclose)
        return made

    async def ask(self, max_tokens: int = 5, text: str = "one two", **fields: Any) -> RoutedStream:
        request = GenerationRequest(
            request_id=RequestId(fields.pop("request_id", new_request_id())),
            prompt=TextPrompt(text=text),
            sampling=SamplingParams(max_tokens=max_tokens, **fields),
        )
        async with asyncio.timeout(DEADLINE_SECONDS):
            return await self.router.start(COUNTING, request)

    def working(self) -> InstanceId:
        """Return the replica that has requests."""
        (found,) = [one for one, fake in self.fakes.items() if fake._live]
        return found


@pytest.fixture
async def replicas(
    tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> AsyncIterator[Replicas]:
    options = getattr(request, "param", {})
    async with contextlib.AsyncExitStack() as stack:
        # Why mktemp: the sockets' paths must be short.
        yield Replicas(tmp_path_factory.mktemp("r"), stack, **options)


async def read(stream: RoutedStream) -> tuple[str, Finished]:
    """Return the whole answer."""
    text = ""
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for event in stream:
            if isinstance(event, Finished):
                return text, event
            assert isinstance(event, TextDelta)
            text += event.text
    raise AssertionError("the stream ended without an end")


def spec_of(replica: ReplicaUid, instance: InstanceId) -> ReplicaSpec:
    return ReplicaSpec(
        replica=replica,
        instance=instance,
        source=ModelSource(path="fake:counts"),
        abilities=("generate",),
        engine_options=EngineOptions(),
        python_executable="",
    )


def counted(count: int) -> str:
    return "".join(f" {number}" for number in range(1, count + 1))


async def test_requests_are_spread_over_the_replicas(replicas: Replicas) -> None:
    await replicas.add()
    await replicas.add()

    streams = [await replicas.ask(max_tokens=200) for _ in range(6)]

    assert [len(fake._live) for fake in replicas.fakes.values()] == [3, 3]
    answers = await asyncio.gather(*map(read, streams))
    assert {text for text, _ in answers} == {counted(200)}
    assert replicas.router.num_retried == 0


async def test_a_stream_goes_on_at_another_replica_from_where_it_was(replicas: Replicas) -> None:
    await replicas.add()
    await replicas.add()
    stream = await replicas.ask(max_tokens=300)
    text = ""
    for _ in range(20):
        event = await stream.__anext__()
        assert isinstance(event, TextDelta)
        text += event.text

    replicas.fakes[replicas.working()].crash()
    rest, end = await read(stream)

    assert text + rest == counted(300)
    assert end.usage.num_completion_tokens == 300
    assert replicas.router.num_continued == 1
    second = [fake for fake in replicas.fakes.values() if fake._num_generated_tokens < 300]
    assert len(second) == 2, "none of the two did all the work"


async def test_a_trace_shows_that_a_stream_moved(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    await replicas.add()
    await replicas.add()
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
        tracer = open_tracer("gateway")
        assert tracer is not None
        span = tracer.begin("POST", {}, {})
        with working_for(span):
            stream = await replicas.ask(max_tokens=300)
            await stream.__anext__()
            replicas.fakes[replicas.working()].crash()
            await read(stream)
        span.end()
        await asyncio.to_thread(tracer.close, 30)
        (received,) = receiver.spans

    assert received.events == ("moved to another replica",)


async def test_an_answer_that_was_all_there_but_its_end_gets_its_end(replicas: Replicas) -> None:
    await replicas.add(step_seconds=0.02)
    await replicas.add()
    stream = await replicas.ask(max_tokens=3)
    first = replicas.working()
    text = ""
    while text != counted(2):
        event = await stream.__anext__()
        assert isinstance(event, TextDelta)
        text += event.text
    # What comes of its last step is seen, and then nothing more.
    stream._flight.token_ids.append(3)
    replicas.fakes[first].crash()

    rest, end = await read(stream)

    assert rest == ""
    assert end.usage.num_completion_tokens == 3


@pytest.mark.parametrize("replicas", [{"continues_streams": False}], indirect=True)
async def test_where_that_is_off_a_stream_ends_with_an_error(replicas: Replicas) -> None:
    await replicas.add()
    await replicas.add()
    stream = await replicas.ask(max_tokens=300)
    await stream.__anext__()

    replicas.fakes[replicas.working()].crash()

    with pytest.raises(ReplicaLost):
        await read(stream)


async def test_a_request_that_has_nothing_yet_is_sent_again(replicas: Replicas) -> None:
    await replicas.add(step_seconds=60.0)
    stream = await replicas.ask()
    await replicas.add()

    replicas.fakes[InstanceId("instance0")].crash()

    assert (await read(stream))[0] == counted(5)
    assert replicas.router.num_retried == 1


async def test_a_replica_that_is_not_there_costs_no_request(replicas: Replicas) -> None:
    dead = await replicas.add()
    replicas.fakes[dead].crash()
    await replicas.add()

    answers = [await read(await replicas.ask()) for _ in range(6)]

    assert {text for text, _ in answers} == {counted(5)}
    assert replicas.router.balancer.is_ejected(dead)


async def test_a_replica_that_is_drained_refuses_and_another_takes_it(replicas: Replicas) -> None:
    draining = await replicas.add()
    await replicas.add()
    replicas.fakes[draining].drain()

    answers = [await read(await replicas.ask()) for _ in range(4)]

    assert len(answers) == 4
    assert not replicas.router.balancer.is_ejected(draining), "it did nothing wrong"


async def test_a_full_replica_refuses_and_another_takes_it_until_all_are(
    replicas: Replicas,
) -> None:
    small = {"max_num_seqs": 1, "max_queue_size": 0, "step_seconds": 60.0}
    await replicas.add(**small)
    await replicas.add(**small)
    streams = [await replicas.ask() for _ in range(2)]
    assert all(len(fake._live) == 1 for fake in replicas.fakes.values())

    with pytest.raises(ModelOverloaded):
        await replicas.ask()

    for stream in streams:
        await stream.aclose()


async def test_a_request_of_the_only_replica_waits_for_the_next_one(replicas: Replicas) -> None:
    first = await replicas.add(step_seconds=60.0)
    stream = await replicas.ask()
    reading = asyncio.create_task(read(stream))
    replicas.fakes[first].crash()
    replicas.remove(first)
    await asyncio.sleep(0.05)  # it waits while there is none

    await replicas.add()

    assert (await reading)[0] == counted(5)


async def test_requests_wake_a_model_that_sleeps_and_wait_until_it_is_ready(
    replicas: Replicas,
) -> None:
    replicas.is_on_demand = replicas.sleeps = True

    first = asyncio.create_task(replicas.ask())
    await until(lambda: replicas.num_woken)
    second = asyncio.create_task(replicas.ask())
    await asyncio.sleep(0)
    await replicas.add()

    assert (await read(await first))[0] == counted(5)
    assert (await read(await second))[0] == counted(5)
    assert replicas.num_woken == 1


async def test_a_request_whose_model_falls_asleep_just_then_wakes_it(replicas: Replicas) -> None:
    replicas.is_on_demand = True
    first = await replicas.add(step_seconds=60.0)
    reading = asyncio.create_task(read(await replicas.ask()))

    replicas.sleeps = True
    replicas.fakes[first].crash()
    replicas.remove(first)
    await until(lambda: replicas.num_woken)
    await replicas.add()

    assert (await reading)[0] == counted(5)
    assert replicas.num_woken == 1


async def test_a_request_does_not_wait_for_ever_for_a_model_that_wakes(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_router, "ACCEPT_TIMEOUT_SECONDS", 0.05)
    replicas.is_on_demand = replicas.sleeps = True

    with pytest.raises(ModelNotReady, match="loading"):
        await replicas.ask()


async def test_a_request_does_not_wait_for_ever(
    replicas: Replicas, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_router, "PARK_SECONDS", 0.2)
    first = await replicas.add(step_seconds=60.0)
    stream = await replicas.ask()
    replicas.fakes[first].crash()
    replicas.remove(first)

    with pytest.raises(ReplicaLost):
        await read(stream)
    with pytest.raises(ModelNotReady):
        await replicas.ask()


async def test_a_poisonous_request_stops_after_two_crashes_and_takes_nobody_along(
    replicas: Replicas,
) -> None:
    for _ in range(3):
        await replicas.add(step_seconds=0.005)
    streams = [await replicas.ask(max_tokens=100) for _ in range(6)]
    reading = [asyncio.create_task(read(stream)) for stream in streams]

    with pytest.raises(RequestCrashesModel):
        await replicas.ask(text=POISON)

    answers = await asyncio.gather(*reading)
    assert {text for text, _ in answers} == {counted(100)}
    assert sum(fake.is_hung for fake in replicas.fakes.values()) == 2
    assert (await read(await replicas.ask()))[0] == counted(5)


async def test_an_id_is_live_once_over_all_replicas(replicas: Replicas) -> None:
    await replicas.add()
    await replicas.add()
    stream = await replicas.ask(max_tokens=300, request_id="same")

    with pytest.raises(DuplicateRequest):
        await replicas.ask(request_id="same")

    await stream.aclose()
    await stream.aclose()
    await until(lambda: not any(fake._live for fake in replicas.fakes.values()))
    assert (await read(await replicas.ask(request_id="same")))[0] == counted(5)


async def test_a_stream_that_nobody_wants_is_no_work_any_more(replicas: Replicas) -> None:
    await replicas.add()
    await replicas.add()
    stream = await replicas.ask(max_tokens=300)
    await stream.__anext__()

    await stream.aclose()

    views = replicas.router.balancer._replicas.values()
    assert [view.outstanding_tokens for view in views] == [0]
    assert [view.num_requests for view in views] == [0]


async def until(condition: Any) -> None:
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.005)


# --- vectors and scores


async def embed(replicas: Replicas, *texts: str) -> RoutedVectors:
    request = EmbeddingRequest(request_id=new_request_id(), inputs=texts)
    async with asyncio.timeout(DEADLINE_SECONDS):
        return await replicas.router.compute(COUNTING, request)


async def test_vectors_come_when_all_of_them_are_there(replicas: Replicas) -> None:
    await replicas.add()

    stream = await embed(replicas, "one two", "three")
    *pieces, end = [event async for event in stream]

    assert stream.accepted.num_prompt_tokens == 3
    assert [one.indices for one in pieces if isinstance(one, DenseVectors)] == [(1,), (0,)]
    assert isinstance(end, Finished)


async def test_vectors_whose_replica_dies_are_computed_by_another(replicas: Replicas) -> None:
    first = await replicas.add(vector_pieces=1)
    stream = await embed(replicas, "one two", "three")
    replicas.remove(first)
    await replicas.add()

    replicas.fakes[first].crash()
    async with asyncio.timeout(DEADLINE_SECONDS):
        *pieces, end = [event async for event in stream]

    assert sorted(one.indices for one in pieces if isinstance(one, DenseVectors)) == [(0,), (1,)]
    assert isinstance(end, Finished)
    assert replicas.router.num_retried == 1
