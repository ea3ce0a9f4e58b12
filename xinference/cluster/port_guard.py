# SPDX-License-Identifier: Apache-2.0
"""`PortGuard`: keeps those without the cluster key from using up an actor port.

A connection is a stranger until its first whole frame has arrived, which proves the key. Of each
host only some strangers are kept, and the oldest goes when another comes: our own peers prove
themselves within milliseconds, but for one that watches whether this process lives, which says
nothing ever and opens another connection when it loses one.

It takes the channels of the actor framework as they are and knows nothing else of it.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import Any

logger = logging.getLogger(__name__)

MAX_STRANGERS = 64
"""Of one host."""
WARN_SECONDS = 60.0
"""Between warnings about one host."""

Handle = Callable[[Any], Awaitable[None]]
"""Serves a channel to its end."""


class PortGuard:
    """The strangers of one port. Belongs to one event loop."""

    def __init__(self) -> None:
        self._strangers: dict[str, dict[GuardedChannel, None]] = {}
        self._warned_at: dict[str, float] = {}

    def guarding(self, handle: Handle) -> Handle:
        """Return a handler that counts what it is given, and then does the same."""

        async def guarded(channel: Any) -> None:
            host = _host_of(channel)
            if host is None:
                await handle(channel)
                return
            stranger = GuardedChannel(channel, self, host)
            of_host = self._strangers.setdefault(host, {})
            of_host[stranger] = None
            if len(of_host) > MAX_STRANGERS:
                oldest = next(iter(of_host))
                del of_host[oldest]
                oldest.writer.transport.abort()
            try:
                await handle(stranger)
            finally:
                self.knows(stranger)

        return guarded

    def knows(self, channel: "GuardedChannel") -> None:
        """Count a channel no longer among the strangers: it has proved the key, or is gone."""
        of_host = self._strangers.get(channel.host, {})
        of_host.pop(channel, None)
        if not of_host:
            self._strangers.pop(channel.host, None)

    def refuses(self, channel: "GuardedChannel", error: EOFError) -> None:
        """Say, now and then, that a frame proves another key than ours, or none."""
        now = time.monotonic()
        if now - self._warned_at.get(channel.host, -WARN_SECONDS) >= WARN_SECONDS:
            self._warned_at[channel.host] = now
            logger.warning(
                "Refused what %s sent: %s. A process there has another cluster key, or is none "
                "of ours.",
                channel.host,
                error,
            )


class GuardedChannel:
    """A channel whose first frame is noted."""

    def __init__(self, channel: Any, guard: PortGuard, host: str) -> None:
        self.host = host
        self._channel = channel
        self._guard = guard
        self._is_stranger = True

    def __getattr__(self, name: str) -> Any:
        """Be the channel in everything else."""
        return getattr(self._channel, name)

    async def recv(self) -> Any:
        """Return the next message.

        Raises:
            EOFError: the connection has ended, or what came proves nothing.
        """
        try:
            message = await self._channel.recv()
        except asyncio.IncompleteReadError:
            raise
        except EOFError as error:
            self._guard.refuses(self, error)
            raise
        if self._is_stranger:
            self._is_stranger = False
            self._guard.knows(self)
        return message


def _host_of(channel: Any) -> str | None:
    """Return the host at the other end; None inside this machine's own sockets."""
    writer = getattr(channel, "writer", None)
    peer = None if writer is None else writer.get_extra_info("peername")
    return str(peer[0]) if isinstance(peer, tuple) else None
