# SPDX-License-Identifier: Apache-2.0
"""What the cluster's hosts keep of models: listed, removed, downloaded ahead of a launch.

`CacheActor` is one host's, beside its worker; `CachesActor` is the supervisor's, and asks those.
Neither is on the way of a launch: that has its files downloaded by its own model actor.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from xinference.errors import (
    CacheInUse,
    InsufficientResources,
    InvalidRequest,
    ObjectNotFound,
    XinferenceError,
)
from xinference.identifiers import NodeId
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.downloads import (
    CachedModel,
    DownloadProgress,
    DownloadRequest,
    DownloadStage,
    DownloadStatus,
    KeptModels,
    Removed,
)
from xinference.protocol.repositories import CardRequest

from .control_bus import ControlBus, remote
from .downloads import Downloads
from .every_worker import Answers, ask_each, nodes_at, unreachable
from .repositories import Repositories, ResolvingCatalog
from .worker import CACHE, REMOVE_TIMEOUT_SECONDS

logger = logging.getLogger(__name__)

CALL_TIMEOUT_SECONDS = 10.0
MAX_ENDED = 256
"""Downloads that have ended and can still be asked about."""


class CacheActor:
    """The cache of one host. Its methods interleave at awaits."""

    def __init__(self, downloads: Downloads) -> None:
        """Share the worker's downloads."""
        self._downloads = downloads
        self._running: dict[str, asyncio.Task[None]] = {}
        self._statuses: OrderedDict[str, DownloadStatus] = OrderedDict()

    @remote
    async def models(self) -> list[CachedModel]:
        """Return all that is kept here, and who uses it."""
        kept = await asyncio.to_thread(self._downloads.cache.models)
        return [
            replace(model, used_by=self._downloads.users_of(model.model_version)) for model in kept
        ]

    @remote
    async def remove(self, model_version: str, is_forced: bool) -> int:
        """Remove what a version alone needs; return how many bytes of the disk that frees.

        Raises:
            ObjectNotFound: nothing of it is here.
            CacheInUse: it is being downloaded, or a model runs from it and this is not forced.
            InvalidRequest: it lies outside the home. InsufficientResources: a file stays.
        """
        users = self._downloads.users_of(model_version)
        if users and not is_forced:
            raise CacheInUse(model_version=model_version, users=list(users))
        removed = await asyncio.to_thread(self._downloads.cache.remove, model_version)
        self._statuses.pop(model_version, None)
        logger.info("%s is removed: %d bytes", model_version, removed.freed_bytes)
        return removed.freed_bytes

    @remote
    async def read_card(self, request: CardRequest) -> str:
        """Return what a repository says of its model, as `RepositoryCard.from_json` reads it.

        Raises:
            DownloadFailed, DownloadUnavailable, InvalidRequest
        """
        return await self._downloads.read_card(request)

    @remote
    async def download(self, request: DownloadRequest) -> None:
        """Begin to download, unless that has begun."""
        version = request.model_version
        if version not in self._running:
            self._note(version, DownloadStatus(stage=DownloadStage.DOWNLOADING))
            task = asyncio.create_task(self._download(request), name=f"download {version}")
            self._running[version] = task
            task.add_done_callback(lambda _: self._running.pop(version))

    @remote
    async def download_status(self, model_version: str) -> DownloadStatus:
        """Return how far a download is."""
        return self._statuses.get(model_version) or DownloadStatus(stage=DownloadStage.PENDING)

    @remote
    async def cancel_download(self, model_version: str) -> bool:
        """End a download; return whether there was one. What has arrived is kept."""
        task = self._running.get(model_version)
        if task is None:
            return False
        task.cancel()
        await asyncio.wait({task})
        return True

    async def close(self) -> None:
        """End what runs."""
        for task in list(self._running.values()):
            task.cancel()
            await asyncio.wait({task})

    async def _download(self, request: DownloadRequest) -> None:
        version = request.model_version

        def on_progress(progress: DownloadProgress) -> None:
            status = DownloadStatus(stage=DownloadStage.DOWNLOADING, progress=progress)
            self._note(version, status)

        try:
            await self._downloads.fetch(request, on_progress)
        except XinferenceError as error:
            self._end(version, DownloadStage.ERROR, str(error))
        except asyncio.CancelledError:
            self._end(version, DownloadStage.CANCELLED)
            raise
        except Exception as error:
            logger.exception("%s: the download failed", version)
            self._end(version, DownloadStage.ERROR, repr(error))
        else:
            self._end(version, DownloadStage.COMPLETED)

    def _end(self, version: str, stage: DownloadStage, error_message: str = "") -> None:
        progress = self._statuses[version].progress
        status = DownloadStatus(stage=stage, progress=progress, error_message=error_message)
        self._note(version, status)

    def _note(self, version: str, status: DownloadStatus) -> None:
        self._statuses[version] = status
        self._statuses.move_to_end(version)
        ended = [one for one in self._statuses if one not in self._running and one != version]
        for one in ended[: max(0, len(self._statuses) - MAX_ENDED)]:
            del self._statuses[one]


class CachesActor:
    """The caches of all hosts. Keeps nothing: every answer is asked for."""

    def __init__(
        self, *, bus: ControlBus, catalog: ResolvingCatalog, nodes: Callable[[], list[NodeId]]
    ) -> None:
        """Ask the workers.

        Args:
            nodes: returns those that have joined.
        """
        self._bus = bus
        self._nodes = nodes
        self._repositories = Repositories(bus=bus, catalog=catalog, nodes=nodes)

    @remote
    async def models(self, worker_ip: str | None, timeout_seconds: float) -> KeptModels:
        """Return what each host keeps that says so in time.

        Raises:
            InvalidRequest: no worker is there. InsufficientResources: none has joined.
            PeerUnreachable: the one that is named does not answer.
        """
        answers = await self._ask(
            self._at(worker_ip),
            "models",
            returns=list[CachedModel],
            timeout_seconds=min(timeout_seconds, CALL_TIMEOUT_SECONDS),
        )
        if worker_ip is not None and answers.unanswered:
            raise unreachable(answers.unanswered, "it did not say what it keeps")
        return KeptModels(models=answers.by_node, unanswered=answers.unanswered)

    @remote
    async def remove(self, model_version: str, worker_ip: str | None, is_forced: bool) -> Removed:
        """Remove a version from each host that keeps it and answers.

        Raises:
            ObjectNotFound: none keeps it. CacheInUse: nothing was removed.
            PeerUnreachable: it is not on those that answer, and others do not.
            InvalidRequest, InsufficientResources
        """
        kept = await self.models(worker_ip, CALL_TIMEOUT_SECONDS)
        keeping = {
            node: model
            for node, models in kept.models.items()
            for model in models
            if model.model_version == model_version
        }
        if not keeping and kept.unanswered:
            raise unreachable(kept.unanswered, "nobody else keeps it, and it does not answer")
        if not keeping:
            raise ObjectNotFound(kind="cached model", id=model_version)
        users = sorted({user for model in keeping.values() for user in model.used_by})
        if users and not is_forced:
            raise CacheInUse(model_version=model_version, users=users)
        answers = await self._ask(
            list(keeping),
            "remove",
            model_version,
            is_forced,
            returns=int,
            timeout_seconds=REMOVE_TIMEOUT_SECONDS,
        )
        return Removed(
            model_version=model_version,
            freed_bytes=sum(answers.by_node.values()),
            unanswered=(*kept.unanswered, *answers.unanswered),
        )

    @remote
    async def download(self, spec: LaunchSpec) -> str:
        """Begin to download what a launch would need, to where it may run; return its version.

        Raises:
            InvalidRequest: no worker is there, or nothing has to be downloaded.
            FamilyNotFound, UnsupportedVariant, DownloadUnavailable, DownloadFailed,
            PeerUnreachable
        """
        # Why trusted: to have files runs no code of theirs; a launch asks whether that may run.
        options = replace(spec.engine_options, trust_remote_code=True)
        resolved = await self._repositories.resolve(replace(spec, engine_options=options))
        source = resolved.source
        if source.download is None:
            raise InvalidRequest(
                field="model_name", problem=f"needs no download: its files are in {source.path}"
            )
        answers = await self._ask(self._at(spec.worker_ip), "download", source.download)
        if answers.unanswered:
            raise unreachable(answers.unanswered, "it was not told to download; the others were")
        return source.download.model_version

    @remote
    async def download_status(self, model_version: str) -> dict[NodeId, DownloadStatus]:
        """Return how far a download is on each host that was told of it and answers.

        Raises:
            PeerUnreachable: nobody knows of it who answers, and others do not.
        """
        answers = await self._ask(
            self._at(None), "download_status", model_version, returns=DownloadStatus
        )
        known: dict[NodeId, DownloadStatus] = {
            node: status
            for node, status in answers.by_node.items()
            if status.stage is not DownloadStage.PENDING
        }
        if not known and answers.unanswered:
            raise unreachable(answers.unanswered, "it did not say how far the download is")
        return known

    @remote
    async def cancel_download(self, model_version: str) -> None:
        """End a download wherever it runs. What has arrived is kept.

        Raises:
            ObjectNotFound: it runs nowhere. PeerUnreachable
        """
        answers = await self._ask(self._at(None), "cancel_download", model_version, returns=bool)
        if answers.unanswered:
            raise unreachable(answers.unanswered, "it was not told to end the download")
        if not any(answers.by_node.values()):
            raise ObjectNotFound(kind="running download", id=model_version)

    def _at(self, worker_ip: str | None) -> list[NodeId]:
        joined = self._nodes()
        if not joined:
            raise InsufficientResources(
                problem="No worker has joined this cluster: start xinference-worker."
            )
        return nodes_at(joined, worker_ip)

    async def _ask(
        self,
        nodes: list[NodeId],
        method: str,
        *arguments: object,
        returns: Any = None,
        timeout_seconds: float = CALL_TIMEOUT_SECONDS,
    ) -> Answers:
        return await ask_each(
            self._bus,
            nodes,
            CACHE,
            method,
            *arguments,
            returns=returns,
            timeout_seconds=timeout_seconds,
        )
