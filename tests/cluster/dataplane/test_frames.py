# SPDX-License-Identifier: Apache-2.0
"""Frames become bytes and come back; bytes that are no frames do no harm."""

import contextlib
from dataclasses import replace
from itertools import pairwise

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.raw_data_plane import frame
from xinference.cluster.dataplane import frames
from xinference.errors import InvalidRequest, ProtocolError
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec, SchedulerPolicy
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    FinishReason,
    GenerationRequest,
    Grammar,
    GrammarKind,
    Message,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenCandidate,
    TokenLogprob,
    TokenPrompt,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
)
from xinference.protocol.tracing import TraceContext
from xinference.protocol.vectors import (
    DenseVectors,
    EmbeddingRequest,
    InputType,
    ModelRequest,
    RerankRequest,
    Scores,
    SparseVector,
    TokenVectors,
    VectorKind,
    VectorPiece,
)

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
NUMBER = st.integers(0, 2**40)
JSON = st.recursive(
    st.none() | st.booleans() | NUMBER | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=5,
)
ERROR = st.fixed_dictionaries({"code": TEXT, "fields": st.dictionaries(TEXT, JSON, max_size=3)})
PART = st.one_of(
    st.none(),
    st.just(frames.Thought()),
    st.builds(frames.CallStart, NUMBER, TEXT, TEXT),
    st.builds(frames.CallArguments, NUMBER),
)
TOKEN_IDS = st.lists(NUMBER, max_size=4).map(tuple)
LOGPROB = st.floats(-9999.0, 0.0)
WIRE_LOGPROB = st.builds(
    frames.Logprob,
    NUMBER,
    st.binary(max_size=8),
    st.none() | LOGPROB,
    NUMBER,
    st.lists(st.builds(frames.Candidate, NUMBER, st.binary(max_size=8), LOGPROB), max_size=2).map(
        tuple
    ),
)
DELTA = st.builds(
    frames.Delta,
    NUMBER,
    TEXT,
    TOKEN_IDS,
    PART,
    NUMBER,
    st.none() | st.sampled_from(["stop", "length"]),
    st.lists(WIRE_LOGPROB, max_size=2).map(tuple),
)
TOKEN_LOGPROB = st.builds(
    TokenLogprob,
    token_id=NUMBER,
    token=st.binary(max_size=8),
    logprob=st.none() | LOGPROB,
    text_offset=NUMBER,
    top=st.lists(
        st.builds(TokenCandidate, token_id=NUMBER, token=st.binary(max_size=8), logprob=LOGPROB),
        max_size=2,
    ).map(tuple),
)
PIECES = st.one_of(
    st.builds(
        TextDelta,
        text=TEXT,
        token_ids=TOKEN_IDS,
        choice_index=NUMBER,
        logprobs=st.lists(TOKEN_LOGPROB, max_size=2).map(tuple),
        reason=st.none() | st.sampled_from(FinishReason),
    ),
    st.builds(ReasoningDelta, text=TEXT, token_ids=TOKEN_IDS, choice_index=NUMBER),
    st.builds(ToolCallStart, index=NUMBER, call_id=TEXT, name=TEXT, choice_index=NUMBER),
    st.builds(ToolCallArguments, index=NUMBER, text=TEXT, choice_index=NUMBER),
)
MESSAGES = st.builds(
    Message,
    role=TEXT,
    content=st.none() | TEXT,
    tool_calls=st.lists(
        st.builds(ToolCall, call_id=TEXT, name=TEXT, arguments=TEXT), max_size=2
    ).map(tuple),
    tool_call_id=st.none() | TEXT,
    name=st.none() | TEXT,
    reasoning_content=st.none() | TEXT,
)
FLOATS = st.binary(max_size=16)
SCORE = st.floats(allow_nan=False)
VECTOR_PIECES = st.one_of(
    st.builds(DenseVectors, indices=TOKEN_IDS, data=FLOATS),
    st.builds(SparseVector, index=NUMBER, token_ids=TOKEN_IDS, weights=FLOATS),
    st.builds(TokenVectors, index=NUMBER, dimensions=NUMBER, data=FLOATS),
    st.builds(Scores, scores=st.lists(SCORE, max_size=4).map(tuple)),
)
SERVER_FRAMES = st.one_of(
    st.builds(frames.Vectors.of, NUMBER, VECTOR_PIECES),
    st.builds(frames.Challenge, NUMBER, st.binary(max_size=40)),
    st.builds(frames.Welcome, st.binary(max_size=40), TEXT),
    st.builds(frames.Close, ERROR),
    st.builds(frames.Accept, NUMBER, NUMBER),
    st.builds(frames.Reject, NUMBER, ERROR),
    st.builds(frames.Chunk, st.lists(DELTA, max_size=5)),
    st.builds(frames.End, NUMBER, TEXT, NUMBER, NUMBER, NUMBER),
    st.builds(frames.Error, NUMBER, ERROR),
    st.builds(frames.Aborted, NUMBER, TEXT),
    st.builds(
        frames.Pong, NUMBER, TEXT, st.dictionaries(TEXT, st.floats(allow_nan=False), max_size=4)
    ),
    st.builds(frames.Progress, st.floats(0, 1), TEXT, TEXT),
    st.builds(frames.Loaded, NUMBER, NUMBER, st.dictionaries(TEXT, TEXT, max_size=3)),
    st.builds(frames.LoadFailed, ERROR),
)
REQUESTS = st.builds(
    GenerationRequest,
    request_id=TEXT.map(RequestId),
    prompt=st.builds(TextPrompt, text=TEXT)
    | st.builds(TokenPrompt, token_ids=st.lists(NUMBER, max_size=5).map(tuple))
    | st.builds(
        ChatPrompt,
        messages=st.lists(MESSAGES, max_size=3).map(tuple),
        template_options=st.dictionaries(TEXT, JSON, max_size=3),
        tools=st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=2).map(tuple),
        tool_choice=st.sampled_from(ToolChoice),
        tool_name=st.none() | TEXT,
        allowed_tools=st.none() | st.lists(TEXT, max_size=3).map(tuple),
        thinking_budget=st.none() | st.integers(0, 2**31 - 1),
        reasoning_effort=st.none() | TEXT,
        parallel_tool_calls=st.booleans(),
        enable_thinking=st.none() | st.booleans(),
    ),
    sampling=st.builds(
        SamplingParams,
        max_tokens=st.none() | st.integers(1, 2**40),
        temperature=st.none() | st.floats(0, 2),
        top_p=st.none() | st.floats(0.01, 1),
        top_k=st.none() | st.integers(-1, 100),
        stop=st.lists(TEXT.filter(bool), max_size=16).map(tuple),
        stop_token_ids=st.lists(NUMBER, max_size=4).map(tuple),
        seed=st.none() | st.integers(-(2**63), 2**64 - 1),
        grammar=st.none()
        | st.builds(Grammar, kind=st.sampled_from(GrammarKind), text=TEXT, field=TEXT),
    ),
    priority=st.integers(-100, 100),
    fairness_key=TEXT,
    cache_salt=TEXT,
)


VECTOR_REQUESTS = st.one_of(
    st.builds(
        EmbeddingRequest,
        request_id=TEXT.map(RequestId),
        inputs=st.lists(TEXT.filter(bool), min_size=1, max_size=3).map(tuple),
        kinds=st.sets(st.sampled_from(VectorKind), min_size=1).map(tuple),
        dimensions=st.none() | st.integers(1, 4096),
        input_type=st.none() | st.sampled_from(InputType),
        truncate_to=st.none() | st.integers(-1, 100).filter(bool),
    ),
    st.builds(
        EmbeddingRequest,
        request_id=TEXT.map(RequestId),
        inputs=st.lists(TOKEN_IDS.filter(bool), min_size=1, max_size=3).map(tuple),
    ),
    st.builds(
        RerankRequest,
        request_id=TEXT.map(RequestId),
        query=TEXT.filter(bool),
        documents=st.lists(TEXT, min_size=1, max_size=3).map(tuple),
        instruction=st.none() | TEXT,
        max_chunks_per_doc=st.none() | st.integers(1, 9),
        max_tokens_per_doc=st.none() | st.integers(1, 9),
    ),
)


def decoder_of_server_frames() -> frames.FrameDecoder:
    decoder = frames.FrameDecoder.of_server_frames()
    decoder.max_frame_bytes = frames.MAX_FRAME_BYTES
    return decoder


@given(st.lists(SERVER_FRAMES, max_size=6), st.data())
def test_frames_come_back_however_the_bytes_are_cut(
    sent: list[frames.Frame], data: st.DataObject
) -> None:
    encoded = b"".join(frames.encode(each) for each in sent)
    cuts = data.draw(st.lists(st.integers(0, len(encoded)), max_size=8))
    decoder = decoder_of_server_frames()

    received = [
        each
        for start, end in pairwise([0, *sorted(cuts), len(encoded)])
        for each in decoder.feed(encoded[start:end])
    ]

    assert received == sent
    assert not decoder.is_mid_frame


@given(PIECES)
def test_a_piece_of_an_answer_comes_back_as_it_was(piece: Delta) -> None:
    sent = frames.encode(frames.Chunk([frames.Delta.of(7, piece)]))

    (received,) = decoder_of_server_frames().feed(sent)

    assert [(delta.stream, delta.event()) for delta in received.deltas] == [(7, piece)]


def test_a_delta_without_its_last_field_is_content() -> None:
    (received,) = decoder_of_server_frames().feed(frame("CHUNK", [[1, "hi", [5]]]))

    assert received.deltas[0].event() == TextDelta(text="hi", token_ids=(5,))


@given(REQUESTS | VECTOR_REQUESTS)
def test_a_request_comes_back_as_it_was(request: ModelRequest) -> None:
    decoder = frames.FrameDecoder.of_client_frames()

    (received,) = decoder.feed(frames.encode_request(3, request))

    assert received.stream == 3
    assert frames.decode_request(received.request, received.kind) == request


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_a_protocol_error_or_an_unfinished_frame(received: bytes) -> None:
    for decoder in (frames.FrameDecoder.of_client_frames(), decoder_of_server_frames()):
        with contextlib.suppress(ProtocolError):
            list(decoder.feed(received))


@given(st.binary(max_size=60))
def test_an_arbitrary_body_is_a_frame_or_a_protocol_error(body: bytes) -> None:
    decoder = frames.FrameDecoder.of_client_frames()
    try:
        received = list(decoder.feed(len(body).to_bytes(4, "big") + body))
    except ProtocolError:
        return

    assert len(received) == 1


def test_a_launch_specification_comes_back_as_it_was() -> None:
    spec = ReplicaSpec(
        replica=ReplicaUid(ModelUid("m"), 2),
        instance=InstanceId("i"),
        source=ModelSource(path="package:guide", stop=("<|im_end|>",), stop_token_ids=(2,)),
        abilities=("chat",),
        engine_options=EngineOptions(
            max_num_seqs=3,
            dtype="float32",
            scheduler_policy=SchedulerPolicy.PREFILL_FIRST,
            enable_prefix_caching=False,
            deterministic=True,
        ),
        python_executable="python",
        envs={"A": "b"},
        request_limits=5,
    )

    (received,) = frames.FrameDecoder.of_client_frames().feed(frames.encode_load(spec))

    assert frames.decode_spec(received.spec) == spec


def test_several_prompts_come_back_as_they_went() -> None:
    request = GenerationRequest(
        request_id=RequestId("r"),
        prompt=TextPrompt(text="a"),
        more_prompts=(TokenPrompt(token_ids=(1, 2)), TextPrompt(text="b")),
    )

    (received,) = frames.FrameDecoder.of_client_frames().feed(frames.encode_request(3, request))

    assert frames.decode_request(received.request) == request


def test_what_a_trace_wants_comes_back_as_it_went() -> None:
    trace = TraceContext(traceparent=f"00-{'1' * 32}-{'2' * 16}-01", request_id="mine")
    for request, kind in (
        (GenerationRequest(request_id=RequestId("r"), prompt=TextPrompt(text="a")), "generate"),
        (EmbeddingRequest(request_id=RequestId("r"), inputs=("a",)), "embed"),
        (RerankRequest(request_id=RequestId("r"), query="a", documents=("b",)), "rerank"),
    ):
        traced = replace(request, trace=trace)
        (received,) = frames.FrameDecoder.of_client_frames().feed(frames.encode_request(3, traced))

        assert frames.decode_request(received.request, kind) == traced


def test_the_bytes_of_a_frame_are_those_of_the_written_protocol() -> None:
    chunk = frames.Chunk([frames.Delta(1, "hi", (5, 6)), frames.Delta(2, "", ())])

    assert frames.encode(chunk) == frame(
        "CHUNK", [[1, "hi", [5, 6], None, 0, None, []], [2, "", [], None, 0, None, []]]
    )
    assert frames.encode(frames.Drain()) == frame("DRAIN")


def test_an_end_without_cached_tokens_and_stop_string_has_none() -> None:
    decoder = decoder_of_server_frames()

    (received,) = decoder.feed(frame("END", 1, "stop", 5, 6))

    assert received == frames.End(1, "stop", 5, 6, 0, None)


def test_a_field_that_a_later_version_adds_is_ignored() -> None:
    (received,) = frames.FrameDecoder.of_client_frames().feed(frame("PING", 7, "later"))

    assert received == frames.Ping(7)


def test_a_frame_above_the_bound_is_refused_by_its_length_alone() -> None:
    decoder = frames.FrameDecoder.of_client_frames()

    with pytest.raises(ProtocolError, match="at most 4096"):
        list(decoder.feed((4097).to_bytes(4, "big")))


def test_what_msgpack_cannot_hold_is_the_callers_mistake() -> None:
    for options in ({"a": object()}, {"a": 2**70}, {"a": "\ud800"}):
        prompt = ChatPrompt(
            messages=(Message(role="user", content="hi"),), template_options=options
        )
        with pytest.raises(InvalidRequest):
            frames.encode_request(0, GenerationRequest(request_id=RequestId("a"), prompt=prompt))


@pytest.mark.parametrize("wire", [{}, {"code": 1}, {"fields": {}}, {"code": "x", "fields": 3}])
def test_an_error_that_is_described_badly_is_an_error_still(wire: dict[str, object]) -> None:
    assert isinstance(str(frames.error_of(wire)), str)


@given(VECTOR_PIECES)
def test_a_piece_of_numbers_comes_back_as_it_was(piece: VectorPiece) -> None:
    (received,) = decoder_of_server_frames().feed(frames.encode(frames.Vectors.of(5, piece)))

    assert (received.stream, received.event()) == (5, piece)


@pytest.mark.parametrize(
    ("kind", "given", "field"),
    [
        ("embed", {"request_id": "r", "inputs": ["a"], "dimension": 3}, ""),
        ("embed", {"request_id": "r", "inputs": []}, "input"),
        ("embed", {"request_id": "r", "inputs": ["a"], "dimensions": 0}, "dimensions"),
        ("rerank", {"request_id": "r", "query": "", "documents": ["a"]}, "query"),
        ("paint", {"request_id": "r"}, "kind"),
    ],
)
def test_a_bad_request_for_numbers_is_refused_by_name(kind: str, given: object, field: str) -> None:
    raw = msgspec.Raw(msgspec.msgpack.encode(given))

    with pytest.raises(InvalidRequest) as caught:
        frames.decode_request(raw, kind)

    assert caught.value.field == field
