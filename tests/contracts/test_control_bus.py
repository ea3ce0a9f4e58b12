# SPDX-License-Identifier: Apache-2.0
"""What every `ControlBus` promises: the in-process one, and xoscar to another process."""

import asyncio
import gc
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.contracts.bus_peer import REPLICA, SPEC, Peer
from xinference.cluster.control_bus import ControlBus, Endpoint, Presence
from xinference.cluster.local_bus import LocalBus, LocalNetwork
from xinference.cluster.xoscar_bus import XoscarBus
from xinference.errors import (
    InternalError,
    InvalidSetting,
    ModelOverloaded,
    PeerUnreachable,
    ProtocolError,
)
from xinference.identifiers import Address, ReplicaUid
from xinference.protocol.deployment import LaunchSpec

ROOT = Path(__file__).parents[2]
KEY = "the key of the contract"


@dataclass
class Subject:
    """A bus that only calls, and a peer in another process."""

    bus: ControlBus
    peer: Endpoint
    kill_peer: Callable[[], None]


@asynccontextmanager
async def local(
    directory: Path, peers: "PeerProcess", peer_key: str = KEY
) -> AsyncIterator[Subject]:
    network = LocalNetwork()
    served = LocalBus(network, "127.0.0.1:1", key=peer_key)
    await served.serve("peer", Peer())
    bus = LocalBus(network, None, key=KEY)
    yield Subject(bus, Endpoint("127.0.0.1:1", "peer"), lambda: network.kill("127.0.0.1:1"))
    await bus.close()
    await served.close()


class PeerProcess:
    """The peer of the real bus; started when there is none, so that tests share it."""

    def __init__(self) -> None:
        self._processes: dict[str, tuple[subprocess.Popen[str], str]] = {}

    def address(self, key: str, directory: Path) -> str:
        if key not in self._processes or self._processes[key][0].poll() is not None:
            process = subprocess.Popen(
                [sys.executable, "-m", "tests.contracts.bus_peer", key, str(directory)],
                cwd=ROOT,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            assert process.stdout is not None
            with process.stdout:
                self._processes[key] = process, process.stdout.readline().strip()
        return self._processes[key][1]

    def kill(self, key: str) -> None:
        process, _ = self._processes[key]
        process.kill()
        process.wait()

    def close(self) -> None:
        for key in self._processes:
            self.kill(key)


@pytest.fixture(scope="module")
def peers() -> Iterator[PeerProcess]:
    peers = PeerProcess()
    yield peers
    peers.close()


@asynccontextmanager
async def xoscar(
    directory: Path, peers: PeerProcess, peer_key: str = KEY
) -> AsyncIterator[Subject]:
    address = await asyncio.to_thread(peers.address, peer_key, directory)
    bus = await XoscarBus.open(None, key=KEY, socket_directory=directory)
    try:
        yield Subject(bus, Endpoint(address, "peer"), lambda: peers.kill(peer_key))
    finally:
        await bus.close()


MakeSubject = Callable[[Path, PeerProcess, str], AbstractAsyncContextManager[Subject]]


@pytest.fixture(params=[local, xoscar])
async def subject(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    peers: PeerProcess,
) -> AsyncIterator[Subject]:
    async with request.param(tmp_path_factory.mktemp("b"), peers) as subject:
        yield subject


async def test_values_arrive_as_they_were_sent(subject: Subject) -> None:
    spec, replica = await subject.bus.call(
        subject.peer,
        "echo",
        SPEC,
        REPLICA,
        returns=tuple[LaunchSpec, ReplicaUid],
        timeout_seconds=5.0,
    )

    assert (spec, replica) == (SPEC, REPLICA)


async def test_an_error_arrives_with_its_fields(subject: Subject) -> None:
    with pytest.raises(ModelOverloaded) as refused:
        await subject.bus.call(subject.peer, "refuse", timeout_seconds=5.0)

    assert refused.value.retry_after_seconds == 7


@pytest.mark.parametrize(
    ("method", "what"),
    [("fail", "by nought"), ("leave", "SystemExit"), ("fail_foreignly", "Foreign: 1 and 2")],
)
async def test_a_bug_of_the_peer_arrives_as_an_internal_error(
    subject: Subject, method: str, what: str
) -> None:
    with pytest.raises(InternalError, match=what):
        await subject.bus.call(subject.peer, method, timeout_seconds=5.0)

    assert await subject.bus.call(subject.peer, "count", returns=int, timeout_seconds=5.0) >= 0


@pytest.mark.parametrize("method", ["hidden", "absent", "__init__"])
async def test_only_marked_methods_can_be_called(subject: Subject, method: str) -> None:
    with pytest.raises(ProtocolError):
        await subject.bus.call(subject.peer, method, timeout_seconds=5.0)


@pytest.mark.parametrize("arguments", [(), (SPEC,), ("text", REPLICA), (SPEC, REPLICA, 1)])
async def test_arguments_of_other_types_are_refused(
    subject: Subject, arguments: tuple[object, ...]
) -> None:
    with pytest.raises(ProtocolError):
        await subject.bus.call(subject.peer, "echo", *arguments, timeout_seconds=5.0)


async def test_a_call_ends_at_its_deadline_and_others_go_on(subject: Subject) -> None:
    started = time.monotonic()
    with pytest.raises(PeerUnreachable):
        await subject.bus.call(subject.peer, "wait", 60.0, timeout_seconds=0.2)
    assert time.monotonic() - started < 2.0

    assert await subject.bus.call(subject.peer, "count", returns=int, timeout_seconds=5.0) >= 0


async def test_a_caller_that_is_cancelled_does_not_stop_the_method(subject: Subject) -> None:
    bus, peer = subject.bus, subject.peer
    call = asyncio.create_task(bus.call(peer, "wait", 0.2, timeout_seconds=5.0))
    before = await bus.call(peer, "count", returns=int, timeout_seconds=5.0)
    call.cancel()
    await asyncio.gather(call, return_exceptions=True)

    deadline = time.monotonic() + 5.0
    while await bus.call(peer, "count", returns=int, timeout_seconds=5.0) == before:
        assert time.monotonic() < deadline
        await asyncio.sleep(0.01)


async def test_calls_interleave(subject: Subject) -> None:
    started = time.monotonic()

    await asyncio.gather(
        *[
            subject.bus.call(subject.peer, "wait", 0.2, returns=str, timeout_seconds=5.0)
            for _ in range(20)
        ]
    )

    assert time.monotonic() - started < 2.0


async def test_lookup_tells_what_is_there(subject: Subject) -> None:
    absent = Endpoint(subject.peer.address, "absent")

    assert await subject.bus.lookup(subject.peer, timeout_seconds=5.0) is Presence.PRESENT
    assert await subject.bus.lookup(absent, timeout_seconds=5.0) is Presence.ABSENT
    with pytest.raises(PeerUnreachable):
        await subject.bus.lookup(Endpoint("127.0.0.1:9", "peer"), timeout_seconds=2.0)


async def test_a_served_name_can_be_replaced_and_ended(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("b")
    buses: list[ControlBus] = [
        LocalBus(LocalNetwork(), "127.0.0.1:1"),
        await XoscarBus.open(Address("127.0.0.1", 0), key=KEY, socket_directory=directory),
    ]
    for bus in buses:
        assert bus.address is not None
        here = Endpoint(bus.address, "peer")
        await bus.serve("peer", Peer())
        await bus.call(here, "wait", 0.0, timeout_seconds=5.0)
        await bus.serve("peer", Peer())
        assert await bus.call(here, "count", returns=int, timeout_seconds=5.0) == 0

        await bus.serve("peer", None)

        assert await bus.lookup(here, timeout_seconds=5.0) is Presence.ABSENT
        await bus.close()


async def test_to_end_a_served_name_is_harmless_while_the_bus_closes_and_after(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    directory = tmp_path_factory.mktemp("b")
    names = [f"peer{index}" for index in range(20)]
    buses: list[ControlBus] = [
        LocalBus(LocalNetwork(), "127.0.0.1:1"),
        await XoscarBus.open(Address("127.0.0.1", 0), key=KEY, socket_directory=directory),
    ]
    for bus in buses:
        for name in names:
            await bus.serve(name, Peer())

        async with asyncio.timeout(20.0):
            await asyncio.gather(
                *(bus.serve(name, None) for name in names[:10]),
                bus.close(),
                *(bus.serve(name, None) for name in names[10:]),
            )
            await bus.serve(names[0], None)
            await bus.serve(names[0], Peer())


async def test_an_answer_that_nobody_waits_for_is_not_logged_when_its_peer_ends(
    tmp_path_factory: pytest.TempPathFactory, caplog: pytest.LogCaptureFixture
) -> None:
    bus = await XoscarBus.open(None, key=KEY, socket_directory=tmp_path_factory.mktemp("b"))
    from xoscar.errors import ServerClosed

    def forget(error: Exception) -> None:
        asyncio.get_running_loop().create_future().set_exception(error)
        gc.collect()

    forget(ServerClosed("the peer"))
    assert caplog.records == []
    forget(ValueError("anything else"))
    assert "never retrieved" in caplog.text
    await bus.close()


async def test_the_end_of_a_peer_is_noticed_at_once(subject: Subject) -> None:
    lost, watched = asyncio.Event(), asyncio.Event()
    subject.bus.on_peer_lost(subject.peer.address, lost.set)
    unwatch = subject.bus.on_peer_lost(subject.peer.address, watched.set)
    call = asyncio.create_task(subject.bus.call(subject.peer, "wait", 60.0, timeout_seconds=60.0))
    await subject.bus.call(subject.peer, "count", returns=int, timeout_seconds=5.0)
    assert not lost.is_set()
    unwatch()

    subject.kill_peer()

    async with asyncio.timeout(2.0):
        await lost.wait()
        with pytest.raises(PeerUnreachable):
            await call
    with pytest.raises(PeerUnreachable):
        await subject.bus.call(subject.peer, "count", timeout_seconds=1.0)
    assert not watched.is_set()


async def test_a_watch_on_nobody_ends_at_once(subject: Subject) -> None:
    lost = asyncio.Event()

    subject.bus.on_peer_lost("127.0.0.1:9", lost.set)

    async with asyncio.timeout(2.0):
        await lost.wait()


async def test_a_closed_bus_ends_its_calls(subject: Subject) -> None:
    call = asyncio.create_task(subject.bus.call(subject.peer, "wait", 60.0, timeout_seconds=60.0))
    await subject.bus.call(subject.peer, "count", returns=int, timeout_seconds=5.0)

    await subject.bus.close()

    async with asyncio.timeout(2.0):
        with pytest.raises(PeerUnreachable):
            await call


@pytest.mark.parametrize("make", [local, xoscar])
async def test_a_peer_with_another_key_is_refused(
    make: MakeSubject, tmp_path_factory: pytest.TempPathFactory, peers: PeerProcess
) -> None:
    async with make(tmp_path_factory.mktemp("b"), peers, "another key, of others") as subject:
        presence = await subject.bus.lookup(subject.peer, timeout_seconds=5.0)
        assert presence is Presence.REFUSED
        with pytest.raises(PeerUnreachable):
            await subject.bus.call(subject.peer, "count", timeout_seconds=1.0)


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
async def test_no_peer_is_told_of_every_address(host: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidSetting, match="an address that other hosts reach"):
        await XoscarBus.open(Address(host, 0), key=KEY, socket_directory=tmp_path)


async def test_a_method_that_is_cancelled_does_not_cancel_its_caller(subject: Subject) -> None:
    with pytest.raises(PeerUnreachable, match="ended"):
        await subject.bus.call(subject.peer, "be_cancelled", timeout_seconds=5.0)

    await subject.bus.call(subject.peer, "count", timeout_seconds=5.0)
