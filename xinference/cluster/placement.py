# SPDX-License-Identifier: Apache-2.0
"""Which node a replica goes to. Pure: nodes in, a node or None out."""

from collections.abc import Iterable
from dataclasses import dataclass

from xinference.identifiers import Address, NodeId
from xinference.protocol.nodes import NodeResources


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A living node, with what is already meant to run on it."""

    node: NodeId
    resources: NodeResources
    num_replicas: int


def place(candidates: Iterable[Candidate], *, worker_ip: str | None) -> NodeId | None:
    """Return the node with the fewest replicas; of those, the one with the most free memory.

    Args:
        worker_ip: if given, only nodes on this host.

    Returns:
        None if there is no such node.
    """
    allowed = [
        candidate
        for candidate in candidates
        if worker_ip is None or Address.parse(candidate.node).host == worker_ip
    ]
    if not allowed:
        return None
    best = min(
        allowed,
        key=lambda candidate: (
            candidate.num_replicas,
            -candidate.resources.memory_available_bytes,
            candidate.node,
        ),
    )
    return best.node
