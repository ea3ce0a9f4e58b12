# SPDX-License-Identifier: Apache-2.0
"""How much memory the best place of a cluster has. Pure."""

from collections.abc import Iterable

from xinference.protocol.nodes import NodeResources, NodeState, NodeStatus


def largest_room_bytes(nodes: Iterable[NodeStatus]) -> int:
    """Return what is free on the roomiest GPU, or node without one; 0 where there is no node."""
    return max((_room(one.resources) for one in nodes if one.state is NodeState.READY), default=0)


def _room(node: NodeResources) -> int:
    if node.devices:
        return max(device.total_bytes - device.used_bytes for device in node.devices)
    return node.memory_available_bytes
