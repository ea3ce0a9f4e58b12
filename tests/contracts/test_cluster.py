# SPDX-License-Identifier: Apache-2.0
"""What every `Cluster` promises the HTTP layer: the fake of the tests and the real one.

The real one is `RemoteCluster` with the real supervisor and worker actors, on the in-process
bus, and the fake replica behind a real socket.
"""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.cluster.local_cluster import (
    KEY,
    SUPERVISOR_ADDRESS,
    InProcessReplica,
    LocalCluster,
)
from tests.fakes.cluster import FakeCluster
from tests.fakes.replica import FAILS, HANGS
from xinference.cluster.interface import Cluster
from xinference.cluster.local_bus import LocalBus
from xinference.cluster.remote import RemoteCluster
from xinference.errors import (
    ContextLengthExceeded,
    DuplicateRequest,
    FamilyNotFound,
    InvalidRequest,
    LaunchCancelled,
    LoadFailed,
    ModelAlreadyExists,
    ModelNotFound,
    ModelNotReady,
    ObjectNotFound,
    UnsupportedVariant,
)
from xinference.identifiers import ModelUid, NodeId, ReplicaUid, RequestId, new_request_id
from xinference.protocol.autostart import AutostartEntry
from xinference.protocol.deployment import (
    AbortOutcome,
    LaunchSpec,
    ModelState,
    ReplicaPlacement,
    ReplicaState,
)
from xinference.protocol.generation import (
    Finished,
    FinishReason,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
    Usage,
)
from xinference.protocol.logs import SUPERVISOR_NODE, LogQuery
from xinference.protocol.vectors import (
    DenseVectors,
    EmbeddingRequest,
    RerankRequest,
    Scores,
)

FAMILY = "xinference-guide"
GUIDE = ModelUid("guide")
TIMEOUT_SECONDS = 10.0


class Subject(Protocol):
    """A cluster under test, and what makes it misbehave."""

    cluster: Cluster

    def failing(self) -> LaunchSpec:
        """Return a launch of GUIDE that fails to load."""
        ...

    def hanging(self) -> LaunchSpec:
        """Return a launch of GUIDE that does not end."""
        ...

    def working(self) -> LaunchSpec:
        """Return a launch of GUIDE that becomes ready."""
        ...

    def holds_streams(self) -> None:
        """Let streams stop before their end."""
        ...


def spec(**changes: Any) -> LaunchSpec:
    given: dict[str, Any] = {
        "model_uid": GUIDE,
        "model_name": FAMILY,
        "model_engine": "transformers",
    }
    return LaunchSpec(**{**given, **changes})


class Fake:
    def __init__(self) -> None:
        self.cluster = FakeCluster()

    def failing(self) -> LaunchSpec:
        self.cluster.launch_error = LoadFailed(model=GUIDE, problem="it was told to fail")
        return spec()

    def hanging(self) -> LaunchSpec:
        self.cluster.holds_launches = True
        return spec()

    def working(self) -> LaunchSpec:
        self.cluster.holds_launches = False
        self.cluster.launch_error = None
        return spec()

    def holds_streams(self) -> None:
        self.cluster.allow(0)


class Real:
    def __init__(self, cluster: RemoteCluster) -> None:
        self.cluster = cluster

    def failing(self) -> LaunchSpec:
        return spec(model_path=FAILS)

    def hanging(self) -> LaunchSpec:
        return spec(model_path=HANGS)

    def working(self) -> LaunchSpec:
        return spec()

    def holds_streams(self) -> None:
        """The fake replica needs a step for each token; a long answer is held enough."""


@asynccontextmanager
async def fake(home: Path) -> AsyncIterator[Subject]:
    yield Fake()


@asynccontextmanager
async def real(home: Path) -> AsyncIterator[Subject]:
    class Replica(InProcessReplica):
        directory = home / "s"

    Replica.directory.mkdir(mode=0o700)
    local = LocalCluster(home, new_replica=Replica)
    await local.start_supervisor()
    worker = await local.start_worker()
    await worker.joined.wait()
    bus = LocalBus(local.network, None)
    cluster = RemoteCluster(bus, supervisor_address=SUPERVISOR_ADDRESS, cluster_key=KEY)
    await cluster.start()
    try:
        yield Real(cluster)
    finally:
        await cluster.aclose()
        await local.close()


@pytest.fixture(params=[fake, real], ids=["fake", "real"])
async def subject(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[Subject]:
    # Why mktemp: the sockets' paths must be short.
    async with request.param(tmp_path_factory.mktemp("c")) as subject:
        yield subject


@pytest.fixture
async def cluster(subject: Subject) -> Cluster:
    await subject.cluster.launch(subject.working(), wait_ready=True)
    return subject.cluster


def ask(request_id: str = "", max_tokens: int | None = 3) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId(request_id) if request_id else new_request_id(),
        prompt=TextPrompt(text="one two three four"),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


def embed(*texts: str) -> EmbeddingRequest:
    return EmbeddingRequest(request_id=new_request_id(), inputs=texts or ("one two",))


async def wait_for_state(cluster: Cluster, state: ModelState) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        states = {model.model_uid: model.state for model in await cluster.models()}
        if states.get(GUIDE) is state:
            return
        assert time.monotonic() < deadline, f"{states}, not {state}"
        await asyncio.sleep(0.01)


async def test_a_launched_model_is_ready_and_described(cluster: Cluster) -> None:
    status = await cluster.model(GUIDE)

    assert status.state is ModelState.READY
    assert status.description.model_uid == GUIDE
    assert status.description.model_name == FAMILY
    assert [replica.state for replica in status.replicas] == [ReplicaState.READY]
    assert [model.model_uid for model in await cluster.models()] == [GUIDE]
    progress = await cluster.launch_progress(GUIDE)
    assert (progress.progress, progress.stage) == (1.0, "completed")
    (replica,) = progress.replicas
    assert (replica.replica, replica.stage) == (ReplicaUid(GUIDE, 0), "completed")
    assert await cluster.events(GUIDE)


async def test_an_unnamed_model_is_named_after_its_family(subject: Subject) -> None:
    cluster = subject.cluster

    first = await cluster.launch(spec(model_uid=None), wait_ready=True)
    second = await cluster.launch(spec(model_uid=None), wait_ready=True)

    assert first == FAMILY
    assert second.startswith(f"{FAMILY}-")


async def test_a_taken_uid_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ModelAlreadyExists):
        await cluster.launch(spec(), wait_ready=True)


async def test_an_unknown_family_is_refused(subject: Subject) -> None:
    with pytest.raises(FamilyNotFound):
        await subject.cluster.launch(spec(model_name="nobody-knows"), wait_ready=False)

    assert await subject.cluster.models() == []


async def test_a_variant_that_is_not_there_is_refused(subject: Subject) -> None:
    with pytest.raises(UnsupportedVariant):
        await subject.cluster.launch(spec(model_format="gptq"), wait_ready=False)


async def test_an_unknown_model_is_not_found(subject: Subject) -> None:
    cluster, unknown = subject.cluster, ModelUid("unknown")

    for question in (
        cluster.model(unknown),
        cluster.events(unknown),
        cluster.terminate(unknown),
        cluster.cancel_launch(unknown),
        cluster.terminate_replica(unknown, 0),
        cluster.add_replicas(unknown, [ReplicaPlacement()]),
        cluster.generate(unknown, ask()),
        cluster.compute(unknown, embed()),
        cluster.abort_request(unknown, RequestId("x"), block_seconds=1.0),
    ):
        with pytest.raises(ModelNotFound):
            await question
    progress = await cluster.launch_progress(unknown)
    assert (progress.progress, progress.stage) == (0.0, "pending")


async def test_nothing_is_kept_at_first_and_nothing_to_be_removed(subject: Subject) -> None:
    cluster = subject.cluster

    kept = await cluster.cached_models(None)
    assert list(kept.models.values()) == [[]]
    assert not kept.unanswered
    assert await cluster.download_status("nothing") == {}
    with pytest.raises(ObjectNotFound):
        await cluster.remove_cached("nothing", None, is_forced=False)
    with pytest.raises(ObjectNotFound):
        await cluster.cancel_download("nothing")


async def test_what_has_its_files_here_needs_no_download(subject: Subject) -> None:
    with pytest.raises(InvalidRequest, match="needs no download"):
        await subject.cluster.download(spec(model_uid=None))
    with pytest.raises(FamilyNotFound):
        await subject.cluster.download(spec(model_name="nobody-knows"))


async def test_a_cache_of_a_worker_that_is_not_there_is_refused(subject: Subject) -> None:
    cluster = subject.cluster

    for question in (
        cluster.cached_models("10.0.0.9"),
        cluster.remove_cached("nothing", "10.0.0.9", is_forced=False),
    ):
        with pytest.raises(InvalidRequest, match="worker_ip"):
            await question


async def test_a_model_has_a_log_and_nobody_knows_of_another(cluster: Cluster) -> None:
    batch = await cluster.logs(LogQuery(model=GUIDE))

    assert (batch.lines, dict(batch.silent)) == ((), {})
    again = await cluster.logs(LogQuery(model=GUIDE, positions=batch.positions))
    assert again.lines == ()
    assert (await cluster.logs(LogQuery(node=SUPERVISOR_NODE))).lines == ()
    with pytest.raises(ModelNotFound):
        await cluster.logs(LogQuery(model=ModelUid("nobody")))
    with pytest.raises(InvalidRequest, match="node"):
        await cluster.logs(LogQuery(node=NodeId("10.0.0.9")))


async def test_a_request_for_vectors_is_pieces_and_one_end(cluster: Cluster) -> None:
    stream = await cluster.compute(GUIDE, embed("one two", "three"))

    assert stream.accepted.num_prompt_tokens == 3
    *pieces, last = [event async for event in stream]
    indices = [index for one in pieces if isinstance(one, DenseVectors) for index in one.indices]
    assert sorted(indices) == [0, 1]
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.STOP
    assert last.usage.num_prompt_tokens == 3
    await stream.aclose()


async def test_a_request_for_scores_is_all_of_them_and_one_end(cluster: Cluster) -> None:
    request = RerankRequest(
        request_id=new_request_id(), query="the cat", documents=("the cat", "a dog", "the dog")
    )

    stream = await cluster.compute(GUIDE, request)

    (scores, last) = [event async for event in stream]
    assert scores == Scores(scores=(1.0, 0.0, 0.5))
    assert isinstance(last, Finished)
    await stream.aclose()


async def test_a_stream_is_deltas_and_one_end(cluster: Cluster) -> None:
    stream = await cluster.generate(GUIDE, ask())

    assert stream.accepted.num_prompt_tokens == 4
    *deltas, last = [event async for event in stream]
    assert deltas
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.LENGTH
    assert last.usage.num_completion_tokens == 3
    await stream.aclose()


async def test_a_prompt_that_is_too_long_is_refused(cluster: Cluster) -> None:
    with pytest.raises(ContextLengthExceeded):
        await cluster.generate(GUIDE, ask(max_tokens=1_000_000))


async def test_a_request_to_count_is_accepted_and_ends_without_an_answer(cluster: Cluster) -> None:
    stream = await cluster.generate(GUIDE, replace(ask(), count_only=True))

    assert stream.accepted.num_prompt_tokens == 4
    (last,) = [event async for event in stream]
    assert isinstance(last, Finished)
    assert last.usage == Usage(num_prompt_tokens=4, num_completion_tokens=0)


async def test_an_id_can_be_live_once(subject: Subject, cluster: Cluster) -> None:
    subject.holds_streams()
    stream = await cluster.generate(GUIDE, ask("same", 500))

    with pytest.raises(DuplicateRequest):
        await cluster.generate(GUIDE, ask("same", 500))

    await stream.aclose()


async def test_an_aborted_request_ends_with_abort(subject: Subject, cluster: Cluster) -> None:
    subject.holds_streams()
    stream = await cluster.generate(GUIDE, ask("mine", 500))

    outcome = await cluster.abort_request(GUIDE, RequestId("mine"), block_seconds=0.0)

    assert outcome is AbortOutcome.DONE
    events = [event async for event in stream]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason is FinishReason.ABORT
    unknown = await cluster.abort_request(GUIDE, RequestId("other"), block_seconds=0.0)
    assert unknown is AbortOutcome.NOT_FOUND


async def test_a_stream_can_be_closed_twice(subject: Subject, cluster: Cluster) -> None:
    subject.holds_streams()
    stream = await cluster.generate(GUIDE, ask(max_tokens=500))

    await stream.aclose()
    await stream.aclose()


async def test_a_loading_model_says_so(subject: Subject) -> None:
    cluster = subject.cluster
    await cluster.launch(subject.hanging(), wait_ready=False)
    await wait_for_state(cluster, ModelState.LOADING)

    with pytest.raises(ModelNotReady) as refused:
        await cluster.generate(GUIDE, ask())

    assert refused.value.retry_after_seconds > 0
    assert 0.0 <= (await cluster.launch_progress(GUIDE)).progress < 1.0
    assert ReplicaUid(GUIDE, 0) not in await cluster.engine_stats()


async def test_a_cancelled_launch_leaves_nothing(subject: Subject) -> None:
    cluster = subject.cluster
    launching = asyncio.create_task(cluster.launch(subject.hanging(), wait_ready=True))
    await wait_for_state(cluster, ModelState.LOADING)

    await cluster.cancel_launch(GUIDE)

    with pytest.raises(LaunchCancelled):
        await launching
    assert await cluster.models() == []
    await cluster.launch(subject.working(), wait_ready=True)


async def test_a_launch_goes_on_when_its_waiter_leaves(subject: Subject) -> None:
    cluster = subject.cluster
    launching = asyncio.create_task(cluster.launch(subject.hanging(), wait_ready=True))
    await wait_for_state(cluster, ModelState.LOADING)

    launching.cancel()
    await asyncio.gather(launching, return_exceptions=True)

    assert [model.model_uid for model in await cluster.models()] == [GUIDE]


async def test_a_ready_model_cannot_be_cancelled(cluster: Cluster) -> None:
    with pytest.raises(InvalidRequest):
        await cluster.cancel_launch(GUIDE)


async def test_a_failed_launch_says_why_and_its_uid_is_free(subject: Subject) -> None:
    cluster = subject.cluster
    with pytest.raises(LoadFailed, match="told to fail"):
        await cluster.launch(subject.failing(), wait_ready=True)
    assert (await cluster.model(GUIDE)).state is ModelState.ERROR
    assert (await cluster.launch_progress(GUIDE)).stage == "error"
    with pytest.raises(LoadFailed, match="told to fail") as refused:
        await cluster.generate(GUIDE, ask())
    assert str(refused.value).count("could not be loaded") == 1

    await cluster.launch(subject.working(), wait_ready=True)

    assert (await cluster.model(GUIDE)).state is ModelState.READY


async def test_a_terminated_model_is_gone(cluster: Cluster) -> None:
    await cluster.terminate(GUIDE)

    assert await cluster.models() == []
    with pytest.raises(ModelNotFound):
        await cluster.generate(GUIDE, ask())


async def test_the_only_replica_takes_its_model_with_it(cluster: Cluster) -> None:
    with pytest.raises(InvalidRequest):
        await cluster.terminate_replica(GUIDE, 3)

    assert await cluster.terminate_replica(GUIDE, 0) == 0
    assert await cluster.models() == []


async def test_replicas_come_and_go_while_the_model_serves(cluster: Cluster) -> None:
    added = await cluster.add_replicas(GUIDE, [ReplicaPlacement(), ReplicaPlacement(n_gpu=0)])

    assert [one.replica.index for one in added] == [1, 2]
    assert {one.state for one in added} == {ReplicaState.READY}
    status = await cluster.model(GUIDE)
    assert status.description.replica == len(status.replicas) == 3
    assert await cluster.terminate_replica(GUIDE, 1) == 2
    left = [one.replica.index for one in (await cluster.model(GUIDE)).replicas]
    assert left == [0, 2]
    events = [event async for event in await cluster.generate(GUIDE, ask())]
    assert isinstance(events[-1], Finished)


async def test_a_launch_of_several_replicas_returns_when_all_are_ready(subject: Subject) -> None:
    launch = replace(subject.working(), replica=3)

    await subject.cluster.launch(launch, wait_ready=True)

    status = await subject.cluster.model(GUIDE)
    assert [one.state for one in status.replicas] == [ReplicaState.READY] * 3


async def test_a_place_that_is_not_there_is_refused(cluster: Cluster) -> None:
    with pytest.raises(InvalidRequest, match="worker_ip"):
        await cluster.launch(spec(model_uid=None, worker_ip="10.9.9.9"), wait_ready=True)
    with pytest.raises(InvalidRequest, match="gpu_idx"):
        await cluster.launch(spec(model_uid=None, gpu_idx=(5,)), wait_ready=True)
    with pytest.raises(InvalidRequest, match="worker_ip"):
        await cluster.add_replicas(GUIDE, [ReplicaPlacement(worker_ip="10.9.9.9")])


async def test_a_ready_model_has_counters(cluster: Cluster) -> None:
    assert (await cluster.engine_stats())[ReplicaUid(GUIDE, 0)]


async def test_the_cluster_shows_its_workers(cluster: Cluster) -> None:
    info = await cluster.info()

    assert info.supervisor_address
    assert [worker.num_replicas for worker in info.workers] == [1]


async def test_families_can_be_registered_and_removed(subject: Subject) -> None:
    cluster = subject.cluster
    family = (
        '{"model_name": "mine", "model_specs": [{"model_format": "pytorch",'
        ' "model_size_in_billions": 1, "quantization": "none", "model_uri": "/m"}]}'
    )
    await cluster.register("LLM", family, persist=False)
    with pytest.raises(ModelAlreadyExists):
        await cluster.register("LLM", family, persist=False)

    mine = await cluster.registration("LLM", "mine")
    assert mine["is_builtin"] is False
    assert [one["model_name"] for one in await cluster.registrations("LLM")] == ["mine", FAMILY]
    assert await cluster.engines("LLM", "mine")

    await cluster.unregister("LLM", "mine")
    with pytest.raises(FamilyNotFound):
        await cluster.registration("LLM", "mine")


async def test_without_virtual_environments_there_are_none_to_list_or_to_remove(
    cluster: Cluster,
) -> None:
    words = {"model_engine": None, "python_version": None}

    assert await cluster.virtual_envs(None) == []
    assert await cluster.remove_virtual_envs(FAMILY, **words, worker_ip=None) == 0
    with pytest.raises(InvalidRequest, match="worker_ip"):
        await cluster.virtual_envs("10.9.9.9")
    with pytest.raises(InvalidRequest, match="worker_ip"):
        await cluster.remove_virtual_envs(FAMILY, **words, worker_ip="10.9.9.9")


async def test_packages_for_a_launch_without_an_environment_are_refused(subject: Subject) -> None:
    wanted = spec(model_uid=None, enable_virtual_env=False, virtual_env_packages=("a",))

    with pytest.raises(InvalidRequest, match="virtual_env_packages"):
        await subject.cluster.launch(wanted, wait_ready=True)


async def test_what_is_no_family_is_refused(subject: Subject) -> None:
    for text in ("{", "{}"):
        with pytest.raises(InvalidRequest):
            await subject.cluster.register("LLM", text, persist=False)
    with pytest.raises(InvalidRequest):
        await subject.cluster.unregister("LLM", FAMILY)
    with pytest.raises(InvalidRequest):
        await subject.cluster.registrations("smell")
    with pytest.raises(FamilyNotFound):
        await subject.cluster.engines("LLM", "nobody-knows")


async def test_a_stopped_cluster_can_be_told_again(cluster: Cluster) -> None:
    await cluster.stop()
    await cluster.stop()


async def test_the_autostart_list_is_kept_until_an_entry_is_removed(cluster: Cluster) -> None:
    entry = AutostartEntry(launch=spec(model_uid=GUIDE), priority=7)
    await cluster.set_autostart(entry)
    await cluster.set_autostart(replace(entry, enabled=False))

    (status,) = await cluster.autostart()
    assert status.entry == replace(entry, enabled=False)

    await cluster.remove_autostart(GUIDE)
    assert await cluster.autostart() == []
    with pytest.raises(ObjectNotFound, match=GUIDE):
        await cluster.remove_autostart(GUIDE)
