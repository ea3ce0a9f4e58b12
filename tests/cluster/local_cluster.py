# SPDX-License-Identifier: Apache-2.0
"""A cluster in one event loop: the real actors on the in-process bus, replicas without processes.

`LocalCluster` may be given any kind of replica. `InProcessReplica` serves the fake one on a real
socket, so that a real `RemoteCluster` can use it; `ScriptedReplica` does what it is told.
"""

import asyncio
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.cluster.simulation import resources
from tests.fakes.catalog import FakeCatalog
from tests.fakes.replica import serve_fake_replica
from xinference.cluster.caches import CacheActor, CachesActor
from xinference.cluster.dataplane.handshake import instance_key
from xinference.cluster.downloads import Downloads
from xinference.cluster.local_bus import LocalBus, LocalNetwork
from xinference.cluster.logs import LogActor, LogsActor
from xinference.cluster.messages import (
    InstanceLoad,
    InstanceReport,
    InstanceState,
    LaunchId,
    StartInstance,
    WorkerEpoch,
)
from xinference.cluster.state.cluster_state import ClusterState
from xinference.cluster.state.records import Moment
from xinference.cluster.store import DesiredStore
from xinference.cluster.supervisor import ModelCatalog, SupervisorActor, system_clock
from xinference.cluster.worker import (
    CACHE,
    CACHES,
    LOG,
    LOGS,
    SUPERVISOR,
    WORKER,
    NewReplica,
    Served,
    WorkerActor,
)
from xinference.errors import ReplicaLost, XinferenceError
from xinference.identifiers import InstanceId
from xinference.protocol.logs import SUPERVISOR_NODE
from xinference.settings import DownloadSettings

SUPERVISOR_ADDRESS = "127.0.0.1:1000"
WORKER_ADDRESS = "127.0.0.1:2000"
KEY = "the cluster key of these tests"


class ScriptedReplica:
    """A `ReplicaActor` whose states a test sets."""

    def __init__(
        self,
        start: StartInstance,
        *,
        sweep: Callable[[InstanceId], int],
        on_change: Callable[[], None],
        adopted: Any = None,
        listens_at: str = "",
    ) -> None:
        self.ended = asyncio.Event()
        self.settled = asyncio.Event()
        self.pid = None
        self.load: InstanceLoad | None = None
        self.source = start.spec.source.path
        self._start = start
        self._on_change = on_change
        self._is_started = False
        self._served: Served | None = None
        self.report = InstanceReport(
            replica=start.spec.replica,
            instance=start.spec.instance,
            launch_id=start.launch_id,
            state=InstanceState.STARTING,
            gpu_idx=start.spec.gpu_idx,
        )

    def start(self, after: Any = None) -> None:
        self._is_started = True

    def stop(self) -> None:
        if not self.ended.is_set():
            self.move(InstanceState.STOPPING)

    @property
    def served(self) -> Served | None:
        return None if self.report.error is None else self._served

    def move(self, state: InstanceState, error: XinferenceError | None = None) -> None:
        if state is InstanceState.READY:
            self._served = Served(self._start, f"unix:{self.report.instance}")
        wire = None if error is None else error.to_wire()
        address = f"unix:{self.report.instance}" if state is InstanceState.READY else None
        self.report = replace(self.report, state=state, error=wire, address=address)
        if state is InstanceState.EXITED:
            self.ended.set()
        self._on_change()


class InProcessReplica(ScriptedReplica):
    """The fake replica of the data plane, served in this event loop."""

    directory: Path
    """Set by whoever makes the class's subclass for its sockets."""
    listen: str | None = None
    """Where to listen instead of there."""

    def __init__(self, start: StartInstance, **callbacks: Any) -> None:
        super().__init__(start, **callbacks)
        self._spec = start.spec
        self._life: asyncio.Task[None] | None = None

    def start(self, after: Any = None) -> None:
        self._life = asyncio.create_task(self._live(after))

    def stop(self) -> None:
        super().stop()
        if self._life is not None:
            self._life.cancel()

    def kill(self) -> None:
        """Let it end as a process does that was killed."""
        assert self._life is not None
        self._life.cancel()

    async def _live(self, after: Any) -> None:
        error: XinferenceError | None = None
        try:
            if after is not None:
                await after.wait()
            async with serve_fake_replica(
                self.listen or f"unix:{self.directory / self.report.instance}",
                instance=self._spec.instance,
                key=instance_key(KEY.encode(), self._spec.instance),
                model=self._spec.replica.model,
            ) as fake:
                self.report = replace(self.report, address=fake.address)
                self.move(InstanceState.LOADING)
                loaded = await fake.load(self._spec, lambda *_: None)
                self.report = replace(self.report, context_length=loaded.context_length)
                self.move(InstanceState.READY)
                self.report = replace(self.report, address=fake.address)
                self._on_change()
                await asyncio.Event().wait()
        except XinferenceError as failure:
            error = failure
        except asyncio.CancelledError:
            if self.report.state is not InstanceState.STOPPING:
                error = ReplicaLost(model=self._spec.replica.model, problem="signal SIGKILL")
        self.move(InstanceState.EXITED, error)


class LocalCluster:
    """A supervisor and its workers. `network` has the faults."""

    def __init__(
        self,
        home: Path,
        *,
        new_replica: NewReplica,
        clock: Callable[[], Moment] = system_clock,
        heartbeat_seconds: float = 0.01,
        catalog: ModelCatalog | None = None,
        downloads: DownloadSettings | None = None,
    ) -> None:
        self.network = LocalNetwork()
        self.supervisor: SupervisorActor | None = None
        self.workers: dict[str, WorkerActor] = {}
        self.replicas: list[Any] = []
        """Every one that was made, the latest last."""
        self._home = home
        self._new_replica = new_replica
        self._clock = clock
        self._heartbeat_seconds = heartbeat_seconds
        self._numbers = itertools.count(1)
        self._tasks: dict[str, list[asyncio.Task[None]]] = {}
        self._stores: list[DesiredStore] = []
        self._catalog = catalog or FakeCatalog()
        self._downloads = downloads or DownloadSettings()

    async def start_supervisor(self, *, is_ticking: bool = True) -> SupervisorActor:
        bus = LocalBus(self.network, SUPERVISOR_ADDRESS)
        store = DesiredStore.open(self._home / "cluster.sqlite3")
        self._stores.append(store)
        epoch = store.next_epoch()
        state = ClusterState(
            epoch=epoch,
            desired=store.models(),
            now=self._clock(),
            new_instance=lambda: InstanceId(f"i{next(self._numbers)}"),
            jitter=lambda: 1.0,
            restart_limit=5,
            expected_workers=None,
        )
        self.supervisor = SupervisorActor(
            bus=bus,
            epoch=epoch,
            state=state,
            store=store,
            catalog=self._catalog,
            read_resources=resources,
            new_launch_id=lambda: LaunchId(f"l{next(self._numbers)}"),
            clock=self._clock,
        )
        await bus.serve(SUPERVISOR, self.supervisor)
        nodes = self.supervisor.nodes
        await bus.serve(CACHES, CachesActor(bus=bus, catalog=self._catalog, nodes=nodes))
        logs = LogsActor(
            bus=bus,
            own=LogActor(self._home, node=SUPERVISOR_NODE),
            nodes=nodes,
            check_model=self.supervisor.check_model,
        )
        await bus.serve(LOGS, logs)
        if is_ticking:
            ticking = asyncio.create_task(self.supervisor.reconcile_forever())
            self._tasks[SUPERVISOR_ADDRESS] = [ticking]
        return self.supervisor

    async def start_worker(self, address: str = WORKER_ADDRESS) -> WorkerActor:
        bus = LocalBus(self.network, address)

        async def find_supervisor() -> str:
            return SUPERVISOR_ADDRESS

        def new_replica(start: StartInstance, **callbacks: Any) -> Any:
            self.replicas.append(self._new_replica(start, **callbacks))
            return self.replicas[-1]

        worker = WorkerActor(
            bus=bus,
            worker_epoch=WorkerEpoch(f"w{next(self._numbers)}"),
            new_replica=new_replica,
            read_resources=resources,
            find_supervisor=find_supervisor,
            heartbeat_seconds=self._heartbeat_seconds,
            first_retry_seconds=self._heartbeat_seconds,
        )
        downloads = Downloads(home=self._home / address, settings=self._downloads)
        await bus.serve(CACHE, CacheActor(downloads))
        await bus.serve(LOG, LogActor(self._home / address, node=worker.node))
        await bus.serve(WORKER, worker)
        self.workers[address] = worker
        self._tasks[address] = [
            asyncio.create_task(worker.report_forever()),
            asyncio.create_task(worker.restart_forever()),
        ]
        return worker

    async def kill(self, address: str) -> None:
        """End a process; a worker's replicas go with it."""
        self.network.kill(address)
        for task in self._tasks.pop(address, []):
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        worker = self.workers.pop(address, None)
        if worker is not None:
            await worker.close()
        elif self.supervisor is not None and address == SUPERVISOR_ADDRESS:
            await self.supervisor.close()
            self.supervisor = None

    async def close(self) -> None:
        for address in list(self.workers):
            await self.kill(address)
        await self.kill(SUPERVISOR_ADDRESS)
