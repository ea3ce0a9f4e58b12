# SPDX-License-Identifier: Apache-2.0
"""The caches of a cluster: the supervisor's and the workers' actors, real downloads below them."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.catalog.downloads.conftest import MODEL_ID, WEIGHTS, files, request
from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from tests.fakes.catalog import FAMILY, FakeCatalog, FakeResolved
from tests.fakes.hub import FakeHub, serving
from xinference.cluster.caches import CacheActor
from xinference.cluster.control_bus import Endpoint
from xinference.cluster.downloads import Downloads
from xinference.cluster.local_bus import LocalBus
from xinference.cluster.worker import CACHES
from xinference.errors import (
    CacheInUse,
    InsufficientResources,
    InvalidRequest,
    ObjectNotFound,
    PeerUnreachable,
)
from xinference.identifiers import NodeId
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.downloads import (
    DownloadStage,
    DownloadStatus,
    KeptModels,
    Removed,
)
from xinference.settings import DownloadSettings

ONE, OTHER = "127.0.0.1:2000", "127.0.0.2:2000"
VERSION = request().model_version
DEADLINE_SECONDS = 30.0
SPEC = LaunchSpec(model_name=FAMILY, model_engine="transformers")

Statuses = dict[NodeId, DownloadStatus]


class HubCatalog(FakeCatalog):
    """Its family is on the hub, and brings code of its own, which a download does not run."""

    def resolve(self, spec: LaunchSpec) -> FakeResolved:
        if not spec.engine_options.trust_remote_code:
            raise InvalidRequest(field="trust_remote_code", problem="must be true to run it")
        resolved = super().resolve(spec)
        return replace(resolved, source=replace(resolved.source, path="", download=request()))


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as served:
        served.add(MODEL_ID, files())
        yield served


@pytest.fixture
async def local(tmp_path: Path, hub: FakeHub) -> AsyncIterator[LocalCluster]:
    """A cluster of two workers with homes of their own."""
    local = LocalCluster(
        tmp_path,
        new_replica=ScriptedReplica,
        catalog=HubCatalog(),
        downloads=DownloadSettings(hf_endpoint=hub.endpoint, max_attempts=1),
    )
    await local.start_supervisor()
    yield local
    await local.close()


Ask = Callable[..., Any]


@pytest.fixture
def ask(local: LocalCluster) -> Ask:
    """Call a method of the supervisor's caches, as a gateway does."""
    bus = LocalBus(local.network, None)

    async def call(method: str, *arguments: object, returns: Any = None) -> Any:
        caches = Endpoint("127.0.0.1:1000", CACHES)
        return await bus.call(caches, method, *arguments, returns=returns, timeout_seconds=20)

    return call


async def joined(local: LocalCluster, *addresses: str) -> None:
    for address in addresses:
        worker = await local.start_worker(address)
        await worker.joined.wait()


async def stage_of_all(ask: Ask, stage: DownloadStage) -> Statuses:
    """Wait until a download is at a stage wherever it was begun."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        statuses: Statuses = await ask("download_status", VERSION, returns=Statuses)
        if statuses and all(one.stage is stage for one in statuses.values()):
            return statuses
        assert time.monotonic() < deadline, statuses
        await asyncio.sleep(0.02)


async def test_a_download_goes_to_every_worker_and_is_listed_there(
    local: LocalCluster, ask: Ask
) -> None:
    await joined(local, ONE, OTHER)

    version = await ask("download", SPEC, returns=str)

    assert version == VERSION
    statuses = await stage_of_all(ask, DownloadStage.COMPLETED)
    assert set(statuses) == {ONE, OTHER}
    kept: KeptModels = await ask("models", None, 10.0, returns=KeptModels)
    versions = {node: [one.model_version for one in models] for node, models in kept.models.items()}
    assert versions == {ONE: [VERSION], OTHER: [VERSION]}


async def test_a_download_to_one_worker_and_its_removal_leave_the_other_alone(
    local: LocalCluster, ask: Ask
) -> None:
    await joined(local, ONE, OTHER)
    await ask("download", replace(SPEC, worker_ip="127.0.0.2"), returns=str)
    await stage_of_all(ask, DownloadStage.COMPLETED)
    kept: KeptModels = await ask("models", None, 10.0, returns=KeptModels)
    assert not kept.models[NodeId(ONE)]
    (model,) = kept.models[NodeId(OTHER)]

    removed: Removed = await ask("remove", VERSION, None, False, returns=Removed)

    assert removed.freed_bytes == model.freed_bytes > 3_000_000
    left: KeptModels = await ask("models", None, 10.0, returns=KeptModels)
    assert left.models == {ONE: [], OTHER: []}


async def test_a_silent_worker_is_named_and_holds_up_neither_lists_nor_removals(
    local: LocalCluster, ask: Ask
) -> None:
    await joined(local, ONE, OTHER)
    await ask("download", SPEC, returns=str)
    await stage_of_all(ask, DownloadStage.COMPLETED)
    local.network.hang(OTHER)

    kept: KeptModels = await ask("models", None, 0.5, returns=KeptModels)
    with pytest.raises(PeerUnreachable, match=OTHER):
        await ask("models", OTHER, 0.5, returns=KeptModels)
    local.network.kill(OTHER)
    removed: Removed = await ask("remove", VERSION, None, False, returns=Removed)

    assert [one.model_version for one in kept.models[NodeId(ONE)]] == [VERSION]
    assert kept.unanswered == (OTHER,)
    assert removed.freed_bytes > 3_000_000
    assert removed.unanswered == (OTHER,)


async def test_a_download_can_be_cancelled_and_gone_on_with(
    local: LocalCluster, ask: Ask, hub: FakeHub
) -> None:
    await joined(local, ONE)
    hub.faults.holds[WEIGHTS] = [1_000_000]
    await ask("download", SPEC, returns=str)
    await asyncio.to_thread(hub.wait_held)

    await ask("cancel_download", VERSION)

    await stage_of_all(ask, DownloadStage.CANCELLED)
    with pytest.raises(ObjectNotFound):
        await ask("cancel_download", VERSION)
    hub.release()
    await ask("download", SPEC, returns=str)
    await stage_of_all(ask, DownloadStage.COMPLETED)


async def test_a_download_that_fails_says_why(local: LocalCluster, ask: Ask, hub: FakeHub) -> None:
    await joined(local, ONE)
    hub.faults.status = 404

    await ask("download", SPEC, returns=str)

    statuses = await stage_of_all(ask, DownloadStage.ERROR)
    assert "has no owner/tiny" in statuses[NodeId(ONE)].error_message


async def test_a_worker_that_is_not_there_is_refused(local: LocalCluster, ask: Ask) -> None:
    with pytest.raises(InsufficientResources, match="No worker"):
        await ask("models", None, 10.0)
    await joined(local, ONE)

    for question in (
        ask("models", "10.0.0.9", 10.0),
        ask("remove", VERSION, "10.0.0.9", False),
        ask("download", replace(SPEC, worker_ip="10.0.0.9")),
    ):
        with pytest.raises(InvalidRequest, match=r"no worker is at 10\.0\.0\.9"):
            await question


async def test_what_a_model_runs_from_is_removed_only_by_force(
    tmp_path: Path, hub: FakeHub
) -> None:
    downloads = Downloads(
        home=tmp_path, settings=DownloadSettings(hf_endpoint=hub.endpoint, max_attempts=1)
    )
    cache = CacheActor(downloads)
    await downloads.fetch(request(), lambda _: None)
    with downloads.used(request(), "my-model"):
        (kept,) = await cache.models()
        assert kept.used_by == ("my-model",)

        with pytest.raises(CacheInUse, match=r"used by my-model.*force"):
            await cache.remove(VERSION, False)

        assert await cache.remove(VERSION, True) == kept.freed_bytes
    assert await cache.models() == []
    await downloads.close()
