# SPDX-License-Identifier: Apache-2.0
"""What a machine of the cluster has, and how busy it is."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum

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
    quarantine: str = ""
    """Why nothing may be placed on it: a replica that ended still holds it. Empty: it may."""


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
    engines: dict[str, str] = field(default_factory=dict)
    """What each engine that is a server lacks here, by its name; empty if nothing. An engine that
    is not there is not known of."""


class NodeState(StrEnum):
    """Of a worker, as the supervisor sees it."""

    READY = "ready"
    SUSPECT = "suspect"
    """It does not answer; its replicas keep their routes for a while."""
    LEAVING = "leaving"
    """It ends in order; its replicas are brought up elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeStatus:
    """A worker as the supervisor sees it."""

    node: NodeId
    resources: NodeResources
    seconds_since_report: float
    num_replicas: int
    state: NodeState = NodeState.READY


def largest_room_bytes(nodes: Iterable[NodeStatus]) -> int:
    """Return what is free on the roomiest GPU, or node without one; 0 where there is no node."""
    return max((_room(one.resources) for one in nodes if one.state is NodeState.READY), default=0)


def _room(node: NodeResources) -> int:
    if node.devices:
        return max(device.total_bytes - device.used_bytes for device in node.devices)
    return node.memory_available_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayRouting:
    """What one gateway has done to get requests to replicas."""

    num_ready_models: int
    """Models that it can send requests to now."""
    num_retried: int
    """Requests that it sent again, because a replica had failed them before it gave anything."""
    num_continued: int
    """Streams that went on at another replica."""
    num_ejected: int
    """Replicas that get no requests now, or one at a time."""
    num_ejections: int = 0
    """How often one was ejected."""
    routes_epoch: int = 0
    """Of the supervisor that the routing table is of."""
    routes_number: int = 0
    """Of the routing table, among those of its supervisor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterInfo:
    """The supervisor, and every worker it knows."""

    supervisor_address: str
    supervisor_resources: NodeResources
    uptime_seconds: int
    workers: tuple[NodeStatus, ...]
