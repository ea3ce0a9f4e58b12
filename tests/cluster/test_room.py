# SPDX-License-Identifier: Apache-2.0
"""A launch that does not fit is refused before anything is started, with what would fit."""

from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from tests.cluster.simulation import GIB, gpu, resources
from xinference.catalog import Catalog
from xinference.errors import InsufficientResources
from xinference.identifiers import NodeId
from xinference.protocol.deployment import EngineOptions, LaunchSpec
from xinference.protocol.nodes import (
    NodeResources,
    NodeState,
    NodeStatus,
    largest_room_bytes,
)


def node(of: NodeResources, state: NodeState = NodeState.READY) -> NodeStatus:
    return NodeStatus(
        node=NodeId("w:1"), resources=of, seconds_since_report=0, num_replicas=0, state=state
    )


def test_the_room_is_that_of_the_best_place() -> None:
    on_cpu = node(resources(available_bytes=5 * GIB))
    on_gpus = node(resources(available_bytes=90 * GIB, devices=(gpu(0), gpu(1))))
    largest = max(one.total_bytes - one.used_bytes for one in (gpu(0), gpu(1)))

    assert largest_room_bytes([]) == 0
    assert largest_room_bytes([on_cpu]) == 5 * GIB
    assert largest_room_bytes([on_gpus]) == largest
    assert largest_room_bytes([on_cpu, replace(on_gpus, state=NodeState.LEAVING)]) == 5 * GIB


async def test_a_model_that_is_too_large_is_refused_with_the_sizes_that_fit(
    tmp_path: Path,
) -> None:
    local = LocalCluster(
        tmp_path, new_replica=ScriptedReplica, catalog=Catalog.load(tmp_path / "home")
    )
    supervisor = await local.start_supervisor()
    worker = await local.start_worker()
    await worker.joined.wait()
    try:
        with pytest.raises(InsufficientResources) as refused:
            await supervisor.launch(
                LaunchSpec(
                    model_name="qwen2.5-instruct",
                    model_size_in_billions="72",
                    model_path="/no/where",
                )
            )

        assert "needs about 13" in str(refused.value)
        assert "What would fit: 3B pytorch, 1.5B pytorch, 0.5B pytorch." in str(refused.value)
        assert not local.replicas

        with pytest.raises(InsufficientResources, match="No xinference-guide would fit"):
            await supervisor.launch(
                LaunchSpec(
                    model_name="xinference-guide",
                    engine_options=EngineOptions(kv_cache_bytes=100 * GIB),
                )
            )

        with pytest.raises(InsufficientResources, match="room for 1 of the 5 wanted"):
            await supervisor.launch(
                LaunchSpec(
                    model_name="xinference-guide",
                    replica=5,
                    engine_options=EngineOptions(kv_cache_bytes=5 * GIB),
                )
            )
        assert not local.replicas
    finally:
        await local.close()
