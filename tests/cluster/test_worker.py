# SPDX-License-Identifier: Apache-2.0
"""What a worker makes of commands: in any order, twice, late, and of the wrong sender."""

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from xinference.cluster.messages import (
    Command,
    InstanceState,
    LaunchId,
    StartInstance,
    StopInstance,
    WorkerEpoch,
)
from xinference.cluster.worker import WorkerActor
from xinference.errors import ProtocolError, ReplicaLost
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec

REPLICA = ReplicaUid(ModelUid("qwen"), 0)
LAUNCH = LaunchId("launch")
LOST = ReplicaLost(model="qwen", problem="signal SIGKILL")
DEADLINE_SECONDS = 10.0


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    local = LocalCluster(tmp_path, new_replica=ScriptedReplica)
    yield local
    for replica in local.replicas:
        if not replica.ended.is_set():
            replica.move(InstanceState.EXITED)
    await local.close()


@pytest.fixture
async def worker(local: LocalCluster) -> WorkerActor:
    return await local.start_worker()


def command(worker: WorkerActor, *, epoch: int = 1, **parts: object) -> Command:
    return Command(
        supervisor_epoch=epoch,
        worker_epoch=worker.report().worker_epoch,
        **parts,  # type: ignore[arg-type]
    )


def start(instance: str = "i1") -> StartInstance:
    spec = ReplicaSpec(
        replica=REPLICA,
        instance=InstanceId(instance),
        source=ModelSource(path="package:guide"),
        abilities=("chat",),
        engine_options=EngineOptions(),
        python_executable="",
    )
    return StartInstance(spec=spec, launch_id=LAUNCH)


def stop(instance: str = "i1") -> StopInstance:
    return StopInstance(replica=REPLICA, instance=InstanceId(instance), launch_id=LAUNCH)


def states(worker: WorkerActor) -> dict[str, InstanceState]:
    return {report.instance: report.state for report in worker.report().instances}


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(DEADLINE_SECONDS):
        while not condition():  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(0.005)


async def test_a_start_that_comes_twice_starts_once(
    local: LocalCluster, worker: WorkerActor
) -> None:
    for _ in range(2):
        await worker.apply(command(worker, start=(start(),)))

    assert len(local.replicas) == 1


async def test_a_stop_that_overtakes_its_start_wins(
    local: LocalCluster, worker: WorkerActor
) -> None:
    report = await worker.apply(command(worker, stop=(stop(),)))
    assert [one.state for one in report.instances] == [InstanceState.EXITED]

    await worker.apply(command(worker, start=(start(),)))

    assert local.replicas == []


async def test_a_forgotten_instance_is_never_started_again(
    local: LocalCluster, worker: WorkerActor
) -> None:
    late = command(worker, start=(start(),))
    await worker.apply(late)
    local.replicas[0].move(InstanceState.EXITED)
    await worker.apply(command(worker, forget=(InstanceId("i1"),)))
    assert states(worker) == {}

    await worker.apply(late)
    await worker.apply(command(worker, stop=(stop(),)))

    assert states(worker) == {}
    assert len(local.replicas) == 1


async def test_a_living_instance_is_not_forgotten(worker: WorkerActor) -> None:
    await worker.apply(command(worker, start=(start(),)))

    await worker.apply(command(worker, forget=(InstanceId("i1"),)))

    assert states(worker) == {"i1": InstanceState.STARTING}


async def test_a_second_instance_of_a_replica_ends_the_first(
    local: LocalCluster, worker: WorkerActor
) -> None:
    await worker.apply(command(worker, start=(start("i1"),)))

    await worker.apply(command(worker, start=(start("i2"),)))

    assert states(worker) == {"i1": InstanceState.STOPPING, "i2": InstanceState.STARTING}


async def test_what_ends_while_there_is_no_supervisor_is_started_again_where_it_was(
    local: LocalCluster, worker: WorkerActor
) -> None:
    await worker.apply(command(worker, start=(start(),)))
    for num_made in (2, 3):
        local.replicas[-1].move(InstanceState.READY)
        local.replicas[-1].move(InstanceState.EXITED, LOST)
        await until(lambda n=num_made: len(local.replicas) == n)
        assert states(worker) == {"i1": InstanceState.STARTING}
    local.replicas[-1].move(InstanceState.READY)

    await local.start_supervisor()
    await until(worker.joined.is_set)
    local.replicas[-1].move(InstanceState.EXITED, LOST)

    await until(lambda: states(worker) != {"i1": InstanceState.READY})
    assert len(local.replicas) == 3, "a supervisor decides"


async def test_what_was_told_to_end_or_never_served_stays_so(
    local: LocalCluster, worker: WorkerActor
) -> None:
    await worker.apply(command(worker, start=(start(),)))
    local.replicas[0].move(InstanceState.EXITED, LOST)
    await worker.apply(command(worker, start=(start("i2"),)))
    local.replicas[1].move(InstanceState.READY)
    await worker.apply(command(worker, stop=(stop("i2"),)))
    local.replicas[1].move(InstanceState.EXITED)
    for _ in range(10):
        await asyncio.sleep(0)

    assert len(local.replicas) == 2
    assert set(states(worker).values()) == {InstanceState.EXITED}


async def test_an_older_supervisor_and_an_earlier_life_are_not_obeyed(
    local: LocalCluster, worker: WorkerActor
) -> None:
    await worker.apply(command(worker, epoch=5))

    with pytest.raises(ProtocolError, match="older supervisor"):
        await worker.apply(command(worker, epoch=4, start=(start(),)))
    with pytest.raises(ProtocolError, match="older supervisor"):
        await worker.shutdown(4)
    earlier = Command(supervisor_epoch=6, worker_epoch=WorkerEpoch("another"), start=(start(),))
    with pytest.raises(ProtocolError, match="earlier worker"):
        await worker.apply(earlier)

    assert local.replicas == []
    assert not worker.shutdown_requested.is_set()


async def test_a_worker_finds_a_supervisor_that_comes_later_and_comes_back(
    local: LocalCluster, worker: WorkerActor
) -> None:
    supervisor = await local.start_supervisor()
    async with asyncio.timeout(5):
        await worker.joined.wait()
    assert len(supervisor._state.nodes(now=supervisor._clock())) == 1

    await local.kill("127.0.0.1:1000")
    supervisor = await local.start_supervisor()

    async with asyncio.timeout(5):
        while not supervisor._state.nodes(now=supervisor._clock()):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
