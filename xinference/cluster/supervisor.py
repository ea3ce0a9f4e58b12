# SPDX-License-Identifier: Apache-2.0
"""`SupervisorActor`: receives events, asks `ClusterState`, carries out its effects.

Workers report to it and are told what to run; gateways ask it for launches and follow its
routing table. What should run is in the store before anything is done about it. It holds no
knowledge of its own that the store and the workers' reports cannot rebuild.
"""

import asyncio
import logging
import math
import sqlite3
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Protocol

from xinference import __version__
from xinference.errors import (
    InsufficientResources,
    PeerUnreachable,
    ProtocolError,
    StateUnwritable,
    XinferenceError,
)
from xinference.identifiers import ModelUid, NodeId, model_uid, new_model_uid
from xinference.protocol.autostart import AutostartEntry, AutostartStatus
from xinference.protocol.deployment import (
    LaunchProgress,
    LaunchSpec,
    ModelDescription,
    ModelEvent,
    ModelStatus,
    ReplicaPlacement,
)
from xinference.protocol.environments import VirtualEnvironment, environment_of
from xinference.protocol.nodes import ClusterInfo, NodeResources, largest_room_bytes

from .control_bus import ControlBus, Endpoint, remote
from .engine_reasons import with_reasons
from .every_worker import ask_each, nodes_at, unreachable
from .messages import (
    CONTROL_VERSION,
    Command,
    DesiredModel,
    Heartbeat,
    LaunchId,
    LaunchTicket,
    ReportAnswer,
    RoutesUpdate,
    RoutesVersion,
    WorkerEpoch,
    WorkerReport,
)
from .repositories import Repositories, ResolvingCatalog
from .state.autostart import Autostart
from .state.cluster_state import Admission, ClusterState
from .state.records import Effect, ForgetModel, Moment, SaveModel, Tell
from .store import DesiredStore
from .worker import REMOVE_TIMEOUT_SECONDS, WORKER

logger = logging.getLogger(__name__)

TICK_SECONDS = 1.0
COPY_SECONDS = 30.0
"""Between copies of the store, if it has changed."""
COMMAND_TIMEOUT_SECONDS = 5.0
PROBE_TIMEOUT_SECONDS = 1.0
MAX_WAIT_SECONDS = 20.0
"""Of one long poll; callers ask again."""
STOP_TIMEOUT_SECONDS = 15.0


class ModelCatalog(ResolvingCatalog, Protocol):
    """What the supervisor needs of `catalog.Catalog`."""

    def families(self, model_type: str) -> list[dict[str, Any]]:
        """Return every family of a type."""
        ...

    def family(self, model_type: str, name: str) -> dict[str, Any]:
        """Return one family."""
        ...

    def register(self, model_type: str, text: str, persist: bool) -> None:
        """Add a family."""
        ...

    def unregister(self, model_type: str, name: str) -> None:
        """Remove a registered family."""
        ...

    def engines(self, model_type: str, name: str) -> dict[str, Any]:
        """Return the engines that can run a family."""
        ...

    def fitting(self, spec: LaunchSpec, room_bytes: int) -> list[str]:
        """Return what of the family of a launch fits a room, in words."""
        ...


def system_clock() -> Moment:
    """Return now."""
    return Moment(monotonic=time.monotonic(), unix=int(time.time()))


class SupervisorActor:
    """The actor that owns a cluster. Stateless towards callers: its methods interleave at awaits.

    Invariant: between two awaits the state, the store and the routing table agree.
    """

    def __init__(
        self,
        *,
        bus: ControlBus,
        epoch: int,
        state: ClusterState,
        store: DesiredStore,
        catalog: ModelCatalog,
        read_resources: Callable[[], NodeResources],
        new_launch_id: Callable[[], LaunchId],
        enables_virtual_env: bool = True,
        clock: Callable[[], Moment] = system_clock,
    ) -> None:
        """Take over; `serve` on the bus comes first, then `reconcile_forever`."""
        assert bus.address is not None
        self.stopped = asyncio.Event()
        self._address = bus.address
        self._bus = bus
        self._epoch = epoch
        self._state = state
        self._store = store
        self._catalog = catalog
        self._read_resources = read_resources
        self._new_launch_id = new_launch_id
        self._enables_virtual_env = enables_virtual_env
        self._clock = clock
        self._autostart = Autostart(store.autostart())
        self._started_at = clock().monotonic
        self._is_stopping = False
        self._repositories = Repositories(bus=bus, catalog=catalog, nodes=self.nodes)
        self._is_autostarting = False
        self._changed: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._unwritten: dict[ModelUid, SaveModel | ForgetModel] = {}
        """What could not be written down, to be tried again; the latest of each model."""
        self._copied_at = self._started_at
        self._commands: dict[NodeId, Command] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._telling: set[NodeId] = set()
        self._watched: dict[NodeId, tuple[WorkerEpoch, Callable[[], None]]] = {}

    # From workers.

    @remote
    async def greet(self, node: NodeId, control_version: int, version: str) -> None:
        """Let a worker know whether it speaks as this supervisor does, before it joins.

        Raises:
            ProtocolError: it does not; says which versions the two are.
        """
        if control_version != CONTROL_VERSION:
            problem = (
                f"the worker at {node} is xinference {version}, whose control plane has version "
                f"{control_version}; this cluster's supervisor is {__version__}, with version "
                f"{CONTROL_VERSION}. Install the same on both hosts"
            )
            logger.error("Refused to let a worker join: %s", problem)
            raise ProtocolError(problem=problem)

    @remote
    async def report(self, report: WorkerReport) -> ReportAnswer:
        """Take in all that runs on a node."""
        if not self._state.node_reported(report, now=self._clock()):
            return ReportAnswer(is_void=True)
        self._watch(report.node, report.worker_epoch)
        self.reconcile()
        return ReportAnswer()

    @remote
    async def beat(self, beat: Heartbeat) -> ReportAnswer:
        """Take in a sign of life."""
        return ReportAnswer(wants_report=not self._state.node_beat(beat, now=self._clock()))

    @remote
    async def leave(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """Forget a worker that stopped in order; what ran there is placed elsewhere."""
        if self._watched.get(node, ("",))[0] == worker_epoch:
            self._watched.pop(node)[1]()
        logger.info("Worker %s left", node)
        self._state.node_lost(node, worker_epoch)
        self.reconcile()

    # From gateways.

    @remote
    async def launch(self, spec: LaunchSpec) -> tuple[RoutesVersion, LaunchTicket]:
        """Write the wish down and begin.

        Raises:
            InvalidRequest, FamilyNotFound, UnsupportedVariant, ModelAlreadyExists,
            DownloadUnavailable, DownloadFailed, InsufficientResources: nothing was started.
        """
        return self._at_version(await self._launch(spec))

    async def _launch(self, spec: LaunchSpec) -> LaunchTicket:
        """See `launch`."""
        given = None if spec.model_uid is None else model_uid(spec.model_uid)
        resolved = await self._repositories.resolve(spec)
        # Invariant: from here to the wish that is written down nothing waits.
        if self._is_stopping:
            raise InsufficientResources(problem="The cluster is shutting down.")
        name = resolved.description.model_name
        uid = given or new_model_uid(name, taken=self._state.taken_uids())
        spec = replace(spec, model_uid=uid)
        admitted = self._check_launch(spec, resolved.description)
        is_off = spec.enable_virtual_env is None and not self._enables_virtual_env
        virtual_env = environment_of(
            model_name=resolved.description.model_name,
            model_engine=resolved.description.model_engine,
            family=resolved.source.virtual_env,
            is_wanted=False if is_off else spec.enable_virtual_env,
            packages=spec.virtual_env_packages,
            find_links=spec.virtual_env_find_links,
        )
        now = self._clock()
        desired = DesiredModel(
            model_uid=uid,
            launch_id=self._new_launch_id(),
            spec=spec,
            description=replace(resolved.description, model_uid=uid),
            source=resolved.source,
            abilities=resolved.abilities,
            created_ts=now.unix,
            replicas=admitted.replicas,
            virtual_env=virtual_env,
        )
        self._write(SaveModel(desired))
        # Why not before: a launch that is refused puts nothing to sleep.
        for model in admitted.to_sleep:
            self._change_anyway(model)
        self._state.launch(desired, now=now)
        self.reconcile()
        return LaunchTicket(model_uid=uid, launch_id=desired.launch_id)

    def _check_launch(self, spec: LaunchSpec, description: ModelDescription) -> Admission:
        """Return what a launch would be; refuse one that does not fit, and say what would.

        Raises:
            ModelAlreadyExists, InvalidRequest, InsufficientResources
        """
        try:
            return self._state.check_launch(spec, description, now=self._clock())
        except InsufficientResources as error:
            nodes = self._state.nodes(now=self._clock())
            room_bytes = largest_room_bytes(nodes)
            if not nodes or description.memory_bytes <= room_bytes:
                raise
            fitting = self._catalog.fitting(spec, room_bytes)
            name = description.model_name
            what = f"What would fit: {', '.join(fitting)}." if fitting else f"No {name} would fit."
            raise InsufficientResources(problem=f"{error.problem} {what}") from error

    @remote
    async def wait_launch(
        self, uid: ModelUid, launch_id: LaunchId, timeout_seconds: float
    ) -> tuple[RoutesVersion, bool]:
        """Return whether the launch has succeeded; wait for that, for a while.

        Raises:
            LoadFailed, LaunchCancelled: it ended, and nothing of it is left.
        """
        is_ready = await self._wait(
            lambda: self._state.launch_outcome(uid, launch_id), timeout_seconds
        )
        return self._at_version(is_ready)

    @remote
    async def terminate(self, uid: ModelUid) -> tuple[RoutesVersion, LaunchTicket]:
        """Begin to stop a model.

        Raises:
            ModelNotFound
        """
        return self._at_version(self._terminate(uid))

    @remote
    async def cancel_launch(self, uid: ModelUid) -> tuple[RoutesVersion, LaunchTicket]:
        """Begin to stop a launch that is under way.

        Raises:
            ModelNotFound
            InvalidRequest: it is ready already.
        """
        self._state.check_cancel(uid)
        return self._at_version(self._terminate(uid))

    @remote
    async def add_replicas(
        self, uid: ModelUid, placements: list[ReplicaPlacement]
    ) -> tuple[RoutesVersion, LaunchTicket]:
        """Write more replicas of a running model down and begin.

        Raises:
            ModelNotFound, ModelNotReady, InvalidRequest, InsufficientResources: nothing was
            started.
        """
        before = {status.replica.index for status in self._state.model(uid).replicas}
        desired = self._state.with_more_replicas(uid, placements)
        self._change(desired)
        added = tuple(one.index for one in desired.replicas if one.index not in before)
        return self._at_version(
            LaunchTicket(model_uid=uid, launch_id=desired.launch_id, replicas=added)
        )

    @remote
    async def wait_replicas(
        self, ticket: LaunchTicket, timeout_seconds: float
    ) -> tuple[RoutesVersion, bool]:
        """Return whether the replicas of a ticket are ready; wait for that, for a while.

        Raises:
            LoadFailed, LaunchCancelled: one does not load, or was removed; it is dropped.
        """
        are_ready = await self._wait(lambda: self._state.replicas_outcome(ticket), timeout_seconds)
        return self._at_version(are_ready)

    @remote
    async def terminate_replica(
        self, uid: ModelUid, index: int
    ) -> tuple[RoutesVersion, tuple[LaunchTicket, int]]:
        """Begin to stop one replica, with the last one the model; return how many remain.

        Raises:
            ModelNotFound
            InvalidRequest: there is no such replica.
        """
        desired = self._state.without_replica(uid, index)
        if not desired.replicas:
            return self._at_version((self._terminate(uid), 0))
        self._change(desired)
        ticket = LaunchTicket(model_uid=uid, launch_id=desired.launch_id, replicas=(index,))
        return self._at_version((ticket, len(desired.replicas)))

    @remote
    async def wait_gone(
        self, ticket: LaunchTicket, timeout_seconds: float
    ) -> tuple[RoutesVersion, bool]:
        """Return whether nothing of a ticket's replicas is left; wait for that, for a while."""
        are_gone = await self._wait(lambda: self._state.are_gone(ticket), timeout_seconds)
        return self._at_version(are_gone)

    @remote
    async def wait_ended(
        self, uid: ModelUid, launch_id: LaunchId, timeout_seconds: float
    ) -> tuple[RoutesVersion, bool]:
        """Return whether nothing of a launch is left; wait for that, for a while."""
        is_ended = await self._wait(lambda: self._state.is_ended(uid, launch_id), timeout_seconds)
        return self._at_version(is_ended)

    @remote
    async def wake(self, uid: ModelUid) -> tuple[RoutesVersion, None]:
        """Begin to start a model that sleeps; nothing happens to one that does not.

        Raises:
            ModelNotFound
            InvalidRequest, InsufficientResources: there is no place for it, or no room.
        """
        for desired in self._state.awake(uid, now=self._clock()):
            self._change_anyway(desired)
        return self._at_version(None)

    @remote
    async def models(self) -> tuple[RoutesVersion, list[ModelStatus]]:
        """Return every model that is wanted or failed."""
        return self._at_version(self._state.models())

    @remote
    async def model(self, uid: ModelUid) -> tuple[RoutesVersion, ModelStatus]:
        """Return one model.

        Raises:
            ModelNotFound
        """
        return self._at_version(self._state.model(uid))

    @remote
    async def launch_progress(self, uid: ModelUid) -> tuple[RoutesVersion, LaunchProgress]:
        """Return how far a launch is."""
        return self._at_version(self._state.launch_progress(uid))

    @remote
    async def events(self, uid: ModelUid) -> tuple[RoutesVersion, list[ModelEvent]]:
        """Return the story of a model.

        Raises:
            ModelNotFound
        """
        return self._at_version(self._state.story(uid))

    @remote
    async def watch_routes(
        self, known: RoutesVersion, timeout_seconds: float
    ) -> RoutesUpdate | None:
        """Return what is new in the routing table since `known`; None when the time is up.

        Why not while recovering: what runs is not known yet. A gateway that has a table of the
        supervisor before this one serves better by that, and one that has none waits.
        """

        def is_news() -> bool:
            is_recovering = self._state.is_recovering(now=self._clock())
            return not is_recovering and self._state.routes_version != known

        is_new = await self._wait(is_news, timeout_seconds)
        return self._state.routes_since(known) if is_new else None

    @remote
    async def autostart(self) -> tuple[RoutesVersion, list[AutostartStatus]]:
        """Return the autostart list, the first to be launched first."""
        statuses = [
            replace(one, problem=one.problem or self._state.problem_of(one.entry.model_uid))
            for one in self._autostart.statuses()
        ]
        return self._at_version(statuses)

    @remote
    async def set_autostart(self, entry: AutostartEntry) -> tuple[RoutesVersion, None]:
        """Write an entry of the autostart list down; its model is launched soon if it is not.

        Raises:
            StateUnwritable
        """
        self._write_or_raise(lambda: self._store.save_autostart(entry))
        self._autostart.set(entry)
        return self._at_version(None)

    @remote
    async def remove_autostart(self, uid: ModelUid) -> tuple[RoutesVersion, None]:
        """Remove an entry of the autostart list; its model stays as it is.

        Raises:
            ObjectNotFound, StateUnwritable
        """
        self._write_or_raise(lambda: self._store.forget_autostart(uid))
        self._autostart.remove(uid)
        return self._at_version(None)

    @remote
    async def info(self) -> tuple[RoutesVersion, ClusterInfo]:
        """Return the supervisor and the workers."""
        now = self._clock()
        return self._at_version(
            ClusterInfo(
                supervisor_address=self._address,
                supervisor_resources=self._read_resources(),
                uptime_seconds=int(now.monotonic - self._started_at),
                workers=tuple(self._state.nodes(now=now)),
            )
        )

    @remote
    async def stop(self) -> None:
        """Shut the cluster down: replicas and workers, then this process. Models stay wanted."""
        if not self._is_stopping:
            self._is_stopping = True
            self._own(self._stop())

    @remote
    async def families(self, model_type: str) -> tuple[RoutesVersion, list[dict[str, Any]]]:
        """Return every family of a type.

        Raises:
            InvalidRequest
        """
        return self._at_version(self._catalog.families(model_type))

    @remote
    async def family(self, model_type: str, name: str) -> tuple[RoutesVersion, dict[str, Any]]:
        """Return one family.

        Raises:
            InvalidRequest, FamilyNotFound
        """
        return self._at_version(self._catalog.family(model_type, name))

    @remote
    async def register(
        self, model_type: str, text: str, persist: bool
    ) -> tuple[RoutesVersion, None]:
        """Add a family.

        Raises:
            InvalidRequest, ModelAlreadyExists
        """
        self._catalog.register(model_type, text, persist)
        return self._at_version(None)

    @remote
    async def unregister(self, model_type: str, name: str) -> tuple[RoutesVersion, None]:
        """Remove a registered family.

        Raises:
            InvalidRequest, FamilyNotFound
        """
        self._catalog.unregister(model_type, name)
        return self._at_version(None)

    @remote
    async def engines(self, model_type: str, name: str) -> tuple[RoutesVersion, dict[str, Any]]:
        """Return what each engine can run of a family on some worker, or why it cannot.

        Raises:
            InvalidRequest, FamilyNotFound
        """
        engines = self._catalog.engines(model_type, name)
        workers = self._state.nodes(now=self._clock())
        return self._at_version(with_reasons(engines, [one.resources for one in workers]))

    @remote
    async def virtual_envs(
        self, worker_ip: str | None
    ) -> tuple[RoutesVersion, list[VirtualEnvironment]]:
        """Return the virtual environments on the hosts that answer, or on one.

        Raises:
            InvalidRequest: there is no such worker. PeerUnreachable: it does not answer.
        """
        answers = await ask_each(
            self._bus,
            nodes_at(self.nodes(), worker_ip),
            WORKER,
            "virtual_envs",
            returns=list[VirtualEnvironment],
            timeout_seconds=COMMAND_TIMEOUT_SECONDS,
        )
        if worker_ip is not None and answers.unanswered:
            raise unreachable(answers.unanswered, "it did not say what environments it has")
        for node in answers.unanswered:
            logger.warning("Worker %s did not say what environments it has", node)
        return self._at_version([one for found in answers.by_node.values() for one in found])

    @remote
    async def remove_virtual_envs(
        self,
        model_name: str,
        model_engine: str | None,
        python_version: str | None,
        worker_ip: str | None,
    ) -> tuple[RoutesVersion, int]:
        """Remove a model's virtual environments; return how many there were.

        Raises:
            InvalidRequest: there is no such worker.
            EnvironmentInUse: a replica runs in one; what was removed elsewhere stays removed.
            PeerUnreachable: a worker does not answer; the others have removed what they had.
        """
        answers = await ask_each(
            self._bus,
            nodes_at(self.nodes(), worker_ip),
            WORKER,
            "remove_virtual_envs",
            model_name,
            model_engine,
            python_version,
            returns=int,
            timeout_seconds=REMOVE_TIMEOUT_SECONDS,
        )
        num_removed = sum(answers.by_node.values())
        if answers.unanswered:
            problem = f"it may still have its own; {num_removed} were removed elsewhere"
            raise unreachable(answers.unanswered, problem)
        return self._at_version(num_removed)

    # The loop.

    async def reconcile_forever(self) -> None:
        """Reconcile when a delay is over, and each second; events do so by themselves."""
        while True:
            self._write_what_was_not()
            self._copy_store()
            self._adapt()
            self._launch_next()
            self.reconcile()
            tick_at = self._clock().monotonic + TICK_SECONDS
            while (left := min(tick_at, self._state.next_due() or tick_at) - self._monotonic()) > 0:
                # An event meanwhile may bring a delay that ends before the tick.
                await asyncio.wait({self._changed}, timeout=left)

    def reconcile(self) -> None:
        """Make what runs match what should, as far as that needs no waiting."""
        effects = self._state.reconcile(now=self._clock())
        self._commands.clear()
        for effect in effects:
            if isinstance(effect, Tell):
                self._commands[effect.node] = effect.command
            else:
                self._try_write(effect)
        if not self._is_stopping:
            for node in self._commands:
                self._tell(node)
        self._changed.set_result(None)
        self._changed = asyncio.get_running_loop().create_future()

    def nodes(self) -> list[NodeId]:
        """Return the workers that have joined, sorted."""
        return [status.node for status in self._state.nodes(now=self._clock())]

    def check_model(self, uid: ModelUid) -> None:
        """Raise `ModelNotFound` for a model that there is not."""
        self._state.model(uid)

    async def close(self) -> None:
        """End every task; the cluster runs on."""
        for _, unwatch in self._watched.values():
            unwatch()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._store.close()

    def _adapt(self) -> None:
        """Do what time and load want: let models sleep, start and stop replicas."""
        for desired in [] if self._is_stopping else self._state.adapted(now=self._clock()):
            self._change_anyway(desired)

    def _launch_next(self) -> None:
        """Launch what the autostart list has next, once it is known what runs."""
        now = self._clock()
        if self._is_stopping or not self._state.has_worker or self._state.is_recovering(now=now):
            return
        if self._is_autostarting:
            return
        entry = self._autostart.due(self._state.state_of, now=now.monotonic)
        if entry is not None:
            self._is_autostarting = True
            self._own(self._autostart_one(entry))

    async def _autostart_one(self, entry: AutostartEntry) -> None:
        problem = ""
        try:
            await self._launch(entry.launch)
        except XinferenceError as error:
            logger.warning("Autostart of %s failed: %s", entry.model_uid, error)
            problem = str(error)
        except Exception as error:
            # Why: one entry of a list must not end the care for all models.
            logger.exception("Autostart of %s failed", entry.model_uid)
            problem = repr(error)
        finally:
            self._is_autostarting = False
        self._autostart.tried(entry, now=self._monotonic(), problem=problem)

    def _change(self, desired: DesiredModel) -> None:
        self._write(SaveModel(desired))
        self._state.change(desired, now=self._clock())
        self.reconcile()

    def _change_anyway(self, desired: DesiredModel) -> None:
        """Change what nobody is promised, written down or not: it would be found needed again."""
        self._try_write(SaveModel(desired))
        self._state.change(desired, now=self._clock())
        self.reconcile()

    def _terminate(self, uid: ModelUid) -> LaunchTicket:
        self._state.model(uid)  # raises ModelNotFound before anything is written
        self._write(ForgetModel(uid))
        self._autostart.dismiss(uid)
        launch_id = self._state.terminate(uid, now=self._clock())
        self.reconcile()
        return LaunchTicket(model_uid=uid, launch_id=launch_id)

    def _monotonic(self) -> float:
        return self._clock().monotonic

    def _at_version(self, value: Any) -> tuple[RoutesVersion, Any]:
        """Return a value with the version of the routes that it belongs to."""
        return self._state.routes_version, value

    async def _wait(self, condition: Callable[[], bool], timeout_seconds: float) -> bool:
        """Return whether the condition holds, now or within the time."""
        deadline = time.monotonic() + min(timeout_seconds, MAX_WAIT_SECONDS)
        while not condition():
            left = deadline - time.monotonic()
            if left <= 0 or math.isnan(left):
                return False
            # Why not wait_for: it would cancel the future that the others wait on, too.
            await asyncio.wait({self._changed}, timeout=left)
        return True

    def _write(self, effect: SaveModel | ForgetModel) -> None:
        """Raises StateUnwritable if it cannot be written; nothing is done then."""
        if isinstance(effect, SaveModel):
            model = effect.model
            self._write_or_raise(lambda: self._store.save(model))
        else:
            uid = effect.model_uid
            self._write_or_raise(lambda: self._store.forget(uid))
        self._unwritten.pop(_uid_of(effect), None)

    @staticmethod
    def _write_or_raise(write: Callable[[], None]) -> None:
        try:
            write()
        except sqlite3.Error as error:
            logger.error("The desired state cannot be written: %s", error)
            raise StateUnwritable(problem=str(error)) from error

    def _try_write(self, effect: Effect) -> None:
        assert not isinstance(effect, Tell)
        try:
            self._write(effect)
        except StateUnwritable:
            self._unwritten[_uid_of(effect)] = effect

    def _write_what_was_not(self) -> None:
        """Try again to write down what has happened while that was not possible."""
        for effect in list(self._unwritten.values()):
            self._try_write(effect)

    def _copy_store(self) -> None:
        """Now and then, let the store's copy have what is new."""
        now = self._monotonic()
        if now - self._copied_at < COPY_SECONDS:
            return
        self._copied_at = now
        try:
            self._store.copy()
        except (sqlite3.Error, OSError) as error:
            logger.warning("The desired state cannot be copied: %s", error)

    def _tell(self, node: NodeId) -> None:
        """Send a node what it should do, one call at a time; what changes meanwhile goes next."""
        if node not in self._telling:
            self._telling.add(node)
            self._own(self._tell_until_quiet(node))

    async def _tell_until_quiet(self, node: NodeId) -> None:
        worker = Endpoint(node, WORKER)
        try:
            while node in self._commands and not self._is_stopping:
                command = self._commands.pop(node)
                report = await self._bus.call(
                    worker,
                    "apply",
                    command,
                    returns=WorkerReport,
                    timeout_seconds=COMMAND_TIMEOUT_SECONDS,
                )
                self._state.node_reported(report, now=self._clock())
                self.reconcile()
        except PeerUnreachable as unreachable:
            logger.warning("%s", unreachable)  # the next tick tells it again
        except XinferenceError as error:
            logger.error("%s refused: %s", worker, error)
        finally:
            self._telling.discard(node)

    def _watch(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """Notice at once when the worker's process ends."""
        if node in self._watched:
            known, unwatch = self._watched[node]
            if known == worker_epoch:
                return
            unwatch()
        logger.info("Worker %s joined", node)
        self._watched[node] = (
            worker_epoch,
            self._bus.on_peer_lost(node, lambda: self._on_lost(node, worker_epoch)),
        )

    def _on_lost(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        if self._watched.get(node, ("",))[0] == worker_epoch:
            del self._watched[node]
            self._own(self._check_lost(node, worker_epoch))

    async def _check_lost(self, node: NodeId, worker_epoch: WorkerEpoch) -> None:
        """A connection ended; find out whether the process did."""
        try:
            await self._bus.lookup(Endpoint(node, WORKER), timeout_seconds=PROBE_TIMEOUT_SECONDS)
        except PeerUnreachable:
            logger.warning("Worker %s does not answer; its replicas keep their routes", node)
            self._state.node_silent(node, worker_epoch)
            self.reconcile()
        else:
            # It lives, or another process is in its place already, and reports soon.
            self._watch(node, worker_epoch)

    async def _stop(self) -> None:
        """Tell every worker to end, wait until they have, then let this process end."""
        for node in self.nodes():
            try:
                await self._bus.call(
                    Endpoint(node, WORKER),
                    "shutdown",
                    self._epoch,
                    timeout_seconds=COMMAND_TIMEOUT_SECONDS,
                )
            except XinferenceError as error:
                logger.warning("Worker %s was not told to end: %s", node, error)
        await self._wait(lambda: not self._state.nodes(now=self._clock()), STOP_TIMEOUT_SECONDS)
        self.stopped.set()

    def _own(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._release)

    def _release(self, task: "asyncio.Task[None]") -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            logger.error("A task of the supervisor failed", exc_info=task.exception())


def _uid_of(effect: SaveModel | ForgetModel) -> ModelUid:
    return effect.model.model_uid if isinstance(effect, SaveModel) else effect.model_uid
