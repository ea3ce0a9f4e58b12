# SPDX-License-Identifier: Apache-2.0
"""`ModelActor`: the life of one replica's process, from its start to the last of its descendants.

In: a `ReplicaSpec`, and orders. Out: an `InstanceReport` that changes as the replica does; the
worker carries it to the supervisor. It decides nothing: what ends is started again with another
actor, by the supervisor as another instance, or while there is none by the worker as the same one.
Requests and text pass it by.
"""

import asyncio
import contextlib
import json
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import BinaryIO

from xinference.errors import (
    InternalError,
    LoadFailed,
    ModelNotReady,
    PeerUnreachable,
    ProtocolError,
    ReplicaLost,
    XinferenceError,
)
from xinference.identifiers import InstanceId, RequestId
from xinference.protocol.deployment import AbortOutcome
from xinference.protocol.downloads import DownloadProgress
from xinference.protocol.worker_reading import ReplicaReading

from .child_process import AdoptedProcess, ChildProcess
from .control_bus import remote
from .dataplane.client import ReplicaConnection
from .dataplane.handshake import instance_key
from .device_ledger import DeviceLedger
from .downloads import Downloads
from .environments import EnvironmentShelf
from .journal import ReplicaJournal, RunningReplica
from .liveness import Liveness
from .log_rotation import open_log
from .messages import InstanceLoad, InstanceReport, InstanceState, StartInstance
from .replica import Bootstrap
from .replica_environment import replica_environment, without_secrets
from .supervision import INSTANCE_VARIABLE, PLATFORM, OomWatch, describe_exit
from .worker import Served

logger = logging.getLogger(__name__)

START_TIMEOUT_SECONDS = 60.0
"""For a process to say where it listens."""
OPEN_TIMEOUT_SECONDS = 10.0
LOAD_TIMEOUT_SECONDS = 3600.0
COMMAND_TIMEOUT_SECONDS = 1800.0
"""For an installer to end, say."""
STOP_GRACE_SECONDS = 3.0
"""For a ready replica to end by itself once its requests are over."""
DRAIN_SECONDS = 30.0
GONE_TIMEOUT_SECONDS = 5.0
HELD_SECONDS = 5.0
"""Devices that are not free so long after the last process ended are quarantined."""
HELD_LOOK_SECONDS = 0.05
QUESTION_TIMEOUT_SECONDS = 2.0
STATS_ARE_GOOD_FOR_SECONDS = 1.0
WATCH_SECONDS = 1.0
SILENT_SECONDS = 3.0
"""For an answer to a PING. Whether a process is stopped is looked up then."""
REASON_TIMEOUT_SECONDS = 1.0
"""A lost connection waits so long for the process's own way of ending."""
NUM_LAST_LINES = 50
NUM_TOLD_LINES = 3
MAX_TOLD_LINE_LEN = 200
_FROM_OUTSIDE = frozenset({signal.SIGKILL, signal.SIGTERM})
"""Signals that say nothing about the process, so its log has no reason to tell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaHost:
    """What all replicas of a worker share."""

    home: Path
    run_directory: Path
    cluster_key: bytes = field(repr=False)
    command: tuple[str, ...]
    """What the interpreter is given."""
    listen_host: str | None
    """None: replicas listen on unix sockets, for this host alone."""
    listen_ports: tuple[int, int] | None = None
    encrypts: bool = True
    """Whether what other hosts send to a replica, and get, is encrypted."""
    drain_seconds: float = DRAIN_SECONDS
    """For what runs on a replica to end, once it is told to stop."""
    log_level: str = "INFO"
    """Of what replicas log."""
    log_format: str = "text"
    lifeline: int | None = None
    """What replicas live by, so that they outlive this worker; None: they end with it."""
    journal: ReplicaJournal | None = None
    """Where they are noted for the next worker."""
    downloads: Downloads
    devices: DeviceLedger = field(default_factory=lambda: DeviceLedger(lambda: ()))
    """What they hold of the host's GPUs."""
    environments: EnvironmentShelf | None = None
    """The virtual environments that they run in; None: only in the host's own."""


class ModelActor:
    """One instance of a replica. Stateless towards callers: its methods interleave.

    `start` begins its life, `stop` ends it early; `ended` is set when no process of it is left.
    """

    def __init__(
        self,
        start: StartInstance,
        *,
        host: ReplicaHost,
        sweep: Callable[[InstanceId], int],
        on_change: Callable[[], None],
        adopted: RunningReplica | None = None,
        listens_at: str = "",
    ) -> None:
        """Prepare; nothing runs yet, unless it is `adopted`.

        Args:
            sweep: kills the worker's orphans that the instance left; returns how many remain.
            on_change: called whenever `report` has changed.
            adopted: the process, which an earlier worker has started.
            listens_at: the address to have; empty: any.
        """
        self._start = start
        self._spec = start.spec
        self._host = host
        self._sweep = sweep
        self._on_change = on_change
        self._report = InstanceReport(
            replica=start.spec.replica,
            instance=start.spec.instance,
            launch_id=start.launch_id,
            state=InstanceState.STARTING,
            gpu_idx=start.spec.gpu_idx,
        )
        self._adopted = adopted
        self._listens_at = listens_at
        self._process: ChildProcess | AdoptedProcess | None = None
        self._connection: ReplicaConnection | None = None
        self._is_stopping = asyncio.Event()
        self._life: asyncio.Task[None] | None = None
        self._stats: dict[str, float] = {}
        self._stats_at = 0.0
        self._load: InstanceLoad | None = None
        self._load_seconds: float | None = None
        self._log_start = 0
        self._served: Served | None = None
        self._verdict = ""
        """Why it is replaced though its process lives."""
        self._used_before: dict[int, int] = {}
        self._oom = OomWatch()
        self.ended = asyncio.Event()
        self.settled = asyncio.Event()
        """Set when it is ready, or will not be."""

    @property
    def report(self) -> InstanceReport:
        """How it is."""
        return self._report

    @property
    def load(self) -> InstanceLoad | None:
        """How much it has to do, at most a second old; None while it is not ready."""
        return self._load if self._report.state is InstanceState.READY else None

    @property
    def reading(self) -> ReplicaReading:
        """Return it for those who watch the worker, its counters at most some seconds old."""
        spec, report = self._spec, self._report
        return ReplicaReading(
            replica=spec.replica,
            state=report.state.value,
            model_name=spec.model_name,
            model_type=spec.model_type,
            model_engine=spec.model_engine,
            model_format=spec.model_format,
            quantization=spec.quantization,
            gpu_idx=spec.gpu_idx or (),
            request_limits=spec.request_limits,
            load_seconds=self._load_seconds,
            counters=self._stats if report.state is InstanceState.READY else {},
        )

    @property
    def pid(self) -> int | None:
        """Of its process; None before there is one."""
        return None if self._process is None else self._process.pid

    def start(self, after: asyncio.Event | None = None) -> None:
        """Begin its life, once `after` is set: nothing of an earlier instance is left."""
        self._life = asyncio.create_task(self._live(after), name=f"life of {self._spec.replica}")

    def stop(self) -> None:
        """End it soon: in order if it is ready, at once if it is not."""
        if self._report.state not in {InstanceState.STOPPING, InstanceState.EXITED}:
            self._change(state=InstanceState.STOPPING)
        self._is_stopping.set()

    @property
    def served(self) -> Served | None:
        """What to start to have the same instance again; None: told to end, or never ready."""
        return None if self._is_stopping.is_set() else self._served

    @remote
    async def describe(self) -> InstanceReport:
        """Return how it is."""
        return self._report

    @remote
    async def stats(self) -> dict[str, float]:
        """Return the engine's counters, at most a second old.

        Raises:
            ModelNotReady, ReplicaLost
        """
        if time.monotonic() - self._stats_at > STATS_ARE_GOOD_FOR_SECONDS:
            load = await self._ready_connection().ping(QUESTION_TIMEOUT_SECONDS)
            self._stats, self._stats_at = load.counters, time.monotonic()
        return self._stats

    @remote
    async def abort(self, request_id: RequestId, block_seconds: float) -> AbortOutcome:
        """Abort a request; for `block_seconds` its id is refused afterwards.

        Raises:
            ModelNotReady, ReplicaLost
        """
        return await self._ready_connection().abort_request(
            request_id, block_seconds=block_seconds, timeout_seconds=QUESTION_TIMEOUT_SECONDS
        )

    @remote
    async def drain(self) -> None:
        """Tell the replica to take no new requests.

        Raises:
            ModelNotReady, ReplicaLost
        """
        await self._ready_connection().drain()

    def _ready_connection(self) -> ReplicaConnection:
        if self._connection is None or self._report.state is not InstanceState.READY:
            raise ModelNotReady(
                model=self._spec.replica.model,
                state=self._report.state.value,
                retry_after_seconds=1,
            )
        return self._connection

    async def _live(self, after: asyncio.Event | None) -> None:
        """Bring the process up, wait for its end, and leave nothing of it."""
        error: XinferenceError | None
        try:
            if after is not None:
                await after.wait()
            with self._host.downloads.used(self._spec.source.download, self._spec.replica.model):
                error = await self._run() if await self._has_files() else None
        except XinferenceError as failure:
            error = failure
        except OSError as failure:
            error = LoadFailed(model=self._spec.replica.model, problem=str(failure))
        except Exception as failure:
            logger.exception("%s: its actor failed", self._spec.replica)
            error = InternalError(where="model actor", problem=repr(failure))
        finally:
            await self._leave_nothing()
        left = await self._free_devices()
        if self._is_stopping.is_set():
            error = None
        if error is not None:
            logger.error("%s ended: %s", self._spec.replica, error)
        self._change(
            state=InstanceState.EXITED,
            address=None,
            info=left,
            error=None if error is None else error.to_wire(),
        )
        self.settled.set()
        self.ended.set()

    async def _has_files(self) -> bool:
        """Get the model's files to this host; return False if it was told to end meanwhile.

        Raises:
            DownloadFailed, DownloadUnavailable, DiskFull
        """
        source = self._spec.source
        if self._is_stopping.is_set() or source.download is None or source.path:
            return not self._is_stopping.is_set()
        fetching = asyncio.create_task(
            self._host.downloads.fetch(source.download, self._on_download), name="fetch"
        )
        stopping = asyncio.create_task(self._is_stopping.wait(), name="stop")
        try:
            await asyncio.wait({fetching, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                return False
            self._spec = replace(self._spec, source=replace(source, path=fetching.result()))
            self._change(state=InstanceState.STARTING)
            return True
        finally:
            for task in (fetching, stopping):
                task.cancel()
            await asyncio.gather(fetching, stopping, return_exceptions=True)

    def _on_download(self, progress: DownloadProgress) -> None:
        self._change(state=InstanceState.DOWNLOADING, download=progress)

    async def _run(self) -> XinferenceError | None:
        """Return why the process ended, or None when it was told to; it may still be there."""
        if self._adopted is None and not await self._made_environment():
            return None
        self._used_before = self._host.devices.started(
            self._spec.instance,
            self._spec.gpu_idx,
            used_before=None if self._adopted is None else self._adopted.used_before,
        )
        process = self._process = self._adopt() or self._spawn()
        logger.info("%s is process %d", self._spec.replica, process.pid)
        serving = asyncio.create_task(self._serve(process), name="serve")
        exiting = asyncio.create_task(process.wait(), name="exit")
        stopping = asyncio.create_task(self._is_stopping.wait(), name="stop")
        try:
            await asyncio.wait({serving, exiting, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                await self._stop_in_order(process)
                return None
            failure = _error_of(serving) if serving.done() else None
            if failure is not None and not isinstance(failure, ReplicaLost):
                return failure
            # Why wait: how the process ended says more than that its connection did.
            await asyncio.wait({exiting}, timeout=REASON_TIMEOUT_SECONDS)
            if exiting.done():
                status = exiting.result()
                is_killed = status is not None and -status in _FROM_OUTSIDE
                how = self._verdict or describe_exit(status)
                if status in {None, -signal.SIGKILL} and self._oom.has_killed():
                    how = f"{how}; the kernel has killed for want of memory (host_oom)"
                return self._death(process, how, is_killed=is_killed)
            return self._death(process, "no answer" if failure is None else failure.problem)
        finally:
            for task in (serving, exiting, stopping):
                task.cancel()
            await asyncio.gather(serving, exiting, stopping, return_exceptions=True)

    async def _made_environment(self) -> bool:
        """Settle the interpreter of the process; False: it was told to stop before.

        Raises:
            InvalidRequest, LoadFailed: the environment cannot be made.
        """
        spec, shelf = self._spec, self._host.environments
        python = spec.python_executable or sys.executable
        if shelf is not None and spec.python_executable:
            shelf.hold(python, user=spec.instance, name=str(spec.replica))
        if spec.virtual_env is not None and not spec.python_executable:
            if shelf is None:
                raise LoadFailed(
                    model=spec.replica.model, problem="its worker makes no virtual environments"
                )
            making = asyncio.create_task(
                shelf.python_for(
                    spec.virtual_env,
                    user=spec.instance,
                    name=str(spec.replica),
                    run=self._run_to_its_end,
                    tell=lambda info: self._change(info=info),
                ),
                name="virtual environment",
            )
            stopping = asyncio.create_task(self._is_stopping.wait(), name="stop")
            try:
                await asyncio.wait({making, stopping}, return_when=asyncio.FIRST_COMPLETED)
                if not making.done():
                    return False
                python = str(making.result())
            finally:
                for task in (making, stopping):
                    task.cancel()
                await asyncio.gather(making, stopping, return_exceptions=True)
        self._spec = replace(spec, python_executable=python)
        return True

    async def _run_to_its_end(self, argv: Sequence[str], variables: Mapping[str, str]) -> bytes:
        """Run a command of this instance, its words in the log; return the first line it said.

        Raises:
            LoadFailed: it failed, or took too long.
        """
        name = " ".join(Path(word).name for word in argv[:3])
        with self._open_log() as log:
            process = ChildProcess.spawn(
                argv,
                environment={
                    **without_secrets(os.environ),
                    **variables,
                    INSTANCE_VARIABLE: self._spec.instance,
                },
                first_line=b"",
                log=log,
            )
        try:
            async with asyncio.timeout(COMMAND_TIMEOUT_SECONDS):
                line = await process.read_line()
                await process.discard_output()
                status = await process.wait()
        except TimeoutError:
            status, line = None, b""
        finally:
            await self._end(process)
        if status == 0:
            return line
        problem = f"{name}: {describe_exit(status)}"
        if status is None:
            problem = f"{name} took more than {COMMAND_TIMEOUT_SECONDS:.0f} s"
        raise LoadFailed(model=self._spec.replica.model, problem=self._with_last_lines(problem))

    def _spawn(self) -> ChildProcess:
        with self._open_log() as log:
            return ChildProcess.spawn(
                [self._spec.python_executable, *self._host.command],
                environment={
                    **replica_environment(self._spec, os.environ),
                    INSTANCE_VARIABLE: self._spec.instance,
                },
                first_line=self._bootstrap(),
                log=log,
                lifeline=self._host.lifeline,
            )

    def _adopt(self) -> AdoptedProcess | None:
        """Return the process that an earlier worker has started; None if there was none.

        Raises:
            ReplicaLost: it has ended.
        """
        if self._adopted is None:
            return None
        if PLATFORM.start_of(self._adopted.pid) != self._adopted.started_at:
            raise ReplicaLost(model=self._spec.replica.model, problem="it ended with its worker")
        if self._host.environments is not None:
            python, instance = self._spec.python_executable, self._spec.instance
            self._host.environments.hold(python, user=instance, name=str(self._spec.replica))
        return AdoptedProcess(self._adopted.pid)

    async def _address_of(self, process: ChildProcess | AdoptedProcess) -> str:
        """Return where the replica listens, once it does.

        Raises:
            ReplicaLost, LoadFailed: it does not say.
        """
        if isinstance(process, AdoptedProcess):
            assert self._adopted is not None, "that is where it is from"
            return self._adopted.address
        model = self._spec.replica.model
        try:
            async with asyncio.timeout(START_TIMEOUT_SECONDS):
                line = await process.read_line()
        except TimeoutError:
            raise LoadFailed(
                model=model, problem=f"no sign of life within {START_TIMEOUT_SECONDS:.0f} s"
            ) from None
        if not line:
            raise ReplicaLost(model=model, problem="it closed its output")
        try:
            return str(json.loads(line)["address"])
        except (ValueError, KeyError, TypeError):
            problem = f"it said {line[:200]!r} where its address was due"
            raise LoadFailed(model=model, problem=problem) from None

    def _note(self, process: ChildProcess | AdoptedProcess, address: str) -> None:
        """Let the next worker find the process, should this one be gone."""
        started_at = PLATFORM.start_of(process.pid)
        if self._host.journal is None or started_at is None:
            return
        running = RunningReplica(
            pid=process.pid,
            started_at=started_at,
            address=address,
            launch_id=self._report.launch_id,
            spec=self._spec,
            used_before=self._used_before,
        )
        try:
            self._host.journal.write(running)
        except OSError:
            logger.exception(
                "%s could not be noted; another worker will not find it", running.spec.replica
            )

    async def _serve(self, process: ChildProcess | AdoptedProcess) -> None:
        """Connect, load, and stay until the connection ends; never returns.

        Raises:
            ReplicaLost: the process or the connection to it ended, or was too slow.
            LoadFailed, InvalidRequest: it cannot load.
        """
        model = self._spec.replica.model
        address = await self._address_of(process)
        self._note(process, address)
        try:
            connection = await ReplicaConnection.open(
                address,
                instance=self._spec.instance,
                key=instance_key(self._host.cluster_key, self._spec.instance),
                role="actor",
                timeout_seconds=OPEN_TIMEOUT_SECONDS,
            )
        except (PeerUnreachable, ProtocolError) as error:
            raise ReplicaLost(model=model, problem=str(error)) from error
        self._connection = connection
        self._change(state=InstanceState.LOADING)
        began_at = time.monotonic()
        loaded = await connection.load(
            self._spec, on_progress=self._on_progress, timeout_seconds=LOAD_TIMEOUT_SECONDS
        )
        if self._adopted is None:
            self._load_seconds = time.monotonic() - began_at
        self._change(
            state=InstanceState.READY,
            address=address,
            progress=1.0,
            info="",
            download=None,
            context_length=loaded.context_length,
            max_num_seqs=loaded.max_num_seqs,
            virtual_env_packages=loaded.virtual_env_packages,
        )
        self._served = Served(self._start, address)
        self._note_devices()
        self.settled.set()
        discarding = asyncio.create_task(process.discard_output(), name="discard output")
        watching = asyncio.create_task(self._watch(connection, process.pid), name="watch progress")
        closing = asyncio.create_task(connection.closed.wait(), name="closed")
        try:
            await asyncio.wait({watching, closing}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (discarding, watching, closing):
                task.cancel()
        if watching.done() and not watching.cancelled():
            watching.result()
        raise ReplicaLost(model=model, problem=self._verdict or "its connection was closed")

    async def _watch(self, connection: ReplicaConnection, pid: int) -> None:
        """Return when a ready replica gets nowhere: it is stopped, silent, or stuck in a step.

        A long prompt is no reason: its chunks are steps, and each of them counts as progress.
        """
        liveness = Liveness(now=time.monotonic())
        while not connection.is_closed:
            await asyncio.sleep(WATCH_SECONDS)
            self._oom.look()
            counters: dict[str, float] | None = None
            with contextlib.suppress(ReplicaLost):
                counters = (await connection.ping(SILENT_SECONDS)).counters
            if counters is not None:
                self._load = _load_of(counters)
                self._stats, self._stats_at = counters, time.monotonic()
            is_stopped = counters is None and PLATFORM.is_stopped(pid)
            problem = liveness.observe(counters, is_stopped=is_stopped, now=time.monotonic())
            if problem is not None and not connection.is_closed:
                self._verdict = problem
                # It writes down where its threads are, if it can; what is left is killed.
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGABRT)
                return

    async def _stop_in_order(self, process: ChildProcess | AdoptedProcess) -> None:
        """Let a replica that is ready finish its requests and end by itself, for a while.

        One that does not answer meanwhile is given up: it finishes nothing.
        """
        connection = self._connection
        if connection is None or connection.is_closed or self._report.context_length is None:
            return
        grace_seconds = self._host.drain_seconds
        exiting = asyncio.create_task(process.wait(), name="exit")
        try:
            async with asyncio.timeout(grace_seconds + STOP_GRACE_SECONDS):
                await connection.stop(grace_seconds=grace_seconds)
                while not exiting.done():
                    await connection.ping(STOP_GRACE_SECONDS)
                    await asyncio.wait({exiting}, timeout=1.0)
        except TimeoutError:
            logger.warning("%s did not end in time", self._spec.replica)
        except ReplicaLost:
            # Its connection ends before it does.
            await asyncio.wait({exiting}, timeout=STOP_GRACE_SECONDS)
        finally:
            exiting.cancel()

    async def _leave_nothing(self) -> None:
        """End every process of this instance, and wait until each is gone."""
        if self._connection is not None:
            await self._connection.aclose()
        if self._host.environments is not None:
            self._host.environments.release(self._spec.instance)
        process = self._process
        if process is None:
            return
        self._note_devices()
        await self._end(process)
        try:
            self._socket_path().unlink(missing_ok=True)
            if self._host.journal is not None:
                self._host.journal.forget(self._spec.instance)
        except OSError as error:
            # Why not raised: the processes are gone, and that has to be told.
            logger.warning("%s has left a file behind: %s", self._spec.instance, error)

    async def _end(self, process: ChildProcess | AdoptedProcess) -> None:
        """End a process of this instance and all that it has left; return when they are gone."""
        process.kill_tree()
        try:
            async with asyncio.timeout(GONE_TIMEOUT_SECONDS):
                await process.wait()
                # What it had started came to this worker as the subreaper, or to the guardian.
                while self._sweep(self._spec.instance):  # noqa: ASYNC110  # nothing tells
                    await asyncio.sleep(0.01)
        except TimeoutError:
            logger.error("%s: process %d does not go away", self._spec.replica, process.pid)

    def _note_devices(self) -> None:
        """Let the ledger know which processes on the devices are of this instance."""
        if self._spec.gpu_idx:
            tagged = PLATFORM.tagged(INSTANCE_VARIABLE)
            own = [pid for pid, instance in tagged.items() if instance == self._spec.instance]
            self._host.devices.saw(self._spec.instance, own)

    async def _free_devices(self) -> str:
        """Return when no device is held by this instance, or say which are, in quarantine."""
        deadline = time.monotonic() + HELD_SECONDS
        while not self._host.devices.is_free_of(self._spec.instance):
            if time.monotonic() > deadline:
                return self._host.devices.quarantine(self._spec.instance)
            await asyncio.sleep(HELD_LOOK_SECONDS)
        return ""

    def _death(
        self, process: ChildProcess | AdoptedProcess, how: str, *, is_killed: bool = False
    ) -> XinferenceError:
        """Return the error of a process that ended unasked, and log its last lines."""
        model = self._spec.replica.model
        if not is_killed:
            how = self._with_last_lines(how)
        if self._report.context_length is None:
            return LoadFailed(model=model, problem=how)
        return ReplicaLost(model=model, problem=how)

    def _with_last_lines(self, how: str) -> str:
        """Return how something ended, with its last words, and log all of them."""
        lines = self._last_lines()
        if not lines:
            return how
        logger.error("%s, %s:\n%s", self._spec.replica, how, "\n".join(lines))
        return f"{how}; last lines of its log: " + " | ".join(
            line[:MAX_TOLD_LINE_LEN] for line in lines[-NUM_TOLD_LINES:]
        )

    def _on_progress(self, progress: float, stage: str, info: str) -> None:
        self._change(progress=progress, info=info or stage)

    def _change(self, **changes: object) -> None:
        if self._is_stopping.is_set() and changes.get("state") not in {None, InstanceState.EXITED}:
            return
        changed = replace(self._report, **changes)  # type: ignore[arg-type]  # its own fields
        if changed != self._report:
            self._report = changed
            self._on_change()

    def _bootstrap(self) -> bytes:
        instance = self._spec.instance
        if self._listens_at:
            listen = self._listens_at
        elif self._host.listen_host is None:
            listen = f"unix:{self._socket_path()}"
        else:
            first, last = self._host.listen_ports or (0, 0)
            ports = f"{first}-{last}" if last else "0"
            host = self._host.listen_host
            kind = "tls" if self._host.encrypts else "tcp"
            listen = f"{kind}:[{host}]:{ports}" if ":" in host else f"{kind}:{host}:{ports}"
        return Bootstrap(
            instance=instance,
            key=instance_key(self._host.cluster_key, instance),
            listen=listen,
            model_uid=self._spec.replica.model,
            lifeline=self._host.lifeline,
            log_path=str(self._log_path()),
            log_level=self._host.log_level,
            log_format=self._host.log_format,
        ).to_line()

    def _socket_path(self) -> Path:
        return self._host.run_directory / self._spec.instance

    def _log_path(self) -> Path:
        return self._host.home / "logs" / f"{self._spec.replica}.log"

    def _open_log(self) -> BinaryIO:
        log = open_log(self._log_path())
        self._log_start = log.tell()
        return log

    def _last_lines(self) -> list[str]:
        """Return the last lines that this instance wrote to its log."""
        try:
            with self._log_path().open("rb") as log:
                end = log.seek(0, os.SEEK_END)
                # It was begun anew meanwhile if it is shorter than it was.
                start = self._log_start if self._log_start <= end else 0
                log.seek(max(start, end - 64 * 1024))
                text = log.read().decode(errors="replace")
        except OSError:
            return []
        return [line for line in text.splitlines() if line.strip()][-NUM_LAST_LINES:]


def _load_of(counters: Mapping[str, float]) -> InstanceLoad:
    return InstanceLoad(
        num_outstanding=int(counters.get("num_running", 0.0) + counters.get("num_waiting", 0.0)),
        progress=counters.get("progress", 0.0),
    )


def _error_of(serving: "asyncio.Task[None]") -> XinferenceError:
    """Return why a replica serves no longer; what is no error of ours is raised."""
    error = serving.exception()
    if isinstance(error, XinferenceError):
        return error
    assert error is not None, "a serving replica does not return"
    raise error
