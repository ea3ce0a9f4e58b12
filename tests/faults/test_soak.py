# SPDX-License-Identifier: Apache-2.0
"""Mixed load and random kills for half an hour: nobody hangs, nobody is told wrong, nothing grows.

Two gateways, two models with two replicas each, one of them the guide model on real engines; some
seconds after the cluster is whole the next process is killed. `--long` takes half an hour and
writes `doc/operations/soak.md`; else it takes 20 s, without the real model.
"""

import asyncio
import sys
import time
from collections.abc import Sequence

import pytest

from tests.cluster.guarded_cluster import MODEL, GuardedCluster, Host, guarded, spec, until_answered
from tests.e2e.platform import free_port
from tests.faults.load import GOLDEN, NUM_TOKENS
from tests.faults.soak import Asked, Callers, Growth, Killer, Watch
from tests.long_runs import ROOT, RecordLongRun, commit_of
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import LaunchSpec

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

PAGE = ROOT / "doc" / "operations" / "soak.md"
SEED = 20261
LONG_SECONDS = 1800.0
LONG_PAUSE_SECONDS = (10.0, 26.0)
"""Between kills; a replica that dies more often than five times in five minutes is given up."""
QUICK_SECONDS = 20.0
QUICK_PAUSE_SECONDS = (0.5, 1.5)
GUIDE = ModelUid("guide")
MAX_MIB_PER_HOUR = 8.0
"""In half an hour, less is not to be told from how an allocator breathes."""
MAX_DESCRIPTORS = 8
"""Connections that come and go while one looks."""
GATEWAY_SECONDS = 2.0
"""After its end, a connection that led to it may still be reset."""

COUNTING = Asked(
    model=MODEL,
    path="/v1/completions",
    body={"model": MODEL, "prompt": "count", "max_tokens": NUM_TOKENS},
    rate_per_second=8.0,
)
TALKING = Asked(
    model=GUIDE,
    path="/v1/chat/completions",
    body={
        "model": GUIDE,
        "messages": [{"role": "user", "content": "How do I launch a model?"}],
        "max_tokens": 24,
        "temperature": 0,
    },
    # Why so often: an engine takes memory over its first several hundred requests, and the first
    # half of the time is to be enough for them.
    rate_per_second=3.0,
    # Why: it takes more whenever it computes more at once than ever before. These are all that two
    # replicas compute at once, and as many again that wait.
    num_at_once=64,
)


@pytest.mark.timeout(LONG_SECONDS + 300)
async def test_nothing_hangs_fails_or_grows_while_processes_are_killed(
    guarded: GuardedCluster, is_long: bool, record_long_run: RecordLongRun
) -> None:
    port = free_port()
    await guarded.hosts[0].start(http_port=port, expected_workers=2 if is_long else 1)
    asked = [COUNTING]
    if is_long:
        guarded.hosts.append(Host(guarded.home / "host-1"))
        await guarded.start_host(1, replica_command=["-m", "xinference.cluster.replica"])
        asked.append(TALKING)
    cluster = await guarded.connect()
    first, *others = await nodes_of(guarded)
    await cluster.launch(launch_at(first, MODEL), wait_ready=True)
    if is_long:
        await cluster.launch(launch_at(others[0], GUIDE), wait_ready=True)
    await until_answered(cluster)

    seconds = LONG_SECONDS if is_long else QUICK_SECONDS
    callers = Callers(endpoint=f"http://127.0.0.1:{port}", seed=SEED)
    pause_seconds = LONG_PAUSE_SECONDS if is_long else QUICK_PAUSE_SECONDS
    killer = Killer(guarded, [one.model for one in asked], SEED, pause_seconds)
    watch = Watch(guarded)
    await callers.start(asked)
    assert callers.golden[MODEL] == GOLDEN
    watching = asyncio.create_task(watch.run())
    started_at = time.monotonic()
    await killer.run(started_at + seconds)
    await callers.stop()
    assert not watching.done(), watching
    watching.cancel()

    outcomes = callers.outcomes()
    growths = watch.growths()
    print(outcomes, killer.killed, *growths, sep="\n")  # noqa: T201  # shown when it fails
    lost = [one for one in callers.sent if one.outcome == "lost"]
    gateway_deaths = [at for at, victim in killer.killed if victim == "gateway"]
    if is_long:  # whatever is asserted below
        write_page(time.monotonic() - started_at, outcomes, killer, growths)
    record_long_run(
        "Soak under kills",
        seconds=round(time.monotonic() - started_at),
        requests=len(callers.sent),
        kills=len(killer.killed),
        lost_with_their_gateway=len(lost),
    )
    # Who asked a gateway that was killed has lost the connection. Nobody else has lost anything.
    assert outcomes.keys() <= {"good", "left", "lost"}, outcomes
    for one in lost:
        assert one.ended_at is not None
        assert any(
            one.sent_at <= at + GATEWAY_SECONDS and at <= one.ended_at for at in gateway_deaths
        )
    assert all(one.mib_per_hour < MAX_MIB_PER_HOUR for one in growths), growths
    assert all(abs(one.descriptors) <= MAX_DESCRIPTORS for one in growths)


async def nodes_of(guarded: GuardedCluster) -> list[str]:
    """Return the workers' addresses, in the order of the hosts."""
    assert guarded.cluster is not None
    known = {one.node for one in (await guarded.cluster.info()).workers}
    logs = [host.log.read_text() for host in guarded.hosts]
    return [next(node for node in known if f"Worker at {node}" in log) for log in logs]


def launch_at(node: str, model: ModelUid) -> LaunchSpec:
    """Return a launch of two replicas on one node."""
    base = spec(uid=model, replica=2)
    return LaunchSpec(
        model_uid=base.model_uid, model_name=base.model_name, replica=2, worker_ip=node
    )


def write_page(
    seconds: float, outcomes: dict[str, int], killer: Killer, growths: Sequence[Growth]
) -> None:
    """Write what a long run has seen."""
    victims = [victim for _, victim in killer.killed]
    kills = ", ".join(f"{victims.count(one)} × {one}" for one in sorted(set(victims)))
    ended = ", ".join(f"{number} {outcome}" for outcome, number in outcomes.items())
    lines = [
        HEAD,
        "| seconds | requests | ended | killed | date | commit |",
        "|---|---|---|---|---|---|",
        f"| {seconds:.0f} | {sum(outcomes.values())} | {ended} | {kills} | "
        f"{time.strftime('%Y-%m-%d')} | {commit_of(besides=PAGE)} |",
        "",
        "| process | seconds watched | MiB in the end | MiB an hour | open files more |",
        "|---|---|---|---|---|",
        *(
            f"| {one.name} | {one.seconds:.0f} | {one.mib:.1f} | {one.mib_per_hour:+.2f} | "
            f"{one.descriptors:+d} |"
            for one in growths
        ),
        "",
    ]
    PAGE.write_text("\n".join(lines))


HEAD = f"""# Half an hour of load and kills

Written by `pytest tests/faults/test_soak.py --long`, seed {SEED}: two gateways on one port, two
workers, two replicas each of a model that counts and of the guide model. Half of the requests are
streamed, some of those are left by their callers halfway. One process after another is killed, each
when all that was killed before is back: of each kind the first one, so that the second can be
watched. *good* is an answer that is the same, token by token, as that of the first request; *left*
is by the caller, as planned; *lost* is with the connection to a gateway that was killed, and nobody
else's. Nothing hung, nothing was wrong, no other error was told.

*MiB an hour* is the slope of a process's own memory over the second half of its life, in which it
is to be level: at most {MAX_MIB_PER_HOUR:g} MiB an hour, and that is what an allocator's breath
amounts to. An engine takes memory over its first several hundred requests, which is the first half,
and whenever it computes more at once than ever before: it is asked as much as it can be at first.
"""
