# SPDX-License-Identifier: Apache-2.0
"""A wall clock that is set an hour forward and back: nothing that waits or expires goes by it."""

import asyncio
from dataclasses import replace
from pathlib import Path

from tests.cluster.guarded_cluster import MODEL, spec, until
from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from xinference.cluster.messages import InstanceState
from xinference.cluster.state.records import Moment
from xinference.cluster.supervisor import system_clock
from xinference.protocol.deployment import ModelState
from xinference.protocol.nodes import NodeState

HOUR = 3600
LEASE_SHARE_SECONDS = 0.5
"""A few dozen heartbeats and ticks."""


async def test_f39_steps_of_the_wall_clock_change_nothing(tmp_path: Path) -> None:
    offsets = [0]

    def clock() -> Moment:
        now = system_clock()
        return replace(now, unix=now.unix + offsets[-1])

    local = LocalCluster(tmp_path, new_replica=ScriptedReplica, clock=clock)
    supervisor = await local.start_supervisor()
    worker = await local.start_worker()
    await worker.joined.wait()
    await supervisor.launch(spec())
    await until(lambda: local.replicas, "its replica is there")
    local.replicas[0].move(InstanceState.READY)
    state = supervisor._state
    await until(lambda: state.model(MODEL).state is ModelState.READY, "it is ready")
    story, routes = state.story(MODEL), state.routes

    for offset in (HOUR, -HOUR, 0):
        offsets.append(offset)
        await asyncio.sleep(LEASE_SHARE_SECONDS)  # the fault lasts so long
        assert [node.state for node in state.nodes(now=clock())] == [NodeState.READY]
        assert state.story(MODEL) == story
        assert state.routes is routes
        (info,) = (await supervisor.info())[1].workers
        assert 0.0 <= info.seconds_since_report < HOUR / 2
    assert len(local.replicas) == 1
    local.replicas[0].move(InstanceState.EXITED)
    await local.close()
