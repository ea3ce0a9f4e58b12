# SPDX-License-Identifier: Apache-2.0
"""`ClusterState`: what should run, what does run, and what to do about the difference.

In: events (a launch, a report of a worker, the passing of time). Out: effects for the supervisor
to carry out, snapshots to show, the routing table. Pure: no I/O, no await, no clock and no
randomness that is not an argument, so that a thousand random histories can be run through it.

It is level-triggered: `reconcile` compares the whole wish with the whole observation, every time.
Launch, boot, crash, scale, cancel and terminate are the same few lines; an effect that gets lost is
found missing and made again. A replica's life:

    pending ──place──▶ starting ─▶ (downloading) ─▶ loading ─▶ ready
       ▲                  │           │         │
       └──── delay over ──┴ backing off ◀───────┴─ its process ended
                              │
                              └─ too often, or a first launch ─▶ failed ─ launch or terminate ─▶

A replica that fails takes nothing else with it: a launch that was never ready ends as a whole, one
that is added to a running model and does not load is dropped, one that dies too often stays
failed, and only with the last one the model is given up.

What fences what: `LaunchId` an old launch from a new one of the same uid, `InstanceId` one start
of a process from the next, `WorkerEpoch` one life of a worker from the next, the supervisor's
epoch an old supervisor from this one.
"""

import itertools
import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TypeVar

from xinference.errors import (
    InsufficientResources,
    InvalidRequest,
    LaunchCancelled,
    LoadFailed,
    ModelAlreadyExists,
    ModelNotFound,
    ModelNotReady,
    XinferenceError,
    from_wire,
)
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid
from xinference.protocol.deployment import (
    MAX_REPLICAS,
    LaunchProgress,
    LaunchSpec,
    ModelDescription,
    ModelEvent,
    ModelState,
    ModelStatus,
    ReplicaPlacement,
    ReplicaSpec,
    ReplicaState,
    ReplicaStatus,
)
from xinference.protocol.nodes import NodeResources, NodeState, NodeStatus

from .launch_progress import progress_of
from .messages import (
    Command,
    DesiredModel,
    DesiredReplica,
    Heartbeat,
    InstanceReport,
    InstanceState,
    LaunchId,
    LaunchTicket,
    ModelRoutes,
    Route,
    RoutesVersion,
    RoutingTable,
    StartInstance,
    StopInstance,
    WorkerEpoch,
    WorkerReport,
)
from .placement import (
    LaunchStrategy,
    Need,
    NodeLoad,
    Place,
    check_one_gpu,
    is_at,
    memory_of,
    place,
    wishes_of,
)

SUSPECT_SECONDS = 2.5
"""A worker that was silent for this long gets nothing new."""
LEASE_SECONDS = 10.0
"""One that was silent for this long is lost. Until then its replicas keep their routes: they serve
without it, and gateways notice for themselves if they do not."""
RECOVERY_SECONDS = 3.0
"""After its start a supervisor waits this long for workers to say what runs."""
RESTART_WINDOW_SECONDS = 300.0
"""Deaths longer ago than this are forgiven."""
BACK_OFF_SECONDS = (0.2, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Before the first restart, the second, … ; the last holds for all that follow."""
RETRY_AFTER_SECONDS = 5
STORY_LEN = 100
MAX_ENDED_LAUNCHES = 256

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Now, on both clocks: decisions use the monotonic one, people read the other."""

    monotonic: float
    unix: int


@dataclass(frozen=True, slots=True)
class SaveModel:
    """Effect: write the model down."""

    model: DesiredModel


@dataclass(frozen=True, slots=True)
class ForgetModel:
    """Effect: remove the model from the store."""

    model_uid: ModelUid


@dataclass(frozen=True, slots=True)
class Tell:
    """Effect: send the command to the worker of the node."""

    node: NodeId
    command: Command


Effect = SaveModel | ForgetModel | Tell


@dataclass(frozen=True, slots=True)
class _Assignment:
    node: NodeId
    worker_epoch: WorkerEpoch
    instance: InstanceId
    gpu_idx: tuple[int, ...] | None


@dataclass(frozen=True, slots=True)
class _Outgoing:
    """Where a replica still serves while it is brought up elsewhere."""

    assigned: _Assignment
    report: InstanceReport


@dataclass(slots=True)
class _Replica:
    uid: ReplicaUid
    created_ts: int
    desired: DesiredReplica
    is_wanted: bool = True
    """False: it is being removed; it goes when nothing of it is left."""
    state: ReplicaState = ReplicaState.PENDING
    assigned: _Assignment | None = None
    report: InstanceReport | None = None
    """The latest of the assigned instance; None until its worker has shown it."""
    outgoing: _Outgoing | None = None
    not_before: float = -math.inf
    """Monotonic; no start earlier than this."""
    deaths: list[float] = field(default_factory=list)
    num_restarts: int = 0
    problem: str = ""

    @property
    def serving(self) -> tuple[_Assignment, InstanceReport] | None:
        """Where it serves, if it does."""
        if self.state is ReplicaState.READY and self.assigned and self.report:
            return self.assigned, self.report
        return None if self.outgoing is None else (self.outgoing.assigned, self.outgoing.report)


class _Wish(StrEnum):
    RUN = "run"
    STOP = "stop"
    NOTHING = "nothing"
    """It was given up; it is kept to be looked at."""


@dataclass(slots=True)
class _Model:
    desired: DesiredModel
    replicas: list[_Replica]
    wish: _Wish = _Wish.RUN
    error: XinferenceError | None = None
    """Why it was given up, or how its launch ended."""
    retry_after_seconds: int = RETRY_AFTER_SECONDS
    story: deque[ModelEvent] = field(default_factory=lambda: deque(maxlen=STORY_LEN))

    @property
    def wanted(self) -> list[_Replica]:
        """The replicas that should run."""
        return [replica for replica in self.replicas if replica.is_wanted]

    def runs(self, replica: _Replica) -> bool:
        """Return whether this replica should run."""
        return self.wish is _Wish.RUN and replica.is_wanted

    def tell(self, kind: str, content: str, now: Moment) -> None:
        self.story.append(ModelEvent(event_type=kind, event_ts=now.unix, event_content=content))


@dataclass(slots=True)
class _Node:
    worker_epoch: WorkerEpoch
    sequence: int
    resources: NodeResources
    instances: dict[InstanceId, InstanceReport]
    seen_at: float
    is_leaving: bool = False
    is_suspect: bool = False
    """It does not answer; it may be restarting."""

    @property
    def state(self) -> NodeState:
        """How it is; only one that is ready gets anything new."""
        if self.is_suspect:
            return NodeState.SUSPECT
        return NodeState.LEAVING if self.is_leaving else NodeState.READY


class ClusterState:
    """The supervisor's mind. Not shared: one owner calls it, from one event loop.

    Every method that takes `now` may change it; call `reconcile` afterwards. The others only look.
    """

    def __init__(
        self,
        *,
        epoch: int,
        desired: Iterable[DesiredModel],
        now: Moment,
        new_instance: Callable[[], InstanceId],
        jitter: Callable[[], float],
        restart_limit: int,
        expected_workers: int | None = None,
        strategy: LaunchStrategy = LaunchStrategy.IDLE_FIRST,
        shares_gpus: bool = True,
    ) -> None:
        """Start from the stored wish, with nothing observed yet.

        Args:
            epoch: of this supervisor; larger than every earlier one's.
            jitter: returns a factor around 1 for each delay.
            restart_limit: restarts of one replica within five minutes; the next death ends it.
            expected_workers: so many reports end the wait for what runs; None: time alone does.
            strategy: where replicas go when there is a choice.
            shares_gpus: whether a GPU may hold more than one replica.
        """
        self._epoch = epoch
        self._new_instance = new_instance
        self._jitter = jitter
        self._restart_limit = restart_limit
        self._expected_workers = expected_workers
        self._strategy = strategy
        self._shares_gpus = shares_gpus
        self._models: dict[ModelUid, _Model] = {}
        self._nodes: dict[NodeId, _Node] = {}
        # Invariant: a worker's process that was replaced, or left, is gone; what it sent is void.
        self._replaced: set[WorkerEpoch] = set()
        self._ended: OrderedDict[LaunchId, XinferenceError] = OrderedDict()
        self._dropped: OrderedDict[tuple[LaunchId, int], XinferenceError] = OrderedDict()
        self._ended_progress: OrderedDict[ModelUid, LaunchProgress] = OrderedDict()
        self._routes = RoutingTable(version=RoutesVersion(supervisor_epoch=epoch), models={})
        for model in desired:
            self._models[model.model_uid] = _new_model(model)
        self._recovery_ends_at = now.monotonic + RECOVERY_SECONDS if self._models else -math.inf
        self._update_routes()

    # What happens.

    def check_launch(self, spec: LaunchSpec) -> tuple[DesiredReplica, ...]:
        """Refuse a launch that cannot be taken now; return the replicas it would have.

        Raises:
            ModelAlreadyExists: a model that runs, starts or stops has the uid.
            InvalidRequest: there is no worker at `worker_ip`, or no such GPU.
            InsufficientResources: there is no worker.
        """
        uid = spec.model_uid
        if uid in self.taken_uids():
            raise ModelAlreadyExists(name=str(uid))
        wishes = wishes_of(spec)
        self._check_places(wishes, spec, memory_bytes=0)
        return tuple(
            DesiredReplica(index=index, placement=wish) for index, wish in enumerate(wishes)
        )

    def check_room(self, spec: LaunchSpec, description: ModelDescription) -> None:
        """Refuse a launch for which there is not memory enough, as far as one can tell.

        Raises:
            InsufficientResources
        """
        memory_bytes = memory_of(description, dtype=spec.engine_options.dtype)
        self._check_places(wishes_of(spec), spec, memory_bytes=memory_bytes)

    def launch(self, desired: DesiredModel, *, now: Moment) -> None:
        """Take on a model that `check_launch` let pass and that is in the store."""
        model = _new_model(desired)
        model.tell("INFO", f"Launch of {desired.description.model_name} requested.", now)
        self._models[desired.model_uid] = model
        self._ended_progress.pop(desired.model_uid, None)

    def with_more_replicas(
        self, model_uid: ModelUid, placements: Sequence[ReplicaPlacement]
    ) -> DesiredModel:
        """Return a running model with replicas added, for `change`. Changes nothing.

        Raises:
            ModelNotFound
            ModelNotReady: it is not launched yet, or is ending.
            InvalidRequest, InsufficientResources: as `check_launch`.
        """
        model = self._find_running(model_uid)
        for wish in placements:
            check_one_gpu(wish)
        num_replicas = len(model.wanted) + len(placements)
        if num_replicas > MAX_REPLICAS:
            raise InvalidRequest(
                field="replica", problem=f"would make {num_replicas}; at most {MAX_REPLICAS}"
            )
        spec = replace(model.desired.spec, n_gpu=None, replica_config=())
        memory_bytes = _memory_of(model)
        self._check_places(placements, spec, memory_bytes=memory_bytes, model=model)
        # Why not those that are on their way out: one index, one replica.
        taken = {replica.uid.index for replica in model.replicas}
        free = (index for index in itertools.count() if index not in taken)
        added = tuple(DesiredReplica(index=next(free), placement=wish) for wish in placements)
        return replace(model.desired, replicas=(*model.desired.replicas, *added))

    def without_replica(self, model_uid: ModelUid, index: int) -> DesiredModel:
        """Return a model with one replica less, for `change`. Changes nothing.

        Raises:
            ModelNotFound
            InvalidRequest: there is no such replica.
        """
        model = self._find(model_uid)
        indices = [replica.uid.index for replica in model.wanted]
        if index not in indices:
            raise InvalidRequest(
                field="replica_id", problem=f"{model_uid} has no replica {index}, only {indices}"
            )
        kept = tuple(one for one in model.desired.replicas if one.index != index)
        return replace(model.desired, replicas=kept)

    def change(self, desired: DesiredModel, *, now: Moment) -> None:
        """Want other replicas of a model. The store knows already."""
        model = self._models[desired.model_uid]
        kept = {one.index for one in desired.replicas}
        known = {replica.uid.index for replica in model.wanted}
        for replica in model.wanted:
            if replica.uid.index not in kept:
                replica.is_wanted = False
                model.tell("INFO", f"{replica.uid} is being removed.", now)
        for one in desired.replicas:
            if one.index not in known:
                added = _new_replica(desired, one, now.unix)
                model.replicas.append(added)
                model.tell("INFO", f"{added.uid} was added.", now)
        model.desired = desired

    def terminate(self, model_uid: ModelUid, *, now: Moment) -> LaunchId:
        """Stop wanting a model. The store has forgotten it already.

        Raises:
            ModelNotFound
        """
        model = self._find(model_uid)
        if model.wish is not _Wish.STOP:
            model.wish = _Wish.STOP
            model.error = LaunchCancelled(model=model_uid)
            model.tell("INFO", "Terminating.", now)
        return model.desired.launch_id

    def check_cancel(self, model_uid: ModelUid) -> None:
        """Refuse to cancel what is no launch under way.

        Raises:
            ModelNotFound
            InvalidRequest: it has been ready.
        """
        if self._find(model_uid).desired.has_been_ready:
            raise InvalidRequest(
                field="model_uid", problem=f"{model_uid} is ready already; terminate it instead"
            )

    def node_reported(self, report: WorkerReport, *, now: Moment) -> bool:
        """Take in all that runs on a node; False if the report is void."""
        if report.worker_epoch in self._replaced:
            return False
        node = self._nodes.get(report.node)
        if node is not None and node.worker_epoch != report.worker_epoch:
            self._replaced.add(node.worker_epoch)
        elif node is not None and report.sequence < node.sequence:
            return True
        self._nodes[report.node] = _Node(
            worker_epoch=report.worker_epoch,
            sequence=report.sequence,
            resources=report.resources,
            instances={instance.instance: instance for instance in report.instances},
            seen_at=now.monotonic,
            is_leaving=report.is_leaving,
        )
        return True

    def node_beat(self, beat: Heartbeat, *, now: Moment) -> bool:
        """Take in a sign of life; False asks for the full report."""
        node = self._nodes.get(beat.node)
        if node is None or node.worker_epoch != beat.worker_epoch:
            return False
        if node.sequence != beat.sequence:
            return False
        node.seen_at = now.monotonic
        node.resources = beat.resources
        node.is_suspect = False
        return True

    def node_silent(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """The worker's process does not answer: it hangs, restarts, or is gone with its host."""
        if node in self._nodes and self._nodes[node].worker_epoch == worker_epoch:
            self._nodes[node].is_suspect = True

    def node_lost(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """The worker's process has ended in order, and its replicas before it."""
        self._replaced.add(worker_epoch)  # what it said before may arrive now
        if node in self._nodes and self._nodes[node].worker_epoch == worker_epoch:
            del self._nodes[node]

    # What to do about it.

    def reconcile(self, *, now: Moment) -> list[Effect]:
        """Move every replica by what was observed, and return what has to be done.

        Calling it again at the same moment returns the same `Tell`s and changes nothing.
        """
        self._expire_leases(now)
        effects: list[Effect] = []
        for model in list(self._models.values()):
            for replica in model.replicas:
                effects += self._observe(model, replica, now)
        loads = _Loads(self._loads)
        for model in list(self._models.values()):
            for replica in list(model.replicas):
                effects += self._assign(model, replica, loads, now)
                self._drop_outgoing(model, replica)
            self._end(model)
        self._update_routes()
        effects += self._commands()
        return effects

    def is_recovering(self, *, now: Moment) -> bool:
        """Return whether what runs is not known yet: nothing new is started until then."""
        if now.monotonic >= self._recovery_ends_at:
            return False
        if self._expected_workers is not None and len(self._nodes) >= self._expected_workers:
            self._recovery_ends_at = -math.inf
            return False
        return True

    def next_due(self) -> float | None:
        """Return the monotonic time of the next delayed start, or None."""
        return min(
            (
                replica.not_before
                for model in self._models.values()
                for replica in model.replicas
                if replica.state is ReplicaState.BACKING_OFF and model.runs(replica)
            ),
            default=None,
        )

    def _expire_leases(self, now: Moment) -> None:
        for name, node in list(self._nodes.items()):
            silence = now.monotonic - node.seen_at
            node.is_suspect |= silence > SUSPECT_SECONDS
            if silence > LEASE_SECONDS:
                del self._nodes[name]

    def _observe(self, model: _Model, replica: _Replica, now: Moment) -> list[Effect]:
        """Bring one replica up to what its worker says."""
        assigned = replica.assigned
        if assigned is None:
            return []
        node = self._nodes.get(assigned.node)
        if node is not None and node.worker_epoch != assigned.worker_epoch:
            adopted = node.instances.get(assigned.instance)
            if adopted is not None and adopted.state is not InstanceState.EXITED:
                assigned = replace(assigned, worker_epoch=node.worker_epoch)
                replica.assigned = assigned
                model.tell("INFO", f"{replica.uid} was adopted by a new worker.", now)
        if node is None or node.worker_epoch != assigned.worker_epoch:
            replica.assigned = replica.report = None
            replica.state = ReplicaState.PENDING
            if model.runs(replica):
                replica.problem = f"node {assigned.node} was lost"
                model.tell("WARNING", f"{replica.uid}: node {assigned.node} was lost.", now)
            return []
        report = node.instances.get(assigned.instance)
        if report is None:
            return []
        replica.report = report
        if report.state is InstanceState.EXITED:
            replica.assigned = replica.report = None
            replica.state = ReplicaState.PENDING
            if report.error is None or not model.runs(replica):
                return []  # it was told to end, maybe by its worker, which leaves
            return self._died(model, replica, from_wire(report.error), now)
        if node.is_leaving and model.runs(replica):
            self._move_away(model, replica, assigned, report, now)
            return []
        before, replica.state = replica.state, _STATES[report.state]
        if replica.state is before:
            return []
        model.tell("INFO", f"{replica.uid} is {replica.state.value} on {assigned.node}.", now)
        if replica.state is not ReplicaState.READY:
            return []
        replica.problem = ""
        model.retry_after_seconds = RETRY_AFTER_SECONDS
        return self._note_ready(model, replica) if model.runs(replica) else []

    def _move_away(
        self,
        model: _Model,
        replica: _Replica,
        assigned: _Assignment,
        report: InstanceReport,
        now: Moment,
    ) -> None:
        """Let a replica go from a node that leaves; if it can be elsewhere, only once it is."""
        place_elsewhere = self._place(_need(model, replica.desired.placement), self._loads())
        if report.state is InstanceState.READY and place_elsewhere is not None:
            replica.outgoing = _Outgoing(assigned, report)
        replica.assigned = replica.report = None
        replica.state = ReplicaState.PENDING
        replica.problem = f"node {assigned.node} is leaving"
        model.tell("INFO", f"{replica.uid}: node {assigned.node} is leaving.", now)

    def _drop_outgoing(self, model: _Model, replica: _Replica) -> None:
        """End what a replica was before it moved, once it is elsewhere, or if it is gone."""
        outgoing = replica.outgoing
        if outgoing is None:
            return
        node = self._nodes.get(outgoing.assigned.node)
        report = None if node is None else node.instances.get(outgoing.assigned.instance)
        serves = report is not None and report.state is InstanceState.READY
        if replica.state is ReplicaState.READY or not serves or not model.runs(replica):
            replica.outgoing = None

    def _note_ready(self, model: _Model, replica: _Replica) -> list[Effect]:
        """Remember for good what has succeeded."""
        before = model.desired
        if not replica.desired.has_been_ready:
            replica.desired = replace(replica.desired, has_been_ready=True)
            index = replica.uid.index
            replicas = [replica.desired if one.index == index else one for one in before.replicas]
            model.desired = replace(model.desired, replicas=tuple(replicas))
        if all(one.state is ReplicaState.READY for one in model.wanted):
            model.desired = replace(model.desired, has_been_ready=True)
        return [] if model.desired == before else [SaveModel(model.desired)]

    def _died(
        self, model: _Model, replica: _Replica, error: XinferenceError, now: Moment
    ) -> list[Effect]:
        """Its process ended unasked: back off, or give up."""
        uid = model.desired.model_uid
        replica.problem = str(error)
        if not replica.desired.has_been_ready:
            return self._failed_to_load(model, replica, error, now)
        recent = now.monotonic - RESTART_WINDOW_SECONDS
        replica.deaths = [death for death in replica.deaths if death > recent] + [now.monotonic]
        if len(replica.deaths) > self._restart_limit:
            times = len(replica.deaths)
            problem = f"it ended {times} times within {RESTART_WINDOW_SECONDS:.0f} s; last: {error}"
            return self._give_up(model, replica, LoadFailed(model=uid, problem=problem), now)
        step = min(len(replica.deaths), len(BACK_OFF_SECONDS)) - 1
        delay = BACK_OFF_SECONDS[step] * self._jitter()
        replica.state = ReplicaState.BACKING_OFF
        replica.not_before = now.monotonic + delay
        replica.num_restarts += 1
        model.retry_after_seconds = math.ceil(delay) + RETRY_AFTER_SECONDS
        model.tell("WARNING", f"{error} Starting it again in {delay:.1f} s.", now)
        return []

    def _failed_to_load(
        self, model: _Model, replica: _Replica, error: XinferenceError, now: Moment
    ) -> list[Effect]:
        """One that never was ready: its launch ends, or it alone is dropped again."""
        uid = model.desired.model_uid
        if not model.desired.has_been_ready:
            model.wish = _Wish.NOTHING
            model.error = error
            replica.state = ReplicaState.FAILED
            model.tell("ERROR", str(error), now)
            return [ForgetModel(uid)]
        kept = tuple(one for one in model.desired.replicas if one.index != replica.uid.index)
        model.desired = replace(model.desired, replicas=kept)
        replica.is_wanted = False
        _remember(self._dropped, (model.desired.launch_id, replica.uid.index), error)
        model.tell("ERROR", f"{replica.uid} was added and does not load: {error}", now)
        return [SaveModel(model.desired)]

    def _give_up(
        self, model: _Model, replica: _Replica, error: XinferenceError, now: Moment
    ) -> list[Effect]:
        """Do not start a replica again; the model goes on while it has another."""
        replica.state = ReplicaState.FAILED
        replica.problem = str(error)
        model.tell("ERROR", str(error), now)
        if all(one.state is ReplicaState.FAILED for one in model.wanted):
            model.wish = _Wish.NOTHING
            model.error = error
        return []

    def _assign(
        self, model: _Model, replica: _Replica, loads: "_Loads", now: Moment
    ) -> list[Effect]:
        """Find the replica an instance: one that runs already, or a new one on some node."""
        if not model.runs(replica) or replica.assigned is not None:
            return []
        living = [
            (name, node, report)
            for name, node in self._nodes.items()
            for report in node.instances.values()
            if report.replica == replica.uid and report.state is not InstanceState.EXITED
            if not node.is_leaving
        ]
        for name, node, report in living:
            if (
                report.launch_id == model.desired.launch_id
                and report.state is not InstanceState.STOPPING
            ):
                replica.assigned = _Assignment(
                    name, node.worker_epoch, report.instance, report.gpu_idx
                )
                model.tell("INFO", f"{replica.uid} was found running on {name}.", now)
                return self._observe(model, replica, now)
        # Invariant: never two live instances of a replica; the old one goes before the new one,
        # unless it is on a node that leaves, and ends as soon as this one is ready.
        is_due = now.monotonic >= replica.not_before and replica.state is not ReplicaState.FAILED
        if living or self.is_recovering(now=now) or not is_due:
            return []
        chosen = self._place(_need(model, replica.desired.placement), loads.now)
        if chosen is None:
            replica.state = ReplicaState.PENDING
            replica.problem = replica.problem or "no node has a place for it"
            return []
        replica.assigned = _Assignment(
            chosen.node,
            self._nodes[chosen.node].worker_epoch,
            self._new_instance(),
            chosen.gpu_idx,
        )
        loads.now[chosen.node].add(chosen.gpu_idx, _memory_of(model))
        replica.state = ReplicaState.STARTING
        model.tell("INFO", f"{replica.uid} is starting on {_where(chosen)}.", now)
        return []

    def _end(self, model: _Model) -> None:
        """Drop a model, or a replica, that is not wanted once nothing of it is left."""
        uid = model.desired.model_uid
        model.replicas = [
            replica
            for replica in model.replicas
            if replica.is_wanted or replica.assigned is not None or self._is_seen(replica.uid)
        ]
        if model.wish is not _Wish.STOP or any(replica.assigned for replica in model.replicas):
            return
        if self._is_seen(uid):
            return
        del self._models[uid]
        assert model.error is not None
        _remember(self._ended, model.desired.launch_id, model.error)
        if not model.desired.has_been_ready:
            cancelled = LaunchProgress(progress=0.0, stage="cancelled")
            _remember(self._ended_progress, uid, cancelled)

    def _is_seen(self, name: ModelUid | ReplicaUid) -> bool:
        """Return whether a living instance of a model, or of a replica, is on some node."""
        return any(
            name in {report.replica, report.replica.model}
            for node in self._nodes.values()
            for report in node.instances.values()
            if report.state is not InstanceState.EXITED
        )

    def _commands(self) -> list[Effect]:
        """Return, per node, the difference between what it runs and what it should."""
        assigned: dict[InstanceId, tuple[_Model, _Replica]] = {
            replica.assigned.instance: (model, replica)
            for model in self._models.values()
            for replica in model.replicas
            if replica.assigned is not None
        }
        outgoing = {
            replica.outgoing.assigned.instance
            for model in self._models.values()
            for replica in model.replicas
            if replica.outgoing is not None
        }
        commands: list[Effect] = []
        for name, node in self._nodes.items():
            start, stop, forget = [], [], []
            for report in node.instances.values():
                # What could be adopted has been, by now; the rest is surplus.
                is_wanted = report.instance in outgoing or (
                    report.instance in assigned and _Model.runs(*assigned[report.instance])
                )
                if report.state is InstanceState.EXITED:
                    forget.append(report.instance)
                elif not is_wanted and report.state is not InstanceState.STOPPING:
                    stop.append(_stop(report.replica, report.instance, report.launch_id))
            for instance, (model, replica) in assigned.items():
                place_of = replica.assigned
                if place_of is None or place_of.node != name or instance in node.instances:
                    continue
                launch_id = model.desired.launch_id
                if model.runs(replica):
                    spec = _spec(model, replica, place_of, self._device_share(model, place_of))
                    start.append(StartInstance(spec=spec, launch_id=launch_id))
                else:
                    stop.append(_stop(replica.uid, instance, launch_id))
            if start or stop or forget:
                command = Command(
                    supervisor_epoch=self._epoch,
                    worker_epoch=node.worker_epoch,
                    start=tuple(start),
                    stop=tuple(stop),
                    forget=tuple(forget),
                )
                commands.append(Tell(name, command))
        return commands

    def _loads(self) -> dict[NodeId, NodeLoad]:
        """Return every node that takes replicas, with what is meant to run on it."""
        loads = {
            name: NodeLoad.of(name, node.resources)
            for name, node in self._nodes.items()
            if node.state is NodeState.READY
        }
        for model in self._models.values():
            memory_bytes = _memory_of(model)
            for replica in model.replicas:
                assigned = replica.assigned
                if assigned is not None and assigned.node in loads:
                    # A replica that is ready shows in the readings of its node.
                    is_promised = replica.state is not ReplicaState.READY
                    load = loads[assigned.node]
                    load.add(assigned.gpu_idx, memory_bytes if is_promised else 0)
        return loads

    def _place(self, need: Need, loads: dict[NodeId, NodeLoad]) -> Place | None:
        return place(loads, need, strategy=self._strategy, shares_gpus=self._shares_gpus)

    def _check_places(
        self,
        wishes: Sequence[ReplicaPlacement],
        spec: LaunchSpec,
        *,
        memory_bytes: int,
        model: _Model | None = None,
    ) -> None:
        """Refuse wishes for which there is no place, one after the other.

        Raises:
            InvalidRequest, InsufficientResources
        """
        loads = self._loads()
        if not loads:
            raise InsufficientResources(problem="No worker has joined this cluster.")
        places: list[Place] = []
        known = Need() if model is None else _need(model, ReplicaPlacement())
        for wish in wishes:
            need = Need(
                placement=wish,
                memory_bytes=memory_bytes,
                own_nodes=(*known.own_nodes, *(one.node for one in places)),
                own_gpus=known.own_gpus | _gpus_of(places),
                max_gpus=spec.n_gpu,
            )
            chosen = self._place(need, loads)
            if chosen is None:
                raise self._no_place(wish)
            if memory_bytes and not chosen.has_room:
                raise InsufficientResources(
                    problem=f"A replica needs about {memory_bytes / 2**30:.1f} GiB; the best place "
                    f"for it, {_where(chosen)}, has less free."
                )
            loads[chosen.node].add(chosen.gpu_idx, memory_bytes)
            places.append(chosen)
        num_gpus = len(_gpus_of(places))
        if num_gpus < (spec.n_gpu or 0):
            raise InvalidRequest(
                field="n_gpu", problem=f"asks for {spec.n_gpu} GPUs; {num_gpus} can be had"
            )

    def _no_place(self, wish: ReplicaPlacement) -> XinferenceError:
        """Return why no node is as a replica asks."""
        known = ", ".join(sorted(self._nodes))
        at = [node for name, node in self._nodes.items() if is_at(name, wish.worker_ip)]
        if not at:
            return InvalidRequest(
                field="worker_ip", problem=f"no worker is at {wish.worker_ip}; workers: {known}"
            )
        there = sorted({device.index for node in at for device in node.resources.devices})
        if wish.gpu_idx is not None and not set(wish.gpu_idx) <= set(there):
            problem = f"there is no GPU {list(wish.gpu_idx)}; GPUs: {there}"
            return InvalidRequest(field="gpu_idx", problem=problem)
        if not there:
            return InvalidRequest(field="n_gpu", problem="no worker has a GPU")
        return InsufficientResources(
            problem="Every GPU holds a replica already, and XINFERENCE_ALLOW_MULTI_REPLICA_PER_GPU "
            "is 0."
        )

    def _device_share(self, model: _Model, at: _Assignment) -> int | None:
        """Return how many bytes of its GPU a replica may take; None: what is free.

        Why: replicas of one model that start together would each find the whole GPU free.
        """
        if not at.gpu_idx or at.node not in self._nodes:
            return None
        num_sharing = sum(
            one.assigned is not None
            and (one.assigned.node, one.assigned.gpu_idx) == (at.node, at.gpu_idx)
            for one in model.replicas
        )
        devices = {one.index: one for one in self._nodes[at.node].resources.devices}
        if num_sharing < 2 or at.gpu_idx[0] not in devices:
            return None
        return devices[at.gpu_idx[0]].total_bytes // num_sharing

    # What to show.

    @property
    def routes(self) -> RoutingTable:
        """The current table; its version grows with every change."""
        return self._routes

    def nodes(self, *, now: Moment) -> list[NodeStatus]:
        """Return every living worker, sorted by address."""
        return [
            NodeStatus(
                node=name,
                resources=node.resources,
                seconds_since_report=max(0.0, now.monotonic - node.seen_at),
                num_replicas=sum(
                    report.state is not InstanceState.EXITED for report in node.instances.values()
                ),
                state=node.state,
            )
            for name, node in sorted(self._nodes.items())
        ]

    def uids(self) -> set[ModelUid]:
        """Return the uids of every model that is wanted, stopping or failed."""
        return set(self._models)

    def taken_uids(self) -> set[ModelUid]:
        """Return the uids that a launch may not have."""
        return {uid for uid, model in self._models.items() if model.wish is not _Wish.NOTHING}

    def models(self) -> list[ModelStatus]:
        """Return every model that is wanted, stopping or failed, sorted by uid."""
        return [self.model(uid) for uid in sorted(self._models)]

    def model(self, model_uid: ModelUid) -> ModelStatus:
        """Return one model.

        Raises:
            ModelNotFound
        """
        model = self._find(model_uid)
        replicas = tuple(_replica_status(replica) for replica in model.replicas)
        addresses = [
            status.address
            for status in replicas
            if status.state is ReplicaState.READY and status.address is not None
        ]
        return ModelStatus(
            model_uid=model_uid,
            description=_description_of(model, addresses[0] if addresses else None),
            state=_state_of(model),
            created_ts=model.desired.created_ts,
            replicas=replicas,
        )

    def story(self, model_uid: ModelUid) -> list[ModelEvent]:
        """Return the last events of a model, oldest first.

        Raises:
            ModelNotFound
        """
        return list(self._find(model_uid).story)

    def launch_progress(self, model_uid: ModelUid) -> LaunchProgress:
        """Return how far a launch is; an unknown model is at 0, "pending"."""
        model = self._models.get(model_uid)
        if model is None:
            pending = LaunchProgress(progress=0.0, stage="pending")
            return self._ended_progress.get(model_uid, pending)
        if model.wish is _Wish.STOP:
            return LaunchProgress(progress=0.0, stage="cancelled")
        if model.wish is _Wish.NOTHING:
            return LaunchProgress(progress=0.0, stage="error", info=str(model.error))
        return min(map(_progress, model.wanted), key=lambda progress: progress.progress)

    def launch_outcome(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """Return whether the launch has succeeded (True) or is under way (False).

        Raises:
            LoadFailed, LaunchCancelled: it ended, and nothing of it is left.
        """
        model = self._models.get(model_uid)
        if model is None or model.desired.launch_id != launch_id:
            raise self._ended.get(launch_id) or LaunchCancelled(model=model_uid)
        if model.wish is _Wish.NOTHING:
            assert model.error is not None
            if any(replica.assigned is not None for replica in model.replicas):
                return False  # what ran beside the replica that failed is still ending
            raise model.error
        return model.desired.has_been_ready

    def replicas_outcome(self, ticket: LaunchTicket) -> bool:
        """Return whether all replicas of a ticket are ready (True) or on their way (False).

        Raises:
            LoadFailed, LaunchCancelled: one of them was dropped, or removed, again.
        """
        model = self._models.get(ticket.model_uid)
        if model is None or model.desired.launch_id != ticket.launch_id:
            raise self._ended.get(ticket.launch_id) or LaunchCancelled(model=ticket.model_uid)
        for index in ticket.replicas:
            if (ticket.launch_id, index) in self._dropped:
                raise self._dropped[ticket.launch_id, index]
        asked = [one for one in model.wanted if one.uid.index in ticket.replicas]
        if model.wish is not _Wish.RUN or len(asked) < len(ticket.replicas):
            raise model.error or LaunchCancelled(model=ticket.model_uid)
        return all(replica.state is ReplicaState.READY for replica in asked)

    def are_gone(self, ticket: LaunchTicket) -> bool:
        """Return whether nothing of the replicas of a ticket is left."""
        model = self._models.get(ticket.model_uid)
        if model is None or model.desired.launch_id != ticket.launch_id:
            return True
        return not any(one.uid.index in ticket.replicas for one in model.replicas)

    def is_ended(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """Return whether nothing of this launch is left."""
        model = self._models.get(model_uid)
        return model is None or model.desired.launch_id != launch_id

    def _find_running(self, model_uid: ModelUid) -> _Model:
        model = self._find(model_uid)
        if model.wish is not _Wish.RUN or not model.desired.has_been_ready:
            raise ModelNotReady(
                model=model_uid,
                state=_state_of(model).value.lower(),
                retry_after_seconds=model.retry_after_seconds,
            )
        return model

    def _find(self, model_uid: ModelUid) -> _Model:
        if model_uid not in self._models:
            ready = [uid for uid, model in self._models.items() if _is_ready(model)]
            raise ModelNotFound(model=model_uid, running=sorted(ready))
        return self._models[model_uid]

    def _update_routes(self) -> None:
        models = {uid: _routes_of(model) for uid, model in self._models.items()}
        if models == self._routes.models:
            return
        version = replace(self._routes.version, number=self._routes.version.number + 1)
        self._routes = RoutingTable(version=version, models=models)


_STATES = {
    InstanceState.STARTING: ReplicaState.STARTING,
    InstanceState.DOWNLOADING: ReplicaState.DOWNLOADING,
    InstanceState.LOADING: ReplicaState.LOADING,
    InstanceState.READY: ReplicaState.READY,
    InstanceState.STOPPING: ReplicaState.STOPPING,
}


class _Loads:
    """What is on the nodes, counted when it is first asked for."""

    def __init__(self, count: Callable[[], dict[NodeId, NodeLoad]]) -> None:
        self._count = count
        self._counted: dict[NodeId, NodeLoad] | None = None

    @property
    def now(self) -> dict[NodeId, NodeLoad]:
        """By node; whoever places a replica adds it."""
        if self._counted is None:
            self._counted = self._count()
        return self._counted


def _new_model(desired: DesiredModel) -> _Model:
    replicas = [_new_replica(desired, one, desired.created_ts) for one in desired.replicas]
    return _Model(desired, replicas)


def _new_replica(desired: DesiredModel, one: DesiredReplica, created_ts: int) -> _Replica:
    return _Replica(ReplicaUid(desired.model_uid, one.index), created_ts, one)


def _memory_of(model: _Model) -> int:
    return memory_of(model.desired.description, dtype=model.desired.spec.engine_options.dtype)


def _need(model: _Model, placement: ReplicaPlacement) -> Need:
    placed = [one.assigned for one in model.replicas if one.assigned is not None]
    return Need(
        placement=placement,
        memory_bytes=_memory_of(model),
        own_nodes=tuple(one.node for one in placed),
        own_gpus=frozenset((one.node, index) for one in placed for index in one.gpu_idx or ()),
        max_gpus=model.desired.spec.n_gpu,
    )


def _gpus_of(places: Iterable[Place]) -> frozenset[tuple[NodeId, int]]:
    return frozenset((one.node, index) for one in places for index in one.gpu_idx or ())


def _where(chosen: Place) -> str:
    if not chosen.gpu_idx:
        return str(chosen.node)
    return f"GPU {', '.join(map(str, chosen.gpu_idx))} of {chosen.node}"


def _spec(
    model: _Model, replica: _Replica, assigned: _Assignment, device_share: int | None
) -> ReplicaSpec:
    options = model.desired.spec.engine_options
    if options.device_memory_bytes is None and options.kv_cache_bytes is None:
        options = replace(options, device_memory_bytes=device_share)
    if assigned.gpu_idx and options.device.startswith("cuda"):
        # The process sees this one GPU alone, as its first.
        options = replace(options, device="cuda")
    return ReplicaSpec(
        replica=replica.uid,
        instance=assigned.instance,
        source=model.desired.source,
        abilities=model.desired.abilities,
        engine_options=options,
        python_executable="",
        envs=model.desired.spec.envs,
        request_limits=model.desired.spec.request_limits,
        gpu_idx=assigned.gpu_idx,
        model_type=model.desired.spec.model_type,
        encoder_options=model.desired.spec.encoder_options,
    )


def _stop(replica: ReplicaUid, instance: InstanceId, launch_id: LaunchId) -> StopInstance:
    return StopInstance(replica=replica, instance=instance, launch_id=launch_id)


def _is_ready(model: _Model) -> bool:
    return model.wish is _Wish.RUN and any(replica.serving is not None for replica in model.wanted)


def _state_of(model: _Model) -> ModelState:
    if model.wish is _Wish.STOP:
        return ModelState.TERMINATING
    if model.wish is _Wish.NOTHING:
        return ModelState.ERROR
    if _is_ready(model):
        return ModelState.READY
    is_loading = any(replica.state is ReplicaState.LOADING for replica in model.replicas)
    if is_loading or model.desired.has_been_ready:
        return ModelState.LOADING
    return ModelState.CREATING


def _description_of(model: _Model, address: str | None) -> ModelDescription:
    """Return what the model is; what its replica says of itself counts for more."""
    description = replace(model.desired.description, address=address, replica=len(model.wanted))
    for replica in model.replicas:
        if replica.report is not None and replica.report.context_length is not None:
            return replace(description, context_length=replica.report.context_length)
    return description


def _routes_of(model: _Model) -> ModelRoutes:
    routes = []
    for replica in model.replicas:
        serving = replica.serving
        if serving is not None and model.runs(replica) and serving[1].address is not None:
            assigned, report = serving
            route = Route(
                replica=replica.uid, instance=assigned.instance, address=str(report.address)
            )
            routes.append(route)
    return ModelRoutes(
        state=_state_of(model),
        retry_after_seconds=model.retry_after_seconds,
        problem=_problem_of(model.error),
        routes=tuple(routes),
    )


def _problem_of(error: XinferenceError | None) -> str:
    """Return what went wrong, without the sentence that a `LoadFailed` puts around it."""
    if error is None:
        return ""
    return error.problem if isinstance(error, LoadFailed) else str(error)


def _replica_status(replica: _Replica) -> ReplicaStatus:
    assigned, report, state = replica.assigned, replica.report, replica.state
    if replica.serving is not None:
        (assigned, report), state = replica.serving, ReplicaState.READY
    return ReplicaStatus(
        replica=replica.uid,
        state=state,
        node=None if assigned is None else assigned.node,
        address=None if report is None else report.address,
        instance=None if assigned is None else assigned.instance,
        created_ts=replica.created_ts,
        num_restarts=replica.num_restarts,
        error_message=replica.problem,
        gpu_idx=None if assigned is None else assigned.gpu_idx,
    )


def _progress(replica: _Replica) -> LaunchProgress:
    return progress_of(replica.state, replica.report, replica.problem)


def _remember(ended: "OrderedDict[KeyT, ValueT]", key: KeyT, value: ValueT) -> None:
    ended[key] = value
    ended.move_to_end(key)
    while len(ended) > MAX_ENDED_LAUNCHES:
        ended.popitem(last=False)
