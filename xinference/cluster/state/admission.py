# SPDX-License-Identifier: Apache-2.0
"""What is refused before anything is done: wishes for which there is no place, or no room."""

from collections import Counter
from collections.abc import Sequence

from xinference.cluster.placement import Need, Place, is_at
from xinference.errors import InsufficientResources, InvalidRequest, XinferenceError
from xinference.identifiers import NodeId
from xinference.protocol.deployment import LaunchSpec, ReplicaPlacement

from .gpu_shares import check_claims
from .lifecycle import where
from .world import World


def check_places(
    world: World,
    wishes: Sequence[ReplicaPlacement],
    *,
    memory_bytes: int,
    n_gpu: int | None = None,
    own_nodes: Counter[NodeId] | None = None,
    own_gpus: Counter[tuple[NodeId, int]] | None = None,
    spec: LaunchSpec,
) -> None:
    """Refuse wishes of one model for which there is no place, one after the other.

    Args:
        spec: the model's.
        memory_bytes: about what each takes; 0: nobody knows.
        n_gpu: on how many different GPUs they must be, all together.
        own_nodes: where the model's other replicas are,
        own_gpus: and on which GPUs.

    Raises:
        InvalidRequest, InsufficientResources
    """
    if not world.loads.has_open_node:
        raise InsufficientResources(
            problem="No worker has joined this cluster: start xinference-worker."
        )
    nodes, gpus = Counter(own_nodes or {}), Counter(own_gpus or {})
    placed: list[tuple[NodeId, int]] = []
    with world.loads.trial() as hold:
        for num_placed, wish in enumerate(wishes):
            need = Need(
                placement=wish,
                memory_bytes=memory_bytes,
                own_nodes=nodes,
                own_gpus=gpus,
                max_gpus=n_gpu,
            )
            chosen = world.loads.place(need)
            if chosen is None:
                raise _no_place(world, wish)
            if memory_bytes and not chosen.has_room:
                raise _no_room(chosen, memory_bytes, num_placed, len(wishes))
            hold(chosen, memory_bytes)
            taken = [(chosen.node, index) for index in chosen.gpu_idx or ()]
            nodes[chosen.node] += 1
            gpus.update(taken)
            placed += taken
    if len(set(placed)) < (n_gpu or 0):
        raise InvalidRequest(
            field="n_gpu", problem=f"asks for {n_gpu} GPUs; {len(set(placed))} can be had"
        )
    check_claims(spec, world.models.values(), placed)


def _no_room(best: Place, memory_bytes: int, num_placed: int, num_wanted: int) -> XinferenceError:
    others = f" There is room for {num_placed} of the {num_wanted} wanted." if num_placed else ""
    return InsufficientResources(
        problem=f"A replica needs about {memory_bytes / 2**30:.1f} GiB; the best place for it, "
        f"{where(best)}, has less free.{others}"
    )


def _no_place(world: World, wish: ReplicaPlacement) -> XinferenceError:
    """Return why no node is as a replica asks."""
    nodes = world.observed.nodes
    at = [node for name, node in nodes.items() if is_at(name, wish.worker_ip)]
    if not at:
        known = ", ".join(sorted(nodes))
        return InvalidRequest(
            field="worker_ip", problem=f"no worker is at {wish.worker_ip}; workers: {known}"
        )
    there = sorted({device.index for node in at for device in node.resources.devices})
    if wish.gpu_idx is not None and not set(wish.gpu_idx) <= set(there):
        problem = f"there is no GPU {list(wish.gpu_idx)}; GPUs: {there}"
        return InvalidRequest(field="gpu_idx", problem=problem)
    if not there:
        return InvalidRequest(field="n_gpu", problem="no worker has a GPU")
    held = {
        device.index: device.quarantine
        for node in at
        for device in node.resources.devices
        if device.quarantine and (wish.gpu_idx is None or device.index in wish.gpu_idx)
    }
    if held:
        problem = f"No GPU is free. In quarantine: {'; '.join(held.values())}."
        return InsufficientResources(problem=problem)
    return InsufficientResources(
        problem="Every GPU holds a replica already, and XINFERENCE_ALLOW_MULTI_REPLICA_PER_GPU "
        "is 0."
    )
