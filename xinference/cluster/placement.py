# SPDX-License-Identifier: Apache-2.0
"""Which node, and which of its GPUs, a replica goes to. Pure: loads in, a place or None out.

A GPU, or a node without one, is as busy as the replicas on it and the share of its memory that
is taken or promised: `IDLE_FIRST` goes to the least busy that has room. A model that is still
loading does not show in a node's readings, so what it will need is promised to it.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from xinference.errors import InvalidRequest
from xinference.identifiers import Address, NodeId
from xinference.protocol.deployment import LaunchSpec, ModelDescription, ReplicaPlacement
from xinference.protocol.nodes import Device, NodeResources

SPREAD_WEIGHT = 0.5
"""A replica of the same model on a node counts for so much more than one of another."""
WORKING_MEMORY_FACTOR = 1.2
"""Weights, and what computing with them takes."""
BITS_OF_WEIGHT = {"float32": 32, "bfloat16": 16, "float16": 16, "auto": 16}

_SIZE = re.compile(r"(\d+)(?:_(\d+))?")
_BITS = re.compile(r"(?:int|q|fp|w)_?([1-8])|([1-8])[-_ ]?bit", re.IGNORECASE)


class LaunchStrategy(StrEnum):
    """What comes first when there is a choice."""

    IDLE_FIRST = "idle_first"
    """The least busy, by replicas and memory."""
    LEAST_MODELS = "least_models"
    """The fewest replicas, whatever their size."""


@dataclass(slots=True, kw_only=True)
class GpuLoad:
    """A GPU, with what is meant to run on it."""

    device: Device
    num_replicas: int = 0
    promised_bytes: int = 0

    def is_open(self, *, shares_gpus: bool) -> bool:
        """Return whether a replica may come to it at all.

        Args:
            shares_gpus: whether it may hold more than one.
        """
        return not self.device.quarantine and (shares_gpus or not self.num_replicas)


@dataclass(slots=True, kw_only=True)
class NodeLoad:
    """A living node, with what is meant to run on it."""

    node: NodeId
    resources: NodeResources
    num_replicas: int = 0
    promised_bytes: int = 0
    gpus: dict[int, GpuLoad] = field(default_factory=dict)

    @classmethod
    def of(cls, node: NodeId, resources: NodeResources) -> "NodeLoad":
        """Return the node with nothing on it."""
        gpus = {device.index: GpuLoad(device=device) for device in resources.devices}
        return cls(node=node, resources=resources, gpus=gpus)

    def add(self, gpu_idx: tuple[int, ...] | None, promised_bytes: int) -> None:
        """Count one more replica, on these GPUs or on none."""
        self.num_replicas += 1
        gpus = [self.gpus[index] for index in gpu_idx or () if index in self.gpus]
        for gpu in gpus:
            gpu.num_replicas += 1
            gpu.promised_bytes += promised_bytes // len(gpus)
        if not gpus:
            self.promised_bytes += promised_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """What a replica asks of a place."""

    placement: ReplicaPlacement = field(default_factory=ReplicaPlacement)
    memory_bytes: int = 0
    """An estimate of what it takes; 0: nobody knows."""
    own_nodes: Mapping[NodeId, int] = field(default_factory=dict)
    """How many of its model's other replicas are on each node,"""
    own_gpus: Mapping[tuple[NodeId, int], int] = field(default_factory=dict)
    """and on each GPU."""
    max_gpus: int | None = None
    """No more than so many different GPUs for the whole model."""

    @property
    def has_all_gpus(self) -> bool:
        """Whether its model has as many different GPUs as it may."""
        return self.max_gpus is not None and len(self.own_gpus) >= self.max_gpus


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a replica goes."""

    node: NodeId
    gpu_idx: tuple[int, ...] | None
    """Empty: the CPU. None: the node knows of no GPU, and the process is to see for itself."""
    has_room: bool
    """Whether what it needs is free there, as far as one can tell."""


class Standing(NamedTuple):
    """How busy a GPU, or a node without one, is; the least is the best, whoever asks."""

    busy: float
    num_own: int
    """Where it comes first after `busy`; 0 until it is known who asks."""
    minus_free_bytes: int
    node: NodeId
    gpu_idx: tuple[int, ...]

    def for_need(self, need: Need, strategy: LaunchStrategy) -> "Standing":
        """Return how it stands for a replica whose model may be there already.

        Invariant: never less than before, and two choices of one node keep their order.
        """
        num_own = need.own_nodes.get(self.node, 0)
        if not num_own:
            return self
        if strategy is LaunchStrategy.LEAST_MODELS:
            return Standing(self.busy, num_own, *self[2:])
        return Standing(self.busy + SPREAD_WEIGHT * num_own, *self[1:])


class Choice(NamedTuple):
    """A place that a replica could have; the least is the best."""

    is_cramped: bool
    """It has no room, and the strategy minds."""
    is_elsewhere: bool
    """It is no GPU."""
    standing: Standing
    place: Place


def place(
    loads: Iterable[NodeLoad],
    need: Need,
    *,
    strategy: LaunchStrategy = LaunchStrategy.IDLE_FIRST,
    shares_gpus: bool = True,
) -> Place | None:
    """Return the best place for a replica; None if no node is as it asks. Looks at each of them.

    Args:
        loads: the living nodes.
        shares_gpus: whether a GPU may hold more than one replica.
    """
    best = min(
        (
            choice(standing_of(load, gpu_idx, strategy), gpu_idx, need, strategy)
            for load in loads
            if is_at(load.node, need.placement.worker_ip)
            for gpu_idx in _choices(load, need, shares_gpus=shares_gpus)
        ),
        default=None,
    )
    return None if best is None else best.place


def standing_of(
    load: NodeLoad, gpu_idx: tuple[int, ...] | None, strategy: LaunchStrategy
) -> Standing:
    """Return how busy these GPUs of a node are, or the node itself."""
    if gpu_idx:
        gpus = [load.gpus[index] for index in gpu_idx]
        num_replicas = max(gpu.num_replicas for gpu in gpus)
        total = sum(gpu.device.total_bytes for gpu in gpus)
        taken = sum(gpu.device.used_bytes + gpu.promised_bytes for gpu in gpus)
    else:
        num_replicas = load.num_replicas
        total = load.resources.memory_total_bytes
        taken = total - load.resources.memory_available_bytes + load.promised_bytes
    share = min(max(taken / total, 0.0), 1.0) if total else 0.0
    busy = num_replicas + (share if strategy is LaunchStrategy.IDLE_FIRST else 0.0)
    return Standing(busy, 0, taken - total, load.node, gpu_idx or ())


def choice(
    standing: Standing, gpu_idx: tuple[int, ...] | None, need: Need, strategy: LaunchStrategy
) -> Choice:
    """Return a place with what it is to a replica."""
    has_room = -standing.minus_free_bytes >= need.memory_bytes
    return Choice(
        strategy is LaunchStrategy.IDLE_FIRST and not has_room,
        not gpu_idx,
        standing.for_need(need, strategy),
        Place(node=standing.node, gpu_idx=gpu_idx, has_room=has_room),
    )


def is_at(node: NodeId, worker_ip: str | None) -> bool:
    """Return whether a node is the one that a launch names, by its host or as "host:port"."""
    return worker_ip is None or worker_ip in {node, Address.parse(node).host}


def wishes_of(spec: LaunchSpec) -> tuple[ReplicaPlacement, ...]:
    """Return where each replica of a launch may go.

    Raises:
        InvalidRequest: it asks for more than one GPU for a replica, or contradicts its `device`.
    """
    if spec.replica_config:
        wishes = spec.replica_config
    elif spec.gpu_idx is not None:
        share = len(spec.gpu_idx) // spec.replica
        wishes = tuple(
            ReplicaPlacement(worker_ip=spec.worker_ip, gpu_idx=spec.gpu_idx[first : first + share])
            for first in range(0, len(spec.gpu_idx), share)
        )
    else:
        wishes = (any_place(spec),) * spec.replica
    if spec.n_gpu is not None and spec.n_gpu > spec.replica:
        raise InvalidRequest(
            field="n_gpu",
            problem=f"is {spec.n_gpu} for {spec.replica} replicas; a replica runs on one GPU",
        )
    for wish in wishes:
        check_one_gpu(wish)
        _check_device(spec.engine_options.device, wish)
    if spec.engine_options.device == "cpu" and spec.n_gpu:
        raise InvalidRequest(field="n_gpu", problem=f"is {spec.n_gpu}, but device says cpu")
    return wishes


def any_place(spec: LaunchSpec) -> ReplicaPlacement:
    """Return where any replica of a launch may go that says nothing of single ones."""
    device, _, index = spec.engine_options.device.partition(":")
    if device == "cpu":
        return ReplicaPlacement(worker_ip=spec.worker_ip, n_gpu=0)
    if index:
        return ReplicaPlacement(worker_ip=spec.worker_ip, gpu_idx=(int(index),))
    each = None if spec.n_gpu is None else min(spec.n_gpu, 1)
    return ReplicaPlacement(worker_ip=spec.worker_ip, n_gpu=each)


def check_one_gpu(wish: ReplicaPlacement) -> None:
    """Refuse several GPUs for one replica.

    Raises:
        InvalidRequest
    """
    if len(wish.gpu_idx or ()) > 1:
        raise InvalidRequest(
            field="gpu_idx",
            problem=f"gives a replica the GPUs {list(wish.gpu_idx or ())}; it runs on one",
        )
    if (wish.n_gpu or 0) > 1:
        raise InvalidRequest(
            field="n_gpu", problem=f"gives a replica {wish.n_gpu} GPUs; it runs on one"
        )


def _check_device(device: str, wish: ReplicaPlacement) -> None:
    """Refuse a place that is not what the launch's `device` says."""
    kind, _, index = device.partition(":")
    if wish.gpu_idx is not None:
        wanted = f"gpu_idx gives a replica GPU {wish.gpu_idx[0]}"
        is_other = kind == "cpu" or bool(index and int(index) != wish.gpu_idx[0])
    else:
        wanted = f"n_gpu gives a replica {wish.n_gpu} GPUs"
        is_other = (kind == "cpu" and bool(wish.n_gpu)) or (kind == "cuda" and wish.n_gpu == 0)
    if is_other:
        raise InvalidRequest(field="device", problem=f"is {device}, but {wanted}; give one of them")


def memory_of(description: ModelDescription, *, dtype: str) -> int:
    """Return about how many bytes a model takes: what the catalogue says, or by its size.

    0: nobody knows.
    """
    if description.memory_bytes:
        return description.memory_bytes
    size = _SIZE.fullmatch(description.model_size_in_billions)
    if size is None:
        return 0
    billions = float(f"{size[1]}.{size[2] or 0}")
    quantized = _BITS.search(description.quantization)
    bits = int(quantized[1] or quantized[2]) if quantized else BITS_OF_WEIGHT.get(dtype, 16)
    return int(billions * 1e9 * bits / 8 * WORKING_MEMORY_FACTOR)


def _choices(load: NodeLoad, need: Need, *, shares_gpus: bool) -> Iterator[tuple[int, ...] | None]:
    """Yield what a replica could be given of a node."""
    wish = need.placement
    if wish.gpu_idx is not None:
        wished = [load.gpus[index] for index in wish.gpu_idx if index in load.gpus]
        if len(wished) == len(wish.gpu_idx) and all(
            gpu.is_open(shares_gpus=shares_gpus) for gpu in wished
        ):
            yield wish.gpu_idx
        return
    if wish.n_gpu == 0:
        yield ()
        return
    for index, gpu in load.gpus.items():
        if not gpu.is_open(shares_gpus=shares_gpus):
            continue
        if not need.has_all_gpus or (load.node, index) in need.own_gpus:
            yield (index,)
    if not load.gpus and wish.n_gpu is None:
        yield None
