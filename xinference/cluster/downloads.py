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
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from xinference.catalog.downloads.cache import ModelCache
from xinference.errors import DownloadFailed, from_wire
from xinference.protocol.downloads import DownloadProgress, DownloadRequest, FileProgress
from xinference.settings import DownloadSettings

from .child_process import ChildProcess
from .log_rotation import open_log
from .replica_environment import without_secrets
from .supervision import describe_exit

logger = logging.getLogger(__name__)

COMMAND = ("-m", "xinference.catalog.downloads")

OnDownload = Callable[[DownloadProgress], None]


@dataclass(slots=True, eq=False)
class _Running:
    """A download that somebody waits for."""

    process: ChildProcess
    task: "asyncio.Task[str] | None" = None
    progress: DownloadProgress = field(default_factory=DownloadProgress)
    listeners: list[OnDownload] = field(default_factory=list)


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
        await asyncio.gather(*(process.wait() for process in self._processes))

    def _start(self, request: DownloadRequest) -> _Running:
        line = json.dumps(
            {
                "request": asdict(request),
                "home": str(self._home),
                "settings": asdict(self._settings),
                "log_format": self._log_format,
            }
        )
        try:
            with open_log(self._home / "logs" / "downloads.log") as log:
                process = ChildProcess.spawn(
                    [sys.executable, *self._command],
                    environment=without_secrets(os.environ),
                    first_line=line.encode() + b"\n",
                    log=log,
                )
        except OSError as error:
            raise DownloadFailed(model=request.model_name, problem=str(error)) from error
        logger.info("%s is downloaded by process %d", request.model_version, process.pid)
        self._processes.add(process)
        running = _Running(process)
        running.task = asyncio.create_task(
            self._follow(request, running), name=f"download {request.model_version}"
        )
        # Why: one that nobody waits for any more fails unseen.
        running.task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self._running[request] = running
        return running

    def _abandon(self, request: DownloadRequest, running: _Running) -> None:
        """Nobody waits for it any more: end it, if it has not ended."""
        if self._running.get(request) is running:
            del self._running[request]
            running.process.kill_tree()

    async def _follow(self, request: DownloadRequest, running: _Running) -> str:
        """Read what the process says, to its end; return the path, or raise what it met."""
        said: dict[str, Any] = {}
        files: dict[str, FileProgress] = {}
        try:
            while line := await running.process.read_line():
                said = json.loads(line)
                if "files" not in said:
                    continue
                files |= {one["file_name"]: FileProgress(**one) for one in said["files"]}
                running.progress = DownloadProgress(
                    files=tuple(files.values()), info=str(said["info"])
                )
                for listener in running.listeners:
                    listener(running.progress)
        finally:
            if self._running.get(request) is running:
                del self._running[request]
            running.process.kill_tree()
            status = await running.process.wait()
            self._processes.discard(running.process)
        if "path" in said:
            return str(said["path"])
        if "error" in said:
            raise from_wire(said["error"])
        raise DownloadFailed(
            model=request.model_name,
            problem=f"its process ended ({describe_exit(status)}); logs/downloads.log may say why",
        )
