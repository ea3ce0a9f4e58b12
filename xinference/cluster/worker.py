# SPDX-License-Identifier: Apache-2.0
"""`WorkerActor`: owns a host's replicas. It starts, watches and stops their processes.

Requests and text never pass through it. It obeys the supervisor's `apply` and reports what runs:
at once when something changed, and a heartbeat every second. Without a supervisor it keeps its
replicas serving, starts those again that end, and looks for one; else it decides nothing. Where its
replicas may outlive it, it adopts what the worker before it has left.
"""

import asyncio
import logging
import os
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xinference.errors import InternalError, PeerUnreachable, ProtocolError, XinferenceError
from xinference.identifiers import InstanceId, NodeId
from xinference.protocol.environments import VirtualEnvironment
from xinference.protocol.nodes import NodeResources
from xinference.protocol.worker_reading import ReplicaReading, WorkerReading

from .control_bus import ControlBus, Endpoint, Presence, remote
from .environments import EnvironmentShelf
from .journal import RunningReplica
from .messages import (
    Command,
    Heartbeat,
    InstanceLoad,
    InstanceReport,
    InstanceState,
    ReportAnswer,
    StartInstance,
    StopInstance,
    WorkerEpoch,
    WorkerReport,
)
from .supervision import INSTANCE_VARIABLE, kill_strays, kill_tagged

logger = logging.getLogger(__name__)

WORKER = "worker"
SUPERVISOR = "supervisor"
CACHE, CACHES = "cache", "caches"
"""What is kept of models: beside a worker, and beside the supervisor."""
LOG, LOGS = "log", "logs"
"""What was logged: beside a worker, and beside the supervisor."""
HEARTBEAT_SECONDS = 1.0
CALL_TIMEOUT_SECONDS = 2.0
REMOVE_TIMEOUT_SECONDS = 60.0
"""For a worker to remove thousands of files, or hundreds of gigabytes."""
FIRST_RETRY_SECONDS = 0.2
"""Between looks for a supervisor; each is twice as late, up to ten times as much."""
ALONE_RESTART_SECONDS = (0.0, 1.0, 4.0, 16.0, 60.0)
"""Without a supervisor: from each start of an instance that ends to the next; so many, and then it
is left for a supervisor to decide."""
MAX_FORGOTTEN = 100_000
"""Ended instances that are remembered, so that a late order does not start them again."""


@dataclass(frozen=True, slots=True)
class Served:
    """An instance that was ready once."""

    start: StartInstance
    address: str
    """Where gateways found it."""


class ReplicaActor(Protocol):
    """What the worker needs of a `ModelActor`."""

    ended: asyncio.Event
    """Set when no process of it is left."""
    settled: asyncio.Event
    """Set when it is ready, or will not be."""

    @property
    def report(self) -> InstanceReport:
        """How it is."""
        ...

    @property
    def load(self) -> InstanceLoad | None:
        """How much it has to do; None while it is not ready."""
        ...

    @property
    def reading(self) -> ReplicaReading:
        """How it is, for those who watch the worker."""
        ...

    @property
    def pid(self) -> int | None:
        """Of its process, if there is one."""
        ...

    def start(self, after: asyncio.Event | None = None) -> None:
        """Begin, once `after` is set."""
        ...

    def stop(self) -> None:
        """End soon."""
        ...

    @property
    def served(self) -> Served | None:
        """What to start to have the same instance again; None: told to end, or never ready."""
        ...


class NewReplica(Protocol):
    """Makes the actor of one instance."""

    def __call__(
        self,
        start: StartInstance,
        *,
        sweep: Callable[[InstanceId], int],
        on_change: Callable[[], None],
        adopted: RunningReplica | None = None,
        listens_at: str = "",
    ) -> ReplicaActor:
        """See `ModelActor`."""
        ...


FindSupervisor = Callable[[], Awaitable[str]]
"""Returns the address of the supervisor's actor, or raises `PeerUnreachable`."""


class WorkerActor:
    """The actor of a host. Its methods interleave at awaits; each changes its tables at once."""

    def __init__(
        self,
        *,
        bus: ControlBus,
        worker_epoch: WorkerEpoch,
        new_replica: NewReplica,
        read_resources: Callable[[], NodeResources],
        find_supervisor: FindSupervisor,
        other_children: Callable[[], Sequence[int]] = tuple,
        environments: EnvironmentShelf | None = None,
        heartbeat_seconds: float = HEARTBEAT_SECONDS,
        first_retry_seconds: float = FIRST_RETRY_SECONDS,
    ) -> None:
        """Own nothing yet. `serve` on the bus comes first, then `report_forever`.

        Args:
            other_children: returns the processes that this one has started beside replicas.
        """
        assert bus.address is not None
        self.node = NodeId(bus.address)
        self.joined = asyncio.Event()
        self.shutdown_requested = asyncio.Event()
        self._bus = bus
        self._worker_epoch = worker_epoch
        self._new_replica = new_replica
        self._read_resources = read_resources
        self._find_supervisor = find_supervisor
        self._other_children = other_children
        self._environments = environments
        self._heartbeat_seconds = heartbeat_seconds
        self._first_retry_seconds = first_retry_seconds
        self._replicas: dict[InstanceId, ReplicaActor] = {}
        self._never_started: dict[InstanceId, InstanceReport] = {}
        self._forgotten: dict[InstanceId, None] = {}
        self._supervisor_epoch = 0
        self._sequence = 0
        self._reported_sequence = -1
        self._is_leaving = False
        self._changed = asyncio.Event()
        self._stirred = asyncio.Event()
        """Set when something changed, or the supervisor is gone; for `restart_forever`."""
        self._restarts: dict[InstanceId, list[float]] = {}
        """When what ended was started again without a supervisor, by the event loop's clock."""

    @remote
    async def apply(self, command: Command) -> WorkerReport:
        """Do what is new in a command; return what runs now. The same one again changes nothing.

        Raises:
            ProtocolError: it is of an older supervisor, or for an earlier life of this worker.
        """
        if command.worker_epoch != self._worker_epoch:
            raise ProtocolError(problem="the command is for an earlier worker at this address")
        if command.supervisor_epoch < self._supervisor_epoch:
            raise ProtocolError(problem="the command is of an older supervisor")
        self._supervisor_epoch = command.supervisor_epoch
        for instance in command.forget:
            await self._forget(instance)
        for stop in command.stop:
            self._stop(stop)
        for start in command.start:
            await self._start(start)
        return self.report()

    @remote
    async def shutdown(self, supervisor_epoch: int) -> None:
        """End this process, its replicas first. Returns at once.

        Raises:
            ProtocolError: the order is of an older supervisor.
        """
        if supervisor_epoch < self._supervisor_epoch:
            raise ProtocolError(problem="the command is of an older supervisor")
        self.shutdown_requested.set()

    @remote
    async def virtual_envs(self) -> list[VirtualEnvironment]:
        """Return the virtual environments on this host."""
        return [] if self._environments is None else await self._environments.found()

    @remote
    async def remove_virtual_envs(
        self, model_name: str, model_engine: str | None, python_version: str | None
    ) -> int:
        """Remove a model's virtual environments on this host; return how many there were.

        Raises:
            EnvironmentInUse
        """
        if self._environments is None:
            return 0
        return await self._environments.remove(
            model_name, model_engine=model_engine, python_version=python_version
        )

    async def adopt(self, running: Sequence[RunningReplica], *, timeout_seconds: float) -> None:
        """Take over what an earlier worker of this host has left; before the first report.

        Returns when each is ready again or lost, or the time is over: what is reported as it is
        keeps its route.
        """
        actors = []
        for one in running:
            actor = self._new_replica(
                StartInstance(spec=one.spec, launch_id=one.launch_id),
                sweep=self._sweep,
                on_change=self._on_change,
                adopted=one,
            )
            self._replicas[one.spec.instance] = actor
            actor.start()
            await self._bus.serve(str(one.spec.replica), actor)
            actors.append(actor)
        settling = [asyncio.create_task(actor.settled.wait()) for actor in actors]
        if settling:
            _, late = await asyncio.wait(settling, timeout=timeout_seconds)
            for task in late:
                task.cancel()

    @property
    def pids(self) -> list[int]:
        """The processes of all replicas here."""
        return [actor.pid for actor in self._replicas.values() if actor.pid is not None]

    def reading(self) -> WorkerReading:
        """Return how host and replicas are, for those who watch this worker."""
        return WorkerReading(
            node=self.node,
            has_joined=self.joined.is_set(),
            resources=self._read_resources(),
            replicas=tuple(
                actor.reading for actor in self._replicas.values() if not actor.ended.is_set()
            ),
        )

    def report(self) -> WorkerReport:
        """Return all that runs here."""
        running = [actor.report for actor in self._replicas.values()]
        return WorkerReport(
            node=self.node,
            worker_epoch=self._worker_epoch,
            sequence=self._sequence,
            resources=self._read_resources(),
            instances=(*running, *self._never_started.values()),
            is_leaving=self._is_leaving,
        )

    async def report_forever(self) -> None:
        """Join the supervisor and keep it informed; find it again whenever it is gone.

        Raises:
            InternalError: another process took this worker's place.
        """
        delay = self._first_retry_seconds
        while True:
            try:
                supervisor = Endpoint(await self._find_supervisor(), SUPERVISOR)
                await self._report_to(supervisor)
            except PeerUnreachable as unreachable:
                logger.debug("No supervisor: %s", unreachable)
                if self.joined.is_set():
                    logger.warning("%s. Replicas keep serving; looking for it.", unreachable)
                    delay = self._first_retry_seconds
                self.joined.clear()
                self._stirred.set()
                await asyncio.sleep(delay * random.uniform(0.8, 1.2))
                delay = min(2 * delay, 10 * self._first_retry_seconds)

    async def restart_forever(self) -> None:
        """While no supervisor is there to decide, start again what served here and ended unasked.

        It is the same instance, at the same address: gateways have its route still, and the next
        supervisor finds it running.
        """
        while True:
            self._stirred.clear()
            due_at: float | None = None
            if self.joined.is_set():
                self._restarts.clear()
            elif not self._is_leaving and not self.shutdown_requested.is_set():
                due_at = await self._restart_ended()
            try:
                async with asyncio.timeout_at(due_at):
                    await self._stirred.wait()
            except TimeoutError:
                continue

    async def _restart_ended(self) -> float | None:
        """Start again what is due; return when the next one is, by the event loop's clock."""
        now = asyncio.get_running_loop().time()
        due: list[float] = []
        begun: list[ReplicaActor] = []
        living = {one.report.replica for one in self._replicas.values() if not one.ended.is_set()}
        for instance, ended in list(self._replicas.items()):
            replica, served = ended.report.replica, ended.served
            starts = self._restarts.get(instance, [])
            if served is None or replica in living or len(starts) == len(ALONE_RESTART_SECONDS):
                continue
            due_at = starts[-1] + ALONE_RESTART_SECONDS[len(starts)] if starts else now
            if due_at > now:
                due.append(due_at)
                continue
            logger.warning("No supervisor is there: %s is started again", replica)
            self._restarts[instance] = [*starts, now]
            living.add(replica)
            actor = self._replicas[instance] = self._new_replica(
                served.start,
                sweep=self._sweep,
                on_change=self._on_change,
                listens_at=served.address,
            )
            self._on_change()
            actor.start()
            begun.append(actor)
        for actor in begun:
            await self._bus.serve(str(actor.report.replica), actor)
        return min(due, default=None)

    async def hand_over(self, *, timeout_seconds: float) -> None:
        """Say that this worker leaves, and let the supervisor end what runs here, for a while.

        It does so at once, or when a replica is ready on another node.
        """
        self._is_leaving = True
        self._on_change()
        living = [actor for actor in self._replicas.values() if not actor.ended.is_set()]
        if not living or not self.joined.is_set():
            return
        ending = [asyncio.create_task(actor.ended.wait()) for actor in living]
        _, late = await asyncio.wait(ending, timeout=timeout_seconds)
        for task in late:
            task.cancel()

    async def close(self) -> None:
        """Let every replica finish what runs, and stop; return when nothing of them is left."""
        self._is_leaving = True
        self._on_change()
        for actor in self._replicas.values():
            actor.stop()
        for actor in list(self._replicas.values()):
            await actor.ended.wait()

    async def leave(self) -> None:
        """Tell the supervisor, if it is there, that this process ends; nothing runs here then."""
        try:
            await self._bus.call(
                Endpoint(await self._find_supervisor(), SUPERVISOR),
                "leave",
                self.node,
                self._worker_epoch,
                timeout_seconds=CALL_TIMEOUT_SECONDS,
            )
        except XinferenceError as error:
            logger.debug("The supervisor was not told: %s", error)

    async def _report_to(self, supervisor: Endpoint) -> None:
        """Report to one supervisor until it is gone.

        Raises:
            PeerUnreachable, InternalError
        """
        if (
            await self._bus.lookup(supervisor, timeout_seconds=CALL_TIMEOUT_SECONDS)
            is not Presence.PRESENT
        ):
            raise PeerUnreachable(peer=str(supervisor), problem="it is not served there")
        is_lost = asyncio.Event()

        def on_lost() -> None:
            is_lost.set()
            self._changed.set()

        self._reported_sequence = -1
        unwatch = self._bus.on_peer_lost(supervisor.address, on_lost)
        try:
            while not is_lost.is_set():
                self._changed.clear()
                await self._say_how_it_is(supervisor)
                self.joined.set()
                try:
                    async with asyncio.timeout(self._heartbeat_seconds):
                        await self._changed.wait()
                except TimeoutError:
                    continue
            raise PeerUnreachable(peer=str(supervisor), problem="its process ended")
        finally:
            unwatch()

    async def _say_how_it_is(self, supervisor: Endpoint) -> None:
        """Send the report if it changed, else a heartbeat; then the report if it is asked for."""
        answer = ReportAnswer(wants_report=True)
        if self._sequence == self._reported_sequence:
            beat = Heartbeat(
                node=self.node,
                worker_epoch=self._worker_epoch,
                sequence=self._sequence,
                resources=self._read_resources(),
                loads={
                    actor.report.instance: load
                    for actor in self._replicas.values()
                    if (load := actor.load) is not None
                },
            )
            answer = await self._bus.call(
                supervisor,
                "beat",
                beat,
                returns=ReportAnswer,
                timeout_seconds=CALL_TIMEOUT_SECONDS,
            )
        if answer.wants_report:
            report = self.report()
            answer = await self._bus.call(
                supervisor,
                "report",
                report,
                returns=ReportAnswer,
                timeout_seconds=CALL_TIMEOUT_SECONDS,
            )
            self._reported_sequence = report.sequence
        if answer.is_void:
            raise InternalError(where="worker", problem=f"another worker took over {self.node}")

    async def _start(self, start: StartInstance) -> None:
        instance = start.spec.instance
        if (
            instance in self._replicas
            or instance in self._never_started
            or instance in self._forgotten
            or self._is_leaving
            or self.shutdown_requested.is_set()
        ):
            return
        # Invariant: one living instance of a replica; a new one waits until the old is gone.
        earlier = [
            actor
            for actor in self._replicas.values()
            if actor.report.replica == start.spec.replica and not actor.ended.is_set()
        ]
        for actor in earlier:
            actor.stop()
        actor = self._new_replica(start, sweep=self._sweep, on_change=self._on_change)
        self._replicas[instance] = actor
        self._on_change()
        actor.start(earlier[-1].ended if earlier else None)
        await self._bus.serve(str(start.spec.replica), actor)

    def _stop(self, stop: StopInstance) -> None:
        if stop.instance in self._replicas:
            self._replicas[stop.instance].stop()
        elif stop.instance not in self._forgotten and stop.instance not in self._never_started:
            # Its start may still be on the way; from now on it is refused.
            self._never_started[stop.instance] = InstanceReport(
                replica=stop.replica,
                instance=stop.instance,
                launch_id=stop.launch_id,
                state=InstanceState.EXITED,
            )
            self._on_change()

    async def _forget(self, instance: InstanceId) -> None:
        actor = self._replicas.get(instance)
        if actor is not None and actor.report.state is not InstanceState.EXITED:
            return
        if actor is None and instance not in self._never_started:
            return
        self._replicas.pop(instance, None)
        self._never_started.pop(instance, None)
        self._forgotten[instance] = None
        while len(self._forgotten) > MAX_FORGOTTEN:
            del self._forgotten[next(iter(self._forgotten))]
        self._on_change()
        if actor is not None and not any(
            other.report.replica == actor.report.replica for other in self._replicas.values()
        ):
            await self._bus.serve(str(actor.report.replica), None)

    def _on_change(self) -> None:
        self._sequence += 1
        self._changed.set()
        self._stirred.set()

    def _sweep(self, ending: InstanceId) -> int:
        """Kill what an ended instance left behind; return how much is not gone yet."""
        actors = [actor for actor in self._replicas.values() if not actor.ended.is_set()]
        living = [one.report.instance for one in actors if one.report.instance != ending]
        known = [actor.pid for actor in actors if actor.pid is not None]
        known += self._other_children()
        num_left = kill_strays(known, tag=INSTANCE_VARIABLE, spared=living)
        # Why: what an adopted replica leaves goes to the guardian, not to this worker.
        return num_left + kill_tagged(INSTANCE_VARIABLE, ending)


def new_worker_epoch() -> WorkerEpoch:
    """Return a name for this life of the worker's process."""
    return WorkerEpoch(f"{os.getpid()}-{os.urandom(6).hex()}")
