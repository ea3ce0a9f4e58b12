# SPDX-License-Identifier: Apache-2.0
"""A data plane client written from `doc/data-plane.md` alone: lists, bytes and nothing of ours.

It can say what our own client never would.
"""

import asyncio
import contextlib
import hashlib
import hmac
import os
import ssl
from collections.abc import AsyncIterator
from typing import Any, Self

import msgspec

SECONDS = 10.0


def frame(*parts: Any) -> bytes:
    """Return a frame: its name, then its fields."""
    body = msgspec.msgpack.encode(parts)
    return len(body).to_bytes(4, "big") + body


def proof(
    side: bytes, key: bytes, instance: str, role: str, *nonces: bytes, certificate: bytes = b""
) -> bytes:
    """Return what one side shows for version 1; the nonces are the server's and the client's."""
    parts = [b"xinference data plane", side, b"1", instance.encode(), role.encode(), *nonces]
    parts.append(certificate)
    said = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
    return hmac.new(key, said, hashlib.sha256).digest()


def request(
    request_id: str, *, max_tokens: int | None = None, text: str = "go", **sampling: Any
) -> dict[str, Any]:
    """Return a request as REQ carries it."""
    return {
        "request_id": request_id,
        "prompt": {"kind": "text", "text": text},
        "sampling": {"max_tokens": max_tokens, "temperature": 0.0, **sampling},
    }


class RawConnection:
    """A connection, welcomed or not."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, address: str) -> Self:
        """Connect and say nothing."""
        kind, _, where = address.partition(":")
        if kind == "unix":
            return cls(*await asyncio.open_unix_connection(where))
        host, _, port = where.rpartition(":")
        encryption = ssl._create_unverified_context() if kind == "tls" else None
        return cls(*await asyncio.open_connection(host, int(port), ssl=encryption))

    @property
    def certificate(self) -> bytes:
        """The digest of what the server has shown; empty without encryption."""
        encryption = self.writer.get_extra_info("ssl_object")
        if encryption is None:
            return b""
        return hashlib.sha256(encryption.getpeercert(binary_form=True)).digest()

    async def shake_hands(
        self, instance: str, key: bytes, *, role: str = "gateway", version: int = 1
    ) -> list[Any]:
        """Say HELLO and return the server's answer."""
        name, server_version, challenge = await self.receive()
        assert (name, server_version) == ("CHALLENGE", 1)
        nonce = os.urandom(32)
        said = (key, instance, role, challenge, nonce)
        shown = proof(b"client", *said, certificate=self.certificate)
        self.send(frame("HELLO", version, instance, role, nonce, shown))
        answer = await self.receive()
        if answer[0] == "WELCOME":
            assert answer[1] == proof(b"server", *said, certificate=self.certificate)
        return answer

    def send(self, encoded: bytes) -> None:
        """Send bytes, whatever they are."""
        self.writer.write(encoded)

    def end(self) -> None:
        """Send nothing more. An encrypted connection has no end of one direction."""
        if self.writer.can_write_eof():
            self.writer.write_eof()
        else:
            self.writer.close()

    async def receive(self) -> list[Any]:
        """Return the next frame.

        Raises:
            asyncio.IncompleteReadError: the connection ended.
        """
        async with asyncio.timeout(SECONDS):
            length = int.from_bytes(await self._reader.readexactly(4), "big")
            received: list[Any] = msgspec.msgpack.decode(await self._reader.readexactly(length))
        return received

    async def receive_until(self, *names: str) -> list[list[Any]]:
        """Return the frames up to the first of one of these names."""
        received = [await self.receive()]
        while received[-1][0] not in names:
            received.append(await self.receive())
        return received

    async def close_error(self) -> str:
        """Return the code that the server closes this connection with, and see it closed."""
        frames = await self.receive_until("CLOSE")
        assert await self._read_rest() == b""
        code: str = frames[-1][1]["code"]
        return code

    async def _read_rest(self) -> bytes:
        async with asyncio.timeout(SECONDS):
            # With TLS it is an SSLError when the peer wrote on after we had said the end.
            with contextlib.suppress(OSError):
                return await self._reader.read()
            return b""

    async def is_closed(self) -> bool:
        """Wait until the server has closed it; whatever it had to say first is thrown away."""
        await self._read_rest()
        return True

    async def aclose(self) -> None:
        """Close it."""
        self.writer.close()
        with contextlib.suppress(OSError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def raw_connection(
    address: str, instance: str, key: bytes, *, role: str = "gateway"
) -> AsyncIterator[RawConnection]:
    """Connect, be welcomed, and close in the end."""
    connection = await RawConnection.connect(address)
    try:
        answer = await connection.shake_hands(instance, key, role=role)
        assert answer[0] == "WELCOME", answer
        yield connection
    finally:
        await connection.aclose()
