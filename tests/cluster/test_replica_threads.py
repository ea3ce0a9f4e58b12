# SPDX-License-Identifier: Apache-2.0
"""What a replica delivers when its threads meet in an unlucky order; with a scripted model."""

import asyncio
import sys
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import replace

import pytest

from xinference.cluster import replica as replica_module
from xinference.cluster.dataplane.service import ServiceEvent
from xinference.cluster.replica import EXIT_ENGINE_DIED, Replica
from xinference.errors import InternalError, ModelOverloaded, RequestAborted
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.models import loading
from xinference.models.base import Sink
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Grammar,
    GrammarKind,
    SamplingParams,
    TextDelta,
    TextPrompt,
    Usage,
)

SECONDS = 10.0
ACCEPTED = Accepted(num_prompt_tokens=1)
DELTA = TextDelta(text="x", token_ids=(1,))
ABORTED = Finished(
    reason=FinishReason.ABORT, usage=Usage(num_prompt_tokens=1, num_completion_tokens=0)
)
SPEC = ReplicaSpec(
    replica=ReplicaUid(ModelUid("m"), 0),
    instance=InstanceId("i"),
    source=ModelSource(path="scripted"),
    abilities=("chat",),
    engine_options=EngineOptions(),
    python_executable=sys.executable,
)


class ScriptedModel:
    """Implements `Generates`; `on_submit` says what happens in the submitting thread."""

    def __init__(self) -> None:
        self.is_alive = True
        self.on_submit: Callable[[GenerationRequest], None] = lambda request: None
        self.submitted: list[RequestId] = []
        self.sink: Sink = lambda events: None
        self.context_length = 10
        self.max_num_seqs = 1

    def description(self) -> Mapping[str, str | int | float | bool | None]:
        return {}

    def counters(self) -> dict[str, float]:
        return {"progress": 1.0}

    def start(self, sink: Sink) -> None:
        self.sink = sink

    def submit(self, request: GenerationRequest) -> Accepted:
        self.on_submit(request)
        self.submitted.append(request.request_id)
        return ACCEPTED

    def abort(self, request_id: RequestId) -> bool:
        self.sink([(request_id, ABORTED)])
        return True

    def stop(self, timeout_seconds: float) -> None:
        self.is_alive = False


class Gate:
    """As a script: the submitting thread waits here until it is opened."""

    def __init__(self) -> None:
        self._is_reached, self._is_open = threading.Event(), threading.Event()

    def __call__(self, request: GenerationRequest) -> None:
        self._is_reached.set()
        assert self._is_open.wait(SECONDS)

    async def wait_reached(self) -> None:
        assert await asyncio.to_thread(self._is_reached.wait, SECONDS)

    def open(self) -> None:
        self._is_open.set()


class Recorder:
    """Takes what is delivered, by request."""

    def __init__(self) -> None:
        self._events: dict[RequestId, list[ServiceEvent]] = {}
        self._changed = asyncio.Event()

    def deliver(self, events: Sequence[tuple[RequestId, ServiceEvent]]) -> None:
        for request_id, event in events:
            self._events.setdefault(request_id, []).append(event)
        self._changed.set()

    async def whole(self, name: str) -> list[ServiceEvent]:
        """Return all events of a request once the last is there."""
        async with asyncio.timeout(SECONDS):
            while True:
                events = self._events.get(RequestId(name), [])
                if events and isinstance(events[-1], Finished | Failed):
                    return events
                self._changed.clear()
                await self._changed.wait()


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> ScriptedModel:
    model = ScriptedModel()
    monkeypatch.setattr(loading, "load_model", lambda spec, on_progress: model)
    return model


@pytest.fixture
def recorder() -> Recorder:
    return Recorder()


@pytest.fixture
async def replica(model: ScriptedModel, recorder: Recorder) -> AsyncIterator[Replica]:
    replica = Replica(ModelUid("m"), asyncio.get_running_loop())
    replica.start(recorder.deliver)
    await replica.load(SPEC, lambda *_: None)
    yield replica
    await replica.aclose(SECONDS)


@pytest.mark.usefixtures("model")
async def test_no_more_requests_live_than_the_launch_allows(recorder: Recorder) -> None:
    replica = Replica(ModelUid("m"), asyncio.get_running_loop())
    replica.start(recorder.deliver)
    await replica.load(replace(SPEC, request_limits=2), lambda *_: None)
    try:
        for name in ("a", "b"):
            replica.submit(a_request(name))
        with pytest.raises(ModelOverloaded) as refused:
            replica.submit(a_request("c"))
        replica.abort(RequestId("a"))
        await recorder.whole("a")
        replica.submit(a_request("c"))
        for name in ("b", "c"):
            replica.abort(RequestId(name))
            await recorder.whole(name)
    finally:
        await replica.aclose(SECONDS)

    assert refused.value.num_waiting == 2
    assert refused.value.retry_after_seconds >= 1


async def test_the_thread_that_loads_ends_before_the_model_serves(
    monkeypatch: pytest.MonkeyPatch, recorder: Recorder
) -> None:
    """A live one would keep its OpenMP team, and each step of the engine would take half longer."""
    loaders: list[threading.Thread] = []

    def load(spec: ReplicaSpec, on_progress: object) -> ScriptedModel:
        loaders.append(threading.current_thread())
        return ScriptedModel()

    monkeypatch.setattr(loading, "load_model", load)
    replica = Replica(ModelUid("m"), asyncio.get_running_loop())
    replica.start(recorder.deliver)
    await replica.load(SPEC, lambda *_: None)
    try:
        await asyncio.to_thread(loaders[0].join, SECONDS)
        assert not loaders[0].is_alive()
    finally:
        await replica.aclose(SECONDS)


def a_request(name: str) -> GenerationRequest:
    return GenerationRequest(request_id=RequestId(name), prompt=TextPrompt(text="go"))


async def test_events_that_overtake_the_acceptance_come_after_it(
    replica: Replica, model: ScriptedModel, recorder: Recorder
) -> None:
    model.on_submit = lambda request: model.sink(
        [(request.request_id, DELTA), (request.request_id, ABORTED)]
    )

    replica.submit(a_request("a"))

    assert await recorder.whole("a") == [ACCEPTED, DELTA, ABORTED]


async def test_an_abort_during_the_submission_takes_effect_after_it(
    replica: Replica, model: ScriptedModel, recorder: Recorder
) -> None:
    gate = Gate()
    model.on_submit = gate
    replica.submit(a_request("a"))
    await gate.wait_reached()

    replica.abort(RequestId("a"))
    gate.open()

    assert await recorder.whole("a") == [ACCEPTED, ABORTED]


async def test_an_abort_before_the_submission_keeps_it_from_the_engine(
    replica: Replica, model: ScriptedModel, recorder: Recorder
) -> None:
    gate = Gate()
    model.on_submit = gate
    replica.submit(a_request("first"))
    replica.submit(a_request("second"))
    await gate.wait_reached()

    replica.abort(RequestId("second"))
    (refused,) = await recorder.whole("second")
    gate.open()
    replica.abort(RequestId("first"))
    await recorder.whole("first")

    assert isinstance(refused, Failed)
    assert isinstance(refused.error, RequestAborted)
    assert model.submitted == ["first"]


async def test_a_bug_in_the_submission_costs_that_request_only(
    replica: Replica, model: ScriptedModel, recorder: Recorder
) -> None:
    def fail(request: GenerationRequest) -> None:
        raise ZeroDivisionError("a bug")

    model.on_submit = fail
    replica.submit(a_request("a"))
    (failed,) = await recorder.whole("a")
    model.on_submit = lambda request: model.sink([(request.request_id, ABORTED)])
    replica.submit(a_request("b"))

    assert isinstance(failed, Failed)
    assert isinstance(failed.error, InternalError)
    assert await recorder.whole("b") == [ACCEPTED, ABORTED]


async def test_prompts_wait_in_a_bounded_queue(
    replica: Replica,
    model: ScriptedModel,
    recorder: Recorder,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(replica_module, "MAX_PREPARING", 2)
    gate = Gate()
    model.on_submit = gate
    for name in ("a", "b"):
        replica.submit(a_request(name))

    with pytest.raises(ModelOverloaded):
        replica.submit(a_request("c"))

    gate.open()
    for name in ("a", "b"):
        replica.abort(RequestId(name))
        await recorder.whole(name)
    replica.submit(a_request("c"))
    replica.abort(RequestId("c"))
    await recorder.whole("c")


async def test_a_long_prompt_keeps_no_short_one_waiting(
    replica: Replica, model: ScriptedModel, recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replica_module, "LONG_PROMPT_CHARS", 100)
    gate = Gate()

    def wait_if_long(request: GenerationRequest) -> None:
        if request.request_id == "long":
            gate(request)
        else:
            model.sink([(request.request_id, ABORTED)])

    model.on_submit = wait_if_long
    long = GenerationRequest(request_id=RequestId("long"), prompt=TextPrompt(text="go" * 50))
    replica.submit(long)
    replica.submit(a_request("short"))

    assert await recorder.whole("short") == [ACCEPTED, ABORTED]
    gate.open()
    replica.abort(RequestId("long"))
    await recorder.whole("long")


async def test_the_death_of_the_engine_ends_the_process(
    replica: Replica, model: ScriptedModel
) -> None:
    model.is_alive = False

    async with asyncio.timeout(SECONDS):
        assert await replica.wait_ended() == EXIT_ENGINE_DIED
    assert replica.state is ReplicaState.FAILED


async def test_a_replica_that_was_drained_while_it_loaded_does_not_become_ready(
    model: ScriptedModel, recorder: Recorder
) -> None:
    replica = Replica(ModelUid("m"), asyncio.get_running_loop())
    replica.start(recorder.deliver)
    loading_task = asyncio.ensure_future(replica.load(SPEC, lambda *_: None))
    await asyncio.sleep(0)
    replica.drain()
    await loading_task

    assert replica.state is ReplicaState.STOPPING
    await replica.aclose(SECONDS)


async def test_grammars_that_take_long_keep_no_plain_request_waiting(
    replica: Replica, model: ScriptedModel, recorder: Recorder
) -> None:
    gates = {"slow 0": Gate(), "slow 1": Gate()}

    def on_submit(request: GenerationRequest) -> None:
        if request.request_id in gates:
            gates[request.request_id](request)
        else:
            model.sink([(request.request_id, ABORTED)])

    model.on_submit = on_submit
    held = SamplingParams(grammar=Grammar(kind=GrammarKind.REGEX, text="a"))
    for name, gate in gates.items():
        replica.submit(replace(a_request(name), sampling=held))
        await gate.wait_reached()

    replica.submit(a_request("plain"))
    events = await recorder.whole("plain")
    submitted = list(model.submitted)
    for gate in gates.values():
        gate.open()

    assert events == [ACCEPTED, ABORTED]
    assert submitted == ["plain"]
