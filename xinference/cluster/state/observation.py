# SPDX-License-Identifier: Apache-2.0
"""What the workers say: which nodes live, and which instances of which replica are on them.

In: reports, heartbeats and silence. Out: the replicas of which something has changed. An index by
replica answers what is seen of one without a look at every node.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from xinference.cluster.messages import (
    Heartbeat,
    InstanceReport,
    InstanceState,
    WorkerEpoch,
    WorkerReport,
)
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid
from xinference.protocol.nodes import NodeResources, NodeState

from .records import Moment

SUSPECT_SECONDS = 2.5
"""A worker that was silent for this long gets nothing new."""
LEASE_SECONDS = 10.0
"""One that was silent for this long is lost. Until then its replicas keep their routes: they serve
without it, and gateways notice for themselves if they do not."""


@dataclass(slots=True, eq=False)
class Node:
    """A living worker, as it was last heard of."""

    name: NodeId
    worker_epoch: WorkerEpoch
    sequence: int
    resources: NodeResources
    instances: dict[InstanceId, InstanceReport]
    seen_at: float
    is_leaving: bool = False
    is_suspect: bool = False
    """It does not answer; it may be restarting."""

    @property
    def state(self) -> NodeState:
        """How it is; only one that is ready gets anything new."""
        if self.is_suspect:
            return NodeState.SUSPECT
        return NodeState.LEAVING if self.is_leaving else NodeState.READY

    @property
    def num_living(self) -> int:
        """How many instances have a process."""
        return sum(one.state is not InstanceState.EXITED for one in self.instances.values())


class Observation:
    """Every living node and what is on it. Knows nothing of what is wanted."""

    def __init__(self) -> None:
        self.nodes: dict[NodeId, Node] = {}
        """Those that were silent the longest come first."""
        # Invariant: a worker's process that was replaced, or left, is gone; what it sent is void.
        self._ended: set[WorkerEpoch] = set()
        self._living: dict[ReplicaUid, dict[tuple[InstanceId, NodeId], None]] = {}
        self._num_living: Counter[ModelUid] = Counter()

    def is_void(self, report: WorkerReport) -> bool:
        """Return whether the process that said this has left, or another has taken its place."""
        return report.worker_epoch in self._ended

    def note_left(self, worker_epoch: WorkerEpoch) -> None:
        """Take nothing more from a worker; what it said before may arrive now."""
        self._ended.add(worker_epoch)

    def take(self, report: WorkerReport, *, now: Moment) -> set[ReplicaUid]:
        """Take in all that runs on a node; return the replicas of which anything changed."""
        old = self.nodes.get(report.node)
        is_successor = old is not None and old.worker_epoch != report.worker_epoch
        if is_successor:
            assert old is not None
            self._ended.add(old.worker_epoch)
        elif old is not None and report.sequence < old.sequence:
            return set()
        before = {} if old is None else old.instances
        node = Node(
            report.node,
            report.worker_epoch,
            report.sequence,
            report.resources,
            {instance.instance: instance for instance in report.instances},
            now.monotonic,
            is_leaving=report.is_leaving,
        )
        self._put_last(node)
        changed = self._index(node.name, before, node.instances)
        if is_successor or (old is not None and old.is_leaving != node.is_leaving):
            changed |= {one.replica for one in (*before.values(), *node.instances.values())}
        return changed

    def beat(self, beat: Heartbeat, *, now: Moment) -> bool:
        """Take in a sign of life; False if the last report of its worker is not the newest."""
        node = self.nodes.get(beat.node)
        if node is None or node.worker_epoch != beat.worker_epoch or node.sequence != beat.sequence:
            return False
        node.seen_at = now.monotonic
        node.resources = beat.resources
        node.is_suspect = False
        self._put_last(node)
        return True

    def drop(self, name: NodeId) -> set[ReplicaUid]:
        """Forget a node; return the replicas that were seen there."""
        node = self.nodes.pop(name)
        self._index(name, node.instances, {})
        return {report.replica for report in node.instances.values()}

    def silent_since(self, moment: float) -> Iterator[Node]:
        """Yield the nodes that said nothing after a monotonic time."""
        for node in self.nodes.values():
            if node.seen_at >= moment:
                return
            yield node

    def living_of(self, replica: ReplicaUid) -> list[tuple[Node, InstanceReport]]:
        """Return the instances of a replica that have a process, and where."""
        return [
            (self.nodes[name], self.nodes[name].instances[instance])
            for instance, name in self._living.get(replica, ())
        ]

    def is_seen(self, replica: ReplicaUid) -> bool:
        """Return whether any instance of a replica has a process."""
        return replica in self._living

    def is_model_seen(self, model: ModelUid) -> bool:
        """Return whether any instance of a model has a process."""
        return self._num_living[model] > 0

    def _put_last(self, node: Node) -> None:
        self.nodes.pop(node.name, None)
        self.nodes[node.name] = node

    def _index(
        self,
        name: NodeId,
        before: dict[InstanceId, InstanceReport],
        after: dict[InstanceId, InstanceReport],
    ) -> set[ReplicaUid]:
        changed = set()
        for instance, report in before.items():
            if after.get(instance) != report:
                changed.add(report.replica)
                self._forget(instance, name, report)
        for instance, report in after.items():
            if before.get(instance) != report:
                changed.add(report.replica)
                if report.state is not InstanceState.EXITED:
                    self._living.setdefault(report.replica, {})[instance, name] = None
                    self._num_living[report.replica.model] += 1
        return changed

    def _forget(self, instance: InstanceId, name: NodeId, report: InstanceReport) -> None:
        if report.state is InstanceState.EXITED:
            return
        living = self._living[report.replica]
        del living[instance, name]
        if not living:
            del self._living[report.replica]
        self._num_living[report.replica.model] -= 1
        if not self._num_living[report.replica.model]:
            del self._num_living[report.replica.model]
