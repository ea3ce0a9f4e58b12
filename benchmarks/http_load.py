# SPDX-License-Identifier: Apache-2.0
"""A load of chat requests that costs the machine as little as it can: bare sockets on uvloop.

Each of a number of kept connections sends its requests one after another. Answers are looked at
just enough to know when the first text came and when they end.
"""

import asyncio
import json
import time
from dataclasses import dataclass, field
from typing import Any, cast

import uvloop

DEADLINE_SECONDS = 120.0
FIRST_TEXT = b'" 1"'
"""The free model counts from 1."""


@dataclass
class Load:
    """What came of a load."""

    seconds: float = 0.0
    first_text_seconds: list[float] = field(default_factory=list)
    """Of each streamed answer, from the request."""


def run(
    port: int,
    body: dict[str, Any],
    *,
    path: str = "/v1/chat/completions",
    num_connections: int,
    num_requests: int,
) -> Load:
    """Send `num_requests` on each connection; return when the last was answered."""
    return uvloop.run(_run(port, path, body, num_connections, num_requests))


async def _run(
    port: int, path: str, body: dict[str, Any], num_connections: int, num_requests: int
) -> Load:
    raw = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
        f"authorization: Bearer none\r\ncontent-length: {len(raw)}\r\n\r\n"
    )
    load, loop = Load(), asyncio.get_running_loop()
    connections = []
    for _ in range(num_connections):
        _, connection = await loop.create_connection(
            lambda: _Connection(head.encode() + raw, num_requests, load), "127.0.0.1", port
        )
        connections.append(connection)
    started = time.perf_counter()
    for connection in connections:
        connection.send()
    async with asyncio.timeout(DEADLINE_SECONDS):
        await asyncio.gather(*(connection.done for connection in connections))
    load.seconds = time.perf_counter() - started
    for connection in connections:
        connection.transport.close()
    return load


class _Connection(asyncio.Protocol):
    def __init__(self, request: bytes, num_requests: int, load: Load) -> None:
        self._request = request
        self._num_left = num_requests
        self._load = load
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(ConnectionError(f"the server closed a connection: {exc}"))

    def send(self) -> None:
        self._received = bytearray()
        self._end = b""
        self._length = -1
        self._has_text = False
        self._sent_at = time.perf_counter()
        self.transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        if not self._has_text and FIRST_TEXT in self._received:
            self._has_text = True
            self._load.first_text_seconds.append(time.perf_counter() - self._sent_at)
        if self._length < 0 and not self._end:
            self._read_head()
        if self._is_whole():
            self._next()

    def _is_whole(self) -> bool:
        if self._end:
            return self._received.endswith(self._end)
        return 0 <= self._length <= len(self._received)

    def _read_head(self) -> None:
        """Find out by what the answer ends: its length, or an empty chunk."""
        end = self._received.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._received[:end]).lower()
        if not head.startswith(b"http/1.1 200"):
            error = RuntimeError(f"not answered: {bytes(self._received)[:500]!r}")
            self.done.set_exception(error)
            self.transport.close()
            return
        if b"transfer-encoding: chunked" in head:
            self._end = b"0\r\n\r\n"
        else:
            length = head.partition(b"content-length: ")[2].partition(b"\r\n")[0]
            self._length = end + 4 + int(length)

    def _next(self) -> None:
        self._num_left -= 1
        if self._num_left:
            self.send()
        elif not self.done.done():
            self.done.set_result(None)
