# SPDX-License-Identifier: Apache-2.0
"""A network between gateway and replicas that is slow, or breaks connections in every way."""

import asyncio
import contextlib
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.guarded_cluster import MODEL, spec
from tests.cluster.local_cluster import KEY, SUPERVISOR_ADDRESS, InProcessReplica, LocalCluster
from tests.faults.load import Load
from tests.faults.table import Outcome, RecordFault
from tests.tcp_relay import Relay, relay_to
from xinference.cluster.dataplane.address import TcpAddress, parse_address
from xinference.cluster.dataplane.client import ReplicaConnection
from xinference.cluster.local_bus import LocalBus
from xinference.cluster.messages import Route
from xinference.cluster.remote import RemoteCluster
from xinference.errors import ReplicaLost
from xinference.identifiers import InstanceId

SECONDS = 4.0
LONG_SECONDS = 120.0
DELAY_SECONDS = 0.1
"""Each way."""
STALL_SECONDS = 1.0
STALLED_SHARE = 0.01


class TcpReplica(InProcessReplica):
    listen = "tcp:127.0.0.1:0"


class RelayedCluster(RemoteCluster):
    """Reaches each replica through a relay of its own."""

    def __init__(self, bus: LocalBus, relays: contextlib.AsyncExitStack) -> None:
        super().__init__(bus, supervisor_address=SUPERVISOR_ADDRESS, cluster_key=KEY)
        self.relays: dict[InstanceId, Relay] = {}
        self._stack = relays

    async def _open(self, route: Route) -> ReplicaConnection:
        if route.instance not in self.relays:
            where = parse_address(route.address)
            assert isinstance(where, TcpAddress)
            relay = relay_to(where.address.host, where.address.port)
            self.relays[route.instance] = await self._stack.enter_async_context(relay)
        port = self.relays[route.instance].port
        return await super()._open(replace(route, address=f"tcp:127.0.0.1:{port}"))


@pytest.fixture
async def cluster(tmp_path: Path) -> AsyncIterator[RelayedCluster]:
    """Two ready replicas that count, behind relays."""
    local = LocalCluster(tmp_path, new_replica=TcpReplica)
    await local.start_supervisor()
    worker = await local.start_worker()
    await worker.joined.wait()
    async with contextlib.AsyncExitStack() as relays:
        cluster = RelayedCluster(LocalBus(local.network, None), relays)
        await cluster.start()
        await cluster.launch(replace(spec(), replica=2), wait_ready=True)
        try:
            yield cluster
        finally:
            await cluster.aclose()
            await local.close()


async def test_f43_a_slow_network_makes_nobody_dead(
    cluster: RelayedCluster, is_long: bool, record_fault: RecordFault
) -> None:
    rng = random.Random(43)
    seconds = LONG_SECONDS if is_long else SECONDS

    async def slowly(piece: bytes, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(STALL_SECONDS if rng.random() < STALLED_SHARE else DELAY_SECONDS)
        writer.write(piece)

    load = Load(cluster, MODEL)
    load.start()
    await load.wait_good(10)
    for relay in cluster.relays.values():
        relay.to_client = relay.to_server = slowly
    slow_since = time.monotonic()
    await asyncio.sleep(seconds)  # so long it is slow
    await load.stop()

    assert load.failures() == {}
    assert load.count("good") == len(load.sent)
    routing = cluster.routing()
    assert (routing.num_ejections, routing.num_retried, routing.num_continued) == (0, 0, 0)
    record_fault(
        Outcome(
            row="F43",
            fault="between gateway and replicas each piece takes 100 ms, and one of a hundred 1 s, "
            f"for {seconds:.0f} s",
            slowest_seconds=load.slowest_seconds(slow_since),
            num_requests=len(load.sent),
            failed={},
            note="nobody is ejected, nothing is sent again",
        )
    )


Break = Callable[[Relay, bytes, asyncio.StreamWriter], Awaitable[None]]


async def reset_inside_a_frame(relay: Relay, piece: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(piece[: len(piece) // 2])
    await writer.drain()
    relay.reset()


async def end_without_end(relay: Relay, piece: bytes, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def garbage(relay: Relay, piece: bytes, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\x00\x00\x05StopIteration" + piece)


@pytest.mark.parametrize("broken", [reset_inside_a_frame, end_without_end, garbage])
async def test_f44_a_connection_that_breaks_in_the_middle_costs_no_answer(
    broken: Break, cluster: RelayedCluster
) -> None:
    load = Load(cluster, MODEL)
    load.start()
    await load.wait_good(20)
    has_broken = asyncio.Event()
    relay = next(iter(cluster.relays.values()))
    passed_on = relay.to_client

    async def break_once(piece: bytes, writer: asyncio.StreamWriter) -> None:
        if b"CHUNK" in piece and not has_broken.is_set():
            has_broken.set()
            relay.to_client = passed_on
            await broken(relay, piece, writer)
        else:
            await passed_on(piece, writer)

    relay.to_client = break_once
    async with asyncio.timeout(10.0):
        await has_broken.wait()
    await load.wait_good(load.count("good") + 20)
    await load.stop()

    assert load.failures() == {}
    assert load.count("hung", "wrong") == 0
    routing = cluster.routing()
    assert routing.num_continued + routing.num_retried > 0
    assert all(one.num_restarts == 0 for one in (await cluster.model(MODEL)).replicas)


async def test_f42_a_stranger_at_a_replicas_address_costs_no_answer(
    cluster: RelayedCluster,
) -> None:
    load = Load(cluster, MODEL)
    load.start()
    await load.wait_good(20)
    relay = next(iter(cluster.relays.values()))

    async def another_protocol(piece: bytes, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    relay.to_client = another_protocol
    relay.reset()
    await load.wait_good(load.count("good") + 40)
    assert cluster.routing().num_ejected == 1
    await load.stop()
    (stranger,) = [one for one in cluster._routes() if cluster.relays[one.instance] is relay]
    with pytest.raises(ReplicaLost):  # and no error of ours, which would not be tried elsewhere
        await cluster._open(stranger)

    assert load.failures() == {}
    assert load.count("hung", "wrong") == 0
