# SPDX-License-Identifier: Apache-2.0
"""What happens to a cluster of real processes, and to those who ask it, when a process fails.

The rows F01 to F15 and F18 of the matrix. Whatever happens, no request hangs, no answer is wrong,
and in the end what is wanted is there, once. `--long` runs every row, with its bounds, and writes
`doc/operations/faults.md`; else a few run.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.cluster.guarded_cluster import (
    MODEL,
    GuardedCluster,
    ask,
    guarded,
    spec,
    until,
    until_answered,
)
from tests.fakes.replica import (
    BLOCKS,
    DIES_IF,
    FAILS,
    HAS_CHILD,
    POISON,
    PREFILL_SECONDS,
    PREFILLS,
    SLOW,
    STICKS,
)
from tests.faults.harness import NOTHING_THERE, SLACK, Bounds, Trial
from tests.faults.table import RecordFault
from xinference.cluster.supervision import PLATFORM
from xinference.errors import LoadFailed, ModelNotReady, RequestCrashesModel
from xinference.identifiers import ModelUid, new_request_id
from xinference.protocol.deployment import ModelState, ReplicaPlacement, ReplicaState
from xinference.protocol.generation import GenerationRequest, SamplingParams, TextPrompt

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PAUSE_SECONDS = 3.0
ALONE_SECONDS = 1.5
LOAD_SECONDS = 5.0
"""Of a model that loads slowly."""
OTHER = ModelUid("other")

Inject = Callable[[GuardedCluster], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    """A fault that is done in a moment, and what users may notice of it."""

    name: str
    what: str
    inject: Inject
    bounds: Bounds
    num_replicas: int = 2
    num_workers: int = 1
    is_idle: bool = False
    is_quick: bool = False
    path: str | None = None
    may_fail_with: frozenset[str] = field(default=frozenset())


async def kill_replica(guarded: GuardedCluster) -> None:
    os.kill(guarded.replicas()[0], signal.SIGKILL)


async def stop_replica(guarded: GuardedCluster) -> None:
    os.kill(guarded.replicas()[0], signal.SIGSTOP)


async def kill_every_replica(guarded: GuardedCluster) -> None:
    for pid in guarded.replicas():
        os.kill(pid, signal.SIGKILL)


async def kill_child_of_replica(guarded: GuardedCluster) -> None:
    (child,) = PLATFORM.children_of(guarded.replicas()[0])
    os.kill(child, signal.SIGKILL)


async def poison(guarded: GuardedCluster) -> None:
    with pytest.raises(RequestCrashesModel):
        await tell(guarded, POISON)


def to_role(name: str, number: int) -> Inject:
    async def inject(guarded: GuardedCluster) -> None:
        os.kill(guarded.role(name), number)

    return inject


async def kill_worker_of_second_host(guarded: GuardedCluster) -> None:
    os.kill(guarded.hosts[1].role("worker"), signal.SIGKILL)


async def pause_worker(guarded: GuardedCluster) -> None:
    os.kill(guarded.role("worker"), signal.SIGSTOP)
    await asyncio.sleep(PAUSE_SECONDS)  # how long it is silent is the fault
    os.kill(guarded.role("worker"), signal.SIGCONT)


async def tell(guarded: GuardedCluster, prompt: str, *, model: ModelUid = MODEL) -> None:
    """Send a prompt that a replica obeys, and leave the request once it is accepted."""
    assert guarded.cluster is not None
    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text=prompt),
        sampling=SamplingParams(max_tokens=10),
    )
    stream = await guarded.cluster.generate(model, request)
    await stream.aclose()


ROWS = [
    Row(
        "F01",
        "SIGKILL of the only replica of a model that nobody asks",
        kill_replica,
        Bounds(detected=0.1, whole=1.5),
        num_replicas=1,
        is_idle=True,
    ),
    Row(
        "F02, F03",
        "SIGKILL of one of two replicas",
        kill_replica,
        Bounds(detected=0.2, good=0.5, whole=2.0),
        is_quick=True,
    ),
    Row(
        "F04",
        "SIGKILL of both replicas at once",
        kill_every_replica,
        Bounds(detected=0.2, good=2.0, whole=2.0),
        may_fail_with=NOTHING_THERE,
    ),
    Row(
        "F05",
        "SIGSTOP of one of two replicas",
        stop_replica,
        Bounds(detected=4.0, good=1.0, whole=6.0),
    ),
    Row(
        "F12",
        "a request that crashes every replica it meets, of three; it ends with 422",
        poison,
        Bounds(detected=0.2, good=0.5, whole=5.0),
        num_replicas=3,
    ),
    Row(
        "F13",
        "SIGKILL of the worker; its replicas serve on and are adopted",
        to_role("worker", signal.SIGKILL),
        Bounds(detected=0.2, good=0.5, whole=5.0),
        is_quick=True,
    ),
    Row(
        "F14",
        "SIGKILL of one of two workers, with a replica each",
        kill_worker_of_second_host,
        Bounds(detected=0.2, good=0.5, whole=5.0),
        num_workers=2,
    ),
    Row(
        "F15",
        "SIGSTOP of the worker for 3 s",
        pause_worker,
        Bounds(detected=3.0, good=0.5, whole=5.0),
    ),
    Row(
        "F18",
        "SIGKILL of the supervisor; nothing is loaded again",
        to_role("supervisor", signal.SIGKILL),
        Bounds(detected=0.2, good=0.5, whole=5.0),
    ),
    Row(
        "F24",
        "SIGKILL of the child that is a replica's engine",
        kill_child_of_replica,
        Bounds(detected=0.5, good=0.5, whole=2.0),
        path=HAS_CHILD,
    ),
]


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_a_fault_costs_users_no_more_than_it_must(
    row: Row, guarded: GuardedCluster, is_long: bool, record_fault: RecordFault
) -> None:
    if not (row.is_quick or is_long):
        pytest.skip("run by --long")
    cluster = await guarded.start(num_workers=row.num_workers)
    await cluster.launch(spec(row.path, replica=row.num_replicas), wait_ready=True)
    replicas = guarded.replicas()
    trial = await Trial.begin(
        guarded, {MODEL: row.num_replicas}, load_of=None if row.is_idle else MODEL
    )

    await row.inject(guarded)

    outcome = await trial.end(
        row=row.name,
        fault=row.what,
        bounds=row.bounds,
        may_fail_with=row.may_fail_with,
        slack=1.0 if is_long else SLACK,
    )
    record_fault(outcome)
    if row.name in {"F13", "F14", "F15", "F18"}:
        assert sorted(guarded.replicas()) == sorted(replicas)  # nothing was loaded again


@pytest.mark.usefixtures("long_only")
async def test_a_replica_that_blocks_everything_in_it_blocks_nobody_else(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    replicas = set(guarded.replicas())
    trial = await Trial.begin(guarded, {MODEL: 2})

    await tell(guarded, BLOCKS)
    started = time.monotonic()
    await cluster.launch(spec(uid=OTHER), wait_ready=True)
    assert await ask(cluster, model=OTHER) == " 1 2 3"
    await cluster.terminate(OTHER)
    seconds = time.monotonic() - started

    assert seconds < 4.0
    await until(lambda: set(guarded.replicas()) - replicas, "it is replaced")
    outcome = await trial.end(
        row="F06",
        fault="a replica holds the interpreter's lock for 15 s",
        bounds=Bounds(detected=5.0, good=1.0, whole=16.0),
        slack=1.0,
        note=f"meanwhile another model is launched, asked and terminated in {seconds:.1f} s",
    )
    record_fault(outcome)


@pytest.mark.usefixtures("long_only")
async def test_an_engine_that_is_stuck_is_replaced_and_its_log_says_where(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    replicas = set(guarded.replicas())
    # What it has when it sticks waits until it is replaced.
    trial = await Trial.begin(guarded, {MODEL: 2}, deadline_seconds=45.0)

    await tell(guarded, STICKS)
    await until(lambda: set(guarded.replicas()) - replicas, "it is replaced", timeout_seconds=40.0)

    outcome = await trial.end(
        row="F07",
        fault="an engine with work finishes no step any more; its process answers",
        bounds=Bounds(detected=12.0, good=1.0, whole=35.0),
        slack=1.0,
        note="its threads are in the log",
    )
    record_fault(outcome)
    logs = "".join(path.read_text() for path in guarded.home.rglob("*.log"))
    assert "Fatal Python error: Aborted" in logs


@pytest.mark.usefixtures("long_only")
async def test_a_long_prefill_is_left_alone(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    before = guarded.replicas()
    trial = await Trial.begin(guarded, {MODEL: 2}, load_of=None)

    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text=PREFILLS),
        sampling=SamplingParams(max_tokens=3),
    )
    events = [event async for event in await cluster.generate(MODEL, request)]

    outcome = await trial.end(
        row="F08",
        fault=f"a prefill of {PREFILL_SECONDS:.0f} s, chunk after chunk",
        note="it is not disturbed",
    )
    record_fault(outcome)
    assert len(events) == 4
    assert trial.is_undetected
    assert guarded.replicas() == before


@pytest.mark.usefixtures("long_only")
async def test_a_replica_that_dies_at_each_load_is_given_up_and_can_be_had_back(
    guarded: GuardedCluster, record_fault: RecordFault, tmp_path: Path
) -> None:
    switch = tmp_path / "die"
    cluster = await guarded.start()
    await cluster.launch(spec(f"{DIES_IF}{switch}", replica=2), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 2})
    trial.wanted[MODEL] = [ReplicaState.FAILED, ReplicaState.READY]
    trial.num_processes -= 1
    trial.num_files -= 2  # its socket and its note

    switch.touch()
    await kill_replica(guarded)

    outcome = await trial.end(
        row="F09",
        fault="a replica is killed, and ends at each load from then on; it is FAILED after five",
        bounds=Bounds(detected=0.2, good=0.5, whole=25.0),
        slack=1.0,
    )
    status = await cluster.model(MODEL)
    (failed,) = [one for one in status.replicas if one.state is ReplicaState.FAILED]
    assert status.state is ModelState.READY
    assert failed.num_restarts == 5
    assert "6 times within 300 s" in failed.error_message
    assert "exit status 1" in failed.error_message
    share = await cpu_share(guarded)
    assert share < 0.02
    record_fault(outcome)

    switch.unlink()
    await cluster.terminate_replica(MODEL, failed.replica.index)
    await cluster.add_replicas(MODEL, [ReplicaPlacement()])
    states = [one.state for one in (await cluster.model(MODEL)).replicas]
    assert states == [ReplicaState.READY] * 2


async def cpu_share(guarded: GuardedCluster) -> float:
    """Return which part of one core the cluster takes when nobody asks it."""

    def ticks() -> int:
        stats = [Path(f"/proc/{pid}/stat").read_text() for pid in guarded.processes()]
        return sum(sum(map(int, stat.rpartition(")")[2].split()[11:13])) for stat in stats)

    before, started = ticks(), time.monotonic()
    await asyncio.sleep(5.0)  # what it takes in a while is the question
    return (ticks() - before) / os.sysconf("SC_CLK_TCK") / (time.monotonic() - started)


@pytest.mark.usefixtures("long_only")
async def test_a_model_that_does_not_load_harms_nobody_and_can_be_launched_again(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(replica=2), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 2})

    with pytest.raises(LoadFailed):
        await cluster.launch(spec(FAILS, uid=OTHER), wait_ready=True)
    seconds = time.monotonic() - trial.fault_at
    await until_refused(guarded)
    await cluster.launch(spec(uid=OTHER), wait_ready=True)
    assert await ask(cluster, model=OTHER) == " 1 2 3"
    await cluster.terminate(OTHER)

    assert seconds < 2.0
    outcome = await trial.end(
        row="F10",
        fault="a launch whose load fails",
        bounds=Bounds(good=0.5),
        slack=1.0,
        note=f"its caller knows after {seconds:.1f} s, and can launch it again",
    )
    record_fault(outcome)


async def until_refused(guarded: GuardedCluster) -> None:
    """Ask until the gateway knows, too, that the model is not going to be there."""
    assert guarded.cluster is not None
    async with asyncio.timeout(1.0):
        while True:
            try:
                await ask(guarded.cluster, model=OTHER)
            except ModelNotReady:
                await asyncio.sleep(0.005)
            except LoadFailed:
                return


@pytest.mark.usefixtures("long_only")
async def test_a_quick_model_does_not_wait_for_a_slow_one(
    guarded: GuardedCluster, record_fault: RecordFault
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    await cluster.launch(spec(f"{SLOW}{LOAD_SECONDS}", uid=OTHER), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 1, OTHER: 1})

    await kill_every_replica(guarded)

    outcome = await trial.end(
        row="F11",
        fault="two models die at once; one of them loads for 5 s, the other is asked",
        bounds=Bounds(detected=0.2, good=1.5, whole=LOAD_SECONDS + 2.0),
        may_fail_with=NOTHING_THERE,
        slack=1.0,
    )
    record_fault(outcome)
    await until_answered(cluster, model=OTHER)


async def test_a_worker_without_a_supervisor_starts_again_what_dies(
    guarded: GuardedCluster, record_fault: RecordFault, is_long: bool
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (before,) = (await cluster.model(MODEL)).replicas
    (first,) = guarded.replicas()
    trial = await Trial.begin(guarded, {MODEL: 1})
    supervisor, log = guarded.role("supervisor"), guarded.hosts[0].log
    os.kill(supervisor, signal.SIGSTOP)
    await until(lambda: "looking for it" in log.read_text(), "the worker has noticed")

    trial.fault_at = time.monotonic()
    os.kill(first, signal.SIGKILL)
    await until(lambda: set(guarded.replicas()) - {first}, "it is started again")
    assert trial.load is not None
    await trial.load.wait_good_since(trial.fault_at)
    seconds = trial.load.seconds_until_good(trial.fault_at)
    os.kill(supervisor, signal.SIGCONT)

    assert seconds < ALONE_SECONDS * (1.0 if is_long else SLACK)
    outcome = await trial.end(
        row="F19",
        fault="the only replica is killed while the supervisor is stopped",
        bounds=Bounds(good=ALONE_SECONDS),
        slack=1.0 if is_long else SLACK,
        note="its worker starts it again, as the same instance; nobody else is needed for it",
    )
    record_fault(outcome)
    (after,) = (await cluster.model(MODEL)).replicas
    assert (after.instance, after.address) == (before.instance, before.address)
