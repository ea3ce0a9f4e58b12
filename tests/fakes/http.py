# SPDX-License-Identifier: Apache-2.0
"""An HTTP server on a loopback port that the kernel picked, in a thread of the test.

`serving` serves any ASGI application. `Script` is one that gives out the replies it was told,
keeps what it was asked, and notices who leaves early.
"""

import asyncio
import json
import queue
import socket
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import uvicorn

DEADLINE_SECONDS = 10.0


class _Server(uvicorn.Server):
    """Tells when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_listening = threading.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self.is_listening.set()


@contextmanager
def serving(app: Any, port: int = 0) -> Iterator[str]:
    """Serve an ASGI application until the block ends; give its endpoint. Port 0: any free one."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    config = uvicorn.Config(
        app, log_level="error", lifespan="auto", ws="none", timeout_graceful_shutdown=1
    )
    server = _Server(config)
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    try:
        assert server.is_listening.wait(DEADLINE_SECONDS), "the server did not start"
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(DEADLINE_SECONDS)
        listener.close()
        assert not thread.is_alive(), "the server did not stop"


@dataclass(frozen=True)
class Asked:
    """A request as it arrived."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    body: Any


@dataclass(frozen=True)
class Reply:
    """What to answer.

    `cut` breaks the connection after the pieces; `hang` sends nothing more until the asker leaves;
    `hold` sends nothing before `Script.release`.
    """

    status: int = 200
    json: Any = None
    pieces: Sequence[bytes] = ()
    headers: dict[str, str] = field(default_factory=dict)
    cut: bool = False
    hang: bool = False
    hold: bool = False


def events(*chunks: Any) -> bytes:
    """Return chunks as server-sent events; a text goes in as it is."""
    texts = [one if isinstance(one, str) else json.dumps(one) for one in chunks]
    return "".join(f"data: {text}\n\n" for text in texts).encode()


class Script:
    """An ASGI application that answers `"METHOD /path"` with what it was told."""

    def __init__(self, replies: Mapping[str, Reply | list[Reply]] | None = None) -> None:
        self.reset(replies or {})

    def reset(self, replies: Mapping[str, Reply | list[Reply]]) -> None:
        """Begin anew with these replies. Of a list, each is given once, the last for ever."""
        self.replies = dict(replies)
        self.asked: list[Asked] = []
        self.asked_paths: queue.SimpleQueue[str] = queue.SimpleQueue()
        self.has_asked = threading.Event()
        self._is_released = threading.Event()
        self.has_left = threading.Event()
        """Set when somebody closed a connection before its reply was over."""

    def release(self) -> None:
        """Let the replies go that are held back."""
        self._is_released.set()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return
        body = b""
        while True:
            message = await receive()
            body += message.get("body", b"")
            if not message.get("more_body"):
                break
        self.asked.append(
            Asked(
                method=scope["method"],
                path=scope["raw_path"].decode(),
                query=scope["query_string"].decode(),
                headers={name.decode(): value.decode() for name, value in scope["headers"]},
                body=json.loads(body) if body else None,
            )
        )
        self.asked_paths.put(self.asked[-1].path)
        self.has_asked.set()
        reply = self._reply(f"{scope['method']} {scope['raw_path'].decode()}")
        if reply.hold:
            await asyncio.to_thread(self._is_released.wait, DEADLINE_SECONDS)
        pieces = reply.pieces or [json.dumps(reply.json).encode()]
        headers = {"content-type": "application/json"} | reply.headers
        if reply.cut:
            # A length that is never reached: the server must break the connection.
            headers["content-length"] = str(sum(map(len, pieces)) + 1)
        if reply.hang and not reply.pieces:
            await self._until_left(receive)
            return
        await send(
            {
                "type": "http.response.start",
                "status": reply.status,
                "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
            }
        )
        for piece in pieces:
            await send({"type": "http.response.body", "body": piece, "more_body": True})
        if reply.hang:
            await self._until_left(receive)
            return
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _until_left(self, receive: Any) -> None:
        async with asyncio.timeout(DEADLINE_SECONDS):
            while (await receive())["type"] != "http.disconnect":
                pass
        self.has_left.set()

    def _reply(self, wanted: str) -> Reply:
        found = self.replies.get(wanted, Reply(status=404, json={"detail": "Not Found"}))
        if isinstance(found, list):
            return found.pop(0) if len(found) > 1 else found[0]
        return found
