# SPDX-License-Identifier: Apache-2.0
"""The difference between what runs on a node and what should, as a command for its worker."""

from dataclasses import replace

from xinference.cluster.messages import (
    Command,
    InstanceState,
    LaunchId,
    StartInstance,
    StopInstance,
)
from xinference.identifiers import InstanceId, NodeId, ReplicaUid
from xinference.protocol.deployment import ReplicaSpec

from .observation import Node
from .records import Assignment, Replica
from .world import World


def command_for(world: World, name: NodeId, *, supervisor_epoch: int) -> Command | None:
    """Return what a node has to do; None if that is nothing, or it is lost."""
    node = world.observed.nodes.get(name)
    if node is None:
        return None
    owners = world.owners(name)
    start, stop, forget = [], [], []
    for report in node.instances.values():
        # What could be adopted has been, by now; the rest is surplus.
        owner = owners.get(report.instance)
        is_wanted = owner is not None and (owner.runs or owner.outgoing is not None)
        if report.state is InstanceState.EXITED:
            forget.append(report.instance)
        elif not is_wanted and report.state is not InstanceState.STOPPING:
            stop.append(_stop(report.replica, report.instance, report.launch_id))
    for instance, replica in owners.items():
        assigned = replica.assigned
        if assigned is None or assigned.instance != instance or instance in node.instances:
            continue
        launch_id = replica.model.desired.launch_id
        if replica.runs:
            start.append(StartInstance(spec=_spec(node, replica, assigned), launch_id=launch_id))
        else:
            stop.append(_stop(replica.uid, instance, launch_id))
    if not (start or stop or forget):
        return None
    return Command(
        supervisor_epoch=supervisor_epoch,
        worker_epoch=node.worker_epoch,
        start=tuple(start),
        stop=tuple(stop),
        forget=tuple(forget),
    )


def _spec(node: Node, replica: Replica, assigned: Assignment) -> ReplicaSpec:
    desired = replica.model.desired
    options = desired.spec.engine_options
    if options.device_memory_bytes is None and options.kv_cache_bytes is None:
        options = replace(options, device_memory_bytes=_device_share(node, replica, assigned))
    if assigned.gpu_idx and options.device.startswith("cuda"):
        # The process sees this one GPU alone, as its first.
        options = replace(options, device="cuda")
    return ReplicaSpec(
        replica=replica.uid,
        instance=assigned.instance,
        source=desired.source,
        abilities=desired.abilities,
        engine_options=options,
        python_executable="",
        envs=desired.spec.envs,
        request_limits=desired.spec.request_limits,
        gpu_idx=assigned.gpu_idx,
        model_type=desired.spec.model_type,
        encoder_options=desired.spec.encoder_options,
        virtual_env=desired.virtual_env,
        server_options=desired.spec.server_options,
        model_name=desired.description.model_name,
        model_engine=desired.description.model_engine,
        model_format=desired.description.model_format,
        quantization=desired.description.quantization,
    )


def _device_share(node: Node, replica: Replica, assigned: Assignment) -> int | None:
    """Return how many bytes of its GPU a replica may take; None: what is free.

    Why: replicas of one model that start together would each find the whole GPU free.
    """
    num_sharing = max((replica.model.own_gpus[gpu] for gpu in assigned.gpus), default=0)
    if num_sharing < 2:
        return None
    total_bytes = {device.index: device.total_bytes for device in node.resources.devices}
    index = assigned.gpus[0][1]
    return total_bytes[index] // num_sharing if index in total_bytes else None


def _stop(replica: ReplicaUid, instance: InstanceId, launch_id: LaunchId) -> StopInstance:
    return StopInstance(replica=replica, instance=instance, launch_id=launch_id)
