# SPDX-License-Identifier: Apache-2.0
"""`ClusterState`: what should run, what does run, and what to do about the difference."""

import itertools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from xinference.cluster.messages import (
    DesiredModel,
    DesiredReplica,
    Heartbeat,
    LaunchId,
    LaunchTicket,
    RoutesUpdate,
    RoutesVersion,
    RoutingTable,
    WorkerEpoch,
    WorkerReport,
)
from xinference.cluster.placement import (
    LaunchStrategy,
    any_place,
    check_one_gpu,
    memory_of,
    wishes_of,
)
from xinference.errors import (
    InvalidRequest,
    LaunchCancelled,
    ModelAlreadyExists,
    ModelNotFound,
    ModelNotReady,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, NodeId
from xinference.protocol.deployment import (
    MAX_REPLICAS,
    LaunchProgress,
    LaunchSpec,
    ModelDescription,
    ModelEvent,
    ModelState,
    ModelStatus,
    ReplicaPlacement,
)
from xinference.protocol.nodes import NodeStatus

from .admission import check_places
from .commands import command_for
from .lifecycle import Lifecycle
from .outcomes import Outcomes
from .records import Effect, Model, Moment, Pressure, Tell, Wish
from .room import check_wake, make_room
from .routes import Routes
from .scaling import HOLD_OFF_SECONDS, is_idle, lowest_of, scales, wanted_replicas
from .views import progress_of, routes_of, status_of
from .world import World

RECOVERY_SECONDS = 3.0
"""After its start a supervisor waits this long for workers to say what runs,"""
FIRST_WORKER_SECONDS = 10.0
"""and this long for the first of them: without it nothing can be started, and a gateway serves
better by what it knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Admission:
    """What a launch that may be would be."""

    replicas: tuple[DesiredReplica, ...]
    to_sleep: tuple[DesiredModel, ...]
    """Models that make room for it: for `change`, before it is launched."""


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
        self._expected_workers = expected_workers
        self._world = World(strategy=strategy, shares_gpus=shares_gpus)
        self._models = self._world.models
        self._outcomes = Outcomes(self._models)
        self._lifecycle = Lifecycle(
            self._world,
            self._outcomes,
            new_instance=new_instance,
            jitter=jitter,
            restart_limit=restart_limit,
        )
        self._tells: dict[NodeId, Tell] = {}
        """What each node has to do still."""
        self._routes = Routes(epoch=epoch)
        for model in desired:
            self._world.add_model(Model.of(model))
        self._recovers_since: float | None = now.monotonic if self._models else None
        self._routes.change({uid: routes_of(model) for uid, model in self._models.items()})

    # What happens.

    def check_launch(
        self, spec: LaunchSpec, description: ModelDescription, *, now: Moment
    ) -> Admission:
        """Refuse a launch that cannot be taken now; return what it would be.

        Raises:
            ModelAlreadyExists: a model that runs, starts or stops has the uid.
            InvalidRequest: there is no worker at `worker_ip`, or no such GPU.
            InsufficientResources: there is no worker, or not memory enough, as far as one can tell.
        """
        known = None if spec.model_uid is None else self._models.get(spec.model_uid)
        if known is not None and known.wish is not Wish.NOTHING:
            raise ModelAlreadyExists(name=str(known.uid))
        wishes = wishes_of(spec)
        memory_bytes = memory_of(description, dtype=spec.engine_options.dtype)

        def check() -> None:
            check_places(self._world, wishes, memory_bytes=memory_bytes, n_gpu=spec.n_gpu)

        return Admission(
            to_sleep=self._asleep(make_room(self._world, check, now=now)),
            replicas=tuple(
                DesiredReplica(index=index, placement=wish) for index, wish in enumerate(wishes)
            ),
        )

    def launch(self, desired: DesiredModel, *, now: Moment) -> None:
        """Take on a model that `check_launch` let pass and that is in the store."""
        model = Model.of(desired)
        model.tell("INFO", f"Launch of {desired.description.model_name} requested.", now)
        self._world.add_model(model)
        self._outcomes.note_launch(model.uid)

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
        highest = model.desired.spec.max_replicas
        if highest is not None and num_replicas > highest:
            raise InvalidRequest(
                field="replica", problem=f"would make {num_replicas}; max_replicas is {highest}"
            )
        check_places(
            self._world,
            placements,
            memory_bytes=model.memory_bytes,
            own_nodes=model.own_nodes,
            own_gpus=model.own_gpus,
        )
        # Why not those that are on their way out: one index, one replica.
        free = (index for index in itertools.count() if index not in model.replicas)
        added = tuple(DesiredReplica(index=next(free), placement=wish) for wish in placements)
        return replace(model.desired, replicas=(*model.desired.replicas, *added))

    def without_replica(self, model_uid: ModelUid, index: int) -> DesiredModel:
        """Return a model with one replica less, for `change`. Changes nothing.

        Raises:
            ModelNotFound
            InvalidRequest: there is no such replica, or the model ends or was given up.
        """
        model = self._find(model_uid)
        if model.wish is not Wish.RUN:
            # Why: what is changed is written down, and the store has forgotten this one.
            raise InvalidRequest(
                field="replica_id",
                problem=f"{model_uid} is {model.state.value}; only the whole of it can be "
                "terminated",
            )
        indices = [replica.uid.index for replica in model.wanted]
        if index not in indices:
            raise InvalidRequest(
                field="replica_id", problem=f"{model_uid} has no replica {index}, only {indices}"
            )
        if scales(model) and len(indices) <= lowest_of(model):
            raise InvalidRequest(
                field="replica_id",
                problem=f"{model_uid} keeps {lowest_of(model)} by its min_replicas; terminate the "
                "model",
            )
        kept = tuple(one for one in model.desired.replicas if one.index != index)
        return replace(model.desired, replicas=kept)

    def without_least_busy(self, model: Model) -> DesiredModel:
        """Return a model with one replica less: the one with the least to do, of those the last."""
        least = min(
            model.wanted,
            key=lambda one: (0 if one.load is None else one.load.num_outstanding, -one.uid.index),
        )
        return self.without_replica(model.uid, least.uid.index)

    def awake(self, model_uid: ModelUid, *, now: Moment) -> list[DesiredModel]:
        """Return what wakes a model, for `change`: others that make room first, then itself.

        None of it is returned if it does not sleep.

        Raises:
            ModelNotFound
            InvalidRequest, InsufficientResources: there is no place for it, or no room.
        """
        model = self._find(model_uid)
        if model.wish is not Wish.SLEEP:
            return []
        others = make_room(self._world, lambda: check_wake(self._world, model), now=now)
        return [*self._asleep(others), replace(model.desired, is_asleep=False)]

    def _asleep(self, models: Sequence[Model]) -> tuple[DesiredModel, ...]:
        return tuple(replace(model.desired, is_asleep=True) for model in models)

    def adapted(self, *, now: Moment) -> list[DesiredModel]:
        """Return the models that time and load want otherwise, for `change`.

        Those that were idle for long sleep; those that scale get, or lose, replicas. What cannot be
        placed is told in the story of its model, and tried again later.
        """
        found = []
        for model in self._models.values():
            if model.wish is not Wish.RUN:
                continue
            spec = model.desired.spec
            if spec.idle_timeout is not None and is_idle(model, now):
                found.append(replace(model.desired, is_asleep=True))
            elif scales(model) and now.monotonic >= model.pressure.not_before:
                found += self._scaled(model, now)
        return found

    def _scaled(self, model: Model, now: Moment) -> list[DesiredModel]:
        number = wanted_replicas(model, now)
        if number == len(model.wanted):
            return []
        # Why: one that does not come up is dropped again, and is not to be tried every second.
        model.pressure = Pressure(not_before=now.monotonic + HOLD_OFF_SECONDS)
        if number < len(model.wanted):
            model.pressure.not_before = now.monotonic
            return [self.without_least_busy(model)]
        try:
            wishes = [any_place(model.desired.spec)] * (number - len(model.wanted))
            return [self.with_more_replicas(model.uid, wishes)]
        except XinferenceError as error:
            model.tell("WARNING", f"More replicas are wanted for the load, but: {error}", now)
            return []

    def change(self, desired: DesiredModel, *, now: Moment) -> None:
        """Want a model otherwise: other replicas, asleep or awake. The store knows already."""
        model = self._models[desired.model_uid]
        if desired.is_asleep != model.desired.is_asleep:
            model.wish = Wish.SLEEP if desired.is_asleep else Wish.RUN
            model.tell("INFO", "It sleeps." if desired.is_asleep else "Waking.", now)
            self._world.mark_model(model)
        kept = {one.index for one in desired.replicas}
        known = {replica.uid.index for replica in model.wanted}
        for replica in model.wanted:
            if replica.uid.index not in kept:
                replica.is_wanted = False
                self._world.mark(replica.uid)
                model.tell("INFO", f"{replica.uid} is being removed.", now)
        for one in desired.replicas:
            if one.index not in known:
                added = model.add(one, now.unix)
                self._world.mark(added.uid)
                model.tell("INFO", f"{added.uid} was added.", now)
        model.desired = desired

    def terminate(self, model_uid: ModelUid, *, now: Moment) -> LaunchId:
        """Stop wanting a model. The store has forgotten it already.

        Raises:
            ModelNotFound
        """
        model = self._find(model_uid)
        if model.wish is not Wish.STOP:
            model.wish = Wish.STOP
            model.error = LaunchCancelled(model=model_uid)
            model.tell("INFO", "Terminating.", now)
            self._world.mark_model(model)
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
        return self._world.take_report(report, now=now)

    def node_beat(self, beat: Heartbeat, *, now: Moment) -> bool:
        """Take in a sign of life; False asks for the full report."""
        return self._world.take_beat(beat, now=now)

    def node_silent(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """The worker's process does not answer: it hangs, restarts, or is gone with its host."""
        self._world.suspect_node(node, worker_epoch)

    def node_lost(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """The worker's process has ended in order, and its replicas before it."""
        self._world.observed.note_left(worker_epoch)
        self._world.drop_node(node, worker_epoch)

    # What to do about it.

    def reconcile(self, *, now: Moment) -> list[Effect]:
        """Move every replica by what was observed, and return what has to be done.

        Calling it again at the same moment returns the same `Tell`s and changes nothing. What
        nothing has happened to is not looked at: `mark_everything` would change nothing either.
        """
        self._pass_time(now)
        effects: list[Effect] = []
        entries = {}
        replicas, models = self._world.take_marked()
        while replicas or models:
            for replica in replicas:
                effects += self._lifecycle.observe(replica, now)
            may_start = not self.is_recovering(now=now)
            for replica in replicas:
                effects += self._lifecycle.assign(replica, may_start=may_start, now=now)
                self._lifecycle.drop_outgoing(replica)
            for uid in models:
                if uid in self._models:
                    self._lifecycle.end(self._models[uid])
                model = self._models.get(uid)
                entries[uid] = None if model is None else routes_of(model)
            replicas, models = self._world.take_marked()
        self._routes.change(entries)
        for node in self._world.take_marked_nodes():
            command = command_for(self._world, node, supervisor_epoch=self._epoch)
            self._tells.pop(node, None)
            if command is not None:
                self._tells[node] = Tell(node, command)
        return [*effects, *self._tells.values()]

    def mark_everything(self) -> None:
        """Let the next `reconcile` look at everything."""
        self._world.mark_everything()

    def is_recovering(self, *, now: Moment) -> bool:
        """Return whether what runs is not known yet: nothing new is started until then."""
        ends_at = self._recovery_ends_at()
        if ends_at is None or now.monotonic >= ends_at:
            return False
        return (
            self._expected_workers is None
            or len(self._world.observed.nodes) < self._expected_workers
        )

    def next_due(self) -> float | None:
        """Return the monotonic time of what is due next without any event, or None."""
        due = (self._lifecycle.next_due(), self._recovery_ends_at())
        return min((one for one in due if one is not None), default=None)

    def _recovery_ends_at(self) -> float | None:
        if self._recovers_since is None:
            return None
        return self._recovers_since + (
            RECOVERY_SECONDS if self.has_worker else FIRST_WORKER_SECONDS
        )

    def _pass_time(self, now: Moment) -> None:
        self._world.expire_leases(now)
        self._lifecycle.mark_due(now)
        if self._recovers_since is not None and not self.is_recovering(now=now):
            self._recovers_since = None
            self._world.wake_waiting()

    # What to show.

    @property
    def routes(self) -> RoutingTable:
        """The current table; its version grows with every change."""
        return self._routes.table

    @property
    def routes_version(self) -> RoutesVersion:
        """The version of the current table."""
        return self._routes.version

    def routes_since(self, known: RoutesVersion) -> RoutesUpdate:
        """Return what makes a table of a known version the current one."""
        return self._routes.since(known)

    def nodes(self, *, now: Moment) -> list[NodeStatus]:
        """Return every living worker, sorted by address."""
        return [
            NodeStatus(
                node=name,
                resources=node.resources,
                seconds_since_report=max(0.0, now.monotonic - node.seen_at),
                num_replicas=node.num_living,
                state=node.state,
            )
            for name, node in sorted(self._world.observed.nodes.items())
        ]

    @property
    def has_worker(self) -> bool:
        """Whether any worker lives."""
        return bool(self._world.observed.nodes)

    def state_of(self, model_uid: ModelUid) -> ModelState | None:
        """Return how a model is; None if there is none."""
        model = self._models.get(model_uid)
        return None if model is None else model.state

    def problem_of(self, model_uid: ModelUid) -> str:
        """Return why a model was given up; empty if it was not."""
        model = self._models.get(model_uid)
        return "" if model is None or model.error is None else str(model.error)

    def uids(self) -> set[ModelUid]:
        """Return the uids of every model that is wanted, stopping or failed."""
        return set(self._models)

    def taken_uids(self) -> set[ModelUid]:
        """Return the uids that a launch may not have."""
        return {uid for uid, model in self._models.items() if model.wish is not Wish.NOTHING}

    def models(self) -> list[ModelStatus]:
        """Return every model that is wanted, stopping or failed, sorted by uid."""
        return [status_of(self._models[uid]) for uid in sorted(self._models)]

    def model(self, model_uid: ModelUid) -> ModelStatus:
        """Return one model.

        Raises:
            ModelNotFound
        """
        return status_of(self._find(model_uid))

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
            return self._outcomes.progress_of_ended(model_uid)
        return progress_of(model)

    def launch_outcome(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """Return whether the launch has succeeded (True) or is under way (False).

        Raises:
            LoadFailed, LaunchCancelled: it ended, and nothing of it is left.
        """
        return self._outcomes.of_launch(model_uid, launch_id)

    def replicas_outcome(self, ticket: LaunchTicket) -> bool:
        """Return whether all replicas of a ticket are ready (True) or on their way (False).

        Raises:
            LoadFailed, LaunchCancelled: one of them was dropped, or removed, again.
        """
        return self._outcomes.of_replicas(ticket)

    def are_gone(self, ticket: LaunchTicket) -> bool:
        """Return whether nothing of the replicas of a ticket is left."""
        return self._outcomes.are_gone(ticket)

    def is_ended(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """Return whether nothing of this launch is left."""
        return self._outcomes.is_ended(model_uid, launch_id)

    def _find_running(self, model_uid: ModelUid) -> Model:
        model = self._find(model_uid)
        if model.wish is not Wish.RUN or not model.desired.has_been_ready:
            raise ModelNotReady(
                model=model_uid,
                state=model.state.value.lower(),
                retry_after_seconds=model.retry_after_seconds,
            )
        return model

    def _find(self, model_uid: ModelUid) -> Model:
        if model_uid not in self._models:
            ready = [uid for uid, model in self._models.items() if model.is_ready]
            raise ModelNotFound(model=model_uid, running=sorted(ready))
        return self._models[model_uid]
