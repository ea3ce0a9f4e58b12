# SPDX-License-Identifier: Apache-2.0
"""The autostart list: what it launches, in which order, and when it leaves a model alone."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from tests.fakes.catalog import FAMILY
from xinference.cluster.messages import InstanceState
from xinference.cluster.state.autostart import Autostart
from xinference.cluster.supervisor import SupervisorActor
from xinference.errors import InvalidRequest, LoadFailed, ObjectNotFound
from xinference.identifiers import ModelUid
from xinference.protocol.autostart import AutostartEntry
from xinference.protocol.deployment import LaunchSpec, ModelState


def entry(uid: str, **options: Any) -> AutostartEntry:
    spec = LaunchSpec(model_uid=ModelUid(uid), model_name=options.pop("model_name", FAMILY))
    return AutostartEntry(launch=spec, **options)


class Models:
    """How models are, as a test says."""

    def __init__(self) -> None:
        self.states: dict[str, ModelState] = {}

    def __call__(self, uid: ModelUid) -> ModelState | None:
        return self.states.get(uid)


def test_one_model_at_a_time_is_launched_by_priority() -> None:
    states = Models()
    listed = Autostart([entry("c"), entry("b"), entry("a", priority=200), entry("z", priority=1)])
    order = []
    while (due := listed.due(states, now=0.0)) is not None:
        order.append(due.model_uid)
        listed.tried(due, now=0.0)
        states.states[due.model_uid] = ModelState.LOADING
        assert listed.due(states, now=0.0) is None, "the one before is still loading"
        states.states[due.model_uid] = ModelState.READY

    assert order == ["z", "b", "c", "a"]


def test_a_launch_is_tried_again_so_often_and_so_late_as_its_entry_says() -> None:
    states = Models()
    listed = Autostart([entry("a", max_retries=2, retry_interval_seconds=10.0)])
    launched = []
    for second in range(100):
        due = listed.due(states, now=float(second))
        if due is not None:
            launched.append(second)
            listed.tried(due, now=float(second), problem="" if second % 20 else "no such file")
            states.states["a"] = ModelState.ERROR

    assert launched == [0, 10, 20]
    (status,) = listed.statuses()
    assert (status.num_attempts, status.problem) == (3, "no such file")
    listed.set(entry("a", max_retries=0))
    assert listed.due(states, now=100.0) is not None, "another entry begins anew"


def test_a_model_that_ran_for_a_while_is_launched_again_when_it_is_given_up() -> None:
    states = Models()
    listed = Autostart([entry("a", max_retries=0)])
    for at in (0.0, 100.0, 200.0):
        due = listed.due(states, now=at)
        assert due is not None
        listed.tried(due, now=at)
        states.states["a"] = ModelState.READY
        assert listed.due(states, now=at + 50.0) is None
        states.states["a"] = ModelState.ERROR


def test_a_model_that_is_off_or_terminated_or_asleep_is_left_alone() -> None:
    states = Models()
    states.states["asleep"] = ModelState.ASLEEP
    listed = Autostart([entry("off", enabled=False), entry("gone"), entry("asleep")])
    listed.dismiss(ModelUid("gone"))

    assert listed.due(states, now=0.0) is None
    with pytest.raises(ObjectNotFound):
        listed.remove(ModelUid("unknown"))


@pytest.mark.parametrize(
    ("options", "field"),
    [({"max_retries": -1}, "max_retries"), ({"retry_interval_seconds": 0}, "retry_interval")],
)
def test_an_entry_that_cannot_be_is_refused(options: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest, match=field):
        entry("a", **options)
    with pytest.raises(InvalidRequest, match="model_uid"):
        AutostartEntry(launch=LaunchSpec(model_name=FAMILY))


async def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.01)


async def problems(supervisor: SupervisorActor) -> dict[str, str]:
    _, statuses = await supervisor.autostart()
    return {one.entry.model_uid: one.problem for one in statuses}


async def test_the_list_survives_a_restart_and_launches_what_does_not_run(tmp_path: Path) -> None:
    cluster = LocalCluster(tmp_path, new_replica=ScriptedReplica)
    supervisor = await cluster.start_supervisor()
    await supervisor.set_autostart(entry("good", retry_interval_seconds=0.01))
    await supervisor.set_autostart(entry("unknown", model_name="nobody-knows", priority=1))
    try:
        await cluster.start_worker()
        await until(lambda: cluster.replicas)
        cluster.replicas[0].move(
            InstanceState.EXITED, LoadFailed(model="good", problem="out of luck")
        )
        await until(lambda: len(cluster.replicas) == 2)
        cluster.replicas[1].move(InstanceState.READY)
        await until(lambda: supervisor._state.state_of(ModelUid("good")) is ModelState.READY)
        assert "nobody-knows" in (await problems(supervisor))["unknown"]

        await supervisor.terminate(ModelUid("good"))
        cluster.replicas[1].move(InstanceState.EXITED)
        await until(lambda: supervisor._state.state_of(ModelUid("good")) is None)
        supervisor._launch_next()
        assert len(cluster.replicas) == 2, "who terminates it means it"

        await supervisor.remove_autostart(ModelUid("unknown"))
        await cluster.kill("127.0.0.1:1000")
        supervisor = await cluster.start_supervisor()
        await until(lambda: len(cluster.replicas) == 3)
        assert set(await problems(supervisor)) == {"good"}
    finally:
        for replica in cluster.replicas:
            replica.ended.set()
        await cluster.close()
