# SPDX-License-Identifier: Apache-2.0
"""A whole cluster of real processes, with the fake replica: what dies comes back, nothing stays."""

import asyncio
import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.guarded_cluster import (
    KEY,
    MODEL,
    REPLICA_MODULE,
    ROOT,
    TIMEOUT_SECONDS,
    GuardedCluster,
    ask,
    guarded,
    is_gone,
    spec,
    until,
    until_adopted,
    until_answered,
)
from tests.fakes.replica import DIES, FAILS, HANGS
from xinference.cluster.configuration import WorkerConfig
from xinference.cluster.remote import RemoteCluster
from xinference.cluster.supervision import PLATFORM
from xinference.errors import LaunchCancelled, LoadFailed, ModelNotFound, XinferenceError
from xinference.identifiers import ReplicaUid, RequestId, new_request_id
from xinference.protocol.deployment import ModelState
from xinference.protocol.generation import (
    Finished,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
)

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def counting(num_tokens: int) -> GenerationRequest:
    return GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text="count"),
        sampling=SamplingParams(max_tokens=num_tokens),
    )


async def test_a_model_lives_from_launch_to_terminate(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()

    assert await cluster.launch(spec(), wait_ready=True) == MODEL
    assert await ask(cluster) == " 1 2 3"
    assert (await cluster.model(MODEL)).state is ModelState.READY
    (replica,) = guarded.replicas()
    assert KEY not in (PLATFORM.variable_of(replica, "XOSCAR_AUTH_KEY") or "")
    assert PLATFORM.variable_of(replica, "XINFERENCE_INSTANCE")
    assert (await cluster.engine_stats())[ReplicaUid(MODEL, 0)]["num_steps"] > 0

    await cluster.terminate(MODEL)

    assert is_gone(replica)
    assert guarded.replicas() == []
    assert await cluster.models() == []
    with pytest.raises(ModelNotFound):
        await ask(cluster)
    assert await guarded.stop() == 0


async def test_a_killed_replica_worker_and_supervisor_come_back(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)

    (replica,) = guarded.replicas()
    os.kill(replica, signal.SIGKILL)
    await until(lambda: guarded.replicas() not in ([], [replica]), "the replica is back")
    await until_answered(cluster)

    (replica,) = guarded.replicas()
    os.kill(guarded.role("supervisor"), signal.SIGKILL)
    for _ in range(20):
        assert await ask(cluster) == " 1 2 3"  # the data plane does not notice
    await until_model_known(cluster)
    assert guarded.replicas() == [replica]  # adopted, not loaded again
    assert (await cluster.model(MODEL)).state is ModelState.READY


async def test_a_killed_workers_replicas_serve_on_and_are_adopted(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (replica,) = guarded.replicas()
    instance = (await cluster.model(MODEL)).replicas[0].instance
    worker = guarded.role("worker")

    os.kill(worker, signal.SIGKILL)

    while guarded.find("worker") in {None, worker}:
        assert await ask(cluster) == " 1 2 3"
    await until_adopted(cluster)
    (status,) = (await cluster.model(MODEL)).replicas
    assert (status.instance, status.num_restarts) == (instance, 0)
    assert not is_gone(replica)

    # The new worker owns it: it notices its end, and ends it when it is told to.
    os.kill(replica, signal.SIGKILL)
    await until(lambda: guarded.replicas() not in ([], [replica]), "the replica is back")
    await until_answered(cluster)
    (second,) = guarded.replicas()
    os.kill(guarded.role("worker"), signal.SIGKILL)
    await until_adopted(cluster, times=2)
    await cluster.terminate(MODEL)
    assert is_gone(second)
    assert is_gone(replica)


async def test_orphans_of_everything_that_was_killed_end_too(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (replica,) = guarded.replicas()
    os.kill(guarded.role("worker"), signal.SIGKILL)
    await until_adopted(cluster)

    await guarded.stop(signal.SIGKILL)

    await until(lambda: is_gone(replica), "the adopted replica ended with its guardian")


async def test_what_hung_when_everything_was_killed_is_swept_at_the_next_start(
    guarded: GuardedCluster,
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (replica,) = guarded.replicas()
    os.kill(replica, signal.SIGSTOP)  # so that it cannot see how its guardian ends

    await guarded.kill_all_but(replica)
    assert not is_gone(replica)

    cluster = await guarded.start()

    assert is_gone(replica)
    await until_answered(cluster)


async def test_a_worker_that_is_told_to_end_lets_requests_finish(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    stream = await cluster.generate(MODEL, counting(300))
    await stream.__anext__()

    os.kill(guarded.role("worker"), signal.SIGTERM)
    events = [event async for event in stream]

    assert isinstance(events[-1], Finished)
    assert events[-1].reason.value == "length"
    await until_answered(cluster)


async def test_a_terminated_model_finishes_what_it_has(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    stream = await cluster.generate(MODEL, counting(300))
    await stream.__anext__()

    terminating = asyncio.create_task(cluster.terminate(MODEL))
    events = [event async for event in stream]
    await terminating

    assert isinstance(events[-1], Finished)
    assert events[-1].reason.value == "length"
    assert guarded.replicas() == []


async def test_adopted_replicas_finish_what_they_have_when_everything_ends(
    guarded: GuardedCluster,
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    worker = guarded.role("worker")
    os.kill(worker, signal.SIGKILL)
    await until(lambda: guarded.find("worker") not in {None, worker}, "it is back")
    await until_adopted(cluster)
    stream = await cluster.generate(MODEL, counting(500))
    await stream.__anext__()

    stopping = asyncio.create_task(guarded.hosts[0].stop())
    events = [event async for event in stream]

    assert isinstance(events[-1], Finished)
    assert events[-1].reason.value == "length"
    assert await stopping == 0


async def until_model_known(cluster: RemoteCluster) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while True:
        try:
            if (await cluster.model(MODEL)).state is ModelState.READY:
                return
        except XinferenceError:
            pass
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def test_a_worker_with_another_key_stops_and_says_what_to_type(
    guarded: GuardedCluster, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    await guarded.start()
    config = WorkerConfig(
        home=tmp_path / "other",
        cluster_key="the key of another cluster",
        run_directory=tmp_path_factory.mktemp("w"),  # short, for sockets
        supervisor_address=(tmp_path / "supervisor.address").read_text(),
    )

    worker = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.cluster.role",
        "worker",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    said, complained = await worker.communicate(config.to_json().encode() + b"\n")

    assert worker.returncode == 2
    assert said == b""
    assert b"XINFERENCE_CLUSTER_KEY=<the key> xinference-worker -e http://" in complained


async def test_a_second_cluster_on_the_home_of_one_that_runs_ends_at_once(
    guarded: GuardedCluster,
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)

    second = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.cluster.guarded",
        cwd=ROOT,
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    told = json.dumps(
        {"home": str(guarded.home), "key": KEY, "replica_command": ["-m", REPLICA_MODULE]}
    )
    # Its worker waits for the supervisor meanwhile.
    async with asyncio.timeout(TIMEOUT_SECONDS):
        said, complained = await second.communicate(told.encode() + b"\n")

    assert second.returncode == 2
    assert said == b""
    assert b"that no other running cluster uses" in complained
    assert b"is killed" not in complained
    assert await ask(cluster) == " 1 2 3"


async def test_after_everything_was_killed_the_models_come_back(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (replica,) = guarded.replicas()

    await guarded.stop(signal.SIGKILL)
    assert is_gone(replica)
    cluster = await guarded.start()

    await until_answered(cluster)


async def test_a_launch_that_hangs_can_be_cancelled(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    launching = asyncio.create_task(cluster.launch(spec(HANGS), wait_ready=True))
    await until(guarded.replicas, "its process is there")
    (replica,) = guarded.replicas()

    started = time.monotonic()
    await cluster.cancel_launch(MODEL)

    assert time.monotonic() - started < 5.0
    assert is_gone(replica)
    with pytest.raises(LaunchCancelled):
        await launching
    await cluster.launch(spec(), wait_ready=True)
    assert await ask(cluster) == " 1 2 3"


@pytest.mark.parametrize(
    ("path", "problem"), [(FAILS, "it was told to fail"), (DIES, "exit status 1")]
)
async def test_a_launch_that_fails_says_why_and_leaves_nothing(
    guarded: GuardedCluster, path: str, problem: str
) -> None:
    cluster = await guarded.start()

    with pytest.raises(LoadFailed, match=problem):
        await cluster.launch(spec(path), wait_ready=True)

    assert guarded.replicas() == []
    status = await cluster.model(MODEL)
    assert status.state is ModelState.ERROR
    assert problem in status.replicas[0].error_message
    await cluster.launch(spec(), wait_ready=True)
    assert await ask(cluster) == " 1 2 3"


async def test_an_aborted_request_ends(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    request = GenerationRequest(
        request_id=RequestId("to-abort"),
        prompt=TextPrompt(text="count"),
        sampling=SamplingParams(max_tokens=1000),
    )
    stream = await cluster.generate(MODEL, request)

    outcome = await cluster.abort_request(MODEL, RequestId("to-abort"), block_seconds=1.0)

    assert outcome.value == "DONE"
    events = [event async for event in stream]
    assert isinstance(events[-1], Finished)
    assert events[-1].reason.value == "abort"


async def test_stop_ends_everything_and_keeps_the_wish(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    guardian = guarded.guardian

    await cluster.stop()

    await until(lambda: is_gone(guardian), "the guardian ended")
    assert await guarded.stop() == 0
    cluster = await guarded.start()
    await until_answered(cluster)
