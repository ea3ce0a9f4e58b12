# SPDX-License-Identifier: Apache-2.0
"""What a machine of the cluster has, and how busy it is."""

from dataclasses import dataclass

from xinference.identifiers import NodeId


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One accelerator."""

    index: int
    name: str
    total_bytes: int
    used_bytes: int
    utilization: float
    """From 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeResources:
    """A reading of one machine."""

    cpu_count: int
    cpu_utilization: float
    """From 0 to 1, of all cores."""
    memory_total_bytes: int
    memory_used_bytes: int
    memory_available_bytes: int
    devices: tuple[Device, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A worker as the supervisor sees it."""

    node: NodeId
    resources: NodeResources
    seconds_since_report: float
    num_replicas: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterInfo:
    """The supervisor, and every worker it knows."""

    supervisor_address: str
    supervisor_resources: NodeResources
    uptime_seconds: int
    workers: tuple[NodeStatus, ...]
