# SPDX-License-Identifier: Apache-2.0
"""The values of the control plane: what workers report, what they are told, what gateways route by.

Every command names the epochs it was meant for, so that a late or replayed one changes nothing.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NewType

from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid
from xinference.protocol.deployment import (
    LaunchSpec,
    ModelDescription,
    ModelSource,
    ModelState,
    ReplicaPlacement,
    ReplicaSpec,
)
from xinference.protocol.downloads import DownloadProgress
from xinference.protocol.environments import EnvironmentSpec
from xinference.protocol.nodes import NodeResources

CONTROL_VERSION = 1
"""Of what supervisor, workers and gateways say to each other. Both ends must have the same."""

LaunchId = NewType("LaunchId", str)
"""One wish for a model. A relaunch under the same uid is another one, so that a replica of the
old cannot pass for one of the new."""

WorkerEpoch = NewType("WorkerEpoch", str)
"""One start of a worker's process; its replicas live no longer than it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredReplica:
    """A copy of a model that should run."""

    index: int
    placement: ReplicaPlacement = field(default_factory=ReplicaPlacement)
    has_been_ready: bool = False
    """One that never was ready is given up at its first failure; one that was is retried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DesiredModel:
    """A model that should run: what the store keeps, enough to start it without the catalogue."""

    model_uid: ModelUid
    launch_id: LaunchId
    spec: LaunchSpec
    description: ModelDescription
    source: ModelSource
    abilities: tuple[str, ...]
    created_ts: int
    """Unix seconds."""
    replicas: tuple[DesiredReplica, ...]
    has_been_ready: bool = False
    """All replicas of the launch were ready at once: it has succeeded. What fails before ends
    the launch, what fails later is one replica's affair."""
    virtual_env: EnvironmentSpec | None = None
    """What its replicas run in; None: the host's own."""
    is_asleep: bool = False
    """It was idle for its `idle_timeout`, or made room; the next request wakes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchTicket:
    """What a caller waits with for the end of a launch or of a terminate."""

    model_uid: ModelUid
    launch_id: LaunchId
    replicas: tuple[int, ...] = ()
    """Of a ticket for single replicas: their indices."""


class InstanceState(StrEnum):
    """Of one started process, as its worker sees it."""

    STARTING = "starting"
    DOWNLOADING = "downloading"
    """There is no process of it yet: its files come first."""
    LOADING = "loading"
    READY = "ready"
    STOPPING = "stopping"
    EXITED = "exited"
    """No process of it is left."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceReport:
    """One instance on a worker. EXITED ones are reported until the supervisor says `forget`."""

    replica: ReplicaUid
    instance: InstanceId
    launch_id: LaunchId
    state: InstanceState
    address: str | None = None
    """Of its data plane."""
    progress: float = 0.0
    """Of loading, from 0 to 1."""
    info: str = ""
    """What loading does now; of an EXITED one, what it has left behind."""
    context_length: int | None = None
    """What the loaded model can take, in tokens; None until it is READY."""
    max_num_seqs: int | None = None
    """How many answers, or texts of a model that embeds or reranks, it computes at once; None
    until it is READY."""
    error: dict[str, Any] | None = None
    """Wire form of why it EXITED; None if it was told to."""
    gpu_idx: tuple[int, ...] | None = None
    """As its `ReplicaSpec` says."""
    download: DownloadProgress | None = None
    """Of its files, until it is READY; None: they were here."""
    virtual_env_packages: dict[str, str] | None = None
    """As its `ReplicaReport` says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReport:
    """All that runs on a node."""

    node: NodeId
    worker_epoch: WorkerEpoch
    sequence: int
    """Grows with every change; a heartbeat carries it alone."""
    resources: NodeResources
    instances: tuple[InstanceReport, ...]
    is_leaving: bool = False
    """It takes nothing new, and ends what it has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InstanceLoad:
    """How much a ready instance has to do."""

    num_outstanding: int
    """Requests that run or wait there."""
    progress: float
    """Grows with each step, so whenever a request was there."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Heartbeat:
    """A worker lives; its report of this sequence number still holds."""

    node: NodeId
    worker_epoch: WorkerEpoch
    sequence: int
    resources: NodeResources
    loads: dict[InstanceId, InstanceLoad] = field(default_factory=dict)
    """Of the ready instances."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportAnswer:
    """What the supervisor says to a report or a heartbeat."""

    is_void: bool = False
    """Another process took this worker's place; it must end."""
    wants_report: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class StartInstance:
    """Start one replica's process."""

    spec: ReplicaSpec
    launch_id: LaunchId


@dataclass(frozen=True, slots=True, kw_only=True)
class StopInstance:
    """End one. A worker that never heard of it remembers not to start it."""

    replica: ReplicaUid
    instance: InstanceId
    launch_id: LaunchId


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """What a worker should do. Sent until its report shows it done, so all of it is idempotent."""

    supervisor_epoch: int
    worker_epoch: WorkerEpoch
    start: tuple[StartInstance, ...] = ()
    stop: tuple[StopInstance, ...] = ()
    forget: tuple[InstanceId, ...] = ()
    """EXITED instances whose end is written down."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Route:
    """A ready replica."""

    replica: ReplicaUid
    instance: InstanceId
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelRoutes:
    """Where requests of one model go; none while it is not READY."""

    state: ModelState
    retry_after_seconds: int
    problem: str = ""
    """Why an ERROR model does not run."""
    routes: tuple[Route, ...] = ()
    is_on_demand: bool = False
    """It sleeps when it is idle: a request wakes it, and waits while it loads."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class RoutesVersion:
    """Orders routing tables, over restarts of the supervisor too."""

    supervisor_epoch: int = 0
    number: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingTable:
    """Where requests of every model go. A gateway serves from its last one on its own."""

    version: RoutesVersion
    models: dict[ModelUid, ModelRoutes]


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutesUpdate:
    """What makes a gateway's routing table the current one."""

    version: RoutesVersion
    models: dict[ModelUid, ModelRoutes]
    """Those that are new or differ; of an update that is whole, all."""
    removed: tuple[ModelUid, ...] = ()
    is_whole: bool = False
    """It replaces the table: the supervisor no longer knows what has changed since."""
