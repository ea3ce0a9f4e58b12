# SPDX-License-Identifier: Apache-2.0
"""What is wanted and what is seen, side by side, with the indexes over both.

Only this changes where a replica is assigned, so that the loads, the owners of instances and the
counts of a model always agree. What changes is marked: reconciling looks at what is marked alone.
"""

from collections import Counter
from collections.abc import Iterable
from typing import TypeVar

from xinference.cluster.messages import Heartbeat, WorkerEpoch, WorkerReport
from xinference.cluster.placement import LaunchStrategy, Need
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid
from xinference.protocol.deployment import ReplicaPlacement, ReplicaState
from xinference.protocol.nodes import NodeState

from .loads import Loads
from .observation import LEASE_SECONDS, SUSPECT_SECONDS, Node, Observation
from .records import Assignment, Model, Moment, Outgoing, Replica, Wish

KeyT = TypeVar("KeyT")


class World:
    """Models, nodes, and who runs where. Pure; not shared."""

    def __init__(self, *, strategy: LaunchStrategy, shares_gpus: bool) -> None:
        self.models: dict[ModelUid, Model] = {}
        self.observed = Observation()
        self.loads = Loads(strategy=strategy, shares_gpus=shares_gpus)
        self._owners: dict[NodeId, dict[InstanceId, Replica]] = {}
        self._marked_replicas: dict[ReplicaUid, None] = {}
        self._marked_models: dict[ModelUid, None] = {}
        self._marked_nodes: dict[NodeId, None] = {}
        self._waiting: dict[ReplicaUid, None] = {}
        """Those for which there was no place."""

    # What is wanted.

    def add_model(self, model: Model) -> None:
        """Want a model, in place of one of its uid that was given up."""
        known = self.models.get(model.uid)
        for replica in [] if known is None else known.replicas.values():
            self.unassign(replica)
            self.set_outgoing(replica, None)
        self.models[model.uid] = model
        self.mark_model(model)

    def remove_model(self, model: Model) -> None:
        """Forget a model of which nothing is left."""
        del self.models[model.uid]

    def replica(self, uid: ReplicaUid) -> Replica | None:
        """Return a replica of a known model."""
        model = self.models.get(uid.model)
        return None if model is None else model.replicas.get(uid.index)

    # Where it runs.

    def assign(self, replica: Replica, assigned: Assignment, *, promised_bytes: int) -> None:
        """Mean a replica to run somewhere; it is assigned nowhere now."""
        assert replica.assigned is None
        replica.assigned = assigned
        self._own(replica, assigned)
        self.loads.hold(assigned.instance, assigned.node, assigned.gpu_idx, promised_bytes)
        replica.model.own_nodes[assigned.node] += 1
        replica.model.own_gpus.update(assigned.gpus)

    def unassign(self, replica: Replica) -> None:
        """Let a replica be pending, with no instance, if it has one."""
        assigned = replica.assigned
        replica.state, replica.report = ReplicaState.PENDING, None
        if assigned is None:
            return
        replica.assigned = replica.load = None
        if replica.outgoing is None or replica.outgoing.assigned.instance != assigned.instance:
            self._disown(assigned)
        self.loads.release(assigned.instance, assigned.node)
        _take_one(replica.model.own_nodes, [assigned.node])
        _take_one(replica.model.own_gpus, assigned.gpus)
        self.wake_waiting()

    def set_outgoing(self, replica: Replica, outgoing: Outgoing | None) -> None:
        """Let what a replica was serve on, or no more."""
        if replica.outgoing is not None:
            self._disown(replica.outgoing.assigned)
        replica.outgoing = outgoing
        if outgoing is not None:
            self._own(replica, outgoing.assigned)

    def owners(self, node: NodeId) -> dict[InstanceId, Replica]:
        """Return the replicas that are assigned to a node, or serve there until they moved."""
        return self._owners.get(node, {})

    def is_being_freed(self, node: NodeId) -> bool:
        """Return whether replicas of a model that goes to sleep are still on a node."""
        return any(one.model.wish is Wish.SLEEP for one in self.owners(node).values())

    def credit(self, model: Model, num_bytes: int) -> None:
        """Count so much of what the readings show of each replica of a model as free."""
        for replica in model.replicas.values():
            if replica.assigned is not None:
                at = replica.assigned
                self.loads.set_promise(at.instance, at.node, -num_bytes)

    def need(self, model: Model, placement: ReplicaPlacement) -> Need:
        """Return what one more replica of a model asks of a place."""
        return Need(
            placement=placement,
            memory_bytes=model.memory_bytes,
            own_nodes=model.own_nodes,
            own_gpus=model.own_gpus,
            max_gpus=model.desired.spec.n_gpu,
        )

    def wait_for_place(self, replica: Replica) -> None:
        """Look at a replica again when there may be a place for it."""
        self._waiting[replica.uid] = None

    # What is seen.

    def take_report(self, report: WorkerReport, *, now: Moment) -> bool:
        """Take in all that runs on a node; False if the report is void."""
        if self.observed.is_void(report):
            return False
        before = self.observed.nodes.get(report.node)
        for uid in self.observed.take(report, now=now):
            self.mark(uid)
        node = self.observed.nodes[report.node]
        if before is None or before.worker_epoch != node.worker_epoch:
            self._mark_owners(node.name)
        if node is not before:
            self._marked_nodes[node.name] = None
            self._note_node(node)
        return True

    def take_beat(self, beat: Heartbeat, *, now: Moment) -> bool:
        """Take in a sign of life; False asks for the full report."""
        if not self.observed.beat(beat, now=now):
            return False
        owners = self.owners(beat.node)
        for instance, load in beat.loads.items():
            replica = owners.get(instance)
            if replica is not None:
                replica.note_load(load, now)
        self._note_node(self.observed.nodes[beat.node])
        return True

    def suspect_node(self, name: NodeId, worker_epoch: WorkerEpoch) -> None:
        """Give a node nothing new until it is heard of."""
        node = self.observed.nodes.get(name)
        if node is not None and node.worker_epoch == worker_epoch and not node.is_suspect:
            node.is_suspect = True
            self._note_node(node)

    def drop_node(self, name: NodeId, worker_epoch: WorkerEpoch) -> None:
        """Forget a node, and that anything runs there."""
        node = self.observed.nodes.get(name)
        if node is None or node.worker_epoch != worker_epoch:
            return
        for uid in self.observed.drop(name):
            self.mark(uid)
        self._mark_owners(name)
        self._marked_nodes[name] = None
        self.loads.remove_node(name)

    def expire_leases(self, now: Moment) -> None:
        """Suspect the nodes that are silent, and drop those that are for too long."""
        for node in list(self.observed.silent_since(now.monotonic - SUSPECT_SECONDS)):
            self.suspect_node(node.name, node.worker_epoch)
            if now.monotonic - node.seen_at > LEASE_SECONDS:
                self.drop_node(node.name, node.worker_epoch)

    # What to look at.

    def mark(self, uid: ReplicaUid) -> None:
        """Look at a replica, its model and the nodes it is on when reconciling."""
        self._marked_replicas[uid] = None
        self._marked_models[uid.model] = None
        replica = self.replica(uid)
        if replica is not None and replica.assigned is not None:
            self._marked_nodes[replica.assigned.node] = None
        if replica is not None and replica.outgoing is not None:
            self._marked_nodes[replica.outgoing.assigned.node] = None

    def mark_model(self, model: Model) -> None:
        """Look at every replica of a model."""
        self._marked_models[model.uid] = None
        for replica in model.replicas.values():
            self.mark(replica.uid)

    def mark_everything(self) -> None:
        """Look at everything."""
        for model in self.models.values():
            self.mark_model(model)
        self._marked_nodes.update(dict.fromkeys(self.observed.nodes))

    def wake_waiting(self) -> None:
        """Look at those for which there was no place."""
        for uid in self._waiting:
            self.mark(uid)
        self._waiting.clear()

    def take_marked(self) -> tuple[list[Replica], dict[ModelUid, None]]:
        """Return what is marked, and mark it no more."""
        found = [one for uid in self._marked_replicas if (one := self.replica(uid)) is not None]
        models, self._marked_models = self._marked_models, {}
        self._marked_replicas = {}
        return found, models

    def take_marked_nodes(self) -> dict[NodeId, None]:
        """Return the nodes for which there may be something else to do now."""
        nodes, self._marked_nodes = self._marked_nodes, {}
        return nodes

    def _own(self, replica: Replica, assigned: Assignment) -> None:
        self._owners.setdefault(assigned.node, {})[assigned.instance] = replica
        self._marked_nodes[assigned.node] = None

    def _disown(self, assigned: Assignment) -> None:
        owners = self._owners[assigned.node]
        del owners[assigned.instance]
        if not owners:
            del self._owners[assigned.node]
        self._marked_nodes[assigned.node] = None

    def _mark_owners(self, name: NodeId) -> None:
        for replica in self.owners(name).values():
            self.mark(replica.uid)

    def _note_node(self, node: Node) -> None:
        is_open = node.state is NodeState.READY
        if self.loads.set_node(node.name, node.resources, is_open=is_open):
            self.wake_waiting()


def _take_one(counter: "Counter[KeyT]", keys: Iterable[KeyT]) -> None:
    """Count each key once less, and not at all when it was the last."""
    for key in keys:
        counter[key] -= 1
        if not counter[key]:
            del counter[key]
