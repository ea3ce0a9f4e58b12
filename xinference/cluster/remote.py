# SPDX-License-Identifier: Apache-2.0
"""`RemoteCluster`: what a gateway has of a cluster.

Lifecycle goes to the supervisor over the control plane. Requests go straight to replicas over
the data plane, by a snapshot of the routing table that a long poll keeps fresh; while the
supervisor is away the last snapshot serves on. A request costs the control plane nothing.
"""

import asyncio
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from xinference.errors import (
    ModelNotReady,
    PeerUnreachable,
    ProtocolError,
    ReplicaLost,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid, RequestId
from xinference.protocol.autostart import AutostartEntry, AutostartStatus
from xinference.protocol.deployment import (
    AbortOutcome,
    LaunchProgress,
    LaunchSpec,
    ModelEvent,
    ModelStatus,
    ReplicaPlacement,
    ReplicaState,
    ReplicaStatus,
)
from xinference.protocol.downloads import DownloadStatus, KeptModels, Removed
from xinference.protocol.environments import VirtualEnvironment
from xinference.protocol.generation import GenerationRequest
from xinference.protocol.logs import LogBatch, LogQuery
from xinference.protocol.nodes import ClusterInfo, GatewayRouting
from xinference.protocol.vectors import VectorRequest
from xinference.tracing import current_context

from .control_bus import ControlBus, Endpoint
from .dataplane.client import ReplicaConnection
from .dataplane.handshake import instance_key
from .interface import GenerationStream, VectorStream
from .messages import LaunchTicket, Route, RoutesUpdate, RoutesVersion, RoutingTable
from .repositories import RESOLVE_SECONDS
from .request_router import RequestRouter
from .routing import ready_models, routes_of, updated
from .worker import CACHES, LOGS, REMOVE_TIMEOUT_SECONDS, SUPERVISOR
from .xoscar_bus import XoscarBus

logger = logging.getLogger(__name__)

CALL_TIMEOUT_SECONDS = 10.0
CACHES_TIMEOUT_SECONDS = 15.0
"""The supervisor asks every worker meanwhile."""
READ_TIMEOUT_SECONDS = RESOLVE_SECONDS + 2.0
"""For a worker to read what is in a repository that the catalogue does not know."""
REMOVE_ALL_TIMEOUT_SECONDS = CACHES_TIMEOUT_SECONDS + REMOVE_TIMEOUT_SECONDS
"""For the supervisor to find out who has something, and for those to remove it at once."""
POLL_SECONDS = 10.0
POLL_TIMEOUT_SECONDS = 15.0
RETRY_SECONDS = 0.2
CONNECT_TIMEOUT_SECONDS = 30.0
LAUNCH_TIMEOUT_SECONDS = 3600.0
TERMINATE_TIMEOUT_SECONDS = 60.0
SUPERVISOR_AWAY_SECONDS = 30.0
"""Waits for a launch or its end go on over a restart of the supervisor that takes so long."""
CATCH_UP_SECONDS = 1.0
NO_TABLE = RoutesVersion()
"""Of the routing table before a supervisor has said what runs."""
FIRST_TABLE_SECONDS = 15.0
"""A request that comes before the first routing table waits so long for it."""
RETRY_AFTER_SECONDS = 5
OPEN_TIMEOUT_SECONDS = 5.0
PROBE_SECONDS = 1.0
SILENT_SECONDS = 3.0
"""A replica that does not answer a PING for so long gets no new requests."""
LAST_CHANCE_SECONDS = 1.0
"""For an answer to one more PING; without it, what runs there moves on."""
QUESTION_TIMEOUT_SECONDS = 2.0
STATS_ARE_GOOD_FOR_SECONDS = 1.0


class RemoteCluster:
    """Implements `interface.Cluster`. Belongs to one event loop; ended by `aclose`."""

    def __init__(
        self,
        bus: ControlBus,
        *,
        supervisor_address: str,
        cluster_key: str,
        continues_streams: bool = True,
    ) -> None:
        """Hold the ends; `connect` or `start` makes it usable.

        Args:
            continues_streams: whether an answer goes on at another replica when its own dies.
        """
        self._bus = bus
        self._supervisor = Endpoint(supervisor_address, SUPERVISOR)
        self._caches = Endpoint(supervisor_address, CACHES)
        self._logs = Endpoint(supervisor_address, LOGS)
        self._cluster_key = cluster_key.encode()
        self._table = RoutingTable(version=RoutesVersion(), models={})
        self._table_changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._connections: dict[InstanceId, ReplicaConnection] = {}
        self._opening: dict[InstanceId, asyncio.Task[ReplicaConnection]] = {}
        self._closing: set[asyncio.Task[None]] = set()
        self._router = RequestRouter(
            table=lambda: self._table,
            table_changed=lambda: self._table_changed,
            connect=self._connection,
            wake=self._wake,
            continues_streams=continues_streams,
        )
        self._probing: asyncio.Task[None] | None = None
        self._stats: dict[ReplicaUid, dict[str, float]] = {}
        self._stats_at = 0.0

    @classmethod
    async def connect(
        cls,
        supervisor_address: str,
        *,
        cluster_key: str,
        socket_directory: Path,
        continues_streams: bool = True,
    ) -> Self:
        """Open a control bus that only calls, and meet the supervisor.

        Args:
            socket_directory: private to this process.
            continues_streams: whether an answer goes on at another replica when its own dies.

        Raises:
            PeerUnreachable: no supervisor answers there, or not with this key.
        """
        bus = await XoscarBus.open(None, key=cluster_key, socket_directory=socket_directory)
        cluster = cls(
            bus,
            supervisor_address=supervisor_address,
            cluster_key=cluster_key,
            continues_streams=continues_streams,
        )
        await cluster.start()
        return cluster

    async def start(self) -> None:
        """Meet the supervisor, and follow its routing table from then on.

        One that has started just now may not know yet what runs. There is no table then, and
        requests wait until there is.

        Raises:
            PeerUnreachable
        """
        deadline = time.monotonic() + CONNECT_TIMEOUT_SECONDS
        while True:
            try:
                await self._poll(wait_seconds=0.0)
                break
            except PeerUnreachable:
                if time.monotonic() > deadline:
                    raise
            await asyncio.sleep(RETRY_SECONDS)
        self._following = asyncio.create_task(self._follow(), name="follow routes")
        self._probing = asyncio.create_task(self._probe_forever(), name="probe replicas")

    async def aclose(self) -> None:
        """Close every connection; requests on them are aborted by their replicas."""
        for task in (self._following, self._probing):
            if task is not None:
                task.cancel()
        for opening in self._opening.values():
            opening.cancel()
        for connection in self._connections.values():
            await connection.aclose()
        await asyncio.gather(*self._closing, return_exceptions=True)
        await self._bus.close()

    # Lifecycle: see `interface.Cluster` for what each promises.

    async def launch(self, spec: LaunchSpec, *, wait_ready: bool) -> ModelUid:
        """See `Cluster`."""
        seconds = READ_TIMEOUT_SECONDS if spec.names_repository else CALL_TIMEOUT_SECONDS
        ticket = await self._ask("launch", spec, returns=LaunchTicket, timeout_seconds=seconds)
        launch = (ticket.model_uid, ticket.launch_id)
        if wait_ready and not await self._wait("wait_launch", launch, LAUNCH_TIMEOUT_SECONDS):
            raise ModelNotReady(model=ticket.model_uid, state="loading", retry_after_seconds=60)
        return ModelUid(ticket.model_uid)

    async def terminate(self, model: ModelUid) -> None:
        """See `Cluster`."""
        await self._wait_ended(await self._ask("terminate", model, returns=LaunchTicket))

    async def cancel_launch(self, model: ModelUid) -> None:
        """See `Cluster`."""
        await self._wait_ended(await self._ask("cancel_launch", model, returns=LaunchTicket))

    async def add_replicas(
        self, model: ModelUid, placements: Sequence[ReplicaPlacement]
    ) -> list[ReplicaStatus]:
        """See `Cluster`."""
        ticket = await self._ask("add_replicas", model, list(placements), returns=LaunchTicket)
        if not await self._wait("wait_replicas", (ticket,), LAUNCH_TIMEOUT_SECONDS):
            raise ModelNotReady(model=model, state="loading", retry_after_seconds=60)
        status = await self.model(model)
        return [one for one in status.replicas if one.replica.index in ticket.replicas]

    async def terminate_replica(self, model: ModelUid, index: int) -> int:
        """See `Cluster`."""
        ticket, num_left = await self._ask(
            "terminate_replica", model, index, returns=tuple[LaunchTicket, int]
        )
        if not ticket.replicas:
            await self._wait_ended(ticket)
        elif not await self._wait("wait_gone", (ticket,), TERMINATE_TIMEOUT_SECONDS):
            raise _does_not_end(ticket)
        return int(num_left)

    async def models(self) -> list[ModelStatus]:
        """See `Cluster`."""
        found: list[ModelStatus] = await self._ask("models", returns=list[ModelStatus])
        return found

    async def model(self, model: ModelUid) -> ModelStatus:
        """See `Cluster`."""
        found: ModelStatus = await self._ask("model", model, returns=ModelStatus)
        return found

    async def launch_progress(self, model: ModelUid) -> LaunchProgress:
        """See `Cluster`."""
        progress: LaunchProgress = await self._ask("launch_progress", model, returns=LaunchProgress)
        return progress

    async def events(self, model: ModelUid) -> list[ModelEvent]:
        """See `Cluster`."""
        story: list[ModelEvent] = await self._ask("events", model, returns=list[ModelEvent])
        return story

    def routing(self) -> GatewayRouting:
        """See `Cluster`."""
        router = self._router
        return GatewayRouting(
            num_ready_models=len(ready_models(self._table)),
            num_retried=router.num_retried,
            num_continued=router.num_continued,
            num_ejected=sum(router.balancer.is_ejected(route.instance) for route in self._routes()),
            num_ejections=router.balancer.num_ejections,
            routes_epoch=self._table.version.supervisor_epoch,
            routes_number=self._table.version.number,
        )

    async def autostart(self) -> list[AutostartStatus]:
        """See `Cluster`."""
        found: list[AutostartStatus] = await self._ask("autostart", returns=list[AutostartStatus])
        return found

    async def set_autostart(self, entry: AutostartEntry) -> None:
        """See `Cluster`."""
        await self._ask("set_autostart", entry, returns=None)

    async def remove_autostart(self, model: ModelUid) -> None:
        """See `Cluster`."""
        await self._ask("remove_autostart", model, returns=None)

    async def info(self) -> ClusterInfo:
        """See `Cluster`."""
        info: ClusterInfo = await self._ask("info", returns=ClusterInfo)
        return info

    async def logs(self, query: LogQuery) -> LogBatch:
        """See `Cluster`."""
        batch: LogBatch = await self._bus.call(
            self._logs, "read", query, returns=LogBatch, timeout_seconds=CALL_TIMEOUT_SECONDS
        )
        return batch

    async def stop(self) -> None:
        """See `Cluster`."""
        await self._bus.call(self._supervisor, "stop", timeout_seconds=CALL_TIMEOUT_SECONDS)

    async def registrations(self, model_type: str) -> list[dict[str, Any]]:
        """See `Cluster`."""
        families: list[dict[str, Any]] = await self._ask(
            "families", model_type, returns=list[dict[str, Any]]
        )
        return families

    async def registration(self, model_type: str, model_name: str) -> dict[str, Any]:
        """See `Cluster`."""
        family: dict[str, Any] = await self._ask(
            "family", model_type, model_name, returns=dict[str, Any]
        )
        return family

    async def register(self, model_type: str, family: str, *, persist: bool) -> None:
        """See `Cluster`."""
        await self._ask("register", model_type, family, persist, returns=None)

    async def unregister(self, model_type: str, model_name: str) -> None:
        """See `Cluster`."""
        await self._ask("unregister", model_type, model_name, returns=None)

    async def engines(self, model_type: str, model_name: str) -> dict[str, Any]:
        """See `Cluster`."""
        engines: dict[str, Any] = await self._ask(
            "engines", model_type, model_name, returns=dict[str, Any]
        )
        return engines

    async def cached_models(
        self, worker_ip: str | None, *, timeout_seconds: float = CALL_TIMEOUT_SECONDS
    ) -> KeptModels:
        """See `Cluster`."""
        kept: KeptModels = await self._ask_caches(
            "models", worker_ip, timeout_seconds, returns=KeptModels
        )
        return kept

    async def remove_cached(
        self, model_version: str, worker_ip: str | None, *, is_forced: bool
    ) -> Removed:
        """See `Cluster`."""
        removed: Removed = await self._ask_caches(
            "remove",
            model_version,
            worker_ip,
            is_forced,
            returns=Removed,
            timeout_seconds=REMOVE_ALL_TIMEOUT_SECONDS,
        )
        return removed

    async def download(self, spec: LaunchSpec) -> str:
        """See `Cluster`."""
        seconds = CACHES_TIMEOUT_SECONDS
        if spec.names_repository:
            seconds += READ_TIMEOUT_SECONDS
        version: str = await self._ask_caches(
            "download", spec, returns=str, timeout_seconds=seconds
        )
        return version

    async def download_status(self, model_version: str) -> dict[NodeId, DownloadStatus]:
        """See `Cluster`."""
        statuses: dict[NodeId, DownloadStatus] = await self._ask_caches(
            "download_status", model_version, returns=dict[NodeId, DownloadStatus]
        )
        return statuses

    async def cancel_download(self, model_version: str) -> None:
        """See `Cluster`."""
        await self._ask_caches("cancel_download", model_version, returns=None)

    async def _ask_caches(
        self,
        method: str,
        *arguments: object,
        returns: Any,
        timeout_seconds: float = CACHES_TIMEOUT_SECONDS,
    ) -> Any:
        return await self._bus.call(
            self._caches, method, *arguments, returns=returns, timeout_seconds=timeout_seconds
        )

    async def virtual_envs(self, worker_ip: str | None) -> list[VirtualEnvironment]:
        """See `Cluster`."""
        found: list[VirtualEnvironment] = await self._ask(
            "virtual_envs", worker_ip, returns=list[VirtualEnvironment]
        )
        return found

    async def remove_virtual_envs(
        self,
        model_name: str,
        *,
        model_engine: str | None,
        python_version: str | None,
        worker_ip: str | None,
    ) -> int:
        """See `Cluster`."""
        num_removed: int = await self._ask(
            "remove_virtual_envs",
            model_name,
            model_engine,
            python_version,
            worker_ip,
            returns=int,
            timeout_seconds=REMOVE_ALL_TIMEOUT_SECONDS,
        )
        return num_removed

    # Requests.

    async def generate(self, model: ModelUid, request: GenerationRequest) -> GenerationStream:
        """See `Cluster`."""
        await self._wait_for_table(model)
        trace = current_context()
        if trace is not None:
            request = replace(request, trace=trace)
        return await self._router.start(model, request)

    async def compute(self, model: ModelUid, request: VectorRequest) -> VectorStream:
        """See `Cluster`."""
        await self._wait_for_table(model)
        trace = current_context()
        if trace is not None:
            request = replace(request, trace=trace)
        return await self._router.compute(model, request)

    async def abort_request(
        self, model: ModelUid, request_id: RequestId, *, block_seconds: float
    ) -> AbortOutcome:
        """See `Cluster`."""
        await self._wait_for_table(model)
        routes = routes_of(self._table, model)

        async def abort(route: Route) -> AbortOutcome:
            try:
                connection = await self._connection(route)
                return await connection.abort_request(
                    request_id,
                    block_seconds=block_seconds,
                    timeout_seconds=QUESTION_TIMEOUT_SECONDS,
                )
            except ReplicaLost:
                return AbortOutcome.NOT_FOUND  # and all its requests with it

        outcomes = await asyncio.gather(*map(abort, routes))
        for outcome in (AbortOutcome.DONE, AbortOutcome.NO_OP):
            if outcome in outcomes:
                return outcome
        return AbortOutcome.NOT_FOUND

    async def engine_stats(self) -> dict[ReplicaUid, dict[str, float]]:
        """See `Cluster`."""
        if time.monotonic() - self._stats_at > STATS_ARE_GOOD_FOR_SECONDS:
            routes = self._routes()
            counters = await asyncio.gather(*map(self._counters_of, routes))
            self._stats = {
                route.replica: found
                for route, found in zip(routes, counters, strict=True)
                if found is not None
            }
            self._stats_at = time.monotonic()
        return self._stats

    async def _counters_of(self, route: Route) -> dict[str, float] | None:
        try:
            connection = await self._connection(route)
            return (await connection.ping(QUESTION_TIMEOUT_SECONDS)).counters
        except XinferenceError as error:
            logger.debug("No counters of %s: %s", route.replica, error)
            return None

    async def _wake(self, model: ModelUid) -> None:
        await self._ask("wake", model, returns=None)

    async def _wait_for_table(self, model: ModelUid) -> None:
        """Wait until a supervisor has said what runs; before that, nothing is known of any model.

        Raises:
            ModelNotReady: none has for long.
        """
        # Why first: every request comes here, and hardly one has to wait.
        if self._table.version != NO_TABLE:
            return
        try:
            async with asyncio.timeout(FIRST_TABLE_SECONDS):
                while self._table.version == NO_TABLE:
                    await self._table_changed.wait()
        except TimeoutError:
            raise ModelNotReady(
                model=model, state="not known yet", retry_after_seconds=RETRY_AFTER_SECONDS
            ) from None

    # Connections to replicas.

    async def _connection(self, route: Route) -> ReplicaConnection:
        """Return the connection to an instance; open it if this is its first use.

        Raises:
            ReplicaLost: nobody, or somebody else, is there.
        """
        connection = self._connections.get(route.instance)
        if connection is not None and not connection.is_closed:
            return connection
        opening = self._opening.get(route.instance)
        if opening is None:
            opening = asyncio.create_task(self._open(route), name=f"open {route.replica}")
            self._opening[route.instance] = opening
            opening.add_done_callback(lambda done: self._on_opened(route, done))
        # Why shield: others may wait for the same one.
        return await asyncio.shield(opening)

    async def _open(self, route: Route) -> ReplicaConnection:
        try:
            return await ReplicaConnection.open(
                route.address,
                instance=route.instance,
                key=instance_key(self._cluster_key, route.instance),
                role="gateway",
                timeout_seconds=OPEN_TIMEOUT_SECONDS,
            )
        # Why both: who answers at a replica's address in another protocol is not the replica.
        except (PeerUnreachable, ProtocolError) as error:
            raise ReplicaLost(model=route.replica.model, problem=error.problem) from error

    def _on_opened(self, route: Route, opening: "asyncio.Task[ReplicaConnection]") -> None:
        del self._opening[route.instance]
        if not opening.cancelled() and opening.exception() is None:
            self._connections[route.instance] = opening.result()

    def _drop_connections(self) -> None:
        """Close connections to instances that are gone, once nothing runs on them."""
        current = {route.instance for route in self._routes()}
        self._router.forget(current)
        for instance, connection in list(self._connections.items()):
            if connection.is_closed or (instance not in current and not connection.num_streams):
                self._drop(instance)

    def _drop(self, instance: InstanceId) -> None:
        """Close a connection; what still runs on it goes elsewhere."""
        connection = self._connections.pop(instance, None)
        if connection is not None:
            closing = asyncio.create_task(connection.aclose(), name="close connection")
            self._closing.add(closing)
            closing.add_done_callback(self._closing.discard)

    # How replicas are.

    async def _probe_forever(self) -> None:
        """Ask those that work how far they are, and those that were ejected whether they live."""
        while True:
            await asyncio.sleep(PROBE_SECONDS)
            due = self._router.balancer.to_probe(self._routes(), now=time.monotonic())
            if due:
                await asyncio.gather(*map(self._probe, due))
                for entry in self._table.models.values():
                    slow = self._router.balancer.eject_slow(entry.routes, now=time.monotonic())
                    for route in slow:
                        logger.warning("%s is far slower than the others; ejected", route.replica)

    async def _probe(self, route: Route) -> None:
        balancer, instance = self._router.balancer, route.instance
        try:
            connection = await self._connection(route)
            load = await connection.ping(SILENT_SECONDS)
        except XinferenceError as error:
            balancer.silent(instance, now=time.monotonic())
            logger.warning("%s does not answer: %s", route.replica, error)
            if not await self._answers(instance):
                # Its requests would wait for ever; on a connection that is closed they move on.
                self._drop(instance)
            return
        if load.state is ReplicaState.READY:
            balancer.observe(instance, load.counters, now=time.monotonic())

    async def _answers(self, instance: InstanceId) -> bool:
        """Return whether what is connected to an instance hears from it after all."""
        connection = self._connections.get(instance)
        try:
            if connection is not None:
                await connection.ping(LAST_CHANCE_SECONDS)
        except XinferenceError:
            return False
        return True

    def _routes(self) -> list[Route]:
        return [route for entry in self._table.models.values() for route in entry.routes]

    # The supervisor.

    async def _follow(self) -> None:
        """Keep the routing table fresh; while the supervisor is away, keep the last one."""
        while True:
            try:
                await self._poll()
            except PeerUnreachable as unreachable:
                logger.debug("Routes are not followed: %s", unreachable)
                await asyncio.sleep(RETRY_SECONDS)
            except XinferenceError:
                logger.exception("Routes cannot be followed")
                await asyncio.sleep(RETRY_SECONDS)

    async def _poll(self, *, wait_seconds: float = POLL_SECONDS) -> None:
        update = await self._bus.call(
            self._supervisor,
            "watch_routes",
            self._table.version,
            wait_seconds,
            returns=RoutesUpdate | None,
            timeout_seconds=POLL_TIMEOUT_SECONDS,
        )
        if update is not None and update.version > self._table.version:
            self._table = updated(self._table, update)
            self._drop_connections()
            self._table_changed.set()
            self._table_changed = asyncio.Event()

    async def _ask(
        self,
        method: str,
        *arguments: object,
        returns: Any,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> Any:
        """Ask the supervisor; return when the routes of this gateway are as new as the answer.

        Why: a caller that was told that a model is ready may use it at once.

        Raises:
            PeerUnreachable, and what the method raises.
        """
        version, value = await self._bus.call(
            self._supervisor,
            method,
            *arguments,
            returns=tuple[RoutesVersion, returns],
            timeout_seconds=timeout_seconds,
        )
        deadline = time.monotonic() + CATCH_UP_SECONDS
        while self._table.version < version and (left := deadline - time.monotonic()) > 0:
            try:
                async with asyncio.timeout(left):
                    await self._table_changed.wait()
            except TimeoutError:
                break
        return value

    async def _wait(
        self, method: str, arguments: tuple[object, ...], timeout_seconds: float
    ) -> bool:
        """Poll the supervisor until it says yes; over its restarts, too."""
        deadline = time.monotonic() + timeout_seconds
        away_since: float | None = None
        while time.monotonic() < deadline:
            try:
                if await self._ask(method, *arguments, CALL_TIMEOUT_SECONDS / 2, returns=bool):
                    return True
                away_since = None
            except PeerUnreachable:
                away_since = away_since or time.monotonic()
                if time.monotonic() - away_since > SUPERVISOR_AWAY_SECONDS:
                    raise
                await asyncio.sleep(RETRY_SECONDS)
        return False

    async def _wait_ended(self, ticket: LaunchTicket) -> None:
        launch = (ticket.model_uid, ticket.launch_id)
        if not await self._wait("wait_ended", launch, TERMINATE_TIMEOUT_SECONDS):
            raise _does_not_end(ticket)


def _does_not_end(ticket: LaunchTicket) -> PeerUnreachable:
    problem = "its processes did not end in time"
    return PeerUnreachable(peer=f"worker of {ticket.model_uid}", problem=problem)
