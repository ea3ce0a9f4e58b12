# SPDX-License-Identifier: Apache-2.0
"""The gateway's and the model actor's end of the data plane: one connection to one replica.

In: requests, questions and, for an actor, orders. Out: accepted streams and answers. The
connection's own task always reads, so one slow consumer never stops the others: what it has not
taken waits in a bounded buffer, and its stream is aborted when that overflows.

Everything here belongs to one event loop.
"""

import asyncio
import contextlib
import itertools
import logging
from collections import deque
from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

from xinference.errors import (
    PeerUnreachable,
    ProtocolError,
    ReplicaLost,
    RequestAborted,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, RequestId
from xinference.protocol.deployment import AbortOutcome, ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallStart,
    Usage,
)
from xinference.protocol.vectors import (
    DenseVectors,
    ModelRequest,
    Scores,
    SparseVector,
    TokenVectors,
    VectorPiece,
    VectorRequest,
)

from . import frames
from .address import UnixAddress, parse_address
from .handshake import Transcript, is_same, new_nonce
from .service import OnProgress, ReplicaLoad, ReplicaReport
from .tls import client_tls, digest_of

logger = logging.getLogger(__name__)

READ_BYTES = 256 * 1024
PING_SECONDS = 10.0
SILENCE_SECONDS = 30.0
"""A replica from which nothing comes for so long, pings and all, is lost."""
CLOSE_SECONDS = 1.0
"""How long what was sent last may take to leave when a connection is closed."""
MAX_BUFFERED_EVENTS = 8192
MAX_BUFFERED_CHARS = 4 * 1024 * 1024
"""What one stream may hold that its consumer has not taken."""

Answer = TypeVar("Answer")
Piece = TypeVar("Piece", bound=Delta | VectorPiece)


class ReplicaStream(Generic[Piece]):
    """An accepted request: zero or more pieces, then one `Finished`, or it raises.

    Implements `GenerationStream` and `VectorStream`. It belongs to one task, which iterates it to
    its end or calls `aclose`; cancelling a wait for the next event loses none. Of a resumed request
    it gives what comes after the tokens that the request has brought.
    """

    def __init__(self, connection: "ReplicaConnection", stream: int, request: ModelRequest) -> None:
        self._connection = connection
        self._stream = stream
        self._request_id = request.request_id
        resumed = request.resume_token_ids if isinstance(request, GenerationRequest) else ()
        self._num_repeated = len(resumed)
        """Tokens that are still to come for the second time."""
        self._is_repeating = False
        self._accepted: Accepted | None = None
        self._events: deque[Piece | Finished | Failed] = deque()
        self._num_chars = 0
        self._arrival: asyncio.Future[None] | None = None
        """What the consumer waits for. Why no event: each of its waits makes such a one."""
        self._is_over = False
        """Nothing more will arrive: the last event is in the buffer, or the stream is closed."""

    @property
    def accepted(self) -> Accepted:
        """What the replica said when it took the request."""
        assert self._accepted is not None, "generate() returns accepted streams only"
        return self._accepted

    def __aiter__(self) -> Self:
        """Iterate once."""
        return self

    async def __anext__(self) -> Piece | Finished:
        """Return the next event.

        Raises:
            StopAsyncIteration: `Finished` was the last, or the stream was closed.
            ReplicaLost: the connection ended before the stream did.
            RequestAborted: this consumer fell too far behind.
            XinferenceError: the engine failed this request.
        """
        while not self._events:
            if self._is_over:
                raise StopAsyncIteration
            await self._wait()
        event = self._events.popleft()
        if isinstance(event, Failed):
            raise event.error
        if not isinstance(event, Finished):
            self._num_chars -= _num_chars(event)
        return event

    async def aclose(self) -> None:
        """Abort the request unless it has ended. Returns at once; may be called again."""
        self._events.clear()
        if not self._is_over:
            self._is_over = True
            self._wake()
            self._connection._forget(self._stream)

    # --- called by the connection

    async def _wait_accepted(self) -> None:
        while self._accepted is None and not self._events:
            await self._wait()
        if self._accepted is None:
            refused = self._events.popleft()
            assert isinstance(refused, Failed), f"{refused} before ACCEPT"
            raise refused.error

    async def _wait(self) -> None:
        """Return when something may have arrived."""
        self._arrival = asyncio.get_running_loop().create_future()
        try:
            await self._arrival
        finally:
            self._arrival = None

    def _wake(self) -> None:
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _accept(self, num_prompt_tokens: int) -> None:
        self._accepted = Accepted(num_prompt_tokens=num_prompt_tokens)
        self._wake()

    def _check_accepted(self, frame: str) -> None:
        if self._accepted is None:
            raise ProtocolError(problem=f"{frame} before ACCEPT on stream {self._stream}")

    def _is_repeated(self, piece: Piece) -> bool:
        """Return whether a piece of a resumed answer is what was generated before.

        Of the pieces of one token the first has it, and those behind it have none.
        """
        if not self._is_repeating and not self._num_repeated:
            return False
        num_tokens = len(piece.token_ids) if isinstance(piece, TextDelta | ReasoningDelta) else 0
        if num_tokens or self._num_repeated:
            self._is_repeating = self._num_repeated > 0
            self._num_repeated = max(0, self._num_repeated - num_tokens)
        return self._is_repeating

    def _push(self, piece: Piece) -> None:
        if self._is_repeated(piece):
            return
        self._num_chars += _num_chars(piece)
        if len(self._events) >= MAX_BUFFERED_EVENTS or self._num_chars > MAX_BUFFERED_CHARS:
            logger.warning("request %s: its consumer is too slow; aborted", self._request_id)
            self._abort(RequestAborted(request_id=self._request_id))
        else:
            self._events.append(piece)
            self._wake()

    def _give_up(self, timeout_seconds: float) -> None:
        self._abort(self._connection._no_answer(timeout_seconds))

    def _abort(self, error: XinferenceError) -> None:
        """Abort the request, and let its consumer know why."""
        self._connection._forget(self._stream)
        self._finish(Failed(error=error))

    def _finish(self, last: Finished | Failed) -> None:
        self._is_over = True
        self._events.append(last)
        self._wake()


class ReplicaConnection:
    """A welcomed connection to one instance of a replica. Made by `open`, ended by `aclose`.

    When it is lost, every stream and every question on it raises `ReplicaLost`, and it cannot be
    used again; `closed` is set.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: frames.FrameDecoder,
        model: ModelUid,
        *,
        ping_seconds: float,
        silence_seconds: float,
    ) -> None:
        self.model = model
        self.closed = asyncio.Event()
        self.has_said_goodbye = False
        """Whether the replica said that it ends; without it, it crashed or cannot be reached."""
        self._reader = reader
        self._writer = writer
        self._decoder = decoder
        self._silence_seconds = silence_seconds
        self._streams: dict[int, ReplicaStream[Any]] = {}
        self._stream_numbers = itertools.count()
        self._questions: dict[int, asyncio.Future[object]] = {}
        self._seqs = itertools.count()
        self._loading: asyncio.Future[object] | None = None
        self._on_progress: OnProgress | None = None
        self._lost: ReplicaLost | None = None
        self._unsent: list[bytes] = []
        self._heard_at = asyncio.get_running_loop().time()
        self._reading = asyncio.create_task(self._read(), name="data plane read")
        self._pinging = asyncio.create_task(self._ping_now_and_then(ping_seconds))

    @classmethod
    async def open(
        cls,
        address: str,
        *,
        instance: InstanceId,
        key: bytes,
        role: str,
        timeout_seconds: float,
        ping_seconds: float = PING_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> Self:
        """Connect and prove both ends to each other.

        Args:
            address: "unix:<path>", "tcp:host:port" or "tls:host:port".
            key: of this instance, by `instance_key`.
            role: "gateway", or "actor" for the one that may load and stop it.

        Raises:
            PeerUnreachable: nobody answers there, or another instance does.
            ProtocolError: the other end has another key or version, or speaks something else.
            InvalidRequest: the address is malformed.
        """
        where = parse_address(address)
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout_seconds):
                if isinstance(where, UnixAddress):
                    reader, writer = await asyncio.open_unix_connection(where.path)
                else:
                    reader, writer = await asyncio.open_connection(
                        where.address.host,
                        where.address.port,
                        ssl=client_tls() if where.is_encrypted else None,
                    )
                decoder = frames.FrameDecoder.of_server_frames()
                model = await _shake_hands(reader, writer, decoder, instance, key, role)
        except (OSError, EOFError) as error:  # TimeoutError is an OSError
            await _discard(writer)
            problem = str(error) or f"no answer within {timeout_seconds:g} s"
            raise PeerUnreachable(peer=f"replica at {address}", problem=problem) from error
        except BaseException:
            await _discard(writer)
            raise
        return cls(
            reader,
            writer,
            decoder,
            model,
            ping_seconds=ping_seconds,
            silence_seconds=silence_seconds,
        )

    @property
    def is_closed(self) -> bool:
        """Whether it was lost or closed."""
        return self._lost is not None

    @property
    def num_streams(self) -> int:
        """Requests of this connection that have not ended."""
        return len(self._streams)

    async def generate(
        self, request: GenerationRequest, *, timeout_seconds: float
    ) -> ReplicaStream[Delta]:
        """Send a request for text. See `request`."""
        return await self.request(request, timeout_seconds=timeout_seconds)

    async def compute(
        self, request: VectorRequest, *, timeout_seconds: float
    ) -> ReplicaStream[VectorPiece]:
        """Send a request for vectors or scores. See `request`."""
        return await self.request(request, timeout_seconds=timeout_seconds)

    async def request(self, request: ModelRequest, *, timeout_seconds: float) -> ReplicaStream[Any]:
        """Send a request; return when the replica has accepted it.

        A caller that is cancelled meanwhile, or that runs out of time, leaves nothing behind.

        Raises:
            ReplicaLost: the connection is lost, or there was no answer in time.
            XinferenceError: the replica refused it; nothing was started.
        """
        self._check_open()
        number = next(self._stream_numbers)
        encoded = frames.encode_request(number, request)
        stream: ReplicaStream[Any] = ReplicaStream(self, number, request)
        self._streams[number] = stream
        # Why neither a timeout around it nor a wait for the socket: both cost every request, and
        # its answer waits for the socket anyway.
        late = asyncio.get_running_loop().call_later(
            timeout_seconds, stream._give_up, timeout_seconds
        )
        try:
            self._write(encoded)
            await stream._wait_accepted()
        except BaseException:
            await stream.aclose()
            raise
        finally:
            late.cancel()
        return stream

    async def abort_request(
        self, request_id: RequestId, *, block_seconds: float, timeout_seconds: float
    ) -> AbortOutcome:
        """Abort a request of any connection; for `block_seconds` its id is refused afterwards.

        Raises:
            ReplicaLost
        """
        return await self._ask(
            lambda seq: frames.AbortRequest(seq, request_id, block_seconds),
            AbortOutcome,
            timeout_seconds,
        )

    async def ping(self, timeout_seconds: float) -> ReplicaLoad:
        """Return the replica's state and the engine's counters.

        Raises:
            ReplicaLost
        """
        return await self._ask(frames.Ping, ReplicaLoad, timeout_seconds)

    async def load(
        self, spec: ReplicaSpec, *, on_progress: OnProgress, timeout_seconds: float
    ) -> ReplicaReport:
        """Tell the replica what to become; return when it is ready. Actors only, one at a time.

        The same specification again joins the load that is under way, or has ended.

        Raises:
            LoadFailed, InvalidRequest: it does not load; end the process.
            ReplicaLost: the connection ended, or the time was up.
        """
        self._check_open()
        assert self._loading is None, "one load at a time"
        self._loading = asyncio.get_running_loop().create_future()
        self._on_progress = on_progress
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._send(frames.encode_load(spec))
                return _expect(ReplicaReport, await self._loading)
        except TimeoutError:
            raise self._no_answer(timeout_seconds) from None
        finally:
            self._loading = self._on_progress = None

    async def drain(self) -> None:
        """Tell the replica to take no new requests. Actors only.

        Raises:
            ReplicaLost
        """
        self._check_open()
        await self._send(frames.encode(frames.Drain()))

    async def stop(self, *, grace_seconds: float = 0.0) -> None:
        """Tell the replica to exit; `closed` is set when it has. Actors only.

        It takes no new requests, and ends those it has, for so long; what is left then fails.

        Raises:
            ReplicaLost
        """
        self._check_open()
        await self._send(frames.encode(frames.Stop(grace_seconds)))

    async def aclose(self) -> None:
        """Close the connection; the replica aborts what still runs on it."""
        self._lose("the connection was closed")
        # Why gather: both tasks were cancelled by _lose and end at once; their errors are theirs.
        await asyncio.gather(self._reading, self._pinging, return_exceptions=True)
        with contextlib.suppress(OSError):  # TimeoutError is one
            async with asyncio.timeout(CLOSE_SECONDS):
                await self._writer.wait_closed()
        await _discard(self._writer)

    # --- out

    def _check_open(self) -> None:
        if self._lost is not None:
            raise self._again(self._lost)

    async def _send(self, encoded: bytes) -> None:
        self._check_open()
        self._write(encoded)
        try:
            await self._writer.drain()
        except OSError as error:
            self._lose(str(error))
            self._check_open()

    def _write(self, encoded: bytes) -> None:
        """Send a frame when the event loop turns, with what else there is by then.

        Why not at once: requests come in bunches, and a system call for each costs as much as all
        of its parsing.
        """
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self._flush)
        self._unsent.append(encoded)

    def _flush(self) -> None:
        if self._unsent and not self._writer.is_closing():
            self._writer.write(b"".join(self._unsent))
        self._unsent.clear()

    async def _ask(
        self,
        question: Callable[[int], frames.Frame],
        answer_type: type[Answer],
        timeout_seconds: float,
    ) -> Answer:
        self._check_open()
        seq = next(self._seqs)
        waiting: asyncio.Future[object] = asyncio.get_running_loop().create_future()
        self._questions[seq] = waiting
        try:
            async with asyncio.timeout(timeout_seconds):
                await self._send(frames.encode(question(seq)))
                return _expect(answer_type, await waiting)
        except TimeoutError:
            raise self._no_answer(timeout_seconds) from None
        finally:
            del self._questions[seq]

    def _forget(self, stream: int) -> None:
        """Drop a stream and tell the replica, unless it has ended."""
        if self._streams.pop(stream, None) is not None and not self.is_closed:
            self._write(frames.encode(frames.Abort(stream)))

    def _no_answer(self, timeout_seconds: float) -> ReplicaLost:
        return ReplicaLost(model=self.model, problem=f"no answer within {timeout_seconds:g} s")

    @staticmethod
    def _again(error: ReplicaLost) -> ReplicaLost:
        # Why a copy: an exception that several tasks raise would mix their tracebacks.
        return ReplicaLost(model=error.model, problem=error.problem)

    async def _ping_now_and_then(self, ping_seconds: float) -> None:
        """Send pings, and lose the connection when nothing at all is heard."""
        loop = asyncio.get_running_loop()
        ping_at = loop.time() + ping_seconds
        while True:
            # Why no timeout around each read: that would cost every token.
            silent_at = self._heard_at + self._silence_seconds
            await asyncio.sleep(max(0.0, min(ping_at, silent_at) - loop.time()))
            if loop.time() >= self._heard_at + self._silence_seconds:
                self._lose(f"nothing heard of it for {self._silence_seconds:g} s")
                return
            if loop.time() >= ping_at:
                # Why no waiting for the PONG: any frame is a sign of life.
                self._write(frames.encode(frames.Ping(next(self._seqs))))
                ping_at += ping_seconds

    # --- in

    async def _read(self) -> None:
        problem = "the connection was closed"
        loop = asyncio.get_running_loop()
        try:
            while True:
                received = await self._reader.read(READ_BYTES)
                if not received:
                    break
                self._heard_at = loop.time()
                for frame in self._decoder.feed(received):
                    self._on_frame(frame)
            problem = "its connection ended"
        except OSError as error:
            problem = f"its connection broke: {error}"
        except ReplicaLost as error:
            self.has_said_goodbye = True
            problem = error.problem
        except XinferenceError as error:
            problem = str(error)
        except Exception:
            logger.exception("a frame of model %s could not be handled", self.model)
            problem = "a frame could not be handled"
        finally:
            self._lose(problem)

    def _on_frame(self, frame: frames.ServerFrame) -> None:
        match frame:
            case frames.Chunk(deltas):
                for delta in deltas:
                    if (stream := self._streams.get(delta.stream)) is not None:
                        stream._check_accepted("CHUNK")
                        stream._push(delta.event())
            case frames.Vectors(number):
                if (stream := self._streams.get(number)) is not None:
                    stream._check_accepted("VECTORS")
                    stream._push(frame.event())
            case frames.Accept(number, num_prompt_tokens):
                if (stream := self._streams.get(number)) is not None:
                    stream._accept(num_prompt_tokens)
            case frames.End(stream=number):
                if (stream := self._streams.get(number)) is not None:
                    stream._check_accepted("END")
                self._end(number, _finished(frame))
            case frames.Error(number, error) | frames.Reject(number, error):
                self._end(number, Failed(error=frames.error_of(error)))
            case frames.Pong(seq, state, counters):
                load = ReplicaLoad(state=_known(ReplicaState, state), counters=counters)
                _answer(self._questions.get(seq), load)
            case frames.Aborted(seq, outcome):
                _answer(self._questions.get(seq), _known(AbortOutcome, outcome))
            case frames.Progress(progress, stage, info):
                if self._on_progress is not None:
                    self._on_progress(progress, stage, info)
            case frames.Loaded(context_length, max_num_seqs, config, packages):
                report = ReplicaReport(
                    context_length=context_length,
                    max_num_seqs=max_num_seqs,
                    config=config,
                    virtual_env_packages=packages,
                )
                _answer(self._loading, report)
            case frames.LoadFailed(error):
                _answer(self._loading, frames.error_of(error))
            case frames.Close(error):
                raise frames.error_of(error)
            case frames.Challenge() | frames.Welcome():
                raise ProtocolError(problem=f"{type(frame).__name__} after the handshake")

    def _end(self, number: int, last: Finished | Failed) -> None:
        if (stream := self._streams.pop(number, None)) is not None:
            stream._finish(last)

    def _lose(self, problem: str) -> None:
        if self._lost is not None:
            return
        lost = self._lost = ReplicaLost(model=self.model, problem=problem)
        streams, self._streams = list(self._streams.values()), {}
        for stream in streams:
            stream._finish(Failed(error=self._again(lost)))
        for waiting in (*self._questions.values(), self._loading):
            _answer(waiting, self._again(lost))
        self._reading.cancel()
        self._pinging.cancel()
        self._flush()
        self._writer.close()
        self.closed.set()


async def _shake_hands(
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
    decoder: frames.FrameDecoder,
    instance: InstanceId,
    key: bytes,
    role: str,
) -> ModelUid:
    """Prove this end, check the other, and return the model that it serves."""
    challenge = await _next_frame(reader, decoder, frames.Challenge)
    if challenge.version != frames.VERSION:
        raise ProtocolError(
            problem=f"this end speaks version {frames.VERSION}, the other {challenge.version}"
        )
    transcript = Transcript(
        version=frames.VERSION,
        instance=instance,
        role=role,
        challenge=challenge.nonce,
        nonce=new_nonce(),
        certificate=_digest_of_peer(writer),
    )
    proof = transcript.client_proof(key)
    hello = frames.Hello(frames.VERSION, instance, role, transcript.nonce, proof)
    writer.write(frames.encode(hello))
    welcome = await _next_frame(reader, decoder, frames.Welcome)
    if not is_same(welcome.proof, transcript.server_proof(key)):
        raise ProtocolError(problem="the replica could not prove that it knows its key")
    decoder.max_frame_bytes = frames.MAX_FRAME_BYTES
    return ModelUid(welcome.model)


def _digest_of_peer(writer: asyncio.StreamWriter) -> bytes:
    """Return the digest of the certificate that the other end has shown; empty without TLS."""
    encryption = writer.get_extra_info("ssl_object")
    return b"" if encryption is None else digest_of(encryption.getpeercert(binary_form=True))


Wanted = TypeVar("Wanted", bound=frames.Frame)


async def _next_frame(
    reader: asyncio.StreamReader, decoder: frames.FrameDecoder, wanted: type[Wanted]
) -> Wanted:
    while True:
        received = await reader.read(frames.MAX_HANDSHAKE_FRAME_BYTES)
        if not received:
            raise EOFError("closed during the handshake")
        # Invariant: the server says nothing between CHALLENGE and WELCOME, nor after WELCOME
        # before it is asked, so there is at most one frame.
        for frame in decoder.feed(received):
            if isinstance(frame, frames.Close):
                raise frames.error_of(frame.error)
            if not isinstance(frame, wanted):
                raise ProtocolError(problem=f"{type(frame).__name__} instead of {wanted.__name__}")
            return frame


async def _discard(writer: asyncio.StreamWriter | None) -> None:
    """Close at once; what is unsent is lost."""
    if writer is not None:
        writer.transport.abort()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


def _answer(waiting: asyncio.Future[object] | None, answer: object) -> None:
    """Give an answer to whoever waits for it, if anybody still does.

    Why an error is given as a result: one that nobody takes must not be reported as lost.
    """
    if waiting is not None and not waiting.done():
        waiting.set_result(answer)


def _expect(answer_type: type[Answer], answer: object) -> Answer:
    if isinstance(answer, XinferenceError):
        raise answer
    if not isinstance(answer, answer_type):
        raise ProtocolError(problem=f"{answer} is no {answer_type.__name__}")
    return answer


def _finished(frame: frames.End) -> Finished:
    usage = Usage(
        num_prompt_tokens=frame.num_prompt_tokens,
        num_completion_tokens=frame.num_completion_tokens,
        num_cached_tokens=frame.num_cached_tokens,
        num_reasoning_tokens=frame.num_reasoning_tokens,
    )
    reason = _known(FinishReason, frame.reason)
    return Finished(reason=reason, usage=usage, stop_string=frame.stop_string)


def _num_chars(piece: Delta | VectorPiece) -> int:
    """Return how large a piece is, in characters or, of numbers, in bytes."""
    match piece:
        case ToolCallStart(name=name):
            return len(name)
        case DenseVectors(data=data) | TokenVectors(data=data) | SparseVector(weights=data):
            return len(data)
        case Scores(scores=scores):
            return 8 * len(scores)
        case _:
            return len(piece.text)


Choice = TypeVar("Choice", FinishReason, ReplicaState, AbortOutcome)


def _known(choices: type[Choice], text: str) -> Choice:
    try:
        return choices(text)
    except ValueError:
        raise ProtocolError(problem=f"{text!r} is no {choices.__name__}") from None
