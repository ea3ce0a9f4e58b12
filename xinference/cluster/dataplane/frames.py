# SPDX-License-Identifier: Apache-2.0
"""Frames: what travels on a data plane connection, and how it becomes bytes.

A frame is a length, 4 bytes, big-endian, and that many bytes of msgpack: an array whose first
element is the frame's name and whose others are its fields, in the order of the classes below.
Values of `xinference.protocol` travel as maps, errors in the form of `to_wire`.

Pure: bytes in, frames out, and back. `doc/data-plane.md` says who sends what, and when.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, get_type_hints

import msgspec

from xinference.errors import InvalidRequest, ProtocolError, XinferenceError, from_wire
from xinference.identifiers import RequestId
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import (
    ChatPrompt,
    FinishReason,
    GenerationRequest,
    Message,
    Prompt,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenCandidate,
    TokenLogprob,
    TokenPrompt,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
)
from xinference.protocol.generation import Delta as PieceOfAnswer
from xinference.protocol.tracing import TraceContext
from xinference.protocol.vectors import (
    DenseVectors,
    EmbeddingRequest,
    ModelRequest,
    RerankRequest,
    Scores,
    SparseVector,
    TokenVectors,
    VectorPiece,
)

VERSION = 1
LENGTH_BYTES = 4
MAX_FRAME_BYTES = 32 * 1024 * 1024
MAX_HANDSHAKE_FRAME_BYTES = 4 * 1024
"""Until a peer has proved that it knows the key."""
CHUNK_BYTES = 64 * 1024
"""A chunk is closed when it has reached about this size."""

Wire = dict[str, Any]
"""An error as `XinferenceError.to_wire` describes it."""


class Frame(msgspec.Struct, frozen=True, array_like=True):
    """Base of all frames. `tag` is the name that travels."""

    name: ClassVar[str]


# --- handshake


class Challenge(Frame, frozen=True, tag="CHALLENGE"):
    """Server, first: its version, and bytes that nobody has seen before."""

    version: int
    nonce: bytes


class Hello(Frame, frozen=True, tag="HELLO"):
    """Client: whom it wants, as what, and the proof that it knows that instance's key."""

    version: int
    instance: str
    role: str
    nonce: bytes
    proof: bytes


class Welcome(Frame, frozen=True, tag="WELCOME"):
    """Server: its own proof; the connection is open."""

    proof: bytes
    model: str


class Close(Frame, frozen=True, tag="CLOSE"):
    """Server: the last frame of a connection that it refuses or ends, and why."""

    error: Wire


# --- streams


class Req(Frame, frozen=True, tag="REQ"):
    """Client: a request; `stream` is new on this connection."""

    stream: int
    request: msgspec.Raw
    """What `kind` says. Raw, so that a bad one costs its stream and not the connection."""
    kind: str = "generate"
    """generate (a `WireRequest`), embed or rerank."""


class Accept(Frame, frozen=True, tag="ACCEPT"):
    """Server: the request is in the bounded queue."""

    stream: int
    num_prompt_tokens: int


class Reject(Frame, frozen=True, tag="REJECT"):
    """Server: nothing was started; the stream is over."""

    stream: int
    error: Wire


class Thought(msgspec.Struct, frozen=True, array_like=True, tag="thought"):
    """Says of a `Delta` that its text is reasoning."""


class CallStart(msgspec.Struct, frozen=True, array_like=True, tag="call"):
    """Says of a `Delta` without text that the model calls a tool."""

    index: int
    call_id: str
    name: str


class CallArguments(msgspec.Struct, frozen=True, array_like=True, tag="arguments"):
    """Says of a `Delta` that its text is arguments of a call."""

    index: int


class Candidate(msgspec.Struct, frozen=True, array_like=True):
    """A `TokenCandidate`."""

    token_id: int
    token: bytes
    logprob: float


class Logprob(msgspec.Struct, frozen=True, array_like=True):
    """A `TokenLogprob`."""

    token_id: int
    token: bytes
    logprob: float | None
    text_offset: int
    top: tuple[Candidate, ...]


class Delta(msgspec.Struct, frozen=True, array_like=True):
    """One piece of one stream's answer. Not a frame: an element of `Chunk`."""

    stream: int
    text: str
    token_ids: tuple[int, ...]
    part: Thought | CallStart | CallArguments | None = None
    """What the text is; None: content."""
    choice_index: int = 0
    reason: str | None = None
    """Why this choice ends here, if it does and there are others."""
    logprobs: tuple[Logprob, ...] = ()

    @property
    def num_bytes(self) -> int:
        """About how long it is at most: four bytes a character, five a token, nine a logprob."""
        num_bytes = 16 + 4 * len(self.text) + 5 * len(self.token_ids)
        if isinstance(self.part, CallStart):
            num_bytes += 4 * (len(self.part.call_id) + len(self.part.name))
        for one in self.logprobs:
            num_bytes += 32 + len(one.token) + sum(24 + len(each.token) for each in one.top)
        return num_bytes

    @classmethod
    def of(cls, stream: int, delta: PieceOfAnswer) -> "Delta":
        """Return a piece of an answer as it travels."""
        choice = delta.choice_index
        match delta:
            case TextDelta(text=text, token_ids=token_ids, logprobs=logprobs, reason=reason):
                told = tuple(map(_logprob, logprobs))
                return cls(stream, text, token_ids, None, choice, reason, told)
            case ReasoningDelta(text=text, token_ids=token_ids):
                return cls(stream, text, token_ids, Thought(), choice)
            case ToolCallStart(index=index, call_id=call_id, name=name):
                return cls(stream, "", (), CallStart(index, call_id, name), choice)
            case ToolCallArguments(index=index, text=text):
                return cls(stream, text, (), CallArguments(index), choice)

    def event(self) -> PieceOfAnswer:
        """Return the piece of an answer that has travelled.

        Raises:
            ProtocolError: the reason is none.
        """
        choice = self.choice_index
        match self.part:
            case None:
                return TextDelta(
                    text=self.text,
                    token_ids=self.token_ids,
                    choice_index=choice,
                    logprobs=tuple(map(_token_logprob, self.logprobs)),
                    reason=None if self.reason is None else _reason(self.reason),
                )
            case Thought():
                return ReasoningDelta(text=self.text, token_ids=self.token_ids, choice_index=choice)
            case CallStart(index, call_id, name):
                return ToolCallStart(index=index, call_id=call_id, name=name, choice_index=choice)
            case CallArguments(index):
                return ToolCallArguments(index=index, text=self.text, choice_index=choice)


def _reason(name: str) -> FinishReason:
    try:
        return FinishReason(name)
    except ValueError as error:
        raise ProtocolError(problem=f"an unknown reason: {name!r}") from error


def _logprob(one: TokenLogprob) -> Logprob:
    top = tuple(Candidate(each.token_id, each.token, each.logprob) for each in one.top)
    return Logprob(one.token_id, one.token, one.logprob, one.text_offset, top)


def _token_logprob(one: Logprob) -> TokenLogprob:
    return TokenLogprob(
        token_id=one.token_id,
        token=one.token,
        logprob=one.logprob,
        text_offset=one.text_offset,
        top=tuple(
            TokenCandidate(token_id=each.token_id, token=each.token, logprob=each.logprob)
            for each in one.top
        ),
    )


class Chunk(Frame, frozen=True, tag="CHUNK"):
    """Server: what one step of the engine gave to all streams of this connection."""

    deltas: list[Delta]


class Dense(msgspec.Struct, frozen=True, array_like=True, tag="dense"):
    """`DenseVectors`."""

    indices: tuple[int, ...]
    data: bytes


class Sparse(msgspec.Struct, frozen=True, array_like=True, tag="sparse"):
    """A `SparseVector`."""

    index: int
    token_ids: tuple[int, ...]
    weights: bytes


class Tokens(msgspec.Struct, frozen=True, array_like=True, tag="tokens"):
    """`TokenVectors`."""

    index: int
    dimensions: int
    data: bytes


class Scored(msgspec.Struct, frozen=True, array_like=True, tag="scores"):
    """`Scores`."""

    scores: tuple[float, ...]


class Vectors(Frame, frozen=True, tag="VECTORS"):
    """Server: a piece of the answer of one stream that asked for vectors or scores."""

    stream: int
    piece: Dense | Sparse | Tokens | Scored

    @classmethod
    def of(cls, stream: int, piece: VectorPiece) -> "Vectors":
        """Return a piece of an answer as it travels."""
        match piece:
            case DenseVectors(indices=indices, data=data):
                return cls(stream, Dense(indices, data))
            case SparseVector(index=index, token_ids=token_ids, weights=weights):
                return cls(stream, Sparse(index, token_ids, weights))
            case TokenVectors(index=index, dimensions=dimensions, data=data):
                return cls(stream, Tokens(index, dimensions, data))
            case Scores(scores=scores):
                return cls(stream, Scored(scores))

    def event(self) -> VectorPiece:
        """Return the piece of an answer that has travelled."""
        match self.piece:
            case Dense(indices, data):
                return DenseVectors(indices=indices, data=data)
            case Sparse(index, token_ids, weights):
                return SparseVector(index=index, token_ids=token_ids, weights=weights)
            case Tokens(index, dimensions, data):
                return TokenVectors(index=index, dimensions=dimensions, data=data)
            case Scored(scores):
                return Scores(scores=scores)


class End(Frame, frozen=True, tag="END"):
    """Server: the answer is whole; the stream is over."""

    stream: int
    reason: str
    num_prompt_tokens: int
    num_completion_tokens: int
    num_cached_tokens: int = 0
    stop_string: str | None = None
    num_reasoning_tokens: int = 0


class Error(Frame, frozen=True, tag="ERROR"):
    """Server: the answer ends here without being whole; the stream is over."""

    stream: int
    error: Wire


class Abort(Frame, frozen=True, tag="ABORT"):
    """Client: stop this stream; nothing more of it is wanted."""

    stream: int


# --- questions


class AbortRequest(Frame, frozen=True, tag="ABORT_REQUEST"):
    """Client: stop a request by its id, and refuse that id for a while."""

    seq: int
    request_id: str
    block_seconds: float


class Aborted(Frame, frozen=True, tag="ABORTED"):
    """Server: the answer to `AbortRequest`: an `AbortOutcome`."""

    seq: int
    outcome: str


class Ping(Frame, frozen=True, tag="PING"):
    """Client: are you there, and how is it going?"""

    seq: int


class Pong(Frame, frozen=True, tag="PONG"):
    """Server: the answer to `Ping`: a `ReplicaState` and the engine's counters."""

    seq: int
    state: str
    counters: dict[str, float]


# --- control, role "actor" only


class Load(Frame, frozen=True, tag="LOAD"):
    """Client: become this model. The same again joins the first."""

    spec: msgspec.Raw
    """A `ReplicaSpec`."""


class Progress(Frame, frozen=True, tag="PROGRESS"):
    """Server: how far loading is, from 0 to 1."""

    progress: float
    stage: str
    info: str


class Loaded(Frame, frozen=True, tag="LOADED"):
    """Server: the replica answers requests from now on."""

    context_length: int
    max_num_seqs: int
    config: dict[str, str | int | float | bool | None]
    virtual_env_packages: dict[str, str] | None = None


class LoadFailed(Frame, frozen=True, tag="LOAD_FAILED"):
    """Server: it does not load, and will not."""

    error: Wire


class Drain(Frame, frozen=True, tag="DRAIN"):
    """Client: take no new requests; finish those you have."""


class Stop(Frame, frozen=True, tag="STOP"):
    """Client: take no new requests, and end the process when those you have are over."""

    grace_seconds: float = 0.0
    """After so long, fail what still runs."""


ClientFrame = Hello | Req | Abort | AbortRequest | Ping | Load | Drain | Stop
ServerFrame = (
    Challenge
    | Welcome
    | Close
    | Accept
    | Reject
    | Chunk
    | Vectors
    | End
    | Error
    | Aborted
    | Pong
    | Progress
    | Loaded
    | LoadFailed
)


# --- requests on the wire


class WireChat(msgspec.Struct, frozen=True, tag_field="kind", tag="chat"):
    """A `ChatPrompt`."""

    messages: list[Message]
    template_options: dict[str, Any]
    tools: list[dict[str, Any]] = []
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str | None = None
    parallel_tool_calls: bool = True
    enable_thinking: bool | None = None
    allowed_tools: tuple[str, ...] | None = None
    thinking_budget: int | None = None
    reasoning_effort: str | None = None


class WireText(msgspec.Struct, frozen=True, tag_field="kind", tag="text"):
    """A `TextPrompt`."""

    text: str


class WireTokens(msgspec.Struct, frozen=True, tag_field="kind", tag="tokens"):
    """A `TokenPrompt`."""

    token_ids: tuple[int, ...]


class WireRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A `GenerationRequest`, its prompt tagged with its kind."""

    request_id: str
    prompt: WireChat | WireText | WireTokens
    sampling: SamplingParams
    priority: int = 0
    fairness_key: str = ""
    cache_salt: str = ""
    resume_token_ids: tuple[int, ...] = ()
    count_only: bool = False
    max_total_tokens: int | None = None
    more_prompts: tuple[WireText | WireTokens, ...] = ()
    trace: TraceContext | None = None


def _closed(value_type: type[Any]) -> type[msgspec.Struct]:
    """Return a struct with the fields of a dataclass that refuses every other field."""
    hints = get_type_hints(value_type)
    own: list[Any] = [
        (field.name, hints[field.name])
        if field.default is dataclasses.MISSING
        else (field.name, hints[field.name], field.default)
        for field in dataclasses.fields(value_type)
    ]
    return msgspec.defstruct(
        value_type.__name__, own, frozen=True, kw_only=True, forbid_unknown_fields=True
    )


_encoder = msgspec.msgpack.Encoder()
_request_decoder = msgspec.msgpack.Decoder(WireRequest)
_VECTOR_REQUESTS: Mapping[str, type[EmbeddingRequest] | type[RerankRequest]] = {
    "embed": EmbeddingRequest,
    "rerank": RerankRequest,
}
_vector_decoders = {
    kind: msgspec.msgpack.Decoder(_closed(request)) for kind, request in _VECTOR_REQUESTS.items()
}
_spec_decoder = msgspec.msgpack.Decoder(ReplicaSpec)
_client_frames = msgspec.msgpack.Decoder(ClientFrame)
_server_frames = msgspec.msgpack.Decoder(ServerFrame)


def encode(frame: Frame) -> bytes:
    """Return the frame as it travels, its length in front.

    Raises:
        InvalidRequest: it would be larger than a frame may be, or holds what msgpack cannot.
    """
    try:
        body = _encoder.encode(frame)
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise InvalidRequest(field="", problem=f"cannot be sent: {error}") from error
    if len(body) > MAX_FRAME_BYTES:
        raise InvalidRequest(
            field="", problem=f"is {len(body)} bytes, more than the {MAX_FRAME_BYTES} of a frame"
        )
    return len(body).to_bytes(LENGTH_BYTES, "big") + body


def encode_request(stream: int, request: ModelRequest) -> bytes:
    """Return the REQ frame of a request.

    Raises:
        InvalidRequest: it is larger than a frame may be, or holds what msgpack cannot.
    """
    if not isinstance(request, GenerationRequest):
        kind = next(kind for kind, given in _VECTOR_REQUESTS.items() if isinstance(request, given))
        return encode(Req(stream, _raw(request), kind))
    prompt = request.prompt
    match prompt:
        case ChatPrompt():
            wire: WireChat | WireText | WireTokens = WireChat(
                list(prompt.messages),
                prompt.template_options,
                list(prompt.tools),
                prompt.tool_choice,
                prompt.tool_name,
                prompt.parallel_tool_calls,
                prompt.enable_thinking,
                prompt.allowed_tools,
                prompt.thinking_budget,
                prompt.reasoning_effort,
            )
        case TextPrompt() | TokenPrompt():
            wire = _wire_prompt(prompt)
    wire_request = WireRequest(
        request.request_id,
        wire,
        request.sampling,
        priority=request.priority,
        fairness_key=request.fairness_key,
        cache_salt=request.cache_salt,
        more_prompts=tuple(map(_wire_prompt, request.more_prompts)),
        resume_token_ids=request.resume_token_ids,
        count_only=request.count_only,
        max_total_tokens=request.max_total_tokens,
        trace=request.trace,
    )
    return encode(Req(stream, _raw(wire_request)))


def decode_request(raw: msgspec.Raw, kind: str = "generate") -> ModelRequest:
    """Read what a REQ frame carries, and as what.

    Raises:
        InvalidRequest: its kind is unknown; a field is missing, unknown or has a bad value.
    """
    if kind in _VECTOR_REQUESTS:
        given = _read(_vector_decoders[kind], raw)
        return _VECTOR_REQUESTS[kind](**msgspec.structs.asdict(given))
    if kind != "generate":
        raise InvalidRequest(field="kind", problem=f"{kind[:60]!r} is none that is known")
    wire: WireRequest = _read(_request_decoder, raw)
    prompt: Prompt
    match wire.prompt:
        case WireChat():
            prompt = ChatPrompt(
                messages=tuple(wire.prompt.messages),
                template_options=wire.prompt.template_options,
                tools=tuple(wire.prompt.tools),
                tool_choice=wire.prompt.tool_choice,
                tool_name=wire.prompt.tool_name,
                parallel_tool_calls=wire.prompt.parallel_tool_calls,
                enable_thinking=wire.prompt.enable_thinking,
                allowed_tools=wire.prompt.allowed_tools,
                thinking_budget=wire.prompt.thinking_budget,
                reasoning_effort=wire.prompt.reasoning_effort,
            )
        case WireText() | WireTokens():
            prompt = _prompt(wire.prompt)
    return GenerationRequest(
        request_id=RequestId(wire.request_id),
        prompt=prompt,
        sampling=wire.sampling,
        priority=wire.priority,
        fairness_key=wire.fairness_key,
        cache_salt=wire.cache_salt,
        more_prompts=tuple(map(_prompt, wire.more_prompts)),
        resume_token_ids=wire.resume_token_ids,
        count_only=wire.count_only,
        max_total_tokens=wire.max_total_tokens,
        trace=wire.trace,
    )


def _wire_prompt(prompt: TextPrompt | TokenPrompt) -> WireText | WireTokens:
    if isinstance(prompt, TextPrompt):
        return WireText(prompt.text)
    return WireTokens(prompt.token_ids)


def _prompt(wire: WireText | WireTokens) -> TextPrompt | TokenPrompt:
    if isinstance(wire, WireText):
        return TextPrompt(text=wire.text)
    return TokenPrompt(token_ids=wire.token_ids)


def encode_load(spec: ReplicaSpec) -> bytes:
    """Return the LOAD frame of a specification.

    Raises:
        InvalidRequest: it is larger than a frame may be.
    """
    return encode(Load(_raw(spec)))


def decode_spec(raw: msgspec.Raw) -> ReplicaSpec:
    """Read what a LOAD frame carries.

    Raises:
        InvalidRequest: a field is missing or has a bad value.
    """
    spec: ReplicaSpec = _read(_spec_decoder, raw)
    return spec


def _raw(value: object) -> msgspec.Raw:
    try:
        return msgspec.Raw(_encoder.encode(value))
    except (TypeError, OverflowError, ValueError, RecursionError) as error:
        raise InvalidRequest(field="", problem=f"cannot be sent: {error}") from error


def _read(decoder: msgspec.msgpack.Decoder[Any], raw: msgspec.Raw) -> Any:
    try:
        return decoder.decode(raw)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise InvalidRequest(field="", problem=str(error)) from error


def error_of(wire: Wire) -> XinferenceError:
    """Rebuild an error that a peer described; a description that is none is a `ProtocolError`."""
    try:
        return from_wire(wire)
    except (KeyError, TypeError, ValueError) as error:
        return ProtocolError(problem=f"a malformed error: {error!r}")


class FrameDecoder:
    """Bytes in, in pieces of any size; whole frames out, in order.

    Once it has raised, it must not be fed again: the peer is out of step.
    """

    def __init__(self, decoder: msgspec.msgpack.Decoder[Any], *, max_frame_bytes: int) -> None:
        self._decoder = decoder
        self._buffer = bytearray()
        self.max_frame_bytes = max_frame_bytes

    @classmethod
    def of_client_frames(cls) -> "FrameDecoder":
        """Return the one that a server reads with; small frames only until it is told more."""
        return cls(_client_frames, max_frame_bytes=MAX_HANDSHAKE_FRAME_BYTES)

    @classmethod
    def of_server_frames(cls) -> "FrameDecoder":
        """Return the one that a client reads with; small frames only until it is told more."""
        return cls(_server_frames, max_frame_bytes=MAX_HANDSHAKE_FRAME_BYTES)

    @property
    def is_mid_frame(self) -> bool:
        """Whether the bytes so far end inside a frame."""
        return bool(self._buffer)

    def feed(self, received: bytes) -> Iterator[Any]:
        """Yield the frames that these bytes complete.

        Raises:
            ProtocolError: a declared length is above the bound, or the bytes are no frame.
        """
        self._buffer += received
        start = 0
        try:
            while len(self._buffer) - start >= LENGTH_BYTES:
                body = start + LENGTH_BYTES
                length = int.from_bytes(self._buffer[start:body], "big")
                if length > self.max_frame_bytes:
                    raise ProtocolError(
                        problem=f"a frame of {length} bytes; at most {self.max_frame_bytes} here"
                    )
                if len(self._buffer) - body < length:
                    break
                # Why bytes(): a Raw field is a view of what was decoded, and the buffer moves.
                frame = self._decode(bytes(self._buffer[body : body + length]))
                start = body + length
                yield frame
        finally:
            del self._buffer[:start]

    def _decode(self, body: bytes) -> Any:
        try:
            return self._decoder.decode(body)
        except (msgspec.MsgspecError, ValueError, RecursionError) as error:
            raise ProtocolError(problem=f"not a frame: {error}") from error
