# SPDX-License-Identifier: Apache-2.0
"""A gateway that comes up when others do: it waits for what it does not know yet."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from tests.cluster.local_cluster import (
    KEY,
    SUPERVISOR_ADDRESS,
    WORKER_ADDRESS,
    InProcessReplica,
    LocalCluster,
)
from tests.fakes.catalog import FAMILY
from xinference.cluster import remote
from xinference.cluster.local_bus import LocalBus
from xinference.cluster.remote import RemoteCluster
from xinference.errors import ModelNotFound, ModelNotReady
from xinference.identifiers import ModelUid, RequestId, new_request_id
from xinference.protocol.deployment import AbortOutcome, LaunchSpec
from xinference.protocol.generation import (
    Finished,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
)

MODEL = ModelUid("counting")
DEADLINE_SECONDS = 20.0


@pytest.fixture
async def local(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[LocalCluster]:
    """A cluster whose supervisor was killed while a model ran."""
    home = tmp_path_factory.mktemp("c")  # short, for sockets

    class Replica(InProcessReplica):
        directory = home / "s"

    Replica.directory.mkdir(mode=0o700)
    local = LocalCluster(home, new_replica=Replica)
    try:
        await local.start_supervisor()
        await local.start_worker()
        async with gateway(local) as cluster:
            await local.workers[WORKER_ADDRESS].joined.wait()
            await cluster.launch(LaunchSpec(model_uid=MODEL, model_name=FAMILY), wait_ready=True)
        await local.kill(SUPERVISOR_ADDRESS)
        yield local
    finally:
        await local.close()


@asynccontextmanager
async def gateway(local: LocalCluster) -> AsyncIterator[RemoteCluster]:
    bus = LocalBus(local.network, None)
    cluster = RemoteCluster(bus, supervisor_address=SUPERVISOR_ADDRESS, cluster_key=KEY)
    await cluster.start()
    try:
        yield cluster
    finally:
        await cluster.aclose()


async def ask(cluster: RemoteCluster, model: ModelUid = MODEL) -> str:
    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text="count"),
        sampling=SamplingParams(max_tokens=3),
    )
    text = ""
    async with asyncio.timeout(DEADLINE_SECONDS):
        async for event in await cluster.generate(model, request):
            if not isinstance(event, Finished):
                assert isinstance(event, TextDelta)
                text += event.text
    return text


async def test_a_gateway_that_starts_with_the_supervisor_waits_for_its_first_routes(
    local: LocalCluster,
) -> None:
    local.network.cut(SUPERVISOR_ADDRESS, WORKER_ADDRESS)
    await local.start_supervisor()

    async with gateway(local) as cluster:
        asking = [asyncio.create_task(ask(cluster)) for _ in range(3)]
        unknown = asyncio.create_task(ask(cluster, ModelUid("unknown")))
        aborting = asyncio.create_task(
            cluster.abort_request(MODEL, RequestId("unknown"), block_seconds=0.0)
        )
        await asyncio.wait([*asking, unknown, aborting], timeout=0.1)
        assert not any(task.done() for task in (*asking, unknown, aborting))

        local.network.heal()

        assert await asyncio.gather(*asking) == [" 1 2 3"] * 3
        assert await aborting is AbortOutcome.NOT_FOUND
        with pytest.raises(ModelNotFound):
            await unknown
        assert len(local.replicas) == 1, "nothing was started anew"


async def test_it_does_not_wait_for_ever(
    local: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_TABLE_SECONDS", 0.05)
    local.network.cut(SUPERVISOR_ADDRESS, WORKER_ADDRESS)
    await local.start_supervisor()

    async with gateway(local) as cluster:
        with pytest.raises(ModelNotReady):
            await ask(cluster)
