# SPDX-License-Identifier: Apache-2.0
"""`Cluster`: all that the HTTP layer may ask of a cluster.

The gateway holds a `RemoteCluster` (`remote.py`), which asks the supervisor over the control
plane and streams from replicas over the data plane; tests of the HTTP layer hold a fake. Both
pass one contract suite. Every method raises errors of `xinference.errors` only, and every wait
inside has a deadline.
"""

from collections.abc import AsyncIterator, Sequence
from typing import Any, Protocol

from xinference.identifiers import ModelUid, NodeId, ReplicaUid, RequestId
from xinference.protocol.autostart import AutostartEntry, AutostartStatus
from xinference.protocol.deployment import (
    AbortOutcome,
    LaunchProgress,
    LaunchSpec,
    ModelEvent,
    ModelStatus,
    ReplicaPlacement,
    ReplicaStatus,
)
from xinference.protocol.downloads import DownloadStatus, KeptModels, Removed
from xinference.protocol.environments import VirtualEnvironment
from xinference.protocol.generation import Accepted, Delta, Finished, GenerationRequest
from xinference.protocol.logs import LogBatch, LogQuery
from xinference.protocol.nodes import ClusterInfo, GatewayRouting
from xinference.protocol.vectors import VectorPiece, VectorRequest


class GenerationStream(Protocol):
    """An accepted request: zero or more deltas, then one `Finished`, or it raises.

    It belongs to one task. Whoever got it must iterate it to its end or call `aclose`.
    """

    @property
    def accepted(self) -> Accepted:
        """What the replica said when it took the request."""
        ...

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        """Iterate once.

        Raises:
            ReplicaLost: the connection ended before the stream did.
            XinferenceError: the engine failed this request.
        """
        ...

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Returns at once; may be called again."""
        ...


class VectorStream(Protocol):
    """An accepted request for vectors or scores: its pieces, then one `Finished`, or it raises.

    It belongs to one task. Whoever got it must iterate it to its end or call `aclose`.
    """

    @property
    def accepted(self) -> Accepted:
        """What the replica said when it took the request."""
        ...

    def __aiter__(self) -> AsyncIterator[VectorPiece | Finished]:
        """Iterate once.

        Raises:
            ReplicaLost: the connection ended before the stream did.
            XinferenceError: the model failed this request.
        """
        ...

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Returns at once; may be called again."""
        ...


class Cluster(Protocol):
    """A cluster as the gateway sees it."""

    async def launch(self, spec: LaunchSpec, *, wait_ready: bool) -> ModelUid:
        """Write the wish down and start it; with `wait_ready`, return when it is READY.

        If the caller is cancelled while waiting, the launch goes on.

        Raises:
            InvalidRequest, FamilyNotFound, UnsupportedVariant, ModelAlreadyExists,
            DownloadUnavailable, InsufficientResources: nothing was started.
            LoadFailed, LaunchCancelled: (only with `wait_ready`) nothing of it is left running.
        """
        ...

    async def terminate(self, model: ModelUid) -> None:
        """Stop the model and forget it; return when no process of it is left.

        Raises:
            ModelNotFound
        """
        ...

    async def cancel_launch(self, model: ModelUid) -> None:
        """End a launch that is under way; return when nothing of it is left.

        Raises:
            ModelNotFound: there is no such model.
            InvalidRequest: it is ready already; terminate it instead.
        """
        ...

    async def models(self) -> list[ModelStatus]:
        """Return every model that is wanted or failed, sorted by uid."""
        ...

    async def model(self, model: ModelUid) -> ModelStatus:
        """Return one model.

        Raises:
            ModelNotFound
        """
        ...

    async def launch_progress(self, model: ModelUid) -> LaunchProgress:
        """Return how far a launch is; an unknown model is at 0, "pending"."""
        ...

    async def events(self, model: ModelUid) -> list[ModelEvent]:
        """Return the last events of a model, oldest first; at most 100.

        Raises:
            ModelNotFound
        """
        ...

    async def add_replicas(
        self, model: ModelUid, placements: Sequence[ReplicaPlacement]
    ) -> list[ReplicaStatus]:
        """Add a replica for each placement; return them when they are READY.

        The others serve meanwhile. If the caller is cancelled while waiting, they still come.

        Raises:
            ModelNotFound, ModelNotReady, InvalidRequest, InsufficientResources: nothing was
            started.
            LoadFailed, LaunchCancelled: one did not come up, and is wanted no longer.
        """
        ...

    async def terminate_replica(self, model: ModelUid, index: int) -> int:
        """Remove one replica; return how many remain. At 0 the model is gone.

        Raises:
            ModelNotFound, InvalidRequest
        """
        ...

    async def generate(self, model: ModelUid, request: GenerationRequest) -> GenerationStream:
        """Send the request to a replica; return when the replica has accepted it.

        If the caller is cancelled while waiting, the request is aborted.

        Raises:
            ModelNotFound, ModelNotReady, ModelOverloaded, InvalidRequest,
            ContextLengthExceeded, DuplicateRequest, AbilityMissing: nothing was started.
            LoadFailed: the model was given up; asking again changes nothing.
            InsufficientResources: it sleeps, and there is no room to wake it.
            ReplicaLost: the replica died before it answered.
        """
        ...

    async def compute(self, model: ModelUid, request: VectorRequest) -> VectorStream:
        """Send a request for vectors or scores to a replica; return when it has accepted it.

        If the caller is cancelled while waiting, the request is aborted.

        Raises:
            As `generate`.
        """
        ...

    async def abort_request(
        self, model: ModelUid, request_id: RequestId, *, block_seconds: float
    ) -> AbortOutcome:
        """Abort a request on every replica; for `block_seconds` the id is refused afterwards.

        Raises:
            ModelNotFound
        """
        ...

    async def engine_stats(self) -> dict[ReplicaUid, dict[str, float]]:
        """Return the latest engine counters of each ready replica, for `/metrics`."""
        ...

    def routing(self) -> GatewayRouting:
        """Return how this gateway routes. Asks nobody."""
        ...

    async def autostart(self) -> list[AutostartStatus]:
        """Return the models that are launched whenever they do not run, in their order."""
        ...

    async def set_autostart(self, entry: AutostartEntry) -> None:
        """Add an entry to that list, or replace the one of its model uid.

        Raises:
            StateUnwritable
        """
        ...

    async def remove_autostart(self, model: ModelUid) -> None:
        """Remove an entry of that list; its model stays as it is.

        Raises:
            ObjectNotFound: it is not in the list.
        """
        ...

    async def info(self) -> ClusterInfo:
        """Return the supervisor and the workers."""
        ...

    async def cached_models(
        self, worker_ip: str | None, *, timeout_seconds: float = 10.0
    ) -> KeptModels:
        """Return what each worker, or the one that is named, keeps of models, by version.

        Args:
            timeout_seconds: How long any of them is waited for; at most ten are.

        Raises:
            InvalidRequest: no worker is there. InsufficientResources: none has joined.
            PeerUnreachable: the one that is named does not answer.
        """
        ...

    async def remove_cached(
        self, model_version: str, worker_ip: str | None, *, is_forced: bool
    ) -> Removed:
        """Remove what one version of a model alone needs, wherever a worker answers.

        Raises:
            ObjectNotFound: no worker that answers keeps it.
            CacheInUse: models run from it and this is not forced, or it is being downloaded.
            InvalidRequest: no worker is there, or it lies outside what may be removed.
            InsufficientResources: a file cannot be removed.
        """
        ...

    async def download(self, spec: LaunchSpec) -> str:
        """Begin to download what a launch would need; return the version, to ask about it.

        Every worker does, or the one that is named. It does not go on by itself where a worker
        is started again.

        Raises:
            InvalidRequest: no worker is there, or nothing has to be downloaded.
            FamilyNotFound, UnsupportedVariant, DownloadUnavailable
        """
        ...

    async def download_status(self, model_version: str) -> dict[NodeId, DownloadStatus]:
        """Return how far such a download is, on each worker that was told of it."""
        ...

    async def cancel_download(self, model_version: str) -> None:
        """End such a download; what has arrived is kept.

        Raises:
            ObjectNotFound: it runs nowhere.
        """
        ...

    async def logs(self, query: LogQuery) -> LogBatch:
        """Return lines of the log of a model or of a host, and which hosts did not answer.

        Raises:
            ModelNotFound: there is neither such a model nor a log of one.
            InvalidRequest: no such worker has joined.
        """
        ...

    async def stop(self) -> None:
        """Shut the whole cluster down, models first.

        They stay wanted: the next start brings them back.
        """
        ...

    async def registrations(self, model_type: str) -> list[dict[str, Any]]:
        """Return every family of a type as its full JSON, with "is_builtin", sorted by name.

        Raises:
            InvalidRequest: the type is unknown.
        """
        ...

    async def registration(self, model_type: str, model_name: str) -> dict[str, Any]:
        """Return one family as its full JSON.

        Raises:
            InvalidRequest, FamilyNotFound
        """
        ...

    async def register(self, model_type: str, family: str, *, persist: bool) -> None:
        """Add a family given as JSON text.

        Raises:
            InvalidRequest: the JSON is not a family of this type.
            ModelAlreadyExists: the name is taken.
        """
        ...

    async def unregister(self, model_type: str, model_name: str) -> None:
        """Remove a registered family; models that run of it go on.

        Raises:
            InvalidRequest: it is built in. FamilyNotFound: there is none.
        """
        ...

    async def engines(self, model_type: str, model_name: str) -> dict[str, Any]:
        """Return, per engine name, a list of parameter objects, or why it cannot be used.

        Raises:
            InvalidRequest, FamilyNotFound
        """
        ...

    async def virtual_envs(self, worker_ip: str | None) -> list[VirtualEnvironment]:
        """Return the virtual environments of models on every host that answers, or on one.

        Raises:
            InvalidRequest: there is no such worker.
        """
        ...

    async def remove_virtual_envs(
        self,
        model_name: str,
        *,
        model_engine: str | None,
        python_version: str | None,
        worker_ip: str | None,
    ) -> int:
        """Remove a model's virtual environments, of all engines, versions and hosts or of one.

        Returns how many there were.

        Raises:
            InvalidRequest: there is no such worker.
            EnvironmentInUse: a replica runs in one of them.
        """
        ...
