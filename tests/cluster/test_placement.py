# SPDX-License-Identifier: Apache-2.0
"""Where replicas go: nodes, their GPUs, and what is taken of both."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from tests.cluster.simulation import GIB, description, gpu, resources
from xinference.cluster.placement import (
    LaunchStrategy,
    Need,
    NodeLoad,
    Place,
    is_at,
    memory_of,
    place,
    wishes_of,
)
from xinference.errors import InvalidRequest
from xinference.identifiers import NodeId
from xinference.protocol.deployment import EngineOptions, LaunchSpec, ReplicaPlacement
from xinference.protocol.nodes import Device

HOST = NodeId("10.0.0.1:1")
OTHER = NodeId("10.0.0.2:1")
ON_CPU, ON_SECOND = EngineOptions(device="cpu"), EngineOptions(device="cuda:1")


def node(
    name: str = HOST, *gpus: Device, num_replicas: int = 0, available_gib: int = 8
) -> NodeLoad:
    load = NodeLoad.of(NodeId(name), resources(available_gib * GIB, gpus))
    for _ in range(num_replicas):
        load.add(None, 0)
    return load


def at(*loads: NodeLoad, **options: Any) -> Place | None:
    wishes = {
        name: options.pop(name) for name in ("worker_ip", "n_gpu", "gpu_idx") if name in options
    }
    behaviour = {name: options.pop(name) for name in ("strategy", "shares_gpus") if name in options}
    need = Need(placement=ReplicaPlacement(**wishes), **options)
    return place(loads, need, **behaviour)


def spread(*loads: NodeLoad, replicas: int, **options: Any) -> list[tuple[str, Any]]:
    """Place one replica after the other; return where each went."""
    nodes = {load.node: load for load in loads}
    places: list[Place] = []
    for _ in range(replicas):
        chosen = at(
            *loads,
            own_nodes=Counter(one.node for one in places),
            own_gpus=Counter((one.node, index) for one in places for index in one.gpu_idx or ()),
            **options,
        )
        assert chosen is not None
        places.append(chosen)
        nodes[chosen.node].add(chosen.gpu_idx, options.get("memory_bytes", 0))
    return [(one.node, one.gpu_idx) for one in places]


def test_idle_nodes_come_first_then_those_with_memory() -> None:
    busy = node("10.0.0.1:1", num_replicas=1, available_gib=16)
    small = node("10.0.0.2:1", available_gib=4)
    large = node("10.0.0.3:1", available_gib=8)

    assert at(busy, small, large) == Place(node=large.node, gpu_idx=None, has_room=True)
    assert at(busy, small) == Place(node=small.node, gpu_idx=None, has_room=True)


def test_nothing_goes_to_a_gpu_in_quarantine() -> None:
    held = replace(gpu(0), quarantine="GPU 0 is held")
    host = node(HOST, held, gpu(1, used_gib=70))

    assert at(host) == Place(node=HOST, gpu_idx=(1,), has_room=True)
    assert at(host, gpu_idx=(0,)) is None
    assert at(node(HOST, held)) is None


def test_a_choice_of_host_is_kept_or_refused() -> None:
    nodes = [node("10.0.0.1:1"), node("[fd00::1]:1", num_replicas=3)]

    chosen = at(*nodes, worker_ip="fd00::1")
    assert chosen is not None
    assert chosen.node == "[fd00::1]:1"
    assert at(*nodes, worker_ip="10.0.0.9") is None
    assert at() is None
    assert is_at(HOST, "10.0.0.1:1")
    assert not is_at(HOST, "10.0.0.1:2")


# The examples of the launch document.


def test_three_replicas_share_the_only_gpu() -> None:
    assert spread(node(HOST, gpu(0)), replicas=3) == [(HOST, (0,))] * 3


def test_three_replicas_on_two_gpus_are_two_and_one() -> None:
    placed = spread(node(HOST, gpu(0), gpu(1)), replicas=3)

    assert placed == [(HOST, (0,)), (HOST, (1,)), (HOST, (0,))]


@pytest.mark.parametrize("count", [2, 4])
def test_as_many_replicas_as_gpus_have_one_each(count: int) -> None:
    placed = spread(node(HOST, *map(gpu, range(count))), replicas=count, max_gpus=count)

    assert placed == [(HOST, (index,)) for index in range(count)]


def test_n_gpu_bounds_how_many_gpus_a_model_is_spread_over() -> None:
    loads = [node(HOST, gpu(0), gpu(1)), node(OTHER, gpu(0))]

    placed = spread(*loads, replicas=3, max_gpus=2)

    assert len(set(placed)) == 2
    assert sorted(placed.count(one) for one in set(placed)) == [1, 2]


def test_a_gpu_full_of_a_stranger_is_not_idle() -> None:
    full_but_unused = gpu(0, used_gib=76)
    load = node(HOST, full_but_unused, gpu(1))
    load.add((1,), 0)

    chosen = at(load, memory_bytes=10 * GIB)

    assert chosen == Place(node=HOST, gpu_idx=(1,), has_room=True)


def test_what_is_promised_to_a_model_that_loads_counts_as_taken() -> None:
    load = node(HOST, gpu(0), gpu(1))
    load.add((0,), 70 * GIB)
    load.add((1,), 5 * GIB)

    assert at(load, memory_bytes=20 * GIB) == Place(node=HOST, gpu_idx=(1,), has_room=True)
    too_large = at(load, memory_bytes=78 * GIB)
    assert too_large is not None
    assert not too_large.has_room


def test_the_other_strategy_counts_replicas_alone() -> None:
    load = node(HOST, gpu(0, used_gib=79), gpu(1))
    load.add((1,), 0)

    chosen = at(load, memory_bytes=10 * GIB, strategy=LaunchStrategy.LEAST_MODELS)

    assert chosen == Place(node=HOST, gpu_idx=(0,), has_room=False)


def test_replicas_of_one_model_go_to_different_nodes() -> None:
    roomy, small = node(HOST, available_gib=16), node(OTHER, num_replicas=1, available_gib=9)

    placed = spread(roomy, small, replicas=2)

    assert {name for name, _ in placed} == {HOST, OTHER}


def test_a_gpu_holds_one_replica_where_sharing_is_off() -> None:
    load = node(HOST, gpu(0), gpu(1))

    placed = spread(load, replicas=2, shares_gpus=False)

    assert placed == [(HOST, (0,)), (HOST, (1,))]
    assert at(load, shares_gpus=False) is None
    assert at(load, gpu_idx=(0,), shares_gpus=False) is None


def test_the_cpu_is_used_where_it_is_asked_for_or_nothing_else_is_there() -> None:
    assert at(node(HOST, gpu(0)), n_gpu=0) == Place(node=HOST, gpu_idx=(), has_room=True)
    assert at(node(HOST), n_gpu=None) == Place(node=HOST, gpu_idx=None, has_room=True)
    assert at(node(HOST), n_gpu=1) is None
    with_gpu = at(node(HOST), node(OTHER, gpu(0), num_replicas=3))
    assert with_gpu == Place(node=OTHER, gpu_idx=(0,), has_room=True)


def test_gpus_that_are_named_are_used() -> None:
    load = node(HOST, gpu(0), gpu(1))

    assert at(load, gpu_idx=(1,)) == Place(node=HOST, gpu_idx=(1,), has_room=True)
    assert at(load, gpu_idx=(2,)) is None


def spec(**options: Any) -> LaunchSpec:
    return LaunchSpec(model_name="qwen", **options)


def test_each_replica_gets_its_part_of_what_a_launch_says() -> None:
    one = ReplicaPlacement(worker_ip="10.0.0.2", gpu_idx=(1,))

    assert wishes_of(spec(replica=2)) == (ReplicaPlacement(),) * 2
    assert wishes_of(spec(replica=3, n_gpu=2)) == (ReplicaPlacement(n_gpu=1),) * 3
    assert [wish.gpu_idx for wish in wishes_of(spec(replica=2, gpu_idx=(3, 5)))] == [(3,), (5,)]
    assert wishes_of(spec(replica=1, replica_config=(one,))) == (one,)
    assert wishes_of(spec(engine_options=ON_CPU)) == (ReplicaPlacement(n_gpu=0),)
    on_second = (ReplicaPlacement(gpu_idx=(1,)),)
    assert wishes_of(spec(engine_options=ON_SECOND)) == on_second
    assert wishes_of(spec(engine_options=ON_SECOND, gpu_idx=(1,))) == on_second


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"replica": 0}, "replica"),
        ({"replica": True}, "replica"),
        ({"n_gpu": -1}, "n_gpu"),
        ({"n_gpu": 2}, "n_gpu"),
        ({"gpu_idx": ()}, "gpu_idx"),
        ({"gpu_idx": (0, 1)}, "gpu_idx"),
        ({"gpu_idx": (0, 1), "replica": 3}, "gpu_idx"),
        ({"gpu_idx": (0,), "n_gpu": 2}, "gpu_idx"),
        ({"replica_config": (ReplicaPlacement(),), "replica": 2}, "replica_config"),
        ({"replica_config": (ReplicaPlacement(),), "worker_ip": "h"}, "worker_ip"),
        ({"replica_config": (ReplicaPlacement(n_gpu=2),)}, "n_gpu"),
        ({"engine_options": ON_SECOND, "gpu_idx": (0,)}, "device"),
        ({"engine_options": ON_CPU, "gpu_idx": (0,)}, "device"),
        ({"engine_options": ON_CPU, "n_gpu": 1}, "n_gpu"),
        (
            {"engine_options": ON_SECOND, "replica_config": (ReplicaPlacement(n_gpu=0),)},
            "device",
        ),
    ],
)
def test_what_contradicts_itself_is_refused_by_name(options: Any, field: str) -> None:
    with pytest.raises(InvalidRequest) as refused:
        wishes_of(spec(**options))

    assert refused.value.field == field


@pytest.mark.parametrize(
    ("size", "quantization", "dtype", "gigabytes"),
    [
        ("7", "none", "auto", 7 * 2 * 1.2),
        ("0_5", "none", "float32", 0.5 * 4 * 1.2),
        ("7", "Int4", "auto", 7 * 0.5 * 1.2),
        ("7", "8-bit", "auto", 7 * 1.2),
        ("7", "q4_0", "auto", 7 * 0.5 * 1.2),
        ("", "none", "auto", 0),
    ],
)
def test_the_memory_of_a_model_is_guessed_by_its_size(
    size: str, quantization: str, dtype: str, gigabytes: float
) -> None:
    from dataclasses import replace

    what = replace(description("m"), model_size_in_billions=size, quantization=quantization)

    assert memory_of(what, dtype=dtype) == pytest.approx(gigabytes * 1e9)
