# SPDX-License-Identifier: Apache-2.0
"""The HTTP server of a gateway: uvicorn, with bounds on what a client can make it hold or wait for.

In: an ASGI application and a listening socket. What a connection may cost:

    connections       `max_connections` of a process; one more is told 503 and closed
    head              `MAX_HEAD_BYTES`, within `HEAD_SECONDS`; else 431, 408
    body              as the application allows (413), within `BODY_SECONDS`; else 408
    pipeline          `MAX_PIPELINED` requests sent before the first is answered
    slow readers      who does not take a full buffer's excess within `WRITE_SECONDS` is cut off
    idle              closed after the keep-alive time

Every refusal is JSON in the shape of all others. Nothing here is done per token: timers run only
while a request arrives, and while a client does not read.
"""

import asyncio
import http
import logging
import resource
from collections.abc import Callable
from typing import Any, cast

import httptools
import orjson
import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from xinference.api.connection import DEPARTURE, Departure
from xinference.api.error_shapes import ToldError, openai_body

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 4096
NUM_OTHER_FILES = 128
"""Descriptors for what is no client: replicas, stores, logs. Without any nothing is answered."""
MAX_HEAD_BYTES = 64 * 2**10
MAX_PIPELINED = 32
CHUNK_OVERHEAD = 16
"""Bytes around a piece of a body that count as part of it: its length and two ends of lines."""
HEAD_SECONDS = 20.0
BODY_SECONDS = 120.0
WRITE_SECONDS = 30.0
MAX_KEPT_BYTES = 8 * 2**10
FIRST_REQUEST_SECONDS = 1.0
"""Who had just connected when the server was told to end may take so long to ask."""
CLOSE_SECONDS = 5.0
"""So long a closed connection may take to send what is left."""
BACKLOG = 2048


def server_of(
    app: Any,
    *,
    keep_alive_seconds: float,
    drain_seconds: float = 30.0,
    ssl_certfile: str | None = None,
    ssl_keyfile: str | None = None,
) -> uvicorn.Server:
    """Return what serves an application: `await server.serve(sockets=[listener])`.

    It ends at SIGTERM or when its `should_exit` is set; running requests may go on for
    `drain_seconds`.
    """
    return uvicorn.Server(
        uvicorn.Config(
            app,
            loop="none",
            http=BoundedHttp,
            ws="none",
            lifespan="on",
            log_config=None,
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=keep_alive_seconds,  # type: ignore[arg-type]  # any number does
            timeout_graceful_shutdown=drain_seconds,  # type: ignore[arg-type]  # as above
            ssl_certfile=ssl_certfile,
            ssl_keyfile=ssl_keyfile,
        )
    )


def max_connections() -> int:
    """Return how many connections this process takes."""
    num_files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if num_files == resource.RLIM_INFINITY:
        return MAX_CONNECTIONS
    return max(1, min(MAX_CONNECTIONS, num_files - NUM_OTHER_FILES))


class BoundedHttp(HttpToolsProtocol):
    """One connection; see the module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._deadline = _Deadline(self.loop)
        """Of the head, the body, or the last bytes of a closed connection."""
        self._write_deadline: asyncio.TimerHandle | None = None
        self._num_overhead = 0
        """Bytes of the current message that are not its body."""
        self._is_arriving = False
        """Whether a message has begun, and is not whole."""
        self._is_refused = False
        self._is_ending = False
        self._running: RequestResponseCycle | None = None
        """The request that is being answered; `cycle` is the last of those that were sent."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take a connection, if there is room for it."""
        super().connection_made(transport)
        self.transport = cast(asyncio.Transport, _HeadKeeper(transport, self.loop))
        if len(self.connections) > max_connections():
            logger.warning("More than %d connections", max_connections())
            self._refuse(503, "This gateway has too many connections; try again later.")
        else:
            self._deadline.set(HEAD_SECONDS, self._on_late)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        self._deadline.close()
        self.resume_writing()
        self._disconnect(self._running)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Parse what came."""
        if self._is_refused:
            return
        self._num_overhead += len(data)
        super().data_received(data)
        if self._num_overhead > MAX_HEAD_BYTES:
            self._refuse(431, f"The head of a request may have {MAX_HEAD_BYTES} bytes.")
        elif not (self._deadline.is_set or self._is_arriving) and self._is_idle():
            # A part of a head, too short to be recognized as one.
            self._deadline.set(HEAD_SECONDS, self._on_late)

    def on_message_begin(self) -> None:
        """Begin to wait for a head."""
        super().on_message_begin()
        self._is_arriving = True
        self._deadline.set(HEAD_SECONDS, self._on_late)

    def on_headers_complete(self) -> None:
        """Start the application, and begin to wait for the body."""
        if len(self.pipeline) >= MAX_PIPELINED:
            raise httptools.HttpParserError("too many requests at once")
        super().on_headers_complete()
        self.cycle.scope[DEPARTURE] = Departure()  # type: ignore[literal-required]
        if self._is_ending:
            self.cycle.keep_alive = False
        self._deadline.set(BODY_SECONDS, self._on_late)

    def on_body(self, body: bytes) -> None:
        """Pass a piece of the body on."""
        self._num_overhead -= len(body) + CHUNK_OVERHEAD
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The request is whole; from now on it is the application that takes time."""
        self._is_arriving = False
        self._num_overhead = 0
        self._deadline.clear()
        super().on_message_complete()

    def shutdown(self) -> None:
        """The server ends: close this when it is idle, or has been answered."""
        if self.cycle is None and not self._is_refused:
            # Why not at once: its request is on its way, and its client believes it was sent.
            self._is_ending = True
            if not self._is_arriving:
                self._deadline.set(FIRST_REQUEST_SECONDS, self.transport.close)
        else:
            super().shutdown()

    def eof_received(self) -> None:
        """The client sends nothing more; whatever it waits for, it has left."""
        if self._is_arriving:
            self._refuse(400, "The request ends before it is whole.")

    def pause_writing(self) -> None:
        """The client does not read; it has a while."""
        super().pause_writing()
        if self._write_deadline is None:
            self._write_deadline = self.loop.call_later(WRITE_SECONDS, self._on_stuck)

    def resume_writing(self) -> None:
        """The client has read."""
        if self._write_deadline is not None:
            self._write_deadline.cancel()
            self._write_deadline = None
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        """Close an idle connection."""
        super().timeout_keep_alive_handler()
        self._deadline.set(CLOSE_SECONDS, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP."""
        self._refuse(400, "This is not an HTTP request.")

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _is_idle(self) -> bool:
        return self._running is None or self._running.response_complete

    @staticmethod
    def _disconnect(cycle: RequestResponseCycle | None) -> None:
        """Tell the application that nobody waits for this answer any more."""
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            cycle.scope[DEPARTURE].happen()  # type: ignore[literal-required]

    def _on_late(self) -> None:
        self._refuse(408, "The request did not arrive in time.")

    def _on_stuck(self) -> None:
        logger.warning("A client did not read for %.0f s and is cut off", WRITE_SECONDS)
        self.transport.abort()

    def _refuse(self, status: int, message: str) -> None:
        """Say why, unless an answer has begun, and close."""
        self._is_refused = True
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if self._running is None or self._is_idle() or not self._running.response_started:
            self.transport.write(_refusal(status, message))
        # Why: the application must not answer, too.
        self._disconnect(self._running)
        self.transport.close()
        self._deadline.set(CLOSE_SECONDS, self.transport.abort)


class _Deadline:
    """Something that is done unless it is called off, which it nearly always is.

    Its timer is left running when it is, and looks again when it fires: each request sets some
    deadlines, and a timer for each would cost as much as parsing its head.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0
        self._due_at = 0.0
        self._then: Callable[[], None] | None = None

    @property
    def is_set(self) -> bool:
        """Whether something is to be done."""
        return self._then is not None

    def set(self, seconds: float, then: Callable[[], None]) -> None:
        """Have `then` done after some time, and nothing else."""
        self._then = then
        self._due_at = self._loop.time() + seconds
        if self._timer is None or self._fires_at > self._due_at:
            self._start(seconds)

    def clear(self) -> None:
        """Have nothing done."""
        self._then = None

    def close(self) -> None:
        """Have nothing done any more, and leave no timer behind."""
        self._then = None
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _start(self, seconds: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = self._loop.time() + seconds
        self._timer = self._loop.call_later(seconds, self._fire)

    def _fire(self) -> None:
        self._timer = None
        if self._then is None:
            return
        left = self._due_at - self._loop.time()
        if left > 0:
            self._start(left)
        else:
            then, self._then = self._then, None
            then()


class _HeadKeeper:
    """A transport that keeps the head of an answer back until its first bytes are there.

    Why: two writes are two system calls and two packets, where one does. What is kept is sent at
    the latest when the event loop turns.
    """

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._head = b""
        self.is_closing = transport.is_closing
        self.get_extra_info = transport.get_extra_info
        self.abort = transport.abort

    def write(self, data: bytes) -> None:
        """Write, behind what was kept."""
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head + data)
        elif data.startswith(b"HTTP/1.1 ") and len(data) < MAX_KEPT_BYTES:
            self._head = data
            self._loop.call_soon(self._send)
        else:
            self._transport.write(data)

    def close(self) -> None:
        """Send what was kept, and close."""
        self._send()
        self._transport.close()

    def _send(self) -> None:
        if self._head:
            head, self._head = self._head, b""
            self._transport.write(head)


def _refusal(status: int, message: str) -> bytes:
    phrase = http.HTTPStatus(status).phrase
    code = phrase.lower().replace(" ", "_")
    body = orjson.dumps(openai_body(ToldError(status=status, message=message, code=code), ""))
    retry = "retry-after: 5\r\n" if status == 503 else ""
    head = (
        f"HTTP/1.1 {status} {phrase}\r\ncontent-type: application/json\r\n{retry}"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body
