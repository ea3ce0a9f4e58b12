# SPDX-License-Identifier: Apache-2.0
"""What happens to a cluster of real processes, and to those who ask it, at each fault.

Two replicas that count, under load. Whatever happens, no request hangs, no answer is wrong, and
in the end the same two replicas are wanted and ready. `--long` runs every row and writes
`doc/operations/faults.md`; else a few run.
"""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.cluster.test_processes import MODEL, GuardedCluster, guarded, spec
from tests.fakes.replica import POISON
from tests.faults.load import Load
from xinference.errors import RequestCrashesModel, XinferenceError
from xinference.identifiers import new_request_id
from xinference.protocol.deployment import ReplicaState
from xinference.protocol.generation import GenerationRequest, SamplingParams, TextPrompt

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PAGE = Path(__file__).parents[2] / "doc" / "operations" / "faults.md"
NUM_WARM = 20
"""Requests that are answered before the fault."""
PAUSE_SECONDS = 3.0
AFTER_SECONDS = 2.0
TIMEOUT_SECONDS = 60.0

Inject = Callable[[GuardedCluster], Awaitable[None]]


@dataclass(frozen=True)
class Row:
    """A fault, and what users may notice of it."""

    name: str
    what: str
    inject: Inject
    good_seconds: float
    """From the fault to the first good answer to a request that was sent after it."""
    whole_seconds: float
    """From the fault until both replicas are ready again."""
    is_quick: bool = False
    may_fail_with: frozenset[str] = frozenset()
    """Error codes that users may get while nothing is there to serve them."""


async def kill_replica(guarded: GuardedCluster) -> None:
    os.kill(guarded.replicas()[0], signal.SIGKILL)


async def stop_replica(guarded: GuardedCluster) -> None:
    os.kill(guarded.replicas()[0], signal.SIGSTOP)


async def kill_both_replicas(guarded: GuardedCluster) -> None:
    for pid in guarded.replicas():
        os.kill(pid, signal.SIGKILL)


async def poison(guarded: GuardedCluster) -> None:
    assert guarded.cluster is not None
    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text=POISON),
        sampling=SamplingParams(max_tokens=1),
    )
    with pytest.raises(RequestCrashesModel):
        await guarded.cluster.generate(MODEL, request)


def to_role(name: str, number: int) -> Inject:
    async def inject(guarded: GuardedCluster) -> None:
        os.kill(guarded.role(name), number)

    return inject


async def pause_worker(guarded: GuardedCluster) -> None:
    os.kill(guarded.role("worker"), signal.SIGSTOP)
    await asyncio.sleep(PAUSE_SECONDS)  # how long it is silent is the fault
    os.kill(guarded.role("worker"), signal.SIGCONT)


NOTHING_THERE = frozenset({"model_not_ready"})

ROWS = [
    Row("F02, F03", "SIGKILL of one of two replicas", kill_replica, 1.0, 10.0, is_quick=True),
    Row(
        "F04",
        "SIGKILL of all replicas at once",
        kill_both_replicas,
        10.0,
        15.0,
        may_fail_with=NOTHING_THERE,
    ),
    Row("F05", "SIGSTOP of one of two replicas", stop_replica, 1.0, 20.0),
    Row(
        "F12",
        "a request that crashes every replica it meets",
        poison,
        10.0,
        15.0,
        may_fail_with=NOTHING_THERE,
    ),
    Row(
        "F13", "SIGKILL of the worker", to_role("worker", signal.SIGKILL), 1.0, 15.0, is_quick=True
    ),
    Row("F15", "SIGSTOP of the worker for 3 s", pause_worker, 1.0, 15.0),
    Row("F18", "SIGKILL of the supervisor", to_role("supervisor", signal.SIGKILL), 1.0, 15.0),
]
RESULTS: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def page(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    if request.config.getoption("--long") and len(RESULTS) == len(ROWS):
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(HEAD + "\n".join(RESULTS) + "\n" + FOOT)


@pytest.mark.parametrize("row", ROWS, ids=[row.name for row in ROWS])
async def test_a_fault_costs_users_no_more_than_it_must(
    row: Row, guarded: GuardedCluster, is_long: bool
) -> None:
    if not (row.is_quick or is_long):
        pytest.skip("run by --long")
    cluster = await guarded.start()
    await cluster.launch(replace(spec(), replica=2), wait_ready=True)
    load = Load(cluster, MODEL)
    load.start()
    await load.wait_good(NUM_WARM)

    fault_at = time.monotonic()
    await row.inject(guarded)
    whole = await seconds_until_whole(guarded, fault_at)
    await asyncio.sleep(AFTER_SECONDS)  # the load goes on: what comes late is seen too
    await load.stop()

    good = load.seconds_until_good(fault_at)
    routing = cluster.routing()
    num_left = len(guarded.replicas()) - 2
    RESULTS.append(
        f"| {row.name} | {row.what} | {good:.2f} | {whole:.2f} | {len(load.sent)} | "
        f"{told(load.failures())} | {routing.num_retried} | {routing.num_continued} | "
        f"{load.count('hung')} | {load.count('wrong')} | {num_left} |"
    )
    print(RESULTS[-1])  # noqa: T201  # shown by pytest -s and when it fails
    assert load.count("hung") == 0
    assert load.count("wrong") == 0
    assert num_left == 0
    assert good <= row.good_seconds
    assert whole <= row.whole_seconds
    assert load.failures().keys() <= row.may_fail_with


def told(failures: dict[str, int]) -> str:
    return ", ".join(f"{count} × `{code}`" for code, count in failures.items()) or "0"


def is_stopped(pid: int) -> bool:
    return b") T " in Path(f"/proc/{pid}/stat").read_bytes()


async def seconds_until_whole(guarded: GuardedCluster, since: float) -> float:
    """Return how long after the fault both replicas are known to be ready, each by one process."""
    assert guarded.cluster is not None
    deadline = time.monotonic() + TIMEOUT_SECONDS
    await asyncio.sleep(0.5)  # what the fault does is seen by now, but for silence
    while True:
        try:
            status = await guarded.cluster.model(MODEL)
            are_ready = [one.state for one in status.replicas] == [ReplicaState.READY] * 2
            pids = guarded.replicas()
            if are_ready and len(pids) == 2 and not any(map(is_stopped, pids)):
                return time.monotonic() - since
        except (XinferenceError, OSError):
            pass
        assert time.monotonic() < deadline, "the cluster did not become whole"
        await asyncio.sleep(0.05)


COLUMNS = (
    "row",
    "fault",
    "first good",
    "whole",
    "requests",
    "failed",
    "retried",
    "continued",
    "hung",
    "wrong",
    "processes left",
)
HEAD = f"""# Faults, and what users notice of them

Written by `pytest tests/faults --long`: real processes on one host, two replicas of a model that
counts (2 ms a token, loads at once), 25 requests a second of 40 tokens, half of them streamed.
*First good* is from the fault to the first answer to a request that was sent after it, *whole*
until both replicas are ready again, looked at from 0.5 s on; both in seconds. *Failed* is the
errors that users got, by code: a 503 with `Retry-After` while nothing was there to serve them.
*Retried* and *continued* are requests that were sent again, and streams that went on at the other
replica; nobody noticed.

| {" | ".join(COLUMNS)} |
|{"---|" * len(COLUMNS)}
"""
FOOT = """
Rows that other tests run, with their bounds: power cut, guardian killed, orphans swept
(`tests/cluster/test_processes.py`); rolling restart, adoption, silence of a node
(`tests/cluster/test_state.py`); stuck engines and long prompts (`tests/cluster/test_liveness.py`);
ejection and probing (`tests/cluster/test_routing.py`).
"""
