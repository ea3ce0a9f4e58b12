# SPDX-License-Identifier: Apache-2.0
"""Launches of repositories that the catalogue does not know, through supervisor and worker."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from tests.fakes.hub import FakeHub, serving
from xinference.catalog import Catalog
from xinference.cluster.messages import InstanceState
from xinference.cluster.supervisor import SupervisorActor
from xinference.errors import (
    InsufficientResources,
    InvalidRequest,
    RepositoryNotFound,
    UnsupportedVariant,
)
from xinference.identifiers import ModelUid
from xinference.protocol.autostart import AutostartEntry
from xinference.protocol.deployment import LaunchSpec
from xinference.settings import DownloadSettings

MODEL_ID = "owner/my-llama"
CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "max_position_embeddings": 512,
}
SPEC = LaunchSpec(model_name=MODEL_ID)
DEADLINE_SECONDS = 60.0


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as served:
        files = {
            "config.json": json.dumps(CONFIG).encode(),
            "tokenizer_config.json": json.dumps({"model_max_length": int(1e30)}).encode(),
            "model.safetensors": b"0" * 4000,
        }
        served.add(MODEL_ID, files)
        yield served


@pytest.fixture
async def local(tmp_path: Path, hub: FakeHub) -> AsyncIterator[LocalCluster]:
    local = LocalCluster(
        tmp_path,
        new_replica=ScriptedReplica,
        catalog=Catalog.load(tmp_path),
        downloads=DownloadSettings(
            hf_endpoint=hub.endpoint, modelscope_endpoint=hub.endpoint, max_attempts=1
        ),
    )
    yield local
    hub.release()
    for replica in local.replicas:
        replica.move(InstanceState.EXITED)
    await local.close()


async def started(local: LocalCluster, *, is_ticking: bool = False) -> SupervisorActor:
    supervisor = await local.start_supervisor(is_ticking=is_ticking)
    worker = await local.start_worker()
    await worker.joined.wait()
    return supervisor


async def test_a_launch_reads_the_repository_and_downloads_from_it(
    local: LocalCluster, hub: FakeHub
) -> None:
    supervisor = await started(local)

    _, ticket = await supervisor.launch(SPEC)

    assert ticket.model_uid == "my-llama"
    _, status = await supervisor.model(ModelUid("my-llama"))
    assert status.description.context_length == 512
    assert status.description.model_ability == ("generate",)
    assert "model.safetensors" not in {one.path for one in hub.asked}


async def test_others_are_served_while_a_hub_takes_its_time(
    local: LocalCluster, hub: FakeHub
) -> None:
    supervisor = await started(local)
    hub.faults.holds["config.json"] = [0]
    slow = asyncio.create_task(supervisor.launch(SPEC))
    await asyncio.to_thread(hub.wait_held)

    async with asyncio.timeout(DEADLINE_SECONDS):
        await supervisor.launch(LaunchSpec(model_name="xinference-guide"))
    assert not slow.done()
    hub.release()

    _, ticket = await slow
    assert ticket.model_uid == "my-llama"


async def test_what_cannot_be_launched_leaves_nothing(local: LocalCluster, hub: FakeHub) -> None:
    other = {"model_type": "vit", "architectures": ["ViTModel"]}
    hub.add("owner/pictures", {"config.json": json.dumps(other).encode(), "x.bin": b"0"})
    supervisor = await started(local)

    with pytest.raises(RepositoryNotFound, match=r"huggingface: .* has no owner/nothing"):
        await supervisor.launch(LaunchSpec(model_name="owner/nothing"))
    with pytest.raises(UnsupportedVariant, match="no ViTModel that goes on from a text"):
        await supervisor.launch(LaunchSpec(model_name="owner/pictures"))
    with pytest.raises(InvalidRequest, match="no worker is at"):
        await supervisor.launch(LaunchSpec(model_name=MODEL_ID, worker_ip="10.0.0.9"))

    assert (await supervisor.models())[1] == []
    assert "model.safetensors" not in {one.path for one in hub.asked}


async def test_without_a_worker_there_is_nobody_to_read_it(local: LocalCluster) -> None:
    supervisor = await local.start_supervisor()

    with pytest.raises(InsufficientResources, match="No worker"):
        await supervisor.launch(SPEC)


async def test_a_repository_can_be_launched_at_the_start(local: LocalCluster, hub: FakeHub) -> None:
    supervisor = await started(local, is_ticking=True)
    uid = ModelUid("mine")
    launch = LaunchSpec(model_uid=uid, model_name=MODEL_ID)

    await supervisor.set_autostart(AutostartEntry(launch=launch))

    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        _, models = await supervisor.models()
        if models:
            break
        assert time.monotonic() < deadline, await supervisor.autostart()
        await asyncio.sleep(0.05)
    (status,) = models
    assert status.description.model_name == "my-llama"
