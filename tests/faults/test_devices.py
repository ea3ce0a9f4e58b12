# SPDX-License-Identifier: Apache-2.0
"""What happens to a GPU whose memory does not come back when a replica's process is gone."""

import asyncio
import os
import signal
import sys
import time
from dataclasses import replace

import pytest

from tests.cluster.guarded_cluster import MODEL, GuardedCluster, ask, guarded, spec, until_answered
from tests.fakes.devices import write_devices
from xinference.cluster.remote import RemoteCluster
from xinference.errors import InsufficientResources, ModelNotFound

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

GIB = 2**30
TIMEOUT_SECONDS = 30.0


async def quarantined(cluster: RemoteCluster) -> list[int]:
    (worker,) = (await cluster.info()).workers
    return [device.index for device in worker.resources.devices if device.quarantine]


async def until_quarantined(cluster: RemoteCluster, indices: list[int]) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while await quarantined(cluster) != indices:
        assert time.monotonic() < deadline, f"not in quarantine: {indices}"
        await asyncio.sleep(0.05)


async def test_f36_a_gpu_that_stays_held_is_used_again_only_when_it_is_free(
    guarded: GuardedCluster,
) -> None:
    write_devices(guarded.home, {0: 1 * GIB, 1: 2 * GIB})
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    (status,) = (await cluster.model(MODEL)).replicas
    assert status.gpu_idx == (0,)
    write_devices(guarded.home, {0: 60 * GIB, 1: 2 * GIB})

    (replica,) = guarded.replicas()
    os.kill(replica, signal.SIGKILL)
    await until_quarantined(cluster, [0])
    await until_answered(cluster)

    (status,) = (await cluster.model(MODEL)).replicas
    assert status.gpu_idx == (1,)

    story = [event.event_content for event in await cluster.events(MODEL)]
    assert any("GPU 0 has 59.0 GiB more in use" in line for line in story), story
    with pytest.raises(InsufficientResources, match="In quarantine: GPU 0"):
        await cluster.launch(
            replace(spec(), model_uid="other", gpu_idx=(0,)),  # type: ignore[arg-type]
            wait_ready=True,
        )
    with pytest.raises(ModelNotFound):
        await cluster.model("other")  # type: ignore[arg-type]

    write_devices(guarded.home, {0: 1 * GIB, 1: 2 * GIB})
    await until_quarantined(cluster, [])
    await cluster.terminate(MODEL)
    await cluster.launch(spec(), wait_ready=True)
    assert await ask(cluster) == " 1 2 3"
    (status,) = (await cluster.model(MODEL)).replicas
    assert status.gpu_idx == (0,)
