# SPDX-License-Identifier: Apache-2.0
"""The mains of the supervisor's and the worker's process: put the parts together and run them.

Each is called with its configuration by the process that the guardian started, runs an event
loop until it is told to end, and ends the process.
"""

import asyncio
import contextlib
import functools
import json
import logging
import os
import random
import secrets
import signal
import sqlite3
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn, Protocol

import uvloop

from xinference import __version__
from xinference.catalog import Catalog
from xinference.errors import InvalidSetting, PeerUnreachable, ProtocolError, XinferenceError
from xinference.identifiers import Address, new_instance_id
from xinference.protocol.logs import SUPERVISOR_NODE
from xinference.protocol.nodes import NodeResources
from xinference.protocol.worker_reading import WorkerReading

from .caches import CacheActor, CachesActor
from .cluster_key import key_refused
from .configuration import RoleConfig, SupervisorConfig, WorkerConfig, private_directory
from .control_bus import ControlBus, Endpoint, Presence
from .device_ledger import DeviceLedger, DeviceUse
from .devices import DeviceReader
from .downloads import Downloads
from .environments import EnvironmentPolicy, EnvironmentShelf
from .journal import ReplicaJournal, RunningReplica
from .log_files import FOLDER
from .log_rotation import remove_old_logs
from .logs import LogActor, LogsActor
from .messages import CONTROL_VERSION, LaunchId
from .model_actor import END_SECONDS, ModelActor, ReplicaHost
from .placement import LaunchStrategy
from .state.cluster_state import ClusterState
from .store import DesiredStore
from .supervision import INSTANCE_VARIABLE, OWNER_VARIABLE, PLATFORM, kill_tree
from .supervisor import ModelCatalog, SupervisorActor, system_clock
from .worker import (
    CACHE,
    CACHES,
    CALL_TIMEOUT_SECONDS,
    LOG,
    LOGS,
    SUPERVISOR,
    WORKER,
    WorkerActor,
    new_worker_epoch,
)
from .xoscar_bus import XoscarBus

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
EXIT_MISCONFIGURED = 2
EXIT_ASKED_TO_END = 0
EXIT_TERMINATED = 128 + signal.SIGTERM

STORE_NAME = "cluster.sqlite3"
JOIN_TIMEOUT_SECONDS = 60.0
JOIN_RETRY_SECONDS = 0.1
JOIN_QUIET_SECONDS = 5.0
"""A supervisor may start at the same time; after so long a person is told what is waited for."""
MAX_REFUSALS = 5
HTTP_TIMEOUT_SECONDS = 5.0
CLOSE_TIMEOUT_SECONDS = 10.0
"""Of what a process has beside replicas."""
SWEEP_SECONDS = 1.0
"""Between looks whether quarantined devices are free."""
ADOPT_SECONDS = 3.0
"""For what the last worker has left to be ready again, before this one says what runs."""

READ_TIMEOUT_SECONDS = 5.0
"""For a reading of the worker."""

_LOOPBACK = frozenset({"127.0.0.1", "::1", "localhost"})


class HostReader(Protocol):
    """What a worker needs of `DeviceReader`."""

    def read(self) -> NodeResources:
        """Return a reading of the host."""
        ...

    def uses(self) -> Sequence[DeviceUse]:
        """Return what is in use of each of its devices, and by which processes."""
        ...


def supervisor_main(
    config: SupervisorConfig, *, load_catalog: Callable[[Path], ModelCatalog] = Catalog.load
) -> NoReturn:
    """Run the supervisor actor until told to end; ends the process."""
    _run(_supervise(config, load_catalog))


Export = Callable[[Callable[[], WorkerReading]], object]
"""Lets others see what a function returns, which any thread may call and may raise TimeoutError."""


def worker_main(
    config: WorkerConfig,
    *,
    new_reader: Callable[[], HostReader] = DeviceReader,
    export: Export | None = None,
) -> NoReturn:
    """Run the worker actor and its replicas until told to end; ends the process.

    Args:
        export: is called once, with what reads the worker; may raise OSError.
    """
    PLATFORM.become_subreaper()
    _run(_work(config, new_reader, export))


def report_ready(**facts: object) -> None:
    """Tell the guardian, on stdout, that this process does its work."""
    sys.stdout.write(json.dumps({"ready": True, "pid": os.getpid(), **facts}) + "\n")
    sys.stdout.flush()


def forbid_heavy_modules() -> None:
    """Make torch and its kin unimportable: a control process never needs them."""
    for name in ("torch", "transformers", "scipy", "cupy", "cudf", "mlx"):
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]  # the way to refuse an import


def _run(main: Coroutine[Any, Any, int]) -> NoReturn:
    forbid_heavy_modules()
    loop = uvloop.new_event_loop()
    asyncio.set_event_loop(loop)
    try:
        status = loop.run_until_complete(main)
    except InvalidSetting as error:
        logger.critical("%s", error)
        status = EXIT_MISCONFIGURED
    except (XinferenceError, OSError, sqlite3.Error) as error:
        logger.critical("This process cannot run: %s", error)
        status = EXIT_FAILED
    except Exception:
        logger.critical("This process failed", exc_info=True)
        status = EXIT_FAILED
    logging.shutdown()
    sys.stdout.flush()
    # Why not sys.exit: calls to peers that hang were abandoned, and must not be waited for.
    os._exit(status)


async def _supervise(config: SupervisorConfig, load_catalog: Callable[[Path], ModelCatalog]) -> int:
    told_to_end = _on_signals()
    bus = await XoscarBus.open(
        Address.parse(config.listen),
        key=config.cluster_key,
        socket_directory=_socket_directory(config),
        advertised_host=config.advertised_host,
    )
    store = DesiredStore.open(config.home / STORE_NAME)
    epoch = store.next_epoch()
    # Why now: a supervisor that has to go on from the copy must count on from this epoch.
    with contextlib.suppress(sqlite3.Error, OSError):
        store.copy()
    reader = DeviceReader()
    state = ClusterState(
        epoch=epoch,
        desired=store.models(),
        now=system_clock(),
        new_instance=new_instance_id,
        jitter=lambda: random.uniform(0.9, 1.1),
        restart_limit=config.restart_limit,
        expected_workers=config.expected_workers,
        strategy=LaunchStrategy(config.launch_strategy),
        shares_gpus=config.shares_gpus,
    )
    catalog = load_catalog(config.home)
    supervisor = SupervisorActor(
        bus=bus,
        epoch=epoch,
        state=state,
        store=store,
        catalog=catalog,
        read_resources=reader.read,
        new_launch_id=lambda: LaunchId(secrets.token_hex(8)),
        enables_virtual_env=config.enables_virtual_env,
    )
    await bus.serve(SUPERVISOR, supervisor)
    await bus.serve(CACHES, CachesActor(bus=bus, catalog=catalog, nodes=supervisor.nodes))
    logs = LogsActor(
        bus=bus,
        own=LogActor(config.home, node=SUPERVISOR_NODE),
        nodes=supervisor.nodes,
        check_model=supervisor.check_model,
    )
    await bus.serve(LOGS, logs)
    reconciling = asyncio.create_task(supervisor.reconcile_forever(), name="reconcile")
    logger.info("Supervisor at %s, epoch %d", bus.address, epoch)
    report_ready(address=bus.address)
    ended = await _first_of(
        told_to_end.wait(), supervisor.stopped.wait(), asyncio.shield(reconciling)
    )
    reconciling.cancel()
    async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS):
        await supervisor.close()
        await bus.close()
    return EXIT_ASKED_TO_END if ended == 1 else EXIT_TERMINATED


async def _work(
    config: WorkerConfig, new_reader: Callable[[], HostReader], export: Export | None
) -> int:
    told_to_end = _on_signals()
    bus = await XoscarBus.open(
        Address.parse(config.listen),
        key=config.cluster_key,
        socket_directory=_socket_directory(config),
        advertised_host=config.advertised_host,
    )
    directory = _SupervisorDirectory(config)
    reader = new_reader()
    devices = DeviceLedger(reader.uses)
    downloads = Downloads(home=config.home, settings=config.downloads, log_format=config.log_format)
    host = _replica_host(config, devices, downloads)
    worker = WorkerActor(
        bus=bus,
        worker_epoch=new_worker_epoch(),
        new_replica=functools.partial(ModelActor, host=host),
        read_resources=lambda: devices.marked(reader.read()),
        find_supervisor=directory.find,
        other_children=lambda: downloads.pids,
        environments=host.environments,
    )
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR2, _die_with_replicas, worker)
    if export is not None:
        export(functools.partial(_read_from_thread, worker, asyncio.get_running_loop()))
    running: Sequence[RunningReplica] = ()
    if host.journal is not None:
        running = host.journal.read()
        _kill_unnoted(running)
        await worker.adopt(running, timeout_seconds=ADOPT_SECONDS)
    _remove_old_logs(config.home, running)
    cache = CacheActor(downloads)
    await bus.serve(CACHE, cache)
    await bus.serve(LOG, LogActor(config.home, node=worker.node))
    await bus.serve(WORKER, worker)
    await _first_of(_check_join(bus, directory, config), told_to_end.wait())
    reporting = asyncio.create_task(worker.report_forever(), name="report")
    restarting = asyncio.create_task(worker.restart_forever(), name="restart alone")
    sweeping = asyncio.create_task(_sweep_forever(devices), name="sweep devices")
    async with asyncio.timeout(JOIN_TIMEOUT_SECONDS):
        await _first_of(worker.joined.wait(), told_to_end.wait(), asyncio.shield(reporting))
    if not told_to_end.is_set():
        logger.info("Worker at %s", bus.address)
        report_ready(address=bus.address)
    ended = await _first_of(
        told_to_end.wait(), worker.shutdown_requested.wait(), asyncio.shield(reporting)
    )
    logger.info("Worker at %s ends; its replicas first", bus.address)
    if ended == 0:
        await worker.hand_over(timeout_seconds=config.drain_seconds)
    async with asyncio.timeout(config.drain_seconds + END_SECONDS + CLOSE_TIMEOUT_SECONDS):
        await worker.close()
        await cache.close()
        await downloads.close()
        for task in (reporting, restarting, sweeping):
            task.cancel()
        await worker.leave()
        await bus.close()
    return EXIT_ASKED_TO_END if ended == 1 else EXIT_TERMINATED


def _read_from_thread(worker: WorkerActor, loop: asyncio.AbstractEventLoop) -> WorkerReading:
    """Read a worker, in the thread that its tables belong to, from another one.

    Raises:
        TimeoutError: it did not answer in time.
    """

    async def read() -> WorkerReading:
        return worker.reading()

    return asyncio.run_coroutine_threadsafe(read(), loop).result(READ_TIMEOUT_SECONDS)


async def _sweep_forever(devices: DeviceLedger) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        devices.sweep()


class _SupervisorDirectory:
    """Where the supervisor is: as configured, or as a gateway says."""

    def __init__(self, config: WorkerConfig) -> None:
        self._config = config

    async def find(self) -> str:
        """Return the address of the supervisor's actor.

        Raises:
            PeerUnreachable: the gateway does not say.
        """
        endpoint = self._config.endpoint
        if endpoint is None:
            assert self._config.supervisor_address is not None, "one of the two is configured"
            return self._config.supervisor_address
        url = f"{endpoint.rstrip('/')}/v1/address"
        try:
            said = await asyncio.to_thread(_get_json, url)
            return str(Address.parse(said))
        except (OSError, ValueError, TypeError, AttributeError, XinferenceError) as error:
            raise PeerUnreachable(peer=f"gateway {endpoint}", problem=str(error)) from error


def _get_json(url: str) -> Any:
    handlers = []
    if urllib.parse.urlsplit(url).hostname in _LOOPBACK:
        # Why: a proxy of the environment cannot reach this machine's own addresses.
        handlers.append(urllib.request.ProxyHandler({}))
    opener = urllib.request.build_opener(*handlers)
    with opener.open(url, timeout=HTTP_TIMEOUT_SECONDS) as answer:
        return json.loads(answer.read(4096))


async def _check_join(
    bus: ControlBus, directory: _SupervisorDirectory, config: WorkerConfig
) -> None:
    """Return when a supervisor answers that has the same key and speaks the same version.

    Raises:
        InvalidSetting: it has another key, or another version; says what to do.
        PeerUnreachable: none answered in time.
    """
    deadline = time.monotonic() + JOIN_TIMEOUT_SECONDS
    num_refusals = 0
    is_told = False
    while True:
        try:
            supervisor = Endpoint(await directory.find(), SUPERVISOR)
            presence = await bus.lookup(supervisor, timeout_seconds=CALL_TIMEOUT_SECONDS)
            if presence is Presence.PRESENT:
                await bus.call(
                    supervisor,
                    "greet",
                    bus.address,
                    CONTROL_VERSION,
                    __version__,
                    timeout_seconds=CALL_TIMEOUT_SECONDS,
                )
                return
        except ProtocolError as refused:
            raise InvalidSetting(
                name="xinference", value=__version__, expected=f"what the cluster runs: {refused}"
            ) from refused
        except PeerUnreachable as error:
            left = deadline - time.monotonic()
            if left < 0:
                raise
            if not is_told and left < JOIN_TIMEOUT_SECONDS - JOIN_QUIET_SECONDS:
                is_told = True
                logger.warning("%s. Trying for %.0f s more", error, left)
        else:
            num_refusals += presence is Presence.REFUSED
            if num_refusals >= MAX_REFUSALS:
                endpoint = config.endpoint or "http://<the supervisor's host>:9997"
                raise key_refused(endpoint, config.home)
        await asyncio.sleep(JOIN_RETRY_SECONDS)


def _replica_host(config: WorkerConfig, devices: DeviceLedger, downloads: Downloads) -> ReplicaHost:
    assert config.run_directory is not None
    host = config.advertised_host or Address.parse(config.listen).host
    return ReplicaHost(
        home=config.home,
        run_directory=private_directory(config.run_directory, "replicas", keep=True),
        cluster_key=config.cluster_key.encode(),
        command=config.replica_command,
        listen_host=None if host in _LOOPBACK else host,
        listen_ports=config.replica_ports,
        encrypts=config.encrypts,
        drain_seconds=config.drain_seconds,
        # Why: a server that is quiet on its terminal still wants to know what its models do.
        log_level="DEBUG" if config.log_level == "DEBUG" else "INFO",
        log_format=config.log_format,
        lifeline=config.lifeline,
        devices=devices,
        downloads=downloads,
        journal=None
        if config.lifeline is None
        else ReplicaJournal(private_directory(config.run_directory, "journal", keep=True)),
        environments=_environments(config, host),
    )


def _environments(config: WorkerConfig, host: str) -> EnvironmentShelf:
    policy = EnvironmentPolicy(
        skips_installed=config.env_skips_installed,
        is_offline=config.env_is_offline,
        find_links_roots=tuple(map(Path, config.env_find_links_roots)),
    )
    shelf = EnvironmentShelf(config.home / "virtualenv", policy, worker_ip=host)
    shelf.sweep()
    return shelf


def _socket_directory(config: RoleConfig) -> Path:
    assert config.run_directory is not None
    return private_directory(config.run_directory, config.role)


def _on_signals() -> asyncio.Event:
    """Return an event that SIGTERM and SIGINT set."""
    told_to_end = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, told_to_end.set)
    return told_to_end


def _die_with_replicas(worker: WorkerActor) -> None:
    """The guardian is gone: kill everything below and end, at once."""
    # Why both: replicas that were adopted are nobody's children here.
    for pid in (*PLATFORM.children_of(os.getpid()), *worker.pids):
        kill_tree(pid)
    os._exit(EXIT_FAILED)


def _remove_old_logs(home: Path, running: Sequence[RunningReplica]) -> None:
    spared = {str(one.spec.replica) for one in running}
    removed = remove_old_logs(home / FOLDER, spared=spared, now=time.time())
    if removed:
        logger.info("Logs that nobody wrote to for a month are removed: %s", ", ".join(removed))


def _kill_unnoted(running: Sequence[RunningReplica]) -> None:
    """Kill the processes of an earlier worker's replicas that nobody can adopt."""
    noted = {one.spec.instance for one in running}
    owners = PLATFORM.tagged(OWNER_VARIABLE)
    for pid, instance in PLATFORM.tagged(INSTANCE_VARIABLE).items():
        if instance not in noted and owners.get(pid) == os.environ.get(OWNER_VARIABLE):
            kill_tree(pid)


async def _first_of(*waits: Any) -> int:
    """Return the number of the wait that ended first; its error is raised."""
    tasks = [asyncio.ensure_future(wait) for wait in waits]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for number, task in enumerate(tasks):
            if task.done():
                await task
                return number
        raise AssertionError("one of them is done")
    finally:
        for task in tasks:
            task.cancel()
