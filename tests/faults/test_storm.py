# SPDX-License-Identifier: Apache-2.0
"""Many launches and terminates, while processes are killed: in the end all is as ordered."""

import asyncio
import os
import random
import signal
import sys
import time
from dataclasses import replace

import pytest

from tests.cluster.guarded_cluster import GuardedCluster, guarded, spec
from tests.faults.table import Outcome, RecordFault
from xinference.cluster.remote import RemoteCluster
from xinference.errors import ModelAlreadyExists, ModelNotFound, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import ModelState

__all__ = ["guarded"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

NUM_MODELS = 6
CONVERGE_SECONDS = 60.0
"""On a machine that is busy with other tests; the bound of the matrix is 30."""


async def test_f46_a_storm_of_orders_ends_with_what_was_ordered_last(
    guarded: GuardedCluster, is_long: bool, record_fault: RecordFault
) -> None:
    rng = random.Random(46)
    num_orders, num_kills, storm_seconds = (200, 12, 10.0) if is_long else (24, 3, 2.0)
    cluster = await guarded.start()
    wanted: dict[ModelUid, bool] = {}
    locks = {ModelUid(f"storm{i}"): asyncio.Lock() for i in range(NUM_MODELS)}

    async def order(at: float, uid: ModelUid, is_launch: bool) -> None:
        await asyncio.sleep(at)
        async with locks[uid]:
            await settled(cluster, uid, is_launch)
            wanted[uid] = is_launch

    async def kill(at: float, role: str | None) -> None:
        await asyncio.sleep(at)
        victims = guarded.replicas() if role is None else [guarded.find(role)]
        for pid in victims[:1]:
            if pid is not None:
                os.kill(pid, signal.SIGKILL)

    orders = [
        order(rng.uniform(0, storm_seconds), uid, rng.random() < 0.6)
        for uid in (rng.choice(list(locks)) for _ in range(num_orders))
    ]
    kills = [
        kill(rng.uniform(0, storm_seconds), rng.choice([None, None, "worker", "supervisor"]))
        for _ in range(num_kills)
    ]
    async with asyncio.timeout(storm_seconds + 2 * CONVERGE_SECONDS):
        await asyncio.gather(*orders, *kills)

    running = {uid for uid, is_wanted in wanted.items() if is_wanted}
    started = time.monotonic()
    while not await has_converged(guarded, cluster, running):
        assert time.monotonic() - started < CONVERGE_SECONDS, (
            running,
            guarded.replicas(),
            await cluster.models(),
        )
        await asyncio.sleep(0.1)
    seconds = time.monotonic() - started
    for model in await cluster.models():
        await cluster.terminate(model.model_uid)
    assert guarded.replicas() == []
    assert await cluster.models() == []
    record_fault(
        Outcome(
            row="F46",
            fault=f"{num_orders} launches and terminates within {storm_seconds:.0f} s, and "
            f"{num_kills} kills of replicas, workers and the supervisor meanwhile",
            whole_seconds=seconds,
            whole_within=30.0,
            failed={},
            note="from the last order on",
        )
    )


async def settled(cluster: RemoteCluster, uid: ModelUid, is_launch: bool) -> None:
    """Give an order until it is taken: while the supervisor is away nobody takes one."""
    while True:
        try:
            if is_launch:
                await cluster.launch(replace(spec(), model_uid=uid), wait_ready=False)
            else:
                await cluster.terminate(uid)
            return
        except (ModelAlreadyExists, ModelNotFound):
            return  # an order that was taken, but whose answer was lost
        except XinferenceError:
            await asyncio.sleep(0.1)


async def has_converged(
    guarded: GuardedCluster, cluster: RemoteCluster, running: set[ModelUid]
) -> bool:
    try:
        models = await cluster.models()
    except XinferenceError:
        return False
    # One whose process is killed before it was ever ready has failed to load, and is given up.
    given_up = [
        one
        for one in models
        if one.state is ModelState.ERROR and "SIGKILL" in one.replicas[0].error_message
    ]
    ready = [one for one in models if one.state is ModelState.READY]
    return (
        {one.model_uid for one in models} == running
        and len(ready) + len(given_up) == len(models)
        and len(guarded.replicas()) == len(ready)
    )
