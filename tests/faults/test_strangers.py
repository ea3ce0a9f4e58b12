# SPDX-License-Identifier: Apache-2.0
"""Who has no key, or somebody else's words, at every port of a running cluster."""

import asyncio
import contextlib
import os
import pickle
import socket
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.cluster.guarded_cluster import MODEL, GuardedCluster, ask, guarded, spec
from tests.contracts.bus_peer import Peer
from tests.contracts.test_control_bus import KEY as PEER_KEY
from tests.contracts.test_control_bus import PeerProcess, peers
from xinference.cluster import port_guard
from xinference.cluster.control_bus import Endpoint
from xinference.cluster.supervision import descendants_of
from xinference.cluster.xoscar_bus import XoscarBus

__all__ = ["Peer", "guarded", "peers"]

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

TIMEOUT_SECONDS = 20.0
PLAIN_FRAME, SIGNED_FRAME = 0, 2
"""Versions of the actor framework's frames."""


class Marker:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> tuple[object, ...]:
        return os.system, (f"touch '{self._path}'",)


def listeners(guardian: int) -> list[str]:
    """Return every address that processes of a cluster listen at: host:port, or a path."""
    found = set()
    for pid in (guardian, *descendants_of(guardian)):
        with contextlib.suppress(psutil.Error):
            for one in psutil.Process(pid).net_connections("all"):
                if one.family is socket.AF_UNIX and one.laddr:
                    found.add(str(one.laddr))
                elif one.status == psutil.CONN_LISTEN:
                    found.add(f"{one.laddr.ip}:{one.laddr.port}")
    return sorted(found)


async def connect(address: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    if address.startswith("/"):
        return await asyncio.open_unix_connection(address)
    host, _, port = address.rpartition(":")
    return await asyncio.open_connection(host, int(port))


async def until_closed(reader: asyncio.StreamReader) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        with contextlib.suppress(ConnectionError):
            await reader.read()


async def test_s01_no_port_runs_what_a_stranger_pickled(
    guarded: GuardedCluster, tmp_path: Path
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    executed = tmp_path / "executed"
    pickled = pickle.dumps(Marker(executed))
    forged = os.urandom(64) + pickled  # two proofs, made without the key
    frames = [
        pickled,
        struct.pack("<BQH", PLAIN_FRAME, len(pickled), 0) + pickled,
        struct.pack("<BQH", SIGNED_FRAME, len(pickled), 0) + forged,
    ]
    ports = [port for port in listeners(guarded.guardian) if "client-" not in port]
    assert len([port for port in ports if ":" in port]) >= 2, ports  # supervisor and worker
    assert [port for port in ports if "replicas" in port], ports

    for port in ports:
        for frame in frames:
            try:
                reader, writer = await connect(port)
            except OSError:
                continue  # a connected end, not a listener
            writer.write(frame)
            if writer.can_write_eof():
                writer.write_eof()
            await until_closed(reader)
            writer.close()

    assert not executed.exists()
    assert await ask(cluster) == " 1 2 3"


async def test_s01_a_good_frame_that_was_recorded_counts_once(
    peers: PeerProcess,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    directory = tmp_path_factory.mktemp("b")
    address = await asyncio.to_thread(peers.address, PEER_KEY, directory)
    bus = await XoscarBus.open(None, key=PEER_KEY, socket_directory=directory)
    from xoscar.backends.communication import socket as transport

    recorded = bytearray()
    write = transport.write_buffers

    def record(writer: object, buffers: list[bytes]) -> None:
        recorded.extend(b"".join(map(bytes, buffers)))
        write(writer, buffers)

    monkeypatch.setattr(transport, "write_buffers", record)
    peer = Endpoint(address, "peer")
    await bus.call(peer, "wait", 0.0, timeout_seconds=5.0)
    assert b"wait" in recorded

    for _ in range(3):
        reader, writer = await connect(address)
        writer.write(recorded)
        async with asyncio.timeout(TIMEOUT_SECONDS):
            assert await reader.read(1)  # it is answered, as the frame is signed
        writer.close()

    assert await bus.call(peer, "count", returns=int, timeout_seconds=5.0) == 1
    await bus.close()


async def p99(ask_once: Callable[[], object], num: int) -> float:
    seconds = []
    for _ in range(num):
        started = time.monotonic()
        await ask_once()  # type: ignore[misc]
        seconds.append(time.monotonic() - started)
    return sorted(seconds)[-max(1, num // 100)]


async def test_s02_connections_that_never_finish_a_frame_are_capped(
    guarded: GuardedCluster, is_long: bool
) -> None:
    num_each = 2000 if is_long else 150
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    ports = [port for port in listeners(guarded.guardian) if ":" in port or "replicas" in port]
    quiet = await p99(lambda: ask(cluster), 100)
    open_at_first = num_descriptors(guarded)

    half_sent: list[asyncio.StreamWriter] = []
    for port in ports:
        for _ in range(num_each):
            try:
                _, writer = await connect(port)
            except OSError:
                break
            writer.write(struct.pack("<BQH", SIGNED_FRAME, 1000, 0))
            half_sent.append(writer)
    assert len(half_sent) >= 3 * num_each
    deadline = time.monotonic() + TIMEOUT_SECONDS
    bound = open_at_first + len(ports) * (port_guard.MAX_STRANGERS + 10)
    while num_descriptors(guarded) > bound:
        assert time.monotonic() < deadline, (
            f"{num_descriptors(guarded)} descriptors, at most {bound}"
        )
        await asyncio.sleep(0.05)
    loaded = await p99(lambda: ask(cluster), 100)

    print(f"p99 of a request: {quiet:.4f} s, then {loaded:.4f} s")  # noqa: T201  # for the table
    assert loaded < quiet + 1.0
    assert (await cluster.model(MODEL)).replicas[0].num_restarts == 0
    for writer in half_sent:
        writer.close()


def num_descriptors(guarded: GuardedCluster) -> int:
    return sum(psutil.Process(pid).num_fds() for pid in descendants_of(guarded.guardian))
