# SPDX-License-Identifier: Apache-2.0
"""The order in which nodes are kept: it finds what a look at every node would have found."""

import random
from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.simulation import GIB, gpu, resources
from xinference.cluster.placement import LaunchStrategy, Need, NodeLoad, Place, place
from xinference.cluster.state.loads import Loads
from xinference.identifiers import InstanceId, NodeId
from xinference.protocol.deployment import ReplicaPlacement

WISHES = [
    ReplicaPlacement(),
    ReplicaPlacement(n_gpu=0),
    ReplicaPlacement(n_gpu=1),
    ReplicaPlacement(gpu_idx=(1,)),
    ReplicaPlacement(worker_ip="10.0.0.2"),
    ReplicaPlacement(worker_ip="10.0.0.2:1", gpu_idx=(0,)),
    ReplicaPlacement(worker_ip="10.9.9.9"),
]


class Both:
    """`Loads`, and beside it plain lists of which every entry is looked at."""

    def __init__(self, seed: int, **behaviour: Any) -> None:
        self.random = random.Random(seed)
        self.behaviour = behaviour
        self.loads = Loads(**behaviour)
        self.nodes: dict[NodeId, tuple[Any, bool]] = {}
        self.held: dict[InstanceId, tuple[NodeId, Any, int]] = {}

    def expected(self, need: Need) -> Place | None:
        loads = {
            name: NodeLoad.of(name, given)
            for name, (given, is_open) in self.nodes.items()
            if is_open
        }
        for node, gpu_idx, promised_bytes in self.held.values():
            if node in loads:
                loads[node].add(gpu_idx, promised_bytes)
        return place(loads.values(), need, **self.behaviour)

    def step(self, number: int) -> None:
        """Let one thing happen."""
        draw = self.random
        node = NodeId(f"10.0.0.{draw.randrange(5)}:1")
        match draw.randrange(10):
            case 0 | 1:
                gpus = tuple(
                    replace(
                        gpu(index, draw.randrange(80)), quarantine=draw.choice(["", "", "held"])
                    )
                    for index in range(draw.randrange(4))
                )
                given = resources(draw.randrange(1, 16) * GIB, gpus)
                self.nodes[node] = given, draw.random() < 0.8
                self.loads.set_node(node, given, is_open=self.nodes[node][1])
            case 2 if node in self.nodes:
                del self.nodes[node]
                self.loads.remove_node(node)
            case 3 if self.held:
                instance = draw.choice(list(self.held))
                self.loads.release(instance, self.held.pop(instance)[0])
            case 4 if self.held:
                instance = draw.choice(list(self.held))
                where, gpu_idx, _ = self.held[instance]
                self.held[instance] = where, gpu_idx, 0
                self.loads.set_promise(instance, where, 0)
            case _:
                self.launch(number)

    def launch(self, number: int) -> None:
        draw = self.random
        own = [one for one in self.held.values() if draw.random() < 0.3]
        need = Need(
            placement=draw.choice(WISHES),
            memory_bytes=draw.choice([0, 0, 3, 30]) * GIB,
            own_nodes=Counter(node for node, *_ in own),
            own_gpus=Counter((node, index) for node, gpu_idx, _ in own for index in gpu_idx or ()),
            max_gpus=draw.choice([None, None, 2]),
        )
        expected = self.expected(need)
        assert self.loads.place(need) == expected
        if expected is not None:
            instance = InstanceId(str(number))
            self.held[instance] = expected.node, expected.gpu_idx, need.memory_bytes
            self.loads.hold(instance, *self.held[instance])


@pytest.mark.parametrize("shares_gpus", [True, False])
@pytest.mark.parametrize("strategy", LaunchStrategy)
def test_the_order_finds_what_a_look_at_every_node_finds(
    strategy: LaunchStrategy, shares_gpus: bool
) -> None:
    for seed in range(40):
        both = Both(seed, strategy=strategy, shares_gpus=shares_gpus)
        for number in range(80):
            both.step(number)


def test_a_trial_leaves_nothing_behind() -> None:
    loads = Loads(strategy=LaunchStrategy.IDLE_FIRST, shares_gpus=False)
    loads.set_node(NodeId("h:1"), resources(devices=(gpu(0),)), is_open=True)
    need = Need(placement=ReplicaPlacement(n_gpu=1))

    with loads.trial() as hold:
        chosen = loads.place(need)
        assert chosen is not None
        hold(chosen, 0)
        assert loads.place(need) is None

    assert loads.place(need) == chosen
