# SPDX-License-Identifier: Apache-2.0
"""The contract of the data plane, on the real replica and on the fake, over both transports.

What `doc/data-plane.md` promises to whoever connects. Each subject is a process of its own.
"""

import asyncio
import contextlib
import os
import shutil
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.raw_data_plane import RawConnection, frame, proof, raw_connection, request
from tests.replica_process import FAKE, REAL, ReplicaProcess, replica_process
from xinference.cluster.dataplane.client import ReplicaConnection, ReplicaStream
from xinference.cluster.dataplane.frames import MAX_FRAME_BYTES
from xinference.cluster.dataplane.handshake import instance_key
from xinference.cluster.dataplane.service import ReplicaReport
from xinference.cluster.replica import Bootstrap
from xinference.errors import (
    ContextLengthExceeded,
    DuplicateRequest,
    InvalidRequest,
    LoadFailed,
    PeerUnreachable,
    ProtocolError,
    ReplicaLost,
    RequestAborted,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.protocol.deployment import (
    AbortOutcome,
    EngineOptions,
    ModelSource,
    ReplicaSpec,
    ReplicaState,
)
from xinference.protocol.generation import (
    ChatPrompt,
    Finished,
    FinishReason,
    GenerationRequest,
    Message,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenPrompt,
)

SECONDS = 20.0
LONG = 3000
"""Tokens of an answer that no test waits for."""
CLUSTER_KEY = b"the key of a cluster that exists in this file only"
INSTANCE = InstanceId("1f2e3d")
KEY = instance_key(CLUSTER_KEY, INSTANCE)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """A loaded replica that listens."""

    process: ReplicaProcess
    spec: ReplicaSpec
    report: ReplicaReport

    @property
    def address(self) -> str:
        return self.process.address

    async def open(self, *, role: str = "gateway") -> ReplicaConnection:
        return await ReplicaConnection.open(
            self.address, instance=INSTANCE, key=KEY, role=role, timeout_seconds=SECONDS
        )


@pytest.fixture(scope="module")
def folder() -> Iterator[Path]:
    # Why not tmp_path: the path of a unix socket must be short.
    path = Path(tempfile.mkdtemp(prefix="xi-"))
    yield path
    shutil.rmtree(path)


@pytest.fixture(scope="module")
def model_path(folder: Path) -> Path:
    # Why here: only the process with this file's tests needs torch.
    from tests.models_tiny import CONFIGS, save_model

    config = CONFIGS["llama"]()
    config.max_position_embeddings = 4096
    return save_model(folder / "model", config=config)


@pytest.fixture(
    scope="module", params=["fake-unix", "fake-tcp", "fake-tls", "real-unix", "real-tls"]
)
def subject(request: pytest.FixtureRequest, folder: Path) -> Iterator[Subject]:
    kind, _, transport = request.param.partition("-")
    path = "counting" if kind == "fake" else str(request.getfixturevalue("model_path"))
    spec = ReplicaSpec(
        replica=ReplicaUid(ModelUid("tiny"), 0),
        instance=INSTANCE,
        source=ModelSource(path=path),
        abilities=("chat", "generate"),
        engine_options=EngineOptions(max_num_seqs=8, max_model_len=4096, block_size=16),
        python_executable=sys.executable,
    )
    bootstrap = Bootstrap(
        instance=INSTANCE,
        key=KEY,
        listen=f"unix:{folder}/{kind}/s.sock"
        if transport == "unix"
        else f"{transport}:127.0.0.1:0",
        model_uid=spec.replica.model,
    )
    with replica_process(FAKE if kind == "fake" else REAL, bootstrap) as process:
        report = asyncio.run(_load(process.address, spec))
        yield Subject(process=process, spec=spec, report=report)
        asyncio.run(_stop(process.address))
        assert process.wait() == 0
        assert "Traceback" not in process.close()


async def _load(address: str, spec: ReplicaSpec) -> ReplicaReport:
    connection = await ReplicaConnection.open(
        address, instance=INSTANCE, key=KEY, role="actor", timeout_seconds=SECONDS
    )
    async with contextlib.aclosing(connection):
        return await connection.load(spec, on_progress=lambda *_: None, timeout_seconds=90.0)


async def _stop(address: str) -> None:
    connection = await ReplicaConnection.open(
        address, instance=INSTANCE, key=KEY, role="actor", timeout_seconds=SECONDS
    )
    async with contextlib.aclosing(connection):
        await connection.stop()
        async with asyncio.timeout(SECONDS):
            await connection.closed.wait()


@pytest.fixture
async def connection(subject: Subject) -> AsyncIterator[ReplicaConnection]:
    async with contextlib.aclosing(await subject.open()) as connection:
        yield connection


@pytest.fixture(autouse=True)
async def nothing_is_left(subject: Subject) -> AsyncIterator[None]:
    """An id lives until the engine has ended its request, and tests use the same ones."""
    yield
    async with contextlib.aclosing(await subject.open()) as connection:
        await wait_until_idle(connection)


@pytest.fixture
async def other(subject: Subject) -> AsyncIterator[ReplicaConnection]:
    async with contextlib.aclosing(await subject.open()) as connection:
        yield connection


def a_request(
    request_id: str, *, max_tokens: int = 5, text: str = "count for me"
) -> GenerationRequest:
    return GenerationRequest(
        request_id=RequestId(request_id),
        prompt=TextPrompt(text=text),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


async def start(connection: ReplicaConnection, request: GenerationRequest) -> ReplicaStream:
    return await connection.generate(request, timeout_seconds=SECONDS)


async def text_of(stream: ReplicaStream) -> str:
    return "".join([event.text async for event in stream if isinstance(event, TextDelta)])


async def next_event(stream: ReplicaStream) -> TextDelta | Finished:
    async with asyncio.timeout(SECONDS):
        return await anext(stream)


async def wait_for(holds: Callable[[], Awaitable[bool]]) -> None:
    """Ask until it holds; each question is a round trip, so this does not spin."""
    async with asyncio.timeout(SECONDS):
        while not await holds():
            pass


async def wait_until_idle(connection: ReplicaConnection) -> dict[str, float]:
    """Wait until the engine holds nothing; return its counters then."""

    async def is_idle() -> bool:
        counters = (await connection.ping(SECONDS)).counters
        return not (
            counters["num_running"] or counters["num_waiting"] or counters["num_blocks_used"]
        )

    await wait_for(is_idle)
    return (await connection.ping(SECONDS)).counters


# --- streams


async def test_an_accepted_request_gives_its_tokens_and_then_one_end(
    connection: ReplicaConnection,
) -> None:
    stream = await start(connection, a_request("a", max_tokens=7))

    events = [event async for event in stream]

    *deltas, last = events
    assert stream.accepted.num_prompt_tokens > 0
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.LENGTH
    assert last.usage.num_prompt_tokens == stream.accepted.num_prompt_tokens
    assert last.usage.num_completion_tokens == 7
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert sum(len(delta.token_ids) for delta in deltas if isinstance(delta, TextDelta)) == 7


async def test_a_resumed_answer_goes_on_after_what_it_was_given(
    connection: ReplicaConnection,
) -> None:
    request = a_request("a", max_tokens=7)
    whole = [event async for event in await start(connection, request)]
    deltas = [event for event in whole if isinstance(event, TextDelta)]
    assert [len(delta.token_ids) for delta in deltas] == [1] * 7
    tokens = [token for delta in deltas for token in delta.token_ids]

    for cut in (1, 4, 7):
        resumed = replace(request, resume_token_ids=tuple(tokens[:cut]))
        *others, last = [event async for event in await start(connection, resumed)]
        assert others == deltas[cut:]
        assert isinstance(last, Finished)
        assert last.usage.num_completion_tokens == 7


@pytest.mark.parametrize(
    "prompt",
    [
        ChatPrompt(messages=(Message(role="user", content="hello"),)),
        TextPrompt(text="hello"),
        TokenPrompt(token_ids=(65, 66, 67)),
    ],
    ids=["chat", "text", "tokens"],
)
async def test_every_kind_of_prompt_is_answered(
    connection: ReplicaConnection, prompt: ChatPrompt | TextPrompt | TokenPrompt
) -> None:
    stream = await start(connection, replace(a_request("a"), prompt=prompt))

    assert await text_of(stream) != ""


async def test_requests_at_once_get_the_answers_they_get_alone(
    connection: ReplicaConnection, other: ReplicaConnection
) -> None:
    requests = [
        a_request(f"r{index}", max_tokens=20 + index, text="and so " * (1 + index))
        for index in range(12)
    ]
    alone = [await text_of(await start(connection, request)) for request in requests]

    async with asyncio.timeout(SECONDS):
        streams = [
            await start(each, request)
            for each, request in zip([connection, other] * 6, requests, strict=True)
        ]
        together = await asyncio.gather(*[text_of(stream) for stream in streams])

    assert together == alone


async def test_nothing_follows_the_end_of_a_stream(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, request("a", max_tokens=3)))
        first = await raw.receive_until("END")
        raw.send(frame("PING", 1))
        rest = await raw.receive_until("PONG")

    names = [name for name, *_ in first]
    assert names[0] == "ACCEPT"
    assert names.count("END") == 1
    assert set(names[1:-1]) <= {"CHUNK"}
    assert first[-1][1:5] == [0, "length", first[0][2], 3]
    assert [name for name, *_ in rest] == ["PONG"]


async def test_one_step_is_one_frame_for_all_streams_of_a_connection(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        for stream in range(4):
            raw.send(frame("REQ", stream, request(f"r{stream}", max_tokens=LONG)))
        streams: list[int] = []
        while len(streams) < 4:
            *_, (_, deltas) = await raw.receive_until("CHUNK")
            streams = [stream for stream, *_ in deltas]
            assert len(set(streams)) == len(streams), "a step gives each stream one piece"

    assert sorted(streams) == [0, 1, 2, 3]


async def test_several_answers_come_in_one_stream_that_ends_once(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, request("a", max_tokens=3, n=3)))
        frames = await raw.receive_until("END")

    deltas = [delta for name, *fields in frames if name == "CHUNK" for delta in fields[0]]
    reasons = {index: reason for *_, index, reason, _ in deltas if reason is not None}
    assert reasons == {0: "length", 1: "length", 2: "length"}
    assert sorted({index for *_, index, _, _ in deltas}) == [0, 1, 2]
    assert [name for name, *_ in frames].count("END") == 1
    assert frames[-1][4] == 9


async def test_each_of_several_prompts_has_its_answers(subject: Subject) -> None:
    asked = request("a", max_tokens=2, n=2)
    asked["more_prompts"] = [{"kind": "text", "text": "x y"}, {"kind": "tokens", "token_ids": [5]}]
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, asked))
        frames = await raw.receive_until("END")

    deltas = [delta for name, *fields in frames if name == "CHUNK" for delta in fields[0]]
    reasons = {index: reason for *_, index, reason, _ in deltas if reason is not None}
    assert reasons == dict.fromkeys(range(6), "length")
    assert frames[-1][4] == 12
    assert frames[-1][3] == frames[0][2]


# --- refusals


async def test_a_refused_request_says_why_and_costs_nothing_else(
    connection: ReplicaConnection,
) -> None:
    too_long = a_request("a", max_tokens=2_000_000)

    with pytest.raises(ContextLengthExceeded) as refused:
        await start(connection, too_long)

    assert refused.value.max_tokens == 2_000_000
    assert await text_of(await start(connection, a_request("a"))) != ""


async def test_an_empty_prompt_is_refused(connection: ReplicaConnection) -> None:
    with pytest.raises(InvalidRequest) as refused:
        await start(connection, a_request("a", text=""))

    assert refused.value.field == "prompt"


@pytest.mark.parametrize(
    ("wire", "named"),
    [
        ({**request("a"), "sampling": {"temperature": 9.0}}, "temperature"),
        ({**request("a"), "sampling": {"max_tokens": "many"}}, "max_tokens"),
        ({**request("a"), "n": 2}, "n"),
        ({**request("a"), "prompt": {"kind": "picture"}}, "picture"),
        ({"request_id": "a"}, "prompt"),
        ("a", "object"),
    ],
)
async def test_a_malformed_request_costs_its_stream_only(
    subject: Subject, wire: object, named: str
) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, wire))
        name, stream, error = await raw.receive()
        raw.send(frame("REQ", 1, request("a", max_tokens=1)))
        after = await raw.receive()

    assert (name, stream, error["code"]) == ("REJECT", 0, "invalid_request")
    assert named in f"{error['fields']}"
    assert after[:2] == ["ACCEPT", 1]


async def test_an_id_that_lives_is_refused_and_the_first_goes_on(
    connection: ReplicaConnection, other: ReplicaConnection
) -> None:
    first = await start(connection, a_request("same", max_tokens=LONG))

    for each in (connection, other):
        with pytest.raises(DuplicateRequest):
            await start(each, a_request("same"))

    assert isinstance(await next_event(first), TextDelta)
    await first.aclose()


# --- aborts


async def test_a_closed_stream_stops_its_request_in_the_engine(
    connection: ReplicaConnection,
) -> None:
    stream = await start(connection, a_request("a", max_tokens=LONG))
    await next_event(stream)

    await stream.aclose()
    await stream.aclose()

    counters = await wait_until_idle(connection)
    assert (await connection.ping(SECONDS)).counters["num_steps"] == counters["num_steps"]
    assert [event async for event in stream] == []


async def test_a_lost_connection_stops_its_requests_and_no_others(
    subject: Subject, connection: ReplicaConnection
) -> None:
    kept = await start(connection, a_request("kept", max_tokens=LONG))
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        for stream in range(12):  # more than run at once: some are waiting
            raw.send(frame("REQ", stream, request(f"r{stream}", max_tokens=LONG)))
        for _ in range(12):
            await raw.receive_until("ACCEPT")
        raw.writer.transport.abort()

    async def is_alone() -> bool:
        counters = (await connection.ping(SECONDS)).counters
        return counters["num_running"] == 1 and not counters["num_waiting"]

    await wait_for(is_alone)
    assert isinstance(await next_event(kept), TextDelta)
    await kept.aclose()


async def test_a_connection_that_ends_inside_a_frame_stops_its_requests(
    subject: Subject, connection: ReplicaConnection
) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, request("a", max_tokens=LONG)))
        await raw.receive_until("ACCEPT")
        raw.send(frame("PING", 1)[:-1])
        raw.end()
        assert await raw.is_closed()

    await wait_until_idle(connection)


async def test_an_abort_by_id_ends_the_stream_of_another_connection(
    connection: ReplicaConnection, other: ReplicaConnection
) -> None:
    stream = await start(connection, a_request("a", max_tokens=LONG))
    await next_event(stream)

    outcome = await other.abort_request(RequestId("a"), block_seconds=0.0, timeout_seconds=SECONDS)

    async with asyncio.timeout(SECONDS):
        *_, last = [event async for event in stream]
    assert outcome is AbortOutcome.DONE
    assert isinstance(last, Finished)
    assert last.reason is FinishReason.ABORT
    assert 0 < last.usage.num_completion_tokens < LONG


async def test_an_abort_says_what_it_found(connection: ReplicaConnection) -> None:
    await text_of(await start(connection, a_request("ended")))

    outcomes = [
        await connection.abort_request(RequestId(name), block_seconds=0.0, timeout_seconds=SECONDS)
        for name in ("ended", "never came")
    ]

    assert outcomes == [AbortOutcome.NO_OP, AbortOutcome.NOT_FOUND]


async def test_an_id_that_was_aborted_before_it_came_is_refused_for_a_while(
    connection: ReplicaConnection,
) -> None:
    for name, block_seconds in (("long", 60.0), ("short", 0.02)):
        await connection.abort_request(
            RequestId(name), block_seconds=block_seconds, timeout_seconds=SECONDS
        )

    async def is_accepted() -> bool:
        try:
            return await text_of(await start(connection, a_request("short"))) != ""
        except RequestAborted:
            return False

    await wait_for(is_accepted)
    with pytest.raises(RequestAborted):
        await start(connection, a_request("long"))


async def test_a_consumer_that_is_cancelled_loses_no_event(connection: ReplicaConnection) -> None:
    whole = await text_of(await start(connection, a_request("a", max_tokens=30)))
    stream = await start(connection, a_request("a", max_tokens=30))

    parts = []
    finished = None
    async with asyncio.timeout(SECONDS):
        while finished is None:
            waiting = asyncio.ensure_future(anext(stream))
            await asyncio.sleep(0)
            waiting.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                event = await waiting
                if isinstance(event, TextDelta):
                    parts.append(event.text)
                else:
                    finished = event

    assert "".join(parts) == whole


async def test_a_caller_that_gives_up_before_the_answer_leaves_nothing(
    connection: ReplicaConnection,
) -> None:
    starting = asyncio.ensure_future(start(connection, a_request("a", max_tokens=LONG)))
    await asyncio.sleep(0)
    starting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await starting

    await wait_until_idle(connection)
    assert connection.num_streams == 0


# --- bytes


async def test_frames_may_come_in_pieces_of_any_size(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        for byte in frame("REQ", 0, request("a", max_tokens=2)) + frame("PING", 9):
            raw.send(bytes([byte]))
            await raw.writer.drain()
            await asyncio.sleep(0)
        frames = await raw.receive_until("END")

    assert frames[-1][:3] == ["END", 0, "length"]


@pytest.mark.parametrize(
    "garbage",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"\x00\x00\x00\x04\xc1\xc1\xc1\xc1",
        b"\x00\x00\x00\x00",
        frame("PONG", 1, "ready", {}),
        frame("NO_SUCH_FRAME", 1),
        frame("PING", "one"),
        frame("HELLO", 1, "x", "gateway", b"", b""),
        (MAX_FRAME_BYTES + 1).to_bytes(4, "big"),
        b"\x00\x00\x27\x10" + b"\x91" * 10_000,
    ],
    ids=["http", "no msgpack", "empty", "server's", "unknown", "type", "hello", "large", "deep"],
)
async def test_a_peer_that_breaks_the_protocol_loses_its_connection_and_requests(
    subject: Subject, connection: ReplicaConnection, garbage: bytes
) -> None:
    kept = await start(connection, a_request("kept", max_tokens=LONG))
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, request("a", max_tokens=LONG)))
        await raw.receive_until("ACCEPT")

        raw.send(garbage)

        assert await raw.close_error() == "protocol_error"

    async def is_alone() -> bool:
        return (await connection.ping(SECONDS)).counters["num_running"] == 1

    await wait_for(is_alone)
    assert isinstance(await next_event(kept), TextDelta)
    await kept.aclose()


async def test_a_stream_number_must_be_new(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 5, request("a", max_tokens=1)))
        await raw.receive_until("END")
        raw.send(frame("REQ", 5, request("b", max_tokens=1)))

        assert await raw.close_error() == "protocol_error"


async def test_an_abort_of_a_stream_that_is_over_does_nothing(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("ABORT", 7))
        raw.send(frame("PING", 1))

        assert (await raw.receive())[:2] == ["PONG", 1]


async def test_a_request_as_large_as_a_frame_may_be_is_read(subject: Subject) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("REQ", 0, {"request_id": "a" * (MAX_FRAME_BYTES - 100)}))

        assert (await raw.receive())[:2] == ["REJECT", 0]


async def test_a_request_larger_than_a_frame_is_refused_before_it_is_sent(
    connection: ReplicaConnection,
) -> None:
    with pytest.raises(InvalidRequest):
        await start(connection, a_request("a", text="a" * MAX_FRAME_BYTES))

    assert connection.num_streams == 0


# --- handshake


async def test_another_key_is_refused(subject: Subject) -> None:
    other_key = instance_key(b"another cluster's key", INSTANCE)

    with pytest.raises(ProtocolError, match="keys"):
        await ReplicaConnection.open(
            subject.address, instance=INSTANCE, key=other_key, role="actor", timeout_seconds=SECONDS
        )


async def test_another_instance_is_refused(subject: Subject) -> None:
    stale = InstanceId("stale")

    with pytest.raises(PeerUnreachable, match="another instance"):
        await ReplicaConnection.open(
            subject.address,
            instance=stale,
            key=instance_key(CLUSTER_KEY, stale),
            role="gateway",
            timeout_seconds=SECONDS,
        )


async def test_another_version_is_refused(subject: Subject) -> None:
    raw = await RawConnection.connect(subject.address)
    async with contextlib.aclosing(raw):
        name, error = await raw.shake_hands(INSTANCE, KEY, version=2)

    assert (name, error["code"]) == ("CLOSE", "protocol_error")
    assert "version 1" in error["fields"]["problem"]


async def test_an_unknown_role_is_refused(subject: Subject) -> None:
    raw = await RawConnection.connect(subject.address)
    async with contextlib.aclosing(raw):
        name, error = await raw.shake_hands(INSTANCE, KEY, role="admin")

    assert (name, error["code"]) == ("CLOSE", "protocol_error")


async def test_a_proof_cannot_be_used_twice(subject: Subject) -> None:
    nonce = os.urandom(32)
    first, second = [await RawConnection.connect(subject.address) for _ in range(2)]
    async with contextlib.aclosing(first), contextlib.aclosing(second):
        _, _, challenge = await first.receive()
        said = (KEY, INSTANCE, "actor", challenge, nonce)
        shown = proof(b"client", *said, certificate=first.certificate)
        hello = frame("HELLO", 1, INSTANCE, "actor", nonce, shown)
        first.send(hello)
        assert (await first.receive())[0] == "WELCOME"

        await second.receive()
        second.send(hello)

        assert await second.close_error() == "protocol_error"


async def test_the_role_is_part_of_the_proof(subject: Subject) -> None:
    nonce = os.urandom(32)
    raw = await RawConnection.connect(subject.address)
    async with contextlib.aclosing(raw):
        _, _, challenge = await raw.receive()
        said = (KEY, INSTANCE, "gateway", challenge, nonce)
        shown = proof(b"client", *said, certificate=raw.certificate)
        raw.send(frame("HELLO", 1, INSTANCE, "actor", nonce, shown))

        assert await raw.close_error() == "protocol_error"


@pytest.mark.parametrize(
    "first",
    [frame("PING", 1), b"\x00\x00\x20\x00" + b"\x00" * 0x2000, b"\xff\xff\xff\xff"],
    ids=["no hello", "above the bound", "far above it"],
)
async def test_whoever_does_not_begin_with_hello_is_refused(subject: Subject, first: bytes) -> None:
    raw = await RawConnection.connect(subject.address)
    async with contextlib.aclosing(raw):
        await raw.receive()
        raw.send(first)

        assert await raw.close_error() == "protocol_error"


# --- control


@pytest.mark.parametrize("order", [frame("LOAD", {}), frame("DRAIN"), frame("STOP")])
async def test_a_gateway_gives_no_orders(subject: Subject, order: bytes) -> None:
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(order)

        assert await raw.close_error() == "protocol_error"
    async with raw_connection(subject.address, INSTANCE, KEY) as raw:
        raw.send(frame("PING", 1))
        assert (await raw.receive())[2] == "ready"


async def test_a_load_that_is_told_again_gives_the_same_report(subject: Subject) -> None:
    async with contextlib.aclosing(await subject.open(role="actor")) as actor:
        again = await actor.load(subject.spec, on_progress=lambda *_: None, timeout_seconds=SECONDS)

    assert again == subject.report


async def test_a_loaded_replica_does_not_become_another(subject: Subject) -> None:
    spec = replace(subject.spec, source=ModelSource(path="elsewhere"))
    async with contextlib.aclosing(await subject.open(role="actor")) as actor:
        with pytest.raises(LoadFailed):
            await actor.load(spec, on_progress=lambda *_: None, timeout_seconds=SECONDS)

        assert (await actor.ping(SECONDS)).state is ReplicaState.READY


async def test_the_counters_show_the_work(connection: ReplicaConnection) -> None:
    before = await connection.ping(SECONDS)
    await text_of(await start(connection, a_request("a", max_tokens=10)))

    after = await connection.ping(SECONDS)

    assert after.state is ReplicaState.READY
    assert after.counters["progress"] >= before.counters["progress"] + 10
    assert after.counters["num_generated_tokens"] == before.counters["num_generated_tokens"] + 10


async def test_a_closed_connection_says_so(subject: Subject) -> None:
    connection = await subject.open()
    stream = await start(connection, a_request("a", max_tokens=LONG))

    await connection.aclose()

    assert connection.is_closed
    assert connection.closed.is_set()
    with pytest.raises(ReplicaLost):
        [event async for event in stream]
    for asked in (connection.ping(SECONDS), start(connection, a_request("b")), connection.drain()):
        with pytest.raises(XinferenceError) as lost:
            await asked
        assert isinstance(lost.value, ReplicaLost)
