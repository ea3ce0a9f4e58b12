# SPDX-License-Identifier: Apache-2.0
"""Random histories of the real actors on the in-process bus, with a clock that is turned by hand.

The pure state has its own, many more, in `test_state.py`; here the shells around it are run:
commands that are told, reports that are sent, watches, epochs, the store.
"""

import asyncio
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.local_cluster import (
    SUPERVISOR_ADDRESS,
    LocalCluster,
    ScriptedReplica,
)
from tests.cluster.simulation import ManualClock
from tests.fakes.catalog import FAMILY
from xinference.cluster.messages import InstanceState
from xinference.cluster.state.cluster_state import RECOVERY_SECONDS
from xinference.cluster.state.observation import LEASE_SECONDS
from xinference.errors import ReplicaLost, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import LaunchSpec, ModelState, ReplicaPlacement, ReplicaState

WORKERS = ["127.0.0.1:2000", "127.0.0.1:2001"]
UIDS = ["a", "b"]
TIMEOUT_SECONDS = 10.0

ACTIONS = st.one_of(
    st.tuples(st.just("launch"), st.sampled_from(UIDS), st.integers(1, 2)),
    st.tuples(st.just("add replica"), st.sampled_from(UIDS)),
    st.tuples(st.just("remove replica"), st.sampled_from(UIDS), st.integers(0, 2)),
    st.tuples(st.just("terminate"), st.sampled_from(UIDS)),
    st.tuples(st.just("finish work")),
    st.tuples(st.just("kill replicas")),
    st.tuples(st.just("kill worker"), st.sampled_from(WORKERS)),
    st.tuples(st.just("start worker"), st.sampled_from(WORKERS)),
    st.tuples(st.just("restart supervisor")),
    st.tuples(st.just("cut"), st.sampled_from(WORKERS)),
    st.tuples(st.just("heal")),
    st.tuples(st.just("wait"), st.sampled_from([0.5, 3.0, 6.0])),
    st.tuples(st.just("breathe"), st.integers(1, 5)),
)


class History:
    """Two workers and a supervisor to which anything may happen."""

    def __init__(self, home: Path) -> None:
        self.clock = ManualClock()
        self.local = LocalCluster(
            home, new_replica=ScriptedReplica, clock=self.clock, heartbeat_seconds=0.001
        )

    async def run(self, actions: list[tuple[Any, ...]]) -> None:
        await self.local.start_supervisor(is_ticking=False)
        for address in WORKERS:
            await self.local.start_worker(address)
        try:
            for action in actions:
                await self.do(action)
            await self.check_at_rest()
        finally:
            for actor in self.living():
                actor.move(InstanceState.EXITED)
            await self.local.close()

    async def do(self, action: tuple[Any, ...]) -> None:
        supervisor = self.local.supervisor
        assert supervisor is not None
        match action:
            case ("launch", uid, replica):
                spec = LaunchSpec(model_uid=ModelUid(uid), model_name=FAMILY, replica=replica)
                await self.attempt(supervisor.launch(spec))
            case ("add replica", uid):
                await self.attempt(supervisor.add_replicas(ModelUid(uid), [ReplicaPlacement()]))
            case ("remove replica", uid, index):
                await self.attempt(supervisor.terminate_replica(ModelUid(uid), index))
            case ("terminate", uid):
                await self.attempt(supervisor.terminate(ModelUid(uid)))
            case ("finish work",):
                self.finish_work()
            case ("kill replicas",):
                for actor in self.living():
                    actor.move(
                        InstanceState.EXITED, ReplicaLost(model="m", problem="signal SIGKILL")
                    )
            case ("kill worker", address):
                await self.kill_worker(address)
            case ("start worker", address):
                if address not in self.local.workers:
                    await self.local.start_worker(address)
            case ("restart supervisor",):
                await self.local.kill(SUPERVISOR_ADDRESS)
                await self.local.start_supervisor(is_ticking=False)
            case ("cut", address):
                self.local.network.cut(SUPERVISOR_ADDRESS, address)
            case ("heal",):
                self.local.network.heal()
            case ("wait", seconds):
                self.clock.advance(seconds)
            case ("breathe", times):
                for _ in range(times):
                    await asyncio.sleep(0)
        if self.local.supervisor is not None:
            self.local.supervisor.reconcile()

    async def kill_worker(self, address: str) -> None:
        worker = self.local.workers.get(address)
        if worker is None:
            return
        killing = asyncio.ensure_future(self.local.kill(address))
        async with asyncio.timeout(TIMEOUT_SECONDS):
            # Why again and again: what was about to begin there begins while its tasks end.
            while not killing.done():
                mine = {report.instance for report in worker.report().instances}
                for actor in self.local.replicas:
                    if actor.report.instance in mine:
                        actor.ended.set()  # it goes with its worker, and nobody is told
                await asyncio.sleep(0)
        await killing

    @staticmethod
    async def attempt(work: Any) -> None:
        try:
            await work
        except XinferenceError:
            return

    def living(self) -> list[ScriptedReplica]:
        return [
            actor
            for actor in self.local.replicas
            if not actor.ended.is_set() and actor.report.state is not InstanceState.EXITED
        ]

    def finish_work(self) -> None:
        for actor in self.living():
            if actor.report.state is InstanceState.STOPPING:
                actor.move(InstanceState.EXITED)
            elif actor.report.state is not InstanceState.READY and actor._is_started:
                actor.move(InstanceState.READY)

    async def check_at_rest(self) -> None:
        """With the network whole and time passing, what runs becomes what is wanted."""
        self.local.network.heal()
        for address in WORKERS:
            if address not in self.local.workers:
                await self.local.start_worker(address)
        self.clock.advance(LEASE_SECONDS + RECOVERY_SECONDS)
        await self.until(self.is_at_rest, "it comes to rest")
        supervisor = self.local.supervisor
        assert supervisor is not None
        for uid in UIDS:
            await self.attempt(supervisor.terminate(ModelUid(uid)))
        await self.until(lambda: not self.living(), "everything is stopped")

    def is_at_rest(self) -> bool:
        supervisor = self.local.supervisor
        assert supervisor is not None
        models = supervisor._state.models()
        wanted = [
            replica.replica
            for one in models
            if one.state is not ModelState.ERROR
            for replica in one.replicas
            if replica.state is not ReplicaState.FAILED
        ]
        running = [actor.report.replica for actor in self.living()]
        is_quiet = all(one.state in {ModelState.READY, ModelState.ERROR} for one in models)
        return is_quiet and sorted(wanted) == sorted(running)

    async def until(self, condition: Any, what: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while not condition():
            assert time.monotonic() < deadline, f"not in time: {what}"
            self.finish_work()
            self.clock.advance(0.05)
            if self.local.supervisor is not None:
                self.local.supervisor.reconcile()
            await asyncio.sleep(0.001)


def run_history(actions: list[tuple[Any, ...]]) -> None:
    with TemporaryDirectory() as home:
        asyncio.run(History(Path(home)).run(actions))


def test_a_worker_dies_that_starts_again_what_was_killed_while_it_was_cut_off() -> None:
    cut = ("cut", "127.0.0.1:2001")
    run_history(
        [
            *(("wait", 0.5), cut, ("breathe", 2), ("launch", "a", 1), ("kill replicas",)),
            *(cut, ("finish work",), cut, ("breathe", 1), ("kill worker", "127.0.0.1:2000")),
        ]
    )


def test_the_actors_bring_any_history_to_rest(is_long: bool) -> None:
    @settings(
        max_examples=2000 if is_long else 25,
        deadline=None,
        derandomize=not is_long,
        suppress_health_check=list(HealthCheck),
    )
    @given(st.lists(ACTIONS, min_size=3, max_size=25))
    def run(actions: list[tuple[Any, ...]]) -> None:
        run_history(actions)

    run()
