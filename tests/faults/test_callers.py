# SPDX-License-Identifier: Apache-2.0
"""What is left of those who asked and are gone: the rows F22 and F26 to F28 of the matrix."""

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from tests.cluster.guarded_cluster import (
    KEY,
    MODEL,
    ROOT,
    GuardedCluster,
    guarded,
    spec,
    until,
    until_answered,
)
from tests.fakes.replica import HANGS
from tests.faults.caller import NUM_TOKENS
from tests.faults.harness import Bounds, Trial
from tests.faults.table import RecordFault
from xinference.cluster.dataplane.client import ReplicaConnection
from xinference.cluster.dataplane.handshake import instance_key
from xinference.errors import LaunchCancelled, XinferenceError
from xinference.identifiers import ModelUid, new_request_id
from xinference.protocol.deployment import ReplicaState
from xinference.protocol.generation import GenerationRequest, SamplingParams, TextPrompt

__all__ = ["guarded"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    pytest.mark.usefixtures("long_only"),
]

NUM_STREAMS = 20
NUM_LEAVING = 60
"""More than the two replicas run at once: some wait."""
NUM_DISCONNECTS = 300
OTHER = ModelUid("other")
TIMEOUT_SECONDS = 20.0

CountLive = Callable[[], Awaitable[int]]


@contextlib.asynccontextmanager
async def live_requests(guarded: GuardedCluster) -> AsyncIterator[CountLive]:
    """Give what counts the requests that run or wait on all replicas of the model."""
    assert guarded.cluster is not None
    async with contextlib.AsyncExitStack() as stack:
        connections = []
        for replica in (await guarded.cluster.model(MODEL)).replicas:
            assert replica.state is ReplicaState.READY
            assert replica.address is not None
            assert replica.instance is not None
            connection = await ReplicaConnection.open(
                replica.address,
                instance=replica.instance,
                key=instance_key(KEY.encode(), replica.instance),
                role="gateway",
                timeout_seconds=5.0,
            )
            stack.push_async_callback(connection.aclose)
            connections.append(connection)

        async def count() -> int:
            loads = [await connection.ping(5.0) for connection in connections]
            return int(
                sum(load.counters["num_running"] + load.counters["num_waiting"] for load in loads)
            )

        yield count


def endless() -> GenerationRequest:
    return GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text="count"),
        sampling=SamplingParams(max_tokens=NUM_TOKENS),
    )


@contextlib.asynccontextmanager
async def calling(guarded: GuardedCluster) -> AsyncIterator[asyncio.subprocess.Process]:
    """Give another gateway, a process that has begun its requests."""
    sockets = guarded.home / "caller"
    sockets.mkdir()
    caller = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.faults.caller",
        (guarded.home / "supervisor.address").read_text(),
        str(sockets),
        str(NUM_STREAMS),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        assert caller.stdout is not None
        assert await caller.stdout.readline() == b"begun\n"
        yield caller
    finally:
        if caller.returncode is None:
            caller.kill()
        await caller.communicate()


async def test_the_requests_of_a_killed_gateway_are_aborted(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    async with calling(guarded) as caller, live_requests(guarded) as count:
        trial = await Trial.begin(guarded, {MODEL: 2})
        assert await count() >= NUM_STREAMS
        trial.fault_at = time.monotonic()
        caller.kill()
        # Of the load, a few run at any time.
        seconds = await seconds_until(count, trial.fault_at, at_most=NUM_STREAMS // 2)

    assert seconds < 1.0
    outcome = await trial.end(
        row="F22",
        fault="SIGKILL of one of two gateways, with 20 streams",
        bounds=Bounds(good=0.5),
        slack=1.0,
        note=f"they are aborted in the engines after {seconds:.2f} s, the other gateway's go on",
    )
    record_fault(outcome)


async def seconds_until(count: CountLive, since: float, *, at_most: int) -> float:
    deadline = since + TIMEOUT_SECONDS
    while await count() > at_most:
        assert time.monotonic() < deadline, "requests of one who is gone run on"
        await asyncio.sleep(0.002)
    return time.monotonic() - since


async def test_what_is_left_by_its_caller_ends_whether_it_runs_or_waits(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 2}, load_of=None)
    streams = [await cluster.generate(MODEL, endless()) for _ in range(NUM_LEAVING)]
    async with live_requests(guarded) as count:
        assert await count() == NUM_LEAVING
        started = time.monotonic()
        await asyncio.gather(*(stream.aclose() for stream in streams))
        seconds = await seconds_until(count, started, at_most=0)

    assert seconds < 0.5
    outcome = await trial.end(
        row="F26",
        fault=f"{NUM_LEAVING} requests are left by their callers at once, half of them wait",
        note=f"none is in an engine after {1000 * seconds:.0f} ms",
    )
    record_fault(outcome)


async def test_callers_of_a_hung_replica_can_leave_and_nobody_waits_for_it(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(uid=OTHER), wait_ready=True)
    (hung,) = guarded.replicas()
    await cluster.launch(spec(replica=2), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 2, OTHER: 1})

    os.kill(hung, signal.SIGSTOP)
    callers = [
        asyncio.create_task(cluster.generate(OTHER, endless())) for _ in range(NUM_DISCONNECTS)
    ]
    staying = asyncio.create_task(cluster.generate(OTHER, endless()))
    await asyncio.sleep(0.2)  # for them to be sent
    left_at = time.monotonic()
    for caller in callers:
        caller.cancel()
    await asyncio.gather(*callers, return_exceptions=True)
    seconds = time.monotonic() - left_at
    os.kill(hung, signal.SIGKILL)
    with contextlib.suppress(XinferenceError):  # it is served by the next one, or told why not
        async with asyncio.timeout(TIMEOUT_SECONDS):
            await (await staying).aclose()

    assert seconds < 0.5
    outcome = await trial.end(
        row="F27",
        fault=f"{NUM_DISCONNECTS} callers of a stopped replica leave, then it is killed",
        bounds=Bounds(detected=4.0, good=0.5, whole=4.0),
        slack=1.0,
        note=f"they are gone after {1000 * seconds:.0f} ms; the load is on another model",
    )
    record_fault(outcome)
    await until_answered(cluster, model=OTHER)


async def test_a_launch_is_cancelled_in_time_wherever_it_is(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 2})

    seconds = []
    for is_process_there in (False, True):
        launching = asyncio.create_task(cluster.launch(spec(HANGS, uid=OTHER), wait_ready=True))
        if is_process_there:
            await until(lambda: len(guarded.replicas()) == 3, "it starts")
            await until_loading(guarded)
        else:
            await until_known(guarded)
        started = time.monotonic()
        await cluster.cancel_launch(OTHER)
        seconds.append(time.monotonic() - started)
        with pytest.raises(LaunchCancelled):
            await launching
        assert len(guarded.replicas()) == 2
    await cluster.launch(spec(uid=OTHER), wait_ready=True)
    await until_answered(cluster, model=OTHER)
    await cluster.terminate(OTHER)

    assert max(seconds) < 5.0
    outcome = await trial.end(
        row="F28",
        fault="a launch is cancelled while its process starts, and while it loads",
        bounds=Bounds(good=0.5),
        slack=1.0,
        note=f"it is gone after {seconds[0]:.2f} s and {seconds[1]:.2f} s, and can be made again",
    )
    record_fault(outcome)


async def until_known(guarded: GuardedCluster) -> None:
    assert guarded.cluster is not None
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            if OTHER in {one.model_uid for one in await guarded.cluster.models()}:
                return
            await asyncio.sleep(0.005)


async def until_loading(guarded: GuardedCluster) -> None:
    assert guarded.cluster is not None
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while True:
            if (await guarded.cluster.launch_progress(OTHER)).stage == "loading":
                return
            await asyncio.sleep(0.005)
