# SPDX-License-Identifier: Apache-2.0
"""Random histories of the pure cluster state: whatever happens, it comes to rest as is wanted.

Hypothesis finds and shrinks in CI; under `--long` a plain generator with seeds runs a hundred
thousand. The real actors have their own histories in `test_histories.py`.
"""

import contextlib
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.cluster.simulation import SimulatedCluster, SimulatedWorker
from tests.long_runs import RecordLongRun
from xinference.cluster.messages import InstanceState
from xinference.cluster.state.cluster_state import RECOVERY_SECONDS
from xinference.cluster.state.observation import LEASE_SECONDS
from xinference.cluster.state.records import Effect, Tell
from xinference.errors import (
    InsufficientResources,
    InvalidRequest,
    ModelAlreadyExists,
    ModelNotFound,
    ModelNotReady,
)
from xinference.identifiers import InstanceId, ModelUid, NodeId
from xinference.protocol.deployment import ModelState, ReplicaState

NUM_SHARES = 10
UIDS = ("a", "b", "c")
WORKERS = (0, 1, 2)

# What may happen, with what it is given.
ACTIONS: tuple[tuple[Any, ...], ...] = (
    ("launch", UIDS, (1, 2, 3)),
    ("add replica", UIDS),
    ("remove replica", UIDS, (0, 1, 2, 3)),
    ("terminate", UIDS),
    ("sleep", UIDS),
    ("wake", UIDS),
    ("report", WORKERS),
    ("late report", WORKERS),
    ("beat", WORKERS),
    ("move", WORKERS, tuple(InstanceState)),
    ("reconcile", (True, False)),
    ("replay", tuple(range(11))),
    ("restart alone", WORKERS),
    ("kill worker", WORKERS, (True, False)),
    ("replace worker", WORKERS, (True, False)),
    ("leave", WORKERS),
    ("stop leaving", WORKERS),
    ("restart supervisor",),
    ("wait", (0.1, 1.0, 3.0, 6.0, 61.0)),
)

HISTORIES = st.one_of(
    *(st.tuples(st.just(name), *map(st.sampled_from, given)) for name, *given in ACTIONS)
)


def random_action(draw: random.Random) -> tuple[Any, ...]:
    name, *choices = draw.choice(ACTIONS)
    return name, *map(draw.choice, choices)


LEGAL_MOVES = {
    InstanceState.STARTING: {
        InstanceState.DOWNLOADING,
        InstanceState.LOADING,
        InstanceState.EXITED,
    },
    InstanceState.DOWNLOADING: {InstanceState.STARTING, InstanceState.EXITED},
    InstanceState.LOADING: {InstanceState.READY, InstanceState.EXITED},
    InstanceState.READY: {InstanceState.EXITED},
    InstanceState.STOPPING: {InstanceState.EXITED},
    InstanceState.EXITED: set(),
}


class WatchedCluster(SimulatedCluster):
    """One whose every order is checked."""

    def __init__(self, **options: Any) -> None:
        self.ordered: set[InstanceId] = set()
        super().__init__(**options)

    def reconcile(self, deliver: Callable[[Tell], bool] = lambda tell: True) -> list[Effect]:
        effects = super().reconcile(deliver)
        self.check_told([effect for effect in effects if isinstance(effect, Tell)])
        return effects

    def check_told(self, tells: list[Tell]) -> None:
        """What is ordered starts no replica twice, nor one that lives where the state can see."""
        world = self.state._world
        started = [start.spec for tell in tells for start in tell.command.start]
        assert len({one.replica for one in started}) == len(started), "a replica is started twice"
        for one in started:
            # One that was ordered before the state saw the other is no mistake of its.
            if one.instance in self.ordered:
                continue
            self.ordered.add(one.instance)
            assert not [
                report
                for node, report in world.observed.living_of(one.replica)
                if not node.is_leaving and report.instance != one.instance
            ], "a replica is started beside a living instance of it"


class History:
    """A cluster of up to three workers to which anything may happen, in any order."""

    def __init__(self) -> None:
        self.cluster = WatchedCluster(restart_limit=2)
        self.wanted: set[str] = set()
        self.said: list[Tell] = []
        self.last_reports: dict[NodeId, Any] = {}
        for index in range(2):
            self.cluster.report(self.cluster.add_worker(self.node(index)))

    @staticmethod
    def node(index: int) -> NodeId:
        return NodeId(f"127.0.0.1:{index + 1}")

    def worker(self, index: int) -> SimulatedWorker | None:
        return self.cluster.workers.get(self.node(index))

    def do(self, action: tuple[Any, ...]) -> None:
        cluster = self.cluster
        match action:
            case ("launch", uid, replica):
                with contextlib.suppress(ModelAlreadyExists, InsufficientResources):
                    cluster.launch(uid, replica=replica, autoload=uid != "a")
            case ("add replica", uid):
                with contextlib.suppress(ModelNotFound, ModelNotReady, InsufficientResources):
                    cluster.add_replicas(uid)
            case ("remove replica", uid, index):
                with contextlib.suppress(ModelNotFound, InvalidRequest):
                    if len(cluster.state.without_replica(ModelUid(uid), index).replicas):
                        cluster.remove_replica(index, uid)
            case ("terminate", uid):
                with contextlib.suppress(ModelNotFound):
                    cluster.terminate(uid)
            case ("sleep", uid):
                known = cluster.state._world.models.get(ModelUid(uid))
                if known is not None and known.is_ready and known.desired.has_been_ready:
                    cluster.change(replace(known.desired, is_asleep=True))
            case ("wake", uid):
                with contextlib.suppress(ModelNotFound, InsufficientResources):
                    cluster.wake(uid)
            case ("report", index):
                if (worker := self.worker(index)) is not None:
                    self.last_reports[worker.node] = worker.report()
                    cluster.report(worker)
            case ("late report", index):
                if (report := self.last_reports.get(self.node(index))) is not None:
                    cluster.state.node_reported(report, now=cluster.clock())
            case ("beat", index):
                if (worker := self.worker(index)) is not None:
                    cluster.state.node_beat(worker.beat(), now=cluster.clock())
            case ("move", index, state):
                worker = self.worker(index)
                for report in [] if worker is None else list(worker.instances.values()):
                    if state in LEGAL_MOVES[report.state]:
                        worker.move(report.instance, state, "it broke")  # type: ignore[union-attr]
            case ("reconcile", is_delivered):
                self.reconcile(is_delivered)
            case ("replay", index):
                if index < len(self.said):
                    tell = self.said[-1 - index]
                    if tell.node in cluster.workers:
                        cluster.workers[tell.node].apply(tell.command)
            case ("restart alone", index):
                worker = self.worker(index)
                if worker is not None and not worker.is_leaving:
                    worker.restart_alone()
            case ("replace worker", index, is_noticed):
                if (worker := self.worker(index)) is not None:
                    if is_noticed:
                        cluster.state.node_silent(worker.node, worker.worker_epoch)
                    successor = cluster.add_worker(worker.node)
                    successor.instances = {
                        report.instance: report
                        for report in worker.living()
                        if report.state is not InstanceState.STOPPING
                    }
            case ("leave", index):
                if (worker := self.worker(index)) is not None:
                    worker.is_leaving = True
                    worker.sequence += 1
            case ("stop leaving", index):
                worker = self.worker(index)
                for report in worker.living() if worker is not None and worker.is_leaving else []:
                    if report.state is not InstanceState.STOPPING:
                        worker.move(report.instance, InstanceState.STOPPING)  # type: ignore[union-attr]
            case ("kill worker", index, is_noticed):
                worker = cluster.workers.pop(self.node(index), None)
                if worker is not None and is_noticed:
                    cluster.state.node_lost(worker.node, worker.worker_epoch)
                if worker is None:
                    cluster.add_worker(self.node(index))
            case ("restart supervisor",):
                cluster.restart_supervisor()
            case ("wait", seconds):
                cluster.clock.advance(seconds)
        self.check_always()

    def reconcile(self, is_delivered: bool) -> None:
        """Reconcile, and check what that promises."""
        cluster = self.cluster
        effects = cluster.reconcile(deliver=lambda tell: is_delivered)
        first = [effect for effect in effects if isinstance(effect, Tell)]
        self.said += first
        again = cluster.state.reconcile(now=cluster.clock())
        assert again == first, "reconciling twice at one moment differs"
        shown = (cluster.state.models(), cluster.state.routes)
        cluster.state.mark_everything()
        whole = cluster.state.reconcile(now=cluster.clock())
        assert {tell.node: tell for tell in whole} == {tell.node: tell for tell in first}, (
            "what was not looked at had changed"
        )
        assert (cluster.state.models(), cluster.state.routes) == shown
        self.check_indexes()

    def check_indexes(self) -> None:
        """What is counted as it changes is what a count of everything gives."""
        world = self.cluster.state._world
        nodes = world.observed.nodes
        assigned = [
            (model, replica.assigned)
            for model in world.models.values()
            for replica in model.replicas.values()
            if replica.assigned is not None
        ]
        assert {one.node for _, one in assigned} <= set(nodes), "a replica is on a dead node"
        for model in world.models.values():
            own = [one for owner, one in assigned if owner is model]
            assert model.own_nodes == Counter(one.node for one in own)
            assert model.own_gpus == Counter(gpu for one in own for gpu in one.gpus)
        held = {(node, instance) for node, held in world.loads._held.items() for instance in held}
        assert held == {(one.node, one.instance) for _, one in assigned}
        assert len(held) == len(assigned), "an instance is counted twice"
        living = {
            (report.instance, name)
            for name, node in nodes.items()
            for report in node.instances.values()
            if report.state is not InstanceState.EXITED
        }
        indexed = [one for found in world.observed._living.values() for one in found]
        assert living == set(indexed)
        assert len(living) == len(indexed)

    def check_always(self) -> None:
        """What holds at every moment."""
        state = self.cluster.state
        nodes = {status.node for status in state.nodes(now=self.cluster.clock())}
        for status in state.models():
            state.launch_progress(status.model_uid)
            assert status.replicas
            if status.state is ModelState.READY:
                ready = [one for one in status.replicas if one.state is ReplicaState.READY]
                assert ready
                assert all(one.node is not None and one.instance is not None for one in ready)
            if status.state is ModelState.ERROR:
                assert any(one.error_message for one in status.replicas)
            indices = [one.replica.index for one in status.replicas]
            assert len(indices) == len(set(indices)), "an index is used twice"
        for uid, entry in state.routes.models.items():
            assert uid in state.uids()
            assert (entry.state is ModelState.READY) == bool(entry.routes)
        assert len(nodes) <= 3

    def check_at_rest(self) -> None:
        """What holds when every message has arrived and all work is done."""
        cluster = self.cluster
        for worker in list(cluster.workers.values()):
            if worker.is_leaving:
                cluster.state.node_lost(worker.node, worker.worker_epoch)
                del cluster.workers[worker.node]
        if not cluster.workers:
            cluster.add_worker(self.node(0))
        cluster.clock.advance(LEASE_SECONDS + RECOVERY_SECONDS)
        for _ in range(3):
            cluster.run_to_rest()
        running = [
            report.replica for worker in cluster.workers.values() for report in worker.living()
        ]
        alive = [
            status for status in cluster.state.models() if status.state is not ModelState.ERROR
        ]
        wanted = {
            replica.replica
            for status in alive
            for replica in status.replicas
            if replica.state is not ReplicaState.FAILED and status.state is not ModelState.ASLEEP
        }
        assert sorted(running) == sorted(wanted), "what runs is not what is wanted"
        assert all(
            status.state in {ModelState.READY, ModelState.ASLEEP, ModelState.ERROR}
            for status in cluster.state.models()
        )
        assert {status.model_uid for status in alive} <= set(cluster.store)
        for status in alive:
            stored = {one.index for one in cluster.store[status.model_uid].replicas}
            assert stored == {one.replica.index for one in status.replicas}
        assert set(cluster.store) <= cluster.state.uids()
        assert all(
            not worker.instances.keys() - self.live(worker) for worker in cluster.workers.values()
        ), "ended instances are never forgotten"
        # Every state has a way out.
        for status in cluster.state.models():
            cluster.terminate(status.model_uid)
        cluster.run_to_rest()
        assert cluster.state.uids() == set()
        assert not any(worker.instances for worker in cluster.workers.values())

    @staticmethod
    def live(worker: SimulatedWorker) -> set[InstanceId]:
        return {report.instance for report in worker.living()}


def run_history(actions: list[tuple[Any, ...]]) -> None:
    history = History()
    for action in actions:
        history.do(action)
    history.check_at_rest()


@settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(st.lists(HISTORIES, max_size=40))
def test_any_history_ends_with_what_is_wanted(actions: list[tuple[Any, ...]]) -> None:
    run_history(actions)


@pytest.mark.parametrize("share", range(NUM_SHARES))
def test_long_histories_end_with_what_is_wanted(
    share: int, is_long: bool, record_long_run: RecordLongRun
) -> None:
    num_histories, num_actions = 10_000 if is_long else 6, 0
    for seed in range(num_histories):
        draw = random.Random(f"{share} {seed}")
        actions = [random_action(draw) for _ in range(draw.randint(10, 70))]
        num_actions += len(actions)
        try:
            run_history(actions)
        except BaseException as error:
            error.add_note(f"seed {seed} of share {share}: {actions}")
            raise
    record_long_run("Cluster state, random histories", histories=num_histories, events=num_actions)
