# SPDX-License-Identifier: Apache-2.0
"""The replica's end of the data plane: a `ReplicaService` on a listening socket.

In: connections, each proved by the handshake. Out: for every request ACCEPT or REJECT, then
CHUNKs, then END or ERROR. It owns which stream of which connection a request belongs to;
losing a connection aborts its requests. It knows no engine, and never computes.

Everything here runs on the event loop's thread. A peer that breaks the protocol loses its
connection, and nobody else notices.
"""

import asyncio
import contextlib
import logging
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from xinference.errors import (
    InvalidRequest,
    LoadFailed,
    ModelNotReady,
    ModelOverloaded,
    PeerUnreachable,
    ProtocolError,
    ReplicaLost,
    XinferenceError,
)
from xinference.identifiers import InstanceId, RequestId
from xinference.protocol.deployment import AbortOutcome, ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    Accepted,
    Failed,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)
from xinference.protocol.vectors import DenseVectors, Scores, SparseVector, TokenVectors

from . import frames
from .handshake import HANDSHAKE_SECONDS, ROLES, Transcript, is_same, new_nonce
from .requests import RequestTable
from .service import ReplicaReport, ReplicaService, ServiceEvent
from .tls import ServerTls

logger = logging.getLogger(__name__)

READ_BYTES = 256 * 1024
MAX_CONNECTIONS = 64
MAX_STRANGERS = 64
"""Connections that have not been welcomed; with one more the oldest is closed."""
MAX_STREAMS = 4096
"""Live streams of one connection."""
MAX_UNSENT_BYTES = 8 * 1024 * 1024
"""A peer that lets this much pile up is not reading; its connection is closed."""
SILENCE_SECONDS = 60.0
"""A peer that sends nothing for so long is gone. Clients ping far more often."""
ACCEPT_RETRY_SECONDS = 0.2
"""After an accept that failed: this process has no file descriptor left, for now."""
RETRY_AFTER_SECONDS = 5
MAX_GRACE_SECONDS = 3600.0
CLOSE_SECONDS = 1.0
"""How long last frames may take to leave when a connection is closed."""


@dataclass(eq=False, slots=True)
class _Entry:
    """A live request: whom its events go to. No peer: it is ending, and nobody listens."""

    peer: "_Peer | None"
    stream: int
    is_accepted: bool = False


class _Peer:
    """One welcomed connection."""

    def __init__(self, writer: asyncio.StreamWriter, role: str) -> None:
        self.writer = writer
        self.role = role
        self.requests: dict[int, RequestId] = {}
        self.last_stream = -1
        self._unsent: list[bytes] = []

    def send(self, *encoded: bytes) -> None:
        """Send frames when the event loop turns; never waits.

        Why not at once: requests come in bunches, and are answered in bunches.
        """
        if not self._unsent:
            asyncio.get_running_loop().call_soon(self.flush)
        self._unsent += encoded

    def flush(self) -> None:
        """Send what waits. A peer that does not read is cut off."""
        unsent, self._unsent = self._unsent, []
        transport = self.writer.transport
        if not unsent or transport.is_closing():
            return
        transport.write(b"".join(unsent))
        if transport.get_write_buffer_size() > MAX_UNSENT_BYTES:
            logger.warning("a %s connection does not read what it asked for; closed", self.role)
            transport.abort()


class DataPlaneServer:
    """Serves one replica until `close`.

    Invariant: a request is in the table from its REQ until the service has delivered its last
    event, also when its stream has long been forgotten, so an id is never live twice.
    """

    def __init__(
        self,
        service: ReplicaService,
        *,
        instance: InstanceId,
        key: bytes,
        tls: ServerTls | None = None,
        clock: Callable[[], float] = time.monotonic,
        handshake_seconds: float = HANDSHAKE_SECONDS,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        self._service = service
        self._instance = instance
        self._key = key
        self._tls = tls
        self._clock = clock
        self._handshake_seconds = handshake_seconds
        self._silence_seconds = silence_seconds
        self._table: RequestTable[_Entry] = RequestTable()
        self._connections: set[asyncio.Task[None]] = set()
        self._strangers: dict[asyncio.Task[None], None] = {}
        self._peers: set[_Peer] = set()
        self._listener: socket.socket | None = None
        self._accepting: asyncio.Task[None] | None = None
        self._spec: ReplicaSpec | None = None
        self._loading: asyncio.Task[None] | None = None
        self._loaders: set[_Peer] = set()
        self._progress: frames.Progress | None = None
        self._stopping: asyncio.Task[None] | None = None
        self._idle = asyncio.Event()
        self._has_given_up = False
        self._outcome: frames.Loaded | frames.LoadFailed | None = None
        service.start(self._deliver)

    async def start(self, listener: socket.socket) -> None:
        """Accept connections on a socket that listens already, until `stop_listening`."""
        listener.setblocking(False)
        self._listener = listener
        self._accepting = asyncio.create_task(self._accept_forever(listener), name="accept")

    def stop_listening(self) -> None:
        """Accept no more; connections go on."""
        if self._accepting is not None:
            self._accepting.cancel()
        if self._listener is not None:
            self._listener.close()

    @property
    def num_live(self) -> int:
        """How many requests have not had their last event."""
        return len(self._table)

    async def close(self) -> None:
        """Stop listening, tell every peer, and end their connections.

        The service should have ended its requests before; what is left is failed here.
        """
        self.stop_listening()
        gone = self.give_up()
        goodbye = frames.encode(frames.Close(gone.to_wire()))
        for peer in tuple(self._peers):
            peer.send(goodbye)
        tasks = [task for task in (*self._connections, self._loading, self._stopping) if task]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def give_up(self) -> ReplicaLost:
        """Fail every live request: another replica may go on with it. Return what they are told.

        What the service tells of them afterwards is not passed on.
        """
        self._has_given_up = True
        gone = ReplicaLost(model=self._service.model, problem="it was stopped")
        for request_id in self._table.live_ids():
            self._deliver([(request_id, Failed(error=gone))])
        return gone

    # --- one connection

    async def _accept_forever(self, listener: socket.socket) -> None:
        """Accept connections.

        Why not by asyncio's server: a connection counts from here on, and not only once it is
        encrypted.
        """
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, _ = await loop.sock_accept(listener)
            except OSError as error:
                logger.warning("no connection can be accepted: %s", error)
                await asyncio.sleep(ACCEPT_RETRY_SECONDS)
                continue
            task = asyncio.create_task(self._on_accepted(accepted), name="data plane connection")
            self._connections.add(task)
            self._strangers[task] = None
            if len(self._strangers) > MAX_STRANGERS:
                # Why the oldest: peers prove themselves within milliseconds, and who holds
                # connections open must not keep them out.
                next(iter(self._strangers)).cancel()
            task.add_done_callback(self._connections.discard)
            task.add_done_callback(self._welcomed)

    def _welcomed(self, task: "asyncio.Task[None] | None") -> None:
        """Count a connection no longer among those that have proved nothing."""
        if task is not None:
            self._strangers.pop(task, None)

    async def _on_accepted(self, accepted: socket.socket) -> None:
        """Serve one connection to its end."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._handshake_seconds
        reader = asyncio.StreamReader(loop=loop)
        protocol = asyncio.StreamReaderProtocol(reader, loop=loop)
        try:
            async with asyncio.timeout_at(deadline):
                transport, _ = await loop.connect_accepted_socket(
                    lambda: protocol,
                    accepted,
                    ssl=None if self._tls is None else self._tls.context,
                )
        except (OSError, TimeoutError, asyncio.CancelledError) as error:
            logger.debug("a connection was not made: %r", error)
            accepted.close()
            return
        writer = asyncio.StreamWriter(transport, protocol, reader, loop)
        try:
            await self._serve(reader, writer, deadline)
        except ProtocolError as error:
            logger.warning("closed a connection: %s", error)
            self._last_word(writer, error)
        except PeerUnreachable as error:
            self._last_word(writer, error)
        except (OSError, TimeoutError, asyncio.CancelledError):
            pass  # nothing to tell anybody: who cancels it knows
        except Exception:
            logger.exception("a connection failed; its requests are aborted")
        finally:
            writer.close()
            with contextlib.suppress(OSError, TimeoutError, asyncio.CancelledError):
                async with asyncio.timeout(CLOSE_SECONDS):
                    await writer.wait_closed()
            writer.transport.abort()

    def _last_word(self, writer: asyncio.StreamWriter, error: XinferenceError) -> None:
        if not writer.transport.is_closing():
            writer.write(frames.encode(frames.Close(error.to_wire())))

    async def _serve(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, deadline: float
    ) -> None:
        decoder = frames.FrameDecoder.of_client_frames()
        async with asyncio.timeout_at(deadline):
            role = await self._handshake(reader, writer, decoder)
        self._welcomed(asyncio.current_task())
        peer = _Peer(writer, role)
        self._peers.add(peer)
        try:
            while True:
                async with asyncio.timeout(self._silence_seconds):
                    received = await reader.read(READ_BYTES)
                if not received:
                    if decoder.is_mid_frame:
                        raise ProtocolError(problem="the connection ended inside a frame")
                    return
                for frame in decoder.feed(received):
                    self._on_frame(peer, frame)
        finally:
            peer.flush()
            self._peers.discard(peer)
            self._loaders.discard(peer)
            for stream in tuple(peer.requests):
                self._abort_stream(peer, stream)

    async def _handshake(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        decoder: frames.FrameDecoder,
    ) -> str:
        """Return the role of a peer that has proved itself."""
        if len(self._peers) >= MAX_CONNECTIONS:
            raise ProtocolError(problem=f"more than {MAX_CONNECTIONS} connections")
        challenge = new_nonce()
        writer.write(frames.encode(frames.Challenge(frames.VERSION, challenge)))
        said: list[Any] = []
        while not said:
            received = await reader.read(frames.MAX_HANDSHAKE_FRAME_BYTES)
            if not received:
                raise ConnectionResetError("closed during the handshake")
            said.extend(decoder.feed(received))
        if len(said) > 1 or decoder.is_mid_frame:
            raise ProtocolError(problem="frames before WELCOME")
        hello = said[0]
        if not isinstance(hello, frames.Hello):
            raise ProtocolError(problem="the first frame must be HELLO")
        proof = self._proof_for(hello, challenge)
        decoder.max_frame_bytes = frames.MAX_FRAME_BYTES
        writer.write(frames.encode(frames.Welcome(proof, self._service.model)))
        return hello.role

    def _proof_for(self, hello: frames.Hello, challenge: bytes) -> bytes:
        """Check what a client says of itself; return what this end shows in turn."""
        if hello.version != frames.VERSION:
            raise ProtocolError(
                problem=f"this end speaks version {frames.VERSION}, the other {hello.version}"
            )
        if hello.instance != self._instance:
            raise PeerUnreachable(
                peer=f"replica instance {hello.instance}",
                problem="another instance listens at its address now",
            )
        if hello.role not in ROLES:
            raise ProtocolError(problem=f"unknown role {hello.role!r}")
        transcript = Transcript(
            version=hello.version,
            instance=hello.instance,
            role=hello.role,
            challenge=challenge,
            nonce=hello.nonce,
            certificate=b"" if self._tls is None else self._tls.digest,
        )
        if not is_same(hello.proof, transcript.client_proof(self._key)):
            raise ProtocolError(problem="the proof is wrong: the two ends have different keys")
        return transcript.server_proof(self._key)

    # --- frames

    def _on_frame(self, peer: _Peer, frame: frames.ClientFrame) -> None:
        match frame:
            case frames.Req():
                self._on_request(peer, frame)
            case frames.Abort(stream):
                self._abort_stream(peer, stream)
            case frames.AbortRequest():
                peer.send(frames.encode(self._on_abort_request(frame)))
            case frames.Ping(seq):
                state, counters = self._service.state, self._service.counters()
                peer.send(frames.encode(frames.Pong(seq, state, counters)))
            case frames.Hello():
                raise ProtocolError(problem="a second HELLO")
            case _ if peer.role != "actor":
                raise ProtocolError(problem=f"a {peer.role} may not send {type(frame).__name__}")
            case frames.Load():
                self._on_load(peer, frame)
            case frames.Drain():
                self._service.drain()
            case frames.Stop(grace_seconds):
                self._stop(grace_seconds)

    def _stop(self, grace_seconds: float) -> None:
        """Let the service end when nothing is live, or the time is over."""
        self._service.drain()
        if self._stopping is not None:
            self._stopping.cancel()
        waited = self._wait_idle(min(grace_seconds, MAX_GRACE_SECONDS))
        self._stopping = asyncio.create_task(waited, name="stop when idle")

    async def _wait_idle(self, grace_seconds: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(grace_seconds):
                while len(self._table):
                    self._idle.clear()
                    await self._idle.wait()
        self._service.stop()

    def _on_request(self, peer: _Peer, frame: frames.Req) -> None:
        stream = frame.stream
        if stream <= peer.last_stream:
            raise ProtocolError(problem=f"stream {stream} after stream {peer.last_stream}")
        peer.last_stream = stream
        try:
            self._admit(peer, frame)
        except XinferenceError as error:
            peer.send(frames.encode(frames.Reject(stream, error.to_wire())))

    def _admit(self, peer: _Peer, frame: frames.Req) -> None:
        request = frames.decode_request(frame.request, frame.kind)
        if self._service.state is not ReplicaState.READY:
            raise ModelNotReady(
                model=self._service.model,
                state=self._service.state,
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if len(peer.requests) >= MAX_STREAMS:
            raise ModelOverloaded(
                model=self._service.model,
                num_waiting=len(self._table),
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        request_id = request.request_id
        self._table.admit(request_id, _Entry(peer, frame.stream), now=self._clock())
        peer.requests[frame.stream] = request_id
        try:
            self._service.submit(request)
        except XinferenceError as error:
            self._deliver([(request_id, Failed(error=error))])

    def _abort_stream(self, peer: _Peer, stream: int) -> None:
        request_id = peer.requests.pop(stream, None)
        if request_id is None:
            return  # it ended while the ABORT was on its way
        entry = self._table.owner(request_id)
        assert entry is not None, f"{request_id} has a stream, so it is live"
        entry.peer = None
        self._service.abort(request_id)

    def _on_abort_request(self, frame: frames.AbortRequest) -> frames.Aborted:
        request_id = RequestId(frame.request_id)
        outcome = self._table.abort(
            request_id, block_seconds=frame.block_seconds, now=self._clock()
        )
        if outcome is AbortOutcome.DONE:
            self._service.abort(request_id)
        return frames.Aborted(frame.seq, outcome)

    # --- loading

    def _on_load(self, peer: _Peer, frame: frames.Load) -> None:
        try:
            spec = frames.decode_spec(frame.spec)
            if self._spec is not None and spec != self._spec:
                raise LoadFailed(
                    model=self._service.model, problem="this process was told to load another one"
                )
        except (InvalidRequest, LoadFailed) as error:
            peer.send(frames.encode(frames.LoadFailed(error.to_wire())))
            return
        if self._outcome is not None:
            peer.send(frames.encode(self._outcome))
            return
        self._loaders.add(peer)
        if self._progress is not None:
            peer.send(frames.encode(self._progress))
        if self._loading is None:
            self._spec = spec
            self._loading = asyncio.create_task(self._load(spec), name="load")

    async def _load(self, spec: ReplicaSpec) -> None:
        try:
            report = await self._service.load(spec, self._on_progress)
            self._outcome = _loaded(report)
        except XinferenceError as error:
            logger.error("loading failed: %s", error)
            self._outcome = frames.LoadFailed(error.to_wire())
        except Exception as error:
            logger.exception("loading failed")
            problem = f"{type(error).__name__}: {error}"
            failed = LoadFailed(model=self._service.model, problem=problem)
            self._outcome = frames.LoadFailed(failed.to_wire())
        self._tell_loaders(self._outcome)

    def _on_progress(self, progress: float, stage: str, info: str) -> None:
        self._progress = frames.Progress(progress, stage, info)
        self._tell_loaders(self._progress)

    def _tell_loaders(self, frame: frames.Frame) -> None:
        encoded = frames.encode(frame)
        for peer in tuple(self._loaders):
            peer.send(encoded)

    # --- events

    def _deliver(self, events: Sequence[tuple[RequestId, ServiceEvent]]) -> None:
        """Send the events of one step: one write for each connection that they concern."""
        outboxes: dict[_Peer, _Outbox] = {}
        for request_id, event in events:
            entry = self._table.owner(request_id)
            if entry is None:
                if not self._has_given_up:
                    logger.error("an event for request %s, which is not live", request_id)
                continue
            peer = entry.peer
            if isinstance(event, (Finished, Failed)):
                self._table.end(request_id)
                if not len(self._table):
                    self._idle.set()
                if peer is not None:
                    peer.requests.pop(entry.stream, None)
            if peer is not None:
                outbox = outboxes.get(peer)
                if outbox is None:
                    outbox = outboxes[peer] = _Outbox()
                outbox.add(entry, event)
        for peer, outbox in outboxes.items():
            try:
                peer.send(*outbox.encoded())
            except XinferenceError:
                # Why not go on: these streams would wait for ever for what could not be said.
                logger.exception("the events of a step cannot be sent; the connection is closed")
                peer.writer.transport.abort()


class _Outbox:
    """What one step has for one connection, in an order that is right for every stream.

    Invariant: of one stream ACCEPT comes before its deltas and END after them, so all answers
    first, then the chunks, then all ends keeps each stream in order.
    """

    def __init__(self) -> None:
        self._answers: list[frames.Frame] = []
        self._chunks: list[frames.Frame] = []
        self._ends: list[frames.Frame] = []
        self._deltas: list[frames.Delta] = []
        self._num_bytes = 0

    def add(self, entry: _Entry, event: ServiceEvent) -> None:
        stream = entry.stream
        match event:
            case TextDelta() | ReasoningDelta() | ToolCallStart() | ToolCallArguments():
                delta = frames.Delta.of(stream, event)
                # Why not before one without tokens: it is of the same step as the one before it,
                # and whoever goes on after a lost connection counts by tokens.
                if self._num_bytes >= frames.CHUNK_BYTES and delta.token_ids:
                    self._cut()
                self._deltas.append(delta)
                self._num_bytes += delta.num_bytes
            case DenseVectors() | SparseVector() | TokenVectors() | Scores():
                self._chunks.append(frames.Vectors.of(stream, event))
            case Finished(reason=reason, usage=usage, stop_string=stop_string):
                self._ends.append(
                    frames.End(
                        stream,
                        reason,
                        usage.num_prompt_tokens,
                        usage.num_completion_tokens,
                        usage.num_cached_tokens,
                        stop_string,
                        usage.num_reasoning_tokens,
                    )
                )
            case Accepted(num_prompt_tokens=num_prompt_tokens):
                entry.is_accepted = True
                self._answers.append(frames.Accept(stream, num_prompt_tokens))
            case Failed(error=error) if entry.is_accepted:
                self._ends.append(frames.Error(stream, error.to_wire()))
            case Failed(error=error):
                self._answers.append(frames.Reject(stream, error.to_wire()))

    def encoded(self) -> list[bytes]:
        """Return the frames as they travel."""
        self._cut()
        return [frames.encode(frame) for frame in (*self._answers, *self._chunks, *self._ends)]

    def _cut(self) -> None:
        if self._deltas:
            self._chunks.append(frames.Chunk(self._deltas))
            self._deltas = []
            self._num_bytes = 0


def _loaded(report: ReplicaReport) -> frames.Loaded:
    return frames.Loaded(
        report.context_length, report.max_num_seqs, report.config, report.virtual_env_packages
    )
