# SPDX-License-Identifier: Apache-2.0
"""Whom the kernel ends when a host has no memory left, and what is told of it."""

import os
import sys
from pathlib import Path

import pytest

from tests.cluster.guarded_cluster import GuardedCluster, guarded, spec
from xinference.cluster.supervision import OomWatch

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


def score(pid: int) -> int:
    return int(Path(f"/proc/{pid}/oom_score_adj").read_text())


async def test_f35_a_replica_goes_before_a_gateway_and_that_before_what_holds_the_cluster(
    guarded: GuardedCluster,
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (replica,) = guarded.replicas()
    own = score(os.getpid())

    scores = [
        score(pid)
        for pid in (
            replica,
            guarded.role("gateway"),
            guarded.role("worker"),
            guarded.role("supervisor"),
        )
    ]

    assert scores[:2] == [500, 100]
    # Who may not lower its score keeps that of whoever started it.
    assert scores[2:] == [-200, -400] or scores[2:] == [own, own]
    assert sorted(scores, reverse=True) == scores


def test_f35_a_kill_while_the_host_ran_out_of_memory_is_told_as_one(tmp_path: Path) -> None:
    counters = tmp_path / "vmstat"
    counters.write_text("pgfault 17\noom_kill 3\n")
    watch = OomWatch(counters)

    watch.look()
    assert not watch.has_killed()

    counters.write_text("pgfault 18\noom_kill 4\n")
    assert watch.has_killed()
    watch.look()
    assert not watch.has_killed()

    counters.unlink()
    assert not OomWatch(counters).has_killed()
