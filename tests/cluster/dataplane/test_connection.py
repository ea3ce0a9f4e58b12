# SPDX-License-Identifier: Apache-2.0
"""What the contract leaves open: loading, slow peers, silence, impostors; with the fake replica."""

import asyncio
import contextlib
import shutil
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.fakes.replica import FAILS, HANGS, FakeReplica, serve_fake_replica
from tests.raw_data_plane import RawConnection, frame, raw_connection, request
from xinference.cluster.dataplane import client as client_module
from xinference.cluster.dataplane import server as server_module
from xinference.cluster.dataplane.client import ReplicaConnection
from xinference.cluster.dataplane.handshake import instance_key
from xinference.errors import (
    InternalError,
    LoadFailed,
    ModelNotReady,
    ModelOverloaded,
    PeerUnreachable,
    ProtocolError,
    ReplicaLost,
    RequestAborted,
)
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
)

SECONDS = 10.0
INSTANCE = InstanceId("abc")
KEY = instance_key(b"cluster", INSTANCE)
SPEC = ReplicaSpec(
    replica=ReplicaUid(ModelUid("counting"), 0),
    instance=INSTANCE,
    source=ModelSource(path="counting"),
    abilities=("chat",),
    engine_options=EngineOptions(),
    python_executable=sys.executable,
)


@pytest.fixture
def listen() -> Iterator[str]:
    folder = Path(tempfile.mkdtemp(prefix="xi-"))
    yield f"unix:{folder}/s.sock"
    shutil.rmtree(folder)


@pytest.fixture
async def replica(listen: str) -> AsyncIterator[FakeReplica]:
    """Loaded, and counting fast."""
    async with serve_fake_replica(
        listen, instance=INSTANCE, key=KEY, spec=SPEC, tokens_per_step=200, max_num_seqs=4
    ) as fake:
        yield fake


async def opened(
    address: str, *, role: str = "gateway", silence_seconds: float = 30.0
) -> ReplicaConnection:
    return await ReplicaConnection.open(
        address,
        instance=INSTANCE,
        key=KEY,
        role=role,
        timeout_seconds=SECONDS,
        silence_seconds=silence_seconds,
    )


def a_request(request_id: str, *, max_tokens: int = 5) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId(request_id),
        prompt=TextPrompt(text="go"),
        sampling=SamplingParams(max_tokens=max_tokens),
    )


async def wait_for(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it holds; each question is a round trip, so this does not spin."""
    async with asyncio.timeout(SECONDS):
        while not await holds():
            pass


@contextlib.asynccontextmanager
async def impostor(
    listen: str,
    behave: Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]],
) -> AsyncIterator[None]:
    """Listen as a replica does, and behave otherwise."""
    ended = asyncio.Event()

    async def behave_and_close(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await behave(reader, writer)
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()
        ended.set()

    server = await asyncio.start_unix_server(behave_and_close, listen.removeprefix("unix:"))
    try:
        yield
        async with asyncio.timeout(SECONDS):
            await ended.wait()
    finally:
        server.close()


# --- loading


async def test_a_replica_refuses_requests_until_it_is_loaded(listen: str) -> None:
    async with serve_fake_replica(listen, instance=INSTANCE, key=KEY) as fake:
        actor = await opened(fake.address, role="actor")
        async with contextlib.aclosing(actor):
            with pytest.raises(ModelNotReady) as refused:
                await actor.generate(a_request("a"), timeout_seconds=SECONDS)
            assert refused.value.state == "starting"
            assert (await actor.ping(SECONDS)).counters == {}

            told: list[tuple[float, str, str]] = []
            report = await actor.load(
                SPEC, on_progress=lambda *progress: told.append(progress), timeout_seconds=SECONDS
            )
            stream = await actor.generate(a_request("a"), timeout_seconds=SECONDS)
            text = "".join([e.text async for e in stream if isinstance(e, TextDelta)])

    assert text == " 1 2 3 4 5"
    assert told == [(0.5, "loading", "counting to one")]
    assert report.max_num_seqs == 16
    assert fake.specs == [SPEC]


async def test_a_load_that_fails_says_why_and_again_when_asked_again(listen: str) -> None:
    spec = replace(SPEC, source=ModelSource(path=FAILS))
    async with serve_fake_replica(listen, instance=INSTANCE, key=KEY) as fake:
        for _ in range(2):
            async with contextlib.aclosing(await opened(fake.address, role="actor")) as actor:
                with pytest.raises(LoadFailed, match="told to fail"):
                    await actor.load(spec, on_progress=lambda *_: None, timeout_seconds=SECONDS)
                assert (await actor.ping(SECONDS)).state is ReplicaState.FAILED

    assert len(fake.specs) == 1


async def test_an_actor_that_comes_back_joins_the_load_that_is_under_way(listen: str) -> None:
    spec = replace(SPEC, source=ModelSource(path=HANGS))
    async with serve_fake_replica(listen, instance=INSTANCE, key=KEY) as fake:
        for _ in range(2):
            actor = await opened(fake.address, role="actor")
            progress = asyncio.Event()
            loading = asyncio.ensure_future(
                actor.load(
                    spec,
                    on_progress=lambda *_, progress=progress: progress.set(),
                    timeout_seconds=SECONDS,
                )
            )
            async with asyncio.timeout(SECONDS):
                await progress.wait()
            assert (await actor.ping(SECONDS)).state is ReplicaState.LOADING
            await actor.aclose()
            with pytest.raises(ReplicaLost):
                await loading

    assert len(fake.specs) == 1


async def test_a_load_has_a_deadline(listen: str) -> None:
    spec = replace(SPEC, source=ModelSource(path=HANGS))
    async with (
        serve_fake_replica(listen, instance=INSTANCE, key=KEY) as fake,
        contextlib.aclosing(await opened(fake.address, role="actor")) as actor,
    ):
        with pytest.raises(ReplicaLost, match=r"within 0\.05 s"):
            await actor.load(spec, on_progress=lambda *_: None, timeout_seconds=0.05)


async def test_a_drained_replica_finishes_what_it_has_and_takes_no_more(
    replica: FakeReplica,
) -> None:
    async with contextlib.aclosing(await opened(replica.address, role="actor")) as actor:
        stream = await actor.generate(a_request("a", max_tokens=2000), timeout_seconds=SECONDS)
        await actor.drain()
        with pytest.raises(ModelNotReady) as refused:
            await actor.generate(a_request("b"), timeout_seconds=SECONDS)
        events = [event async for event in stream]

    assert refused.value.state == "stopping"
    assert len(events) == 2001


# --- failures


async def test_an_engine_that_fails_ends_every_stream_with_its_error(
    replica: FakeReplica,
) -> None:
    async with contextlib.aclosing(await opened(replica.address)) as connection:
        streams = [
            await connection.generate(a_request(name, max_tokens=500_000), timeout_seconds=SECONDS)
            for name in "ab"
        ]
        replica.fail_all()
        for stream in streams:
            with pytest.raises(InternalError, match="told to fail"):
                [event async for event in stream]
            assert [event async for event in stream] == []


async def test_a_full_queue_is_a_refusal(listen: str) -> None:
    async with (
        serve_fake_replica(
            listen, instance=INSTANCE, key=KEY, spec=SPEC, max_num_seqs=1, max_queue_size=1
        ) as fake,
        contextlib.aclosing(await opened(fake.address)) as connection,
    ):
        streams = [
            await connection.generate(a_request(name, max_tokens=500_000), timeout_seconds=SECONDS)
            for name in "ab"
        ]
        with pytest.raises(ModelOverloaded):
            await connection.generate(a_request("c"), timeout_seconds=SECONDS)
        assert len(streams) == connection.num_streams == 2


async def test_a_stream_without_end_is_lost_and_not_whole(listen: str) -> None:
    async with serve_fake_replica(listen, instance=INSTANCE, key=KEY, spec=SPEC) as fake:
        connection = await opened(fake.address)
        stream = await connection.generate(
            a_request("a", max_tokens=500_000), timeout_seconds=SECONDS
        )
        connection._writer.transport.abort()

        with pytest.raises(ReplicaLost):
            [event async for event in stream]
        assert connection.is_closed
        await connection.aclose()


async def test_a_stopped_replica_ends_streams_before_its_connections(listen: str) -> None:
    async with serve_fake_replica(listen, instance=INSTANCE, key=KEY, spec=SPEC) as fake:
        connection = await opened(fake.address)
        stream = await connection.generate(
            a_request("a", max_tokens=500_000), timeout_seconds=SECONDS
        )
    async with contextlib.aclosing(connection):
        *_, last = [event async for event in stream]
        async with asyncio.timeout(SECONDS):
            await connection.closed.wait()
        with pytest.raises(ReplicaLost, match="it was stopped"):
            await connection.ping(SECONDS)

    assert last.reason == "abort"


# --- slow peers


async def test_a_slow_consumer_loses_its_stream_and_stops_nobody_else(
    replica: FakeReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "MAX_BUFFERED_EVENTS", 1000)
    async with contextlib.aclosing(await opened(replica.address)) as connection:
        slow = await connection.generate(
            a_request("slow", max_tokens=500_000), timeout_seconds=SECONDS
        )
        quick = await connection.generate(
            a_request("quick", max_tokens=5_000), timeout_seconds=SECONDS
        )
        num_quick = len([event async for event in quick])

        async def is_idle() -> bool:
            return (await connection.ping(SECONDS)).counters["num_running"] == 0

        await wait_for(is_idle)
        kept = [await anext(slow) for _ in range(1000)]
        with pytest.raises(RequestAborted):
            await anext(slow)

    assert num_quick == 5_001
    assert kept[-1] == TextDelta(text=" 1000", token_ids=(1000,))


async def test_a_peer_that_does_not_read_is_cut_off(
    replica: FakeReplica, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Why: to fill what it allows by default takes the fake many seconds on a busy machine.
    monkeypatch.setattr(server_module, "MAX_UNSENT_BYTES", 256 * 1024)
    async with raw_connection(replica.address, INSTANCE, KEY) as raw:
        for stream in range(4):
            raw.send(frame("REQ", stream, request(f"r{stream}", max_tokens=900_000)))

        async with contextlib.aclosing(await opened(replica.address)) as connection:

            async def has_aborted() -> bool:
                return (await connection.ping(SECONDS)).counters["num_aborts"] == 4

            await wait_for(has_aborted)


# --- silence and impostors


async def test_a_replica_that_falls_silent_is_lost(listen: str) -> None:
    async with serve_fake_replica(listen, instance=INSTANCE, key=KEY, spec=SPEC) as fake:
        connection = await opened(fake.address, silence_seconds=0.05)
        async with asyncio.timeout(SECONDS):
            await connection.closed.wait()

        with pytest.raises(ReplicaLost, match=r"nothing heard of it for 0\.05 s"):
            await connection.ping(SECONDS)
        await connection.aclose()


async def test_pings_keep_a_quiet_connection_open(listen: str) -> None:
    async with serve_fake_replica(
        listen, instance=INSTANCE, key=KEY, spec=SPEC, silence_seconds=0.5
    ) as fake:
        connection = await ReplicaConnection.open(
            fake.address,
            instance=INSTANCE,
            key=KEY,
            role="gateway",
            timeout_seconds=SECONDS,
            ping_seconds=0.05,
            silence_seconds=0.5,
        )
        async with contextlib.aclosing(connection):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(connection.closed.wait(), 0.8)


async def test_a_peer_that_falls_silent_is_closed(listen: str) -> None:
    async with (
        serve_fake_replica(
            listen, instance=INSTANCE, key=KEY, spec=SPEC, silence_seconds=0.05
        ) as fake,
        raw_connection(fake.address, INSTANCE, KEY) as raw,
    ):
        assert await raw.is_closed()


async def test_a_peer_that_never_says_hello_is_closed(listen: str) -> None:
    async with serve_fake_replica(
        listen, instance=INSTANCE, key=KEY, handshake_seconds=0.05
    ) as fake:
        raw = await RawConnection.connect(fake.address)
        async with contextlib.aclosing(raw):
            assert await raw.is_closed()


async def test_whoever_cannot_prove_the_key_is_not_trusted(listen: str) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(frame("CHALLENGE", 1, b"c" * 32))
        await reader.read(1000)
        writer.write(frame("WELCOME", b"p" * 32, "counting"))
        await writer.drain()

    async with impostor(listen, behave):
        with pytest.raises(ProtocolError, match="could not prove"):
            await opened(listen)


@pytest.mark.parametrize(
    ("said", "error"),
    [
        (frame("CHALLENGE", 2, b"c"), "version 1"),
        (b"HTTP/1.1 400 Bad Request\r\n\r\n", "at most 4096"),
        (frame("PONG", 1, "ready", {}), "instead of Challenge"),
    ],
)
async def test_whatever_speaks_something_else_is_a_protocol_error(
    listen: str, said: bytes, error: str
) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await reader.read(1000)

    async with impostor(listen, behave):
        with pytest.raises(ProtocolError, match=error):
            await opened(listen)


async def test_a_connection_that_is_closed_during_the_handshake_is_nobody(listen: str) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        pass

    async with impostor(listen, behave):
        with pytest.raises(PeerUnreachable):
            await opened(listen)


async def test_a_peer_that_never_answers_has_a_deadline(listen: str) -> None:
    async def behave(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read(1000)

    async with impostor(listen, behave):
        with pytest.raises(PeerUnreachable, match=r"within 0\.05 s"):
            await ReplicaConnection.open(
                listen, instance=INSTANCE, key=KEY, role="gateway", timeout_seconds=0.05
            )


async def test_nobody_at_the_address_is_unreachable(listen: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    for address in (listen, f"tcp:127.0.0.1:{port}"):
        with pytest.raises(PeerUnreachable, match="replica at"):
            await opened(address)
