# SPDX-License-Identifier: Apache-2.0
"""`Downloads`: what a worker's host has of models, and the processes that fetch the rest.

One process per request, however many wait for it: it ends when it is done, or when nobody waits any
more. Why a process: to kill it is a cancel that needs nobody's consent, and neither its checksums
nor a name that does not resolve hold up the worker.
"""

import asyncio
import contextlib
import json
import logging
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xinference.catalog.downloads.cache import ModelCache
from xinference.errors import DownloadFailed, from_wire
from xinference.protocol.downloads import DownloadProgress, DownloadRequest, FileProgress
from xinference.protocol.repositories import CardRequest
from xinference.settings import DownloadSettings

from .child_process import ChildProcess
from .log_rotation import open_log
from .replica_environment import without_secrets
from .supervision import describe_exit

logger = logging.getLogger(__name__)

COMMAND = ("-m", "xinference.catalog.downloads")
GONE_TIMEOUT_SECONDS = 5.0
CARD_COMMAND = ("-m", "xinference.cluster.card_process")
CARD_SECONDS = 24.0
"""For a hub to say what a repository holds, and to send its small files."""

OnDownload = Callable[[DownloadProgress], None]


@dataclass(slots=True, eq=False)
class _Running:
    """A download that somebody waits for."""

    process: ChildProcess | None = None
    """None: it waits for others to be done."""
    task: "asyncio.Task[str] | None" = None
    progress: DownloadProgress = field(default_factory=DownloadProgress)
    listeners: list[OnDownload] = field(default_factory=list)

    def tell(self, progress: DownloadProgress) -> None:
        """Let everybody who waits for it know how far it is."""
        self.progress = progress
        for listener in self.listeners:
            listener(progress)


class Downloads:
    """The models on a host's disk. Belongs to one event loop; its methods interleave at awaits."""

    def __init__(
        self,
        *,
        home: Path,
        settings: DownloadSettings,
        command: Sequence[str] = COMMAND,
        log_format: str = "text",
    ) -> None:
        """Look after `<home>/cache`; nothing runs yet.

        Args:
            command: what the interpreter is given.
            log_format: of the downloads' log.
        """
        self.cache = ModelCache(home)
        self._home = home
        self._settings = settings
        self._command = tuple(command)
        self._log_format = log_format
        self._slots = asyncio.Semaphore(settings.max_models)
        self._running: dict[DownloadRequest, _Running] = {}
        self._processes: set[ChildProcess] = set()
        self._users: dict[str, Counter[str]] = {}

    @property
    def pids(self) -> list[int]:
        """Of every process that is not gone yet."""
        return [process.pid for process in self._processes]

    async def fetch(self, request: DownloadRequest, on_progress: OnDownload) -> str:
        """Have what a model needs on this host; return the path that it is loaded from.

        Cancelling the last one who waits for it cancels the download, at once. What has arrived is
        kept.

        Args:
            on_progress: is called only if something has to be downloaded.

        Raises:
            DownloadFailed, DownloadUnavailable, DiskFull
        """
        path = await asyncio.to_thread(self.cache.find, request)
        if path is not None:
            return path
        running = self._running.get(request) or self._start(request)
        assert running.task is not None
        running.listeners.append(on_progress)
        on_progress(running.progress)
        try:
            # Why shield: others may wait for the same one.
            return await asyncio.shield(running.task)
        finally:
            running.listeners.remove(on_progress)
            if not running.listeners:
                self._abandon(request, running)

    async def read_card(self, request: CardRequest) -> str:
        """Return what a repository says of its model, from the cache or from a hub.

        It is as `RepositoryCard.from_json` reads it.

        Raises:
            DownloadFailed, DownloadUnavailable, InvalidRequest
        """
        with tempfile.TemporaryDirectory(prefix="xinference-card-") as directory:
            process = self._spawn(
                CARD_COMMAND, request, model=request.model_id, directory=directory
            )
            text, said = "", dict[str, Any]()
            try:
                async with asyncio.timeout(CARD_SECONDS):
                    while line := await process.read_line():
                        said = json.loads(line)
                        text += said.get("piece", "")
            except TimeoutError:
                problem = f"what it holds is not known after {CARD_SECONDS:.0f} seconds"
                raise DownloadFailed(model=request.model_id, problem=problem) from None
            finally:
                status = await self._end(process)
        if "error" in said:
            raise from_wire(said["error"])
        if "ended" not in said:
            raise _died(request.model_id, status)
        return text

    @contextlib.contextmanager
    def used(self, request: DownloadRequest | None, by: str) -> Iterator[None]:
        """Let it be known who runs from what was downloaded, until the block ends."""
        if request is None:
            yield
            return
        users = self._users.setdefault(request.model_version, Counter())
        users[by] += 1
        try:
            yield
        finally:
            users[by] -= 1
            if not +users:
                self._users.pop(request.model_version, None)

    def users_of(self, model_version: str) -> tuple[str, ...]:
        """Return the models that run from a version, or wait for it, sorted."""
        return tuple(sorted(+self._users.get(model_version, Counter())))

    async def close(self) -> None:
        """End every download; return when no process of them is left."""
        for request, running in list(self._running.items()):
            self._abandon(request, running)
        await asyncio.gather(*map(_gone, self._processes))

    def _spawn(
        self,
        command: Sequence[str],
        request: DownloadRequest | CardRequest,
        *,
        model: str,
        **more: object,
    ) -> ChildProcess:
        line = json.dumps(
            {
                "request": asdict(request),
                "home": str(self._home),
                "settings": asdict(self._settings),
                "log_format": self._log_format,
                **more,
            }
        )
        try:
            with open_log(self._home / "logs" / "downloads.log") as log:
                process = ChildProcess.spawn(
                    [sys.executable, *command],
                    environment=without_secrets(os.environ),
                    first_line=line.encode() + b"\n",
                    log=log,
                )
        except OSError as error:
            raise DownloadFailed(model=model, problem=str(error)) from error
        self._processes.add(process)
        return process

    async def _end(self, process: ChildProcess) -> int | None:
        """Let nothing of a process be left; return how it ended."""
        process.kill_tree()
        status = await _gone(process)
        self._processes.discard(process)
        return status

    def _start(self, request: DownloadRequest) -> _Running:
        running = _Running()
        running.task = asyncio.create_task(
            self._run(request, running), name=f"download {request.model_version}"
        )
        # Why: one that nobody waits for any more fails unseen.
        running.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._running[request] = running
        return running

    def _abandon(self, request: DownloadRequest, running: _Running) -> None:
        """Nobody waits for it any more: end it, if it has not ended."""
        if self._running.get(request) is not running:
            return
        del self._running[request]
        if running.process is not None:
            running.process.kill_tree()
        elif running.task is not None:
            running.task.cancel()

    async def _run(self, request: DownloadRequest, running: _Running) -> str:
        """Download when it is its turn; return the path, or raise what the process met."""
        if self._slots.locked():
            running.tell(DownloadProgress(info="waits for other downloads to be done"))
        try:
            async with self._slots:
                running.process = self._spawn(self._command, request, model=request.model_name)
                logger.info(
                    "%s is downloaded by process %d", request.model_version, running.process.pid
                )
                return await self._follow(request, running, running.process)
        finally:
            if self._running.get(request) is running:
                del self._running[request]

    async def _follow(
        self, request: DownloadRequest, running: _Running, process: ChildProcess
    ) -> str:
        """Read what the process says, to its end; return the path, or raise what it met."""
        said: dict[str, Any] = {}
        files: dict[str, FileProgress] = {}
        try:
            while line := await process.read_line():
                said = json.loads(line)
                if "files" not in said:
                    continue
                files |= {one["file_name"]: FileProgress(**one) for one in said["files"]}
                running.tell(DownloadProgress(files=tuple(files.values()), info=str(said["info"])))
        finally:
            status = await self._end(process)
        if "path" in said:
            return str(said["path"])
        if "error" in said:
            raise from_wire(said["error"])
        raise _died(request.model_name, status)


async def _gone(process: ChildProcess) -> int | None:
    """Return how a process that was killed has ended; None: it does not go away."""
    try:
        async with asyncio.timeout(GONE_TIMEOUT_SECONDS):
            return await process.wait()
    except TimeoutError:
        # Hazard: one that waits for a disk or a network drive that hangs cannot be killed.
        logger.error("The download in process %d does not go away", process.pid)
        return None


def _died(model: str, status: int | None) -> DownloadFailed:
    problem = f"its process ended ({describe_exit(status)}); logs/downloads.log may say why"
    return DownloadFailed(model=model, problem=problem)
