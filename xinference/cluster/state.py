# SPDX-License-Identifier: Apache-2.0
"""`ClusterState`: what should run, what does run, and what to do about the difference.

In: events (a launch, a report of a worker, the passing of time). Out: effects for the supervisor
to carry out, snapshots to show, the routing table. Pure: no I/O, no await, no clock and no
randomness that is not an argument, so that a thousand random histories can be run through it.

It is level-triggered: `reconcile` compares the whole wish with the whole observation, every time.
Launch, boot, crash, cancel and terminate are the same few lines; an effect that gets lost is
found missing and made again. A replica's life:

    pending ──place──▶ starting ─▶ loading ─▶ ready
       ▲                  │           │         │
       └──── delay over ──┴ backing off ◀───────┴─ its process ended
                              │
                              └─ too often, or a first launch ─▶ failed ─ launch or terminate ─▶

What fences what: `LaunchId` an old launch from a new one of the same uid, `InstanceId` one start
of a process from the next, `WorkerEpoch` one life of a worker from the next, the supervisor's
epoch an old supervisor from this one.
"""

import math
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable
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
    XinferenceError,
    from_wire,
)
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid
from xinference.protocol.deployment import (
    LaunchProgress,
    LaunchSpec,
    ModelDescription,
    ModelEvent,
    ModelState,
    ModelStatus,
    ReplicaSpec,
    ReplicaState,
    ReplicaStatus,
)
from xinference.protocol.nodes import NodeResources, NodeStatus

from .messages import (
    Command,
    DesiredModel,
    Heartbeat,
    InstanceReport,
    InstanceState,
    LaunchId,
    ModelRoutes,
    Route,
    RoutesVersion,
    RoutingTable,
    StartInstance,
    StopInstance,
    WorkerEpoch,
    WorkerReport,
)
from .placement import Candidate, place

LEASE_SECONDS = 5.0
"""A worker that was silent for this long is lost."""
RECOVERY_SECONDS = 3.0
"""After its start a supervisor waits this long for workers to say what runs."""
RESTART_WINDOW_SECONDS = 300.0
"""Deaths longer ago than this are forgiven."""
BACK_OFF_SECONDS = (0.2, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 60.0)
"""Before the first restart, the second, … ; the last holds for all that follow."""
RETRY_AFTER_SECONDS = 5
STORY_LEN = 100
MAX_ENDED_LAUNCHES = 256

_PROGRESS_OF_STARTING = 0.05

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


@dataclass(slots=True)
class _Replica:
    uid: ReplicaUid
    created_ts: int
    state: ReplicaState = ReplicaState.PENDING
    assigned: _Assignment | None = None
    report: InstanceReport | None = None
    """The latest of the assigned instance; None until its worker has shown it."""
    not_before: float = -math.inf
    """Monotonic; no start earlier than this."""
    deaths: list[float] = field(default_factory=list)
    num_restarts: int = 0
    problem: str = ""


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

    def tell(self, kind: str, content: str, now: Moment) -> None:
        self.story.append(ModelEvent(event_type=kind, event_ts=now.unix, event_content=content))


@dataclass(slots=True)
class _Node:
    worker_epoch: WorkerEpoch
    sequence: int
    resources: NodeResources
    instances: dict[InstanceId, InstanceReport]
    seen_at: float


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
    ) -> None:
        """Start from the stored wish, with nothing observed yet.

        Args:
            epoch: of this supervisor; larger than every earlier one's.
            jitter: returns a factor around 1 for each delay.
            restart_limit: restarts of one replica within five minutes; the next death ends it.
            expected_workers: so many reports end the wait for what runs; None: time alone does.
        """
        self._epoch = epoch
        self._new_instance = new_instance
        self._jitter = jitter
        self._restart_limit = restart_limit
        self._expected_workers = expected_workers
        self._models: dict[ModelUid, _Model] = {}
        self._nodes: dict[NodeId, _Node] = {}
        # Invariant: a worker's process that was replaced is gone; what it sent, late, is void.
        self._replaced: set[WorkerEpoch] = set()
        self._ended: OrderedDict[LaunchId, XinferenceError] = OrderedDict()
        self._ended_progress: OrderedDict[ModelUid, LaunchProgress] = OrderedDict()
        self._routes = RoutingTable(version=RoutesVersion(supervisor_epoch=epoch), models={})
        for model in desired:
            self._models[model.model_uid] = _new_model(model)
        self._recovery_ends_at = now.monotonic + RECOVERY_SECONDS if self._models else -math.inf
        self._update_routes()

    # What happens.

    def check_launch(self, spec: LaunchSpec) -> None:
        """Refuse a launch that cannot be taken now.

        Raises:
            ModelAlreadyExists: a model that runs, starts or stops has the uid.
            InvalidRequest: no worker is at `worker_ip`.
            InsufficientResources: there is no worker.
        """
        uid = spec.model_uid
        if uid in self.taken_uids():
            raise ModelAlreadyExists(name=str(uid))
        if not self._nodes:
            raise InsufficientResources(problem="No worker has joined this cluster.")
        if place(self._candidates(), worker_ip=spec.worker_ip) is None:
            known = ", ".join(sorted(self._nodes))
            raise InvalidRequest(
                field="worker_ip", problem=f"no worker is at {spec.worker_ip}; workers: {known}"
            )

    def launch(self, desired: DesiredModel, *, now: Moment) -> None:
        """Take on a model that `check_launch` let pass and that is in the store."""
        model = _new_model(desired)
        model.tell("INFO", f"Launch of {desired.description.model_name} requested.", now)
        self._models[desired.model_uid] = model
        self._ended_progress.pop(desired.model_uid, None)

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
        return True

    def node_lost(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """The worker's process is gone, and its replicas with it."""
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
        for model in list(self._models.values()):
            for replica in model.replicas:
                effects += self._assign(model, replica, now)
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
                if model.wish is _Wish.RUN
                for replica in model.replicas
                if replica.state is ReplicaState.BACKING_OFF
            ),
            default=None,
        )

    def _expire_leases(self, now: Moment) -> None:
        for name, node in list(self._nodes.items()):
            if now.monotonic - node.seen_at > LEASE_SECONDS:
                del self._nodes[name]

    def _observe(self, model: _Model, replica: _Replica, now: Moment) -> list[Effect]:
        """Bring one replica up to what its worker says."""
        assigned = replica.assigned
        if assigned is None:
            return []
        node = self._nodes.get(assigned.node)
        if node is None or node.worker_epoch != assigned.worker_epoch:
            replica.assigned = replica.report = None
            replica.state = ReplicaState.PENDING
            if model.wish is _Wish.RUN:
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
            return self._died(model, replica, report, now) if model.wish is _Wish.RUN else []
        before, replica.state = replica.state, _STATES[report.state]
        if replica.state is before:
            return []
        model.tell("INFO", f"{replica.uid} is {replica.state.value} on {assigned.node}.", now)
        if replica.state is not ReplicaState.READY:
            return []
        replica.problem = ""
        model.retry_after_seconds = RETRY_AFTER_SECONDS
        if model.desired.has_been_ready or model.wish is not _Wish.RUN:
            return []
        model.desired = replace(model.desired, has_been_ready=True)
        return [SaveModel(model.desired)]

    def _died(
        self, model: _Model, replica: _Replica, report: InstanceReport, now: Moment
    ) -> list[Effect]:
        """Its process ended unasked: back off, or give up."""
        uid = model.desired.model_uid
        error = (
            LoadFailed(model=uid, problem="its process ended")
            if report.error is None
            else from_wire(report.error)
        )
        replica.problem = str(error)
        if not model.desired.has_been_ready:
            self._give_up(model, replica, error, now)
            return [ForgetModel(uid)]
        recent = now.monotonic - RESTART_WINDOW_SECONDS
        replica.deaths = [death for death in replica.deaths if death > recent] + [now.monotonic]
        if len(replica.deaths) > self._restart_limit:
            times = len(replica.deaths)
            problem = f"it ended {times} times within {RESTART_WINDOW_SECONDS:.0f} s; last: {error}"
            self._give_up(model, replica, LoadFailed(model=uid, problem=problem), now)
            return []
        step = min(len(replica.deaths), len(BACK_OFF_SECONDS)) - 1
        delay = BACK_OFF_SECONDS[step] * self._jitter()
        replica.state = ReplicaState.BACKING_OFF
        replica.not_before = now.monotonic + delay
        replica.num_restarts += 1
        model.retry_after_seconds = math.ceil(delay) + RETRY_AFTER_SECONDS
        model.tell("WARNING", f"{error} Starting it again in {delay:.1f} s.", now)
        return []

    def _give_up(
        self, model: _Model, replica: _Replica, error: XinferenceError, now: Moment
    ) -> None:
        model.wish = _Wish.NOTHING
        model.error = error
        replica.state = ReplicaState.FAILED
        replica.problem = str(error)
        model.tell("ERROR", str(error), now)

    def _assign(self, model: _Model, replica: _Replica, now: Moment) -> list[Effect]:
        """Find the replica an instance: one that runs already, or a new one on some node."""
        if model.wish is not _Wish.RUN or replica.assigned is not None:
            return []
        living = [
            (name, node, report)
            for name, node in self._nodes.items()
            for report in node.instances.values()
            if report.replica == replica.uid and report.state is not InstanceState.EXITED
        ]
        for name, node, report in living:
            if (
                report.launch_id == model.desired.launch_id
                and report.state is not InstanceState.STOPPING
            ):
                replica.assigned = _Assignment(name, node.worker_epoch, report.instance)
                model.tell("INFO", f"{replica.uid} was found running on {name}.", now)
                return self._observe(model, replica, now)
        # Invariant: never two live instances of a replica; the old one goes before the new one.
        if living or self.is_recovering(now=now) or now.monotonic < replica.not_before:
            return []
        chosen = place(self._candidates(), worker_ip=model.desired.spec.worker_ip)
        if chosen is None:
            replica.state = ReplicaState.PENDING
            return []
        replica.assigned = _Assignment(
            chosen, self._nodes[chosen].worker_epoch, self._new_instance()
        )
        replica.state = ReplicaState.STARTING
        model.tell("INFO", f"{replica.uid} is starting on {chosen}.", now)
        return []

    def _end(self, model: _Model) -> None:
        """Drop a model that is not wanted once nothing of it is left."""
        uid = model.desired.model_uid
        if model.wish is not _Wish.STOP or any(replica.assigned for replica in model.replicas):
            return
        for node in self._nodes.values():
            for report in node.instances.values():
                if report.replica.model == uid and report.state is not InstanceState.EXITED:
                    return
        del self._models[uid]
        assert model.error is not None
        _remember(self._ended, model.desired.launch_id, model.error)
        if not model.desired.has_been_ready:
            cancelled = LaunchProgress(progress=0.0, stage="cancelled")
            _remember(self._ended_progress, uid, cancelled)

    def _commands(self) -> list[Effect]:
        """Return, per node, the difference between what it runs and what it should."""
        assigned: dict[InstanceId, tuple[_Model, _Replica]] = {
            replica.assigned.instance: (model, replica)
            for model in self._models.values()
            for replica in model.replicas
            if replica.assigned is not None
        }
        commands: list[Effect] = []
        for name, node in self._nodes.items():
            start, stop, forget = [], [], []
            for report in node.instances.values():
                # What could be adopted has been, by now; the rest is surplus.
                is_wanted = (
                    report.instance in assigned and assigned[report.instance][0].wish is _Wish.RUN
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
                if model.wish is _Wish.RUN:
                    start.append(
                        StartInstance(spec=_spec(model, replica, instance), launch_id=launch_id)
                    )
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

    def _candidates(self) -> list[Candidate]:
        counts = dict.fromkeys(self._nodes, 0)
        for model in self._models.values():
            for replica in model.replicas:
                if replica.assigned is not None and replica.assigned.node in counts:
                    counts[replica.assigned.node] += 1
        return [
            Candidate(node=name, resources=node.resources, num_replicas=counts[name])
            for name, node in self._nodes.items()
        ]

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
        return min(map(_progress, model.replicas), key=lambda progress: progress.progress)

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
            raise model.error
        return _state_of(model) is ModelState.READY

    def is_ended(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """Return whether nothing of this launch is left."""
        model = self._models.get(model_uid)
        return model is None or model.desired.launch_id != launch_id

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
    InstanceState.LOADING: ReplicaState.LOADING,
    InstanceState.READY: ReplicaState.READY,
    InstanceState.STOPPING: ReplicaState.STOPPING,
}


def _new_model(desired: DesiredModel) -> _Model:
    uids = [ReplicaUid(desired.model_uid, index) for index in range(desired.spec.replica)]
    return _Model(desired, [_Replica(uid, desired.created_ts) for uid in uids])


def _spec(model: _Model, replica: _Replica, instance: InstanceId) -> ReplicaSpec:
    return ReplicaSpec(
        replica=replica.uid,
        instance=instance,
        source=model.desired.source,
        abilities=model.desired.abilities,
        engine_options=model.desired.spec.engine_options,
        python_executable="",
        envs=model.desired.spec.envs,
        request_limits=model.desired.spec.request_limits,
        model_type=model.desired.spec.model_type,
        encoder_options=model.desired.spec.encoder_options,
    )


def _stop(replica: ReplicaUid, instance: InstanceId, launch_id: LaunchId) -> StopInstance:
    return StopInstance(replica=replica, instance=instance, launch_id=launch_id)


def _is_ready(model: _Model) -> bool:
    return model.wish is _Wish.RUN and any(
        replica.state is ReplicaState.READY for replica in model.replicas
    )


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
    description = replace(model.desired.description, address=address)
    for replica in model.replicas:
        if replica.report is not None and replica.report.context_length is not None:
            return replace(description, context_length=replica.report.context_length)
    return description


def _routes_of(model: _Model) -> ModelRoutes:
    routes = [
        Route(
            replica=replica.uid, instance=replica.assigned.instance, address=replica.report.address
        )
        for replica in model.replicas
        if model.wish is _Wish.RUN
        and replica.state is ReplicaState.READY
        and replica.assigned is not None
        and replica.report is not None
        and replica.report.address is not None
    ]
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
    return ReplicaStatus(
        replica=replica.uid,
        state=replica.state,
        node=None if replica.assigned is None else replica.assigned.node,
        address=None if replica.report is None else replica.report.address,
        instance=None if replica.assigned is None else replica.assigned.instance,
        created_ts=replica.created_ts,
        num_restarts=replica.num_restarts,
        error_message=replica.problem,
    )


def _progress(replica: _Replica) -> LaunchProgress:
    if replica.state is ReplicaState.READY:
        return LaunchProgress(progress=1.0, stage="completed")
    if replica.state is ReplicaState.LOADING and replica.report is not None:
        share = _PROGRESS_OF_STARTING + (1.0 - _PROGRESS_OF_STARTING) * replica.report.progress
        return LaunchProgress(progress=min(share, 0.99), stage="loading", info=replica.report.info)
    if replica.state is ReplicaState.STARTING:
        return LaunchProgress(progress=_PROGRESS_OF_STARTING, stage="launching")
    return LaunchProgress(progress=0.0, stage="pending", info=replica.problem)


def _remember(ended: "OrderedDict[KeyT, ValueT]", key: KeyT, value: ValueT) -> None:
    ended[key] = value
    ended.move_to_end(key)
    while len(ended) > MAX_ENDED_LAUNCHES:
        ended.popitem(last=False)
