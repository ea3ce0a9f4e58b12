# SPDX-License-Identifier: Apache-2.0
"""What a worker knows of its host and of its replicas at one moment, for those who watch it."""

from dataclasses import dataclass, field

from xinference.identifiers import NodeId, ReplicaUid

from .nodes import NodeResources


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReading:
    """A replica, as its worker sees it."""

    replica: ReplicaUid
    state: str
    model_name: str
    model_type: str
    model_engine: str
    model_format: str
    quantization: str
    gpu_idx: tuple[int, ...] = ()
    request_limits: int | None = None
    load_seconds: float | None = None
    """What its last load took; None before, and of one that an earlier worker has started."""
    counters: dict[str, float] = field(default_factory=dict)
    """At most some seconds old; empty until it is ready."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerReading:
    """A worker and its host."""

    node: NodeId
    has_joined: bool
    """Whether a supervisor knows of it now."""
    resources: NodeResources
    replicas: tuple[ReplicaReading, ...]
