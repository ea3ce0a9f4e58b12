# SPDX-License-Identifier: Apache-2.0
"""A replica's life: what its worker says moves it, and what it lacks is found for it.

    pending ──place──▶ starting ─▶ (downloading) ─▶ loading ─▶ ready
       ▲                  │               │            │         │
       └──── delay over ──┴ backing off ◀─┴────────────┴─────────┴─ it ended
                              │
                              └─ too often, or a first launch ─▶ failed ─ launch or terminate ─▶

A replica that fails takes nothing else with it: a launch that was never ready ends as a whole, one
that is added to a running model and does not load is dropped, one that dies too often stays
failed, and only with the last one the model is given up.
"""

import heapq
import itertools
import math
from collections.abc import Callable
from dataclasses import replace

from xinference.cluster.messages import InstanceReport, InstanceState
from xinference.cluster.placement import Place
from xinference.errors import LoadFailed, XinferenceError, from_wire
from xinference.identifiers import InstanceId, ReplicaUid
from xinference.protocol.deployment import ReplicaState

from .outcomes import Outcomes
from .records import (
    RETRY_AFTER_SECONDS,
    Assignment,
    Effect,
    ForgetModel,
    Model,
    Moment,
    Outgoing,
    Replica,
    SaveModel,
    Wish,
)
from .world import World

RESTART_WINDOW_SECONDS = 300.0
"""Deaths longer ago than this are forgiven."""
BACK_OFF_SECONDS = (0.2, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Before the first restart, the second, … ; the last holds for all that follow."""

_STATES = {
    InstanceState.STARTING: ReplicaState.STARTING,
    InstanceState.DOWNLOADING: ReplicaState.DOWNLOADING,
    InstanceState.LOADING: ReplicaState.LOADING,
    InstanceState.READY: ReplicaState.READY,
    InstanceState.STOPPING: ReplicaState.STOPPING,
}


class Lifecycle:
    """Moves the replicas of a world. `observe` all that is marked, then `assign`, then `end`."""

    def __init__(
        self,
        world: World,
        outcomes: Outcomes,
        *,
        new_instance: Callable[[], InstanceId],
        jitter: Callable[[], float],
        restart_limit: int,
    ) -> None:
        """See `ClusterState`."""
        self._world = world
        self._outcomes = outcomes
        self._new_instance = new_instance
        self._jitter = jitter
        self._restart_limit = restart_limit
        self._due: list[tuple[float, int, ReplicaUid]] = []
        self._numbers = itertools.count()

    def next_due(self) -> float | None:
        """Return the monotonic time of the next delayed start, or None."""
        while self._due and not self._is_delayed(*self._due[0]):
            heapq.heappop(self._due)
        return self._due[0][0] if self._due else None

    def mark_due(self, now: Moment) -> None:
        """Look at the replicas whose delay is over."""
        while self._due and self._due[0][0] <= now.monotonic:
            self._world.mark(heapq.heappop(self._due)[2])

    def observe(self, replica: Replica, now: Moment) -> list[Effect]:
        """Bring one replica up to what its worker says."""
        world, model, assigned = self._world, replica.model, replica.assigned
        if assigned is None:
            return []
        node = world.observed.nodes.get(assigned.node)
        if node is not None and node.worker_epoch != assigned.worker_epoch:
            adopted = node.instances.get(assigned.instance)
            if adopted is not None and adopted.state is not InstanceState.EXITED:
                assigned = replica.assigned = replace(assigned, worker_epoch=node.worker_epoch)
                model.tell("INFO", f"{replica.uid} was adopted by a new worker.", now)
        if node is None or node.worker_epoch != assigned.worker_epoch:
            world.unassign(replica)
            if replica.runs:
                replica.problem = f"node {assigned.node} was lost"
                model.tell("WARNING", f"{replica.uid}: node {assigned.node} was lost.", now)
            return []
        report = node.instances.get(assigned.instance)
        if report is None:
            return []
        replica.report = report
        if report.state is InstanceState.EXITED:
            world.unassign(replica)
            if report.info:
                told = f"{replica.uid} has ended on {assigned.node}: {report.info}; in quarantine."
                model.tell("WARNING", told, now)
            if report.error is None or not replica.runs:
                return []  # it was told to end, maybe by its worker, which leaves
            return self._died(replica, from_wire(report.error), now)
        if node.is_leaving and replica.runs:
            self._move_away(replica, assigned, report, now)
            return []
        before, replica.state = replica.state, _STATES[report.state]
        is_ready = replica.state is ReplicaState.READY
        world.loads.set_promise(assigned.instance, assigned.node, _promise(replica))
        if replica.state is before:
            return []
        model.tell("INFO", f"{replica.uid} is {replica.state.value} on {assigned.node}.", now)
        if not is_ready:
            return []
        replica.problem = ""
        model.used_at = now.monotonic
        model.retry_after_seconds = RETRY_AFTER_SECONDS
        return self._note_ready(replica) if replica.runs else []

    def assign(self, replica: Replica, *, may_start: bool, now: Moment) -> list[Effect]:
        """Find the replica an instance: one that runs already, or a new one on some node.

        Args:
            may_start: False while what runs is not known yet.
        """
        world, model = self._world, replica.model
        if not replica.runs or replica.assigned is not None:
            return []
        living = [
            (node, report)
            for node, report in world.observed.living_of(replica.uid)
            if not node.is_leaving
        ]
        for node, report in living:
            if (
                report.launch_id == model.desired.launch_id
                and report.state is not InstanceState.STOPPING
            ):
                found = Assignment(node.name, node.worker_epoch, report.instance, report.gpu_idx)
                world.assign(replica, found, promised_bytes=model.memory_bytes)
                model.tell("INFO", f"{replica.uid} was found running on {node.name}.", now)
                return self.observe(replica, now)
        # Invariant: never two live instances of a replica; the old one goes before the new one,
        # unless it is on a node that leaves, and ends as soon as this one is ready.
        if living or replica.state is ReplicaState.FAILED:
            return []
        if now.monotonic < replica.not_before:
            self._delay(replica)
            return []
        if not may_start:
            world.wait_for_place(replica)
            return []
        chosen = world.loads.place(world.need(model, replica.desired.placement))
        if chosen is None:
            replica.state = ReplicaState.PENDING
            replica.problem = replica.problem or "no node has a place for it"
            world.wait_for_place(replica)
            return []
        if model.memory_bytes and world.is_being_freed(chosen.node):
            replica.problem = f"waits for memory of {chosen.node}"
            world.wait_for_place(replica)
            return []
        replica.problem = ""
        worker_epoch = world.observed.nodes[chosen.node].worker_epoch
        place = Assignment(chosen.node, worker_epoch, self._new_instance(), chosen.gpu_idx)
        world.assign(replica, place, promised_bytes=model.memory_bytes)
        replica.state = ReplicaState.STARTING
        model.tell("INFO", f"{replica.uid} is starting on {where(chosen)}.", now)
        return []

    def drop_outgoing(self, replica: Replica) -> None:
        """End what a replica was before it moved, once it is elsewhere, or if it is gone."""
        outgoing = replica.outgoing
        if outgoing is None:
            return
        node = self._world.observed.nodes.get(outgoing.assigned.node)
        report = None if node is None else node.instances.get(outgoing.assigned.instance)
        serves = report is not None and report.state is InstanceState.READY
        if replica.state is ReplicaState.READY or not serves or not replica.runs:
            self._world.set_outgoing(replica, None)

    def end(self, model: Model) -> None:
        """Drop a model, or a replica, that is not wanted once nothing of it is left."""
        observed = self._world.observed
        gone = [
            replica
            for replica in model.replicas.values()
            if not replica.is_wanted
            and replica.assigned is None
            and not observed.is_seen(replica.uid)
        ]
        for replica in gone:
            del model.replicas[replica.uid.index]
        if model.wish is not Wish.STOP or observed.is_model_seen(model.uid):
            return
        if not any(replica.assigned for replica in model.replicas.values()):
            self._world.remove_model(model)
            self._outcomes.note_ended(model)

    def _is_delayed(self, due_at: float, _: int, uid: ReplicaUid) -> bool:
        replica = self._world.replica(uid)
        return (
            replica is not None
            and replica.runs
            and replica.assigned is None
            and replica.not_before == due_at
        )

    def _delay(self, replica: Replica) -> None:
        heapq.heappush(self._due, (replica.not_before, next(self._numbers), replica.uid))

    def _move_away(
        self, replica: Replica, assigned: Assignment, report: InstanceReport, now: Moment
    ) -> None:
        """Let a replica go from a node that leaves; if it can be elsewhere, only once it is."""
        world = self._world
        elsewhere = world.loads.place(world.need(replica.model, replica.desired.placement))
        if report.state is InstanceState.READY and elsewhere is not None:
            world.set_outgoing(replica, Outgoing(assigned, report))
        world.unassign(replica)
        replica.problem = f"node {assigned.node} is leaving"
        replica.model.tell("INFO", f"{replica.uid}: node {assigned.node} is leaving.", now)

    def _note_ready(self, replica: Replica) -> list[Effect]:
        """Remember for good what has succeeded."""
        model = replica.model
        before = model.desired
        if not replica.desired.has_been_ready:
            model.note_first_ready(replica)
        if not before.has_been_ready and all(
            one.state is ReplicaState.READY for one in model.wanted
        ):
            model.desired = replace(model.desired, has_been_ready=True)
        return [] if model.desired is before else [SaveModel(model.desired)]

    def _died(self, replica: Replica, error: XinferenceError, now: Moment) -> list[Effect]:
        """Its process ended unasked: back off, or give up."""
        model = replica.model
        replica.problem = str(error)
        if not replica.desired.has_been_ready:
            return self._failed_to_load(replica, error, now)
        recent = now.monotonic - RESTART_WINDOW_SECONDS
        replica.deaths = [death for death in replica.deaths if death > recent] + [now.monotonic]
        if len(replica.deaths) > self._restart_limit:
            times = len(replica.deaths)
            problem = f"it ended {times} times within {RESTART_WINDOW_SECONDS:.0f} s; last: {error}"
            self._give_up(replica, LoadFailed(model=model.uid, problem=problem), now)
            return []
        step = min(len(replica.deaths), len(BACK_OFF_SECONDS)) - 1
        delay = BACK_OFF_SECONDS[step] * self._jitter()
        replica.state = ReplicaState.BACKING_OFF
        replica.not_before = now.monotonic + delay
        replica.num_restarts += 1
        self._delay(replica)
        model.retry_after_seconds = math.ceil(delay) + RETRY_AFTER_SECONDS
        model.tell("WARNING", f"{error} Starting it again in {delay:.1f} s.", now)
        return []

    def _failed_to_load(
        self, replica: Replica, error: XinferenceError, now: Moment
    ) -> list[Effect]:
        """One that never was ready: its launch ends, or it alone is dropped, if it is not alone."""
        model = replica.model
        kept = tuple(one for one in model.desired.replicas if one.index != replica.uid.index)
        if not model.desired.has_been_ready or not kept:
            replica.state = ReplicaState.FAILED
            self._give_up_model(model, error)
            model.tell("ERROR", str(error), now)
            return [ForgetModel(model.uid)]
        model.desired = replace(model.desired, replicas=kept)
        replica.is_wanted = False
        self._outcomes.note_dropped(model, replica, error)
        model.tell("ERROR", f"{replica.uid} was added and does not load: {error}", now)
        return [SaveModel(model.desired)]

    def _give_up(self, replica: Replica, error: XinferenceError, now: Moment) -> None:
        """Do not start a replica again; the model goes on while it has another."""
        replica.state = ReplicaState.FAILED
        replica.problem = str(error)
        replica.model.tell("ERROR", str(error), now)
        if all(one.state is ReplicaState.FAILED for one in replica.model.wanted):
            self._give_up_model(replica.model, error)

    def _give_up_model(self, model: Model, error: XinferenceError) -> None:
        model.wish = Wish.NOTHING
        model.error = error
        self._world.mark_model(model)


def _promise(replica: Replica) -> int:
    """Return what of the memory of its node a replica takes beyond what the readings show.

    One that is ready shows in them; so does one that goes to sleep, and what it has is free soon.
    """
    memory_bytes = replica.model.memory_bytes
    is_loaded = replica.state in {ReplicaState.READY, ReplicaState.STOPPING}
    if replica.model.wish is Wish.SLEEP:
        return -memory_bytes if is_loaded else 0
    return 0 if replica.state is ReplicaState.READY else memory_bytes


def where(chosen: Place) -> str:
    """Return a place in words."""
    if not chosen.gpu_idx:
        return str(chosen.node)
    return f"GPU {', '.join(map(str, chosen.gpu_idx))} of {chosen.node}"
