# SPDX-License-Identifier: Apache-2.0
"""How busy every node is, kept as it changes, so that a place is found without a look at each.

Nodes are kept in the order in which replicas go to them. What a replica asks beside that, room and
distance from its like, can only make a node worse, so the search ends at the first node that could
not be better than the best one found. `placement.place`, which looks at all, is what it must equal.
"""

import bisect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from xinference.cluster.placement import (
    Choice,
    LaunchStrategy,
    Need,
    NodeLoad,
    Place,
    Standing,
    choice,
    is_at,
    place,
    standing_of,
)
from xinference.identifiers import Address, InstanceId, NodeId
from xinference.protocol.deployment import ReplicaPlacement
from xinference.protocol.nodes import NodeResources


@dataclass(slots=True)
class _Hold:
    """A replica that is meant to run on a node."""

    gpu_idx: tuple[int, ...] | None
    promised_bytes: int


@dataclass(slots=True, eq=False)
class _Node:
    resources: NodeResources
    is_open: bool
    """It may get more."""
    load: NodeLoad
    gpus: list[Standing] = field(default_factory=list)
    """Of each GPU, the best first."""
    host: Standing | None = None


class Loads:
    """What is on the nodes and what is promised to what loads there. Pure."""

    def __init__(self, *, strategy: LaunchStrategy, shares_gpus: bool) -> None:
        self._strategy = strategy
        self._shares_gpus = shares_gpus
        self._nodes: dict[NodeId, _Node] = {}
        self._by_host: dict[str, dict[NodeId, None]] = {}
        self._held: dict[NodeId, dict[InstanceId, _Hold]] = {}
        # The open nodes, by their best GPU and by themselves.
        self._gpu_order: list[Standing] = []
        self._host_order: list[Standing] = []
        # Why: heartbeats come more often than launches; a node is ranked when it is next needed.
        self._stale: dict[NodeId, None] = {}
        self._hopeless: set[ReplicaPlacement] = set()

    @property
    def has_open_node(self) -> bool:
        """Whether any node may get more."""
        return any(node.is_open for node in self._nodes.values())

    def set_node(self, name: NodeId, resources: NodeResources, *, is_open: bool) -> bool:
        """Take in a reading of a node; return whether there may be places that there were not."""
        known = self._nodes.get(name)
        if known is None:
            known = _Node(resources, is_open, NodeLoad.of(name, resources))
            self._nodes[name] = known
            self._by_host.setdefault(Address.parse(name).host, {})[name] = None
            offers_more = is_open
        else:
            offers_more = is_open and (
                not known.is_open or _gpus_of(resources) != _gpus_of(known.resources)
            )
            known.resources, known.is_open = resources, is_open
        self._stale[name] = None
        if offers_more:
            self._hopeless.clear()
        return offers_more

    def remove_node(self, name: NodeId) -> None:
        """Forget a node; what is held on it is released by whoever held it."""
        node = self._nodes.pop(name)
        self._unrank(node)
        self._stale.pop(name, None)
        host = Address.parse(name).host
        del self._by_host[host][name]
        if not self._by_host[host]:
            del self._by_host[host]

    def hold(
        self,
        instance: InstanceId,
        node: NodeId,
        gpu_idx: tuple[int, ...] | None,
        promised_bytes: int,
    ) -> None:
        """Count a replica; what it is promised does not show in the readings of its node yet."""
        self._held.setdefault(node, {})[instance] = _Hold(gpu_idx, promised_bytes)
        self._touch(node)

    def set_promise(self, instance: InstanceId, node: NodeId, promised_bytes: int) -> None:
        """Change what a replica is promised: nothing once it shows in the readings."""
        hold = self._held[node][instance]
        if hold.promised_bytes != promised_bytes:
            hold.promised_bytes = promised_bytes
            self._touch(node)

    def release(self, instance: InstanceId, node: NodeId) -> None:
        """Count a replica no more."""
        held = self._held[node]
        del held[instance]
        if not held:
            del self._held[node]
        self._touch(node)
        self._hopeless.clear()

    @contextmanager
    def trial(self) -> Iterator[Callable[[Place, int], None]]:
        """Yield what holds places as if replicas were there, until the block ends."""
        held: list[tuple[InstanceId, NodeId]] = []

        def hold(chosen: Place, promised_bytes: int) -> None:
            instance = InstanceId(f"trial {len(held)}")
            self.hold(instance, chosen.node, chosen.gpu_idx, promised_bytes)
            held.append((instance, chosen.node))

        try:
            yield hold
        finally:
            for instance, node in held:
                self.release(instance, node)

    def place(self, need: Need) -> Place | None:
        """Return the best place for a replica; None if no open node is as it asks."""
        wish = need.placement
        if wish in self._hopeless and not need.has_all_gpus:
            return None
        self._rank_stale()
        if wish.worker_ip is not None:
            found = self._place_at(self._names_at(wish.worker_ip), need)
        elif wish.gpu_idx is not None:
            found = self._place_at(self._nodes, need)
        else:
            found = self._place_anywhere(need)
        # Why: no place is for want of GPUs, never of memory; what is held only adds to that.
        if found is None and not need.has_all_gpus:
            self._hopeless.add(wish)
        return found

    def _names_at(self, worker_ip: str) -> list[NodeId]:
        names = [*self._by_host.get(worker_ip, ()), NodeId(worker_ip)]
        return [name for name in names if name in self._nodes and is_at(name, worker_ip)]

    def _place_at(self, names: Iterable[NodeId], need: Need) -> Place | None:
        return place(
            (self._nodes[name].load for name in names if self._is_open(name)),
            need,
            strategy=self._strategy,
            shares_gpus=self._shares_gpus,
        )

    def _is_open(self, name: NodeId) -> bool:
        return name in self._nodes and self._nodes[name].is_open

    def _place_anywhere(self, need: Need) -> Place | None:
        best: Choice | None = None
        if need.placement.n_gpu != 0:
            best = self._first(self._gpus_for(need), self._gpu_choice, need)
        if need.placement.n_gpu != 1 and (best is None or best.is_cramped):
            host = self._first(self._host_order, self._host_choice, need)
            best = min((one for one in (best, host) if one is not None), default=None)
        return None if best is None else best.place

    def _first(
        self,
        order: list[Standing],
        choose: Callable[[_Node, Need], Choice | None],
        need: Need,
    ) -> Choice | None:
        """Return the best choice in an order of nodes."""
        best: Choice | None = None
        for standing in order:
            if best is not None and not best.is_cramped:
                if standing >= best.standing:
                    break
                if standing.for_need(need, self._strategy) >= best.standing:
                    continue
            found = choose(self._nodes[standing.node], need)
            if found is not None and (best is None or found < best):
                best = found
        return best

    def _gpus_for(self, need: Need) -> list[Standing]:
        """Return the nodes whose GPUs a replica may have, by the best of each."""
        if not need.has_all_gpus:
            return self._gpu_order
        owned = {name for name, _ in need.own_gpus if name in self._nodes}
        return sorted(self._nodes[name].gpus[0] for name in owned if self._nodes[name].gpus)

    def _gpu_choice(self, node: _Node, need: Need) -> Choice | None:
        cramped: Choice | None = None
        for standing in node.gpus:
            gpu = (standing.node, standing.gpu_idx[0])
            if need.has_all_gpus and gpu not in need.own_gpus:
                continue
            if not node.load.gpus[gpu[1]].is_open(shares_gpus=self._shares_gpus):
                continue
            found = choice(standing, standing.gpu_idx, need, self._strategy)
            if not found.is_cramped:
                return found
            cramped = cramped or found
        return cramped

    def _host_choice(self, node: _Node, need: Need) -> Choice | None:
        assert node.host is not None
        if need.placement.n_gpu == 0:
            return choice(node.host, (), need, self._strategy)
        return None if node.gpus else choice(node.host, None, need, self._strategy)

    def _touch(self, name: NodeId) -> None:
        if name in self._nodes:
            self._stale[name] = None

    def _rank_stale(self) -> None:
        for name in self._stale:
            node = self._nodes[name]
            self._unrank(node)
            node.load = NodeLoad.of(name, node.resources)
            for hold in self._held.get(name, {}).values():
                node.load.add(hold.gpu_idx, hold.promised_bytes)
            if node.is_open:
                self._rank(node)
        self._stale.clear()

    def _rank(self, node: _Node) -> None:
        node.host = standing_of(node.load, None, self._strategy)
        bisect.insort(self._host_order, node.host)
        node.gpus = sorted(
            standing_of(node.load, (index,), self._strategy) for index in node.load.gpus
        )
        if node.gpus:
            bisect.insort(self._gpu_order, node.gpus[0])

    def _unrank(self, node: _Node) -> None:
        if node.host is not None:
            del self._host_order[bisect.bisect_left(self._host_order, node.host)]
            node.host = None
        if node.gpus:
            del self._gpu_order[bisect.bisect_left(self._gpu_order, node.gpus[0])]
            node.gpus = []


def _gpus_of(resources: NodeResources) -> list[tuple[int, bool]]:
    return [(device.index, not device.quarantine) for device in resources.devices]
