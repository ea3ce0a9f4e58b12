# SPDX-License-Identifier: Apache-2.0
"""Somebody on the way between a client and a server: hears everything, and may do worse."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

Pass = Callable[[bytes, asyncio.StreamWriter], Awaitable[None]]
"""Sees to a piece of what one end sent: writes it to the other, or not, or later."""


async def pass_on(piece: bytes, writer: asyncio.StreamWriter) -> None:
    """Pass a piece on as it is."""
    writer.write(piece)
    await writer.drain()


class Relay:
    """Listens on a loopback port and passes on what comes."""

    def __init__(self) -> None:
        self.port = 0
        self.heard = bytearray()
        """All that went either way."""
        self.to_client: Pass = pass_on
        self.to_server: Pass = pass_on
        self._writers: set[asyncio.StreamWriter] = set()

    def reset(self) -> None:
        """Cut every connection, so that both ends get a reset."""
        for writer in tuple(self._writers):
            writer.transport.abort()

    async def _on_connection(
        self,
        host: str,
        port: int,
        upstream_tls: ssl.SSLContext | None,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        far_writer: asyncio.StreamWriter | None = None
        try:
            far_reader, far_writer = await asyncio.open_connection(host, port, ssl=upstream_tls)
            self._writers |= {writer, far_writer}
            # Why the first: who closes one direction here closes the connection.
            up = asyncio.create_task(self._carry(reader, far_writer, is_answer=False))
            down = asyncio.create_task(self._carry(far_reader, writer, is_answer=True))
            await asyncio.wait({up, down}, return_when=asyncio.FIRST_COMPLETED)
            for task in (up, down):
                task.cancel()
            await asyncio.gather(up, down, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            for end in (writer, far_writer):
                if end is not None:
                    self._writers.discard(end)
                    end.close()

    async def _carry(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, is_answer: bool
    ) -> None:
        with contextlib.suppress(OSError):
            while piece := await reader.read(65536):
                self.heard += piece
                await (self.to_client if is_answer else self.to_server)(piece, writer)


@contextlib.asynccontextmanager
async def relay_to(
    host: str,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    upstream_tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Relay]:
    """Stand between whoever connects to `port` of the relay and a server.

    Args:
        tls: to take connections with, as if it were the server's.
        upstream_tls: to reach the server with.
    """
    relay = Relay()

    async def on_connection(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await relay._on_connection(host, port, upstream_tls, reader, writer)

    server = await asyncio.start_server(on_connection, "127.0.0.1", 0, ssl=tls)
    relay.port = server.sockets[0].getsockname()[1]
    try:
        yield relay
    finally:
        server.close()
        relay.reset()
