# SPDX-License-Identifier: Apache-2.0
"""Whole hosts end, by accident or in order: the rows F20 to F25, F29 and F30 of the matrix."""

import asyncio
import os
import signal
import sys
import time
from pathlib import Path

import httpx
import psutil
import pytest

from tests.cluster.guarded_cluster import (
    MODEL,
    GuardedCluster,
    guarded,
    is_gone,
    spec,
    until,
    until_adopted,
    until_answered,
)
from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import started
from tests.fakes.replica import FORKS
from tests.faults.harness import Bounds, Footprint, Trial, num_files
from tests.faults.table import Outcome, RecordFault
from xinference.identifiers import new_request_id
from xinference.protocol.deployment import ReplicaState
from xinference.protocol.generation import GenerationRequest, SamplingParams, TextPrompt

__all__ = ["guarded"]

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc"),
    pytest.mark.usefixtures("long_only"),
]

DRAIN_SECONDS = 30.0
NUM_CALLERS = 4
WHOLE_TIMEOUT_SECONDS = 30.0


async def test_after_a_power_cut_everything_is_back_at_other_addresses(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start(num_workers=2)
    await cluster.launch(spec(replica=2), wait_ready=True)
    await cluster.launch(spec(uid="other"), wait_ready=True)
    nodes = {one.node for one in (await cluster.info()).workers}
    before = Footprint.of(guarded)

    await guarded.kill_all_but()
    started_at = time.monotonic()
    cluster = await guarded.start(num_workers=2)
    await until_answered(cluster)
    good = time.monotonic() - started_at
    trial = await Trial.begin(guarded, {MODEL: 2, "other": 1}, load_of=None)
    trial.fault_at = started_at
    trial.num_processes, trial.num_files = len(before.processes), before.num_files
    seen = await trial.end(row="F20, F21", fault="")

    assert nodes.isdisjoint(one.node for one in (await cluster.info()).workers)
    outcome = Outcome(
        row="F20, F21",
        fault="SIGKILL of everything on two hosts; both start again, at other ports",
        good_seconds=good,
        good_within=5.0,
        whole_seconds=max(good, seen.whole_seconds or 0.0),
        whole_within=6.0,
        failed={},
        note="from the moment on at which both are started",
    )
    record_fault(outcome)
    assert outcome.is_within_bounds()


async def test_a_killed_guardian_leaves_nothing(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    await fork(guarded)
    below = guarded.processes()[1:]
    await until(lambda: len(guarded.processes()) == len(below) + 1, "all are known")

    os.kill(guarded.guardian, signal.SIGKILL)
    killed_at = time.monotonic()
    await until(lambda: all(map(is_gone, below)), "everything ended")
    seconds = time.monotonic() - killed_at

    assert seconds < 1.0
    record_fault(
        Outcome(
            row="F23",
            fault="SIGKILL of the guardian, with two replicas and a process that one has forked",
            failed={},
            note=f"{len(below)} processes are gone after {seconds:.2f} s",
        )
    )


async def fork(guarded: GuardedCluster) -> None:
    """Let a replica start a process in a session of its own, and forget it."""
    assert guarded.cluster is not None
    num_before = len(guarded.processes())
    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text=FORKS),
        sampling=SamplingParams(max_tokens=1),
    )
    async for _ in await guarded.cluster.generate(MODEL, request):
        pass
    await until(lambda: len(guarded.processes()) > num_before, "it has forked")


@pytest.mark.parametrize("is_adopted", [False, True], ids=["own", "adopted"])
async def test_what_a_replica_has_forked_ends_with_it(
    guarded: GuardedCluster, record_fault: RecordFault, is_adopted: bool
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    if is_adopted:
        worker = guarded.role("worker")
        os.kill(worker, signal.SIGKILL)
        await until(lambda: guarded.find("worker") not in {None, worker}, "it is back")
        await until_adopted(cluster, times=2)
    trial = await Trial.begin(guarded, {MODEL: 2})
    await fork(guarded)

    trial.fault_at = time.monotonic()
    for pid in guarded.replicas():
        os.kill(pid, signal.SIGKILL)

    outcome = await trial.end(
        row="F25" if not is_adopted else "F25, F13",
        fault="SIGKILL of both replicas, one of which has forked a process in a session of its own"
        + (", and whose worker was killed before" if is_adopted else ""),
        bounds=Bounds(detected=0.2, good=2.0, whole=2.0),
        may_fail_with=frozenset({"model_not_ready"}),
        slack=1.0,
    )
    record_fault(outcome)


async def test_a_host_that_is_told_to_end_costs_nobody_anything(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start(num_workers=2)
    await cluster.launch(spec(replica=2), wait_ready=True)
    assert [len(host.replicas()) for host in guarded.hosts] == [1, 1]
    num_files_of_replica = 2  # its socket and its note
    trial = await Trial.begin(guarded, {MODEL: 2})
    trial.num_workers = 1
    trial.num_processes -= 2  # its guardian and its worker
    trial.num_files += num_files_of_replica - num_files(guarded.hosts[1])

    assert await guarded.hosts[1].stop() == 0
    seconds = time.monotonic() - trial.fault_at

    assert seconds < DRAIN_SECONDS + 1.0
    outcome = await trial.end(
        row="F29",
        fault="SIGTERM to one of two hosts, with a replica each",
        bounds=Bounds(good=0.5, whole=DRAIN_SECONDS),
        slack=1.0,
        note=f"it ended after {seconds:.1f} s",
    )
    record_fault(outcome)


async def test_every_worker_can_be_restarted_in_turn(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start(num_workers=2)
    await cluster.launch(spec(replica=2), wait_ready=True)
    before = set(guarded.replicas())
    trial = await Trial.begin(guarded, {MODEL: 2})

    for host in guarded.hosts:
        worker = host.role("worker")
        os.kill(worker, signal.SIGTERM)
        await until(
            lambda host=host, worker=worker: host.find("worker") not in {None, worker},
            "it is back",
            timeout_seconds=WHOLE_TIMEOUT_SECONDS,
        )
        await trial.whole(timeout_seconds=WHOLE_TIMEOUT_SECONDS)

    outcome = await trial.end(
        row="F30",
        fault="SIGTERM to each of two workers in turn, so that every replica is another process",
        bounds=Bounds(good=0.5, whole=WHOLE_TIMEOUT_SECONDS),
        slack=1.0,
    )
    record_fault(outcome)
    assert before.isdisjoint(guarded.replicas())
    states = [one.state for one in (await cluster.model(MODEL)).replicas]
    assert states == [ReplicaState.READY] * 2


async def test_every_gateway_can_be_restarted_in_turn(
    tmp_path: Path, record_fault: RecordFault
) -> None:
    body = {"model": GUIDE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 8}
    statuses: list[int | str] = []

    with started(tmp_path, "--api-workers", "2") as platform:
        launch_guide(platform)
        is_over = asyncio.Event()

        async def ask_until_over() -> None:
            while not is_over.is_set():
                # A connection for each, so that none is kept alive by a gateway that ends.
                async with httpx.AsyncClient(base_url=platform.endpoint, timeout=30) as client:
                    try:
                        answer = await client.post("/v1/chat/completions", json=body)
                        statuses.append(answer.status_code)
                    except httpx.HTTPError as error:
                        statuses.append(type(error).__name__)

        def gateways() -> list[int]:
            """Return the pids of those that take connections."""
            return [
                one.pid
                for one in platform.processes("xinference.cli.process")
                if "gateway" in one.cmdline()
                and any(found.status == psutil.CONN_LISTEN for found in one.net_connections("tcp"))
            ]

        callers = [asyncio.create_task(ask_until_over()) for _ in range(NUM_CALLERS)]
        begun_at = time.monotonic()
        for pid in gateways():
            os.kill(pid, signal.SIGTERM)
            await until(
                lambda pid=pid: pid not in gateways() and len(gateways()) == 2,
                "the gateway is back",
                timeout_seconds=WHOLE_TIMEOUT_SECONDS,
            )
            num_before = len(statuses)
            await until(lambda n=num_before: len(statuses) > n + 4 * NUM_CALLERS, "it serves")
        seconds = time.monotonic() - begun_at
        is_over.set()
        await asyncio.gather(*callers)

    failed = [str(status) for status in statuses if status != 200]
    record_fault(
        Outcome(
            row="F30, F22",
            fault="SIGTERM to each of two gateways in turn; requests by HTTP, a connection each",
            whole_seconds=seconds,
            num_requests=len(statuses),
            failed={kind: failed.count(kind) for kind in sorted(set(failed))},
        )
    )
    assert failed == []
