# SPDX-License-Identifier: Apache-2.0
"""`XoscarBus`: the control bus over xoscar; the only file that imports it.

xoscar has traps that were measured; each rule here avoids one of them:

- One main pool per process, no sub pools, `StatelessActor` only: one hung process then blocks
  nobody else, and no lock is held across an await.
- A call is a task of its own that is never cancelled: a cancelled future poisons its
  connection for every other call on it. A caller that gives up abandons the task.
- A peer is probed by plain TCP before xoscar connects: xoscar holds its router's lock while it
  connects, up to 8 s, and every call of the process waits behind it.
- Bytes in, bytes out: nothing of ours is pickled, no exception crosses.
- Its frames are signed, but a recorded one is taken again: each call carries a stamp that counts
  once.
- It keeps whoever connects: strangers are counted.
- A plain connection that says nothing stands beside the calls and ends with the peer, so a dead
  process is noticed in milliseconds without a call in flight.
- What fails while it is being sent is logged by asyncio, traceback and all: xoscar forgets the
  future that it made for the answer. The sender is told, so the log is spared it.
- torch is not importable while xoscar is imported: it would cost 190 MB and 0.7 s.
"""

import asyncio
import contextlib
import logging
import os
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import astuple
from pathlib import Path
from typing import Any, Self

from xinference.errors import InvalidSetting, PeerUnreachable, ProtocolError
from xinference.identifiers import Address, is_wildcard

from .control_bus import Endpoint, Presence, Service, decode_answer, encode_arguments
from .freshness import Stamp, StampCheck, Stamper
from .port_guard import PortGuard

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_SECONDS = 1.0
PROBE_IS_GOOD_FOR_SECONDS = 2.0
CLOSE_TIMEOUT_SECONDS = 0.5
UNACKNOWLEDGED_SECONDS = 5.0
"""A connection on which the peer's system has not acknowledged what was sent for so long ends."""
MAX_CALLS_PER_PEER = 256
"""Abandoned calls included; one more is refused as if the peer were unreachable."""

# Imported by xoscar if they can be, used by none of our values.
_HEAVY = ("torch", "scipy", "cupy", "cudf", "mlx")


@contextlib.contextmanager
def _heavy_modules_hidden() -> Iterator[None]:
    hidden = [name for name in _HEAVY if name not in sys.modules]
    for name in hidden:
        sys.modules[name] = None  # type: ignore[assignment]  # the documented way to refuse an import
    try:
        yield
    finally:
        for name in hidden:
            del sys.modules[name]


class XoscarBus:
    """`ControlBus` over xoscar. One per process."""

    def __init__(self, xoscar: Any, pool: Any) -> None:
        self._xoscar = xoscar
        self._pool = pool
        self._actors: dict[str, Any] = {}
        self._refs: dict[Endpoint, Any] = {}
        self._stamper = Stamper()
        self._stamps = StampCheck()
        self._receivers: dict[str, str] = {}
        """By address: which life of the process there stamps are for."""
        self._calls: Counter[str] = Counter()
        self._pending: set[asyncio.Future[bytes]] = set()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._watches: set[asyncio.Task[None]] = set()
        self._reached_at: dict[str, float] = {}
        self._is_closing = False
        self._serving = asyncio.Lock()

    @classmethod
    async def open(
        cls,
        listen: Address | None,
        *,
        key: str,
        socket_directory: Path,
        advertised_host: str | None = None,
    ) -> Self:
        """Start this process's end.

        Args:
            listen: None for a process that only calls. Port 0 takes a free one.
            key: the cluster key; frames of a peer with another one are dropped unread.
            socket_directory: private to this process; xoscar's unix socket goes there.
            advertised_host: what peers are told; None: the host of `listen`.

        Raises:
            OSError: the address cannot be bound.
            InvalidSetting: peers would be told of "every address", which leads them nowhere.
        """
        host = "" if listen is None else advertised_host or listen.host
        if listen is not None and is_wildcard(host):
            raise InvalidSetting(
                name="listen", value=str(listen), expected="an address that other hosts reach"
            )
        # Hazard: xoscar reads them when it is imported or at each frame, and only from here.
        os.environ["XOSCAR_AUTH_KEY"] = key
        os.environ["XOSCAR_DIR"] = str(socket_directory)
        # Why: after a silence the kernel waits as long again before it sends what was lost, and
        # every call would wait with it. A new connection is there at once.
        os.environ["XOSCAR_TCP_USER_TIMEOUT"] = str(int(1000 * UNACKNOWLEDGED_SECONDS))
        # Why: it logs a traceback for each peer that goes away, which callers are told anyway.
        logging.getLogger("xoscar").setLevel(logging.CRITICAL)
        with _heavy_modules_hidden():
            # Why here: importing it takes 0.2 s and must see the environment above.
            import xoscar

            _spare_the_log(asyncio.get_running_loop(), xoscar.ServerClosed)
            if listen is None:
                return cls(xoscar, None)
            pool = await xoscar.create_actor_pool(
                str(Address(host, listen.port)),
                n_process=0,
                auto_recover=False,
                extra_conf={"listen_elastic_ip": True} if host != listen.host else None,
            )
        guard = PortGuard()
        for server in pool._servers:
            server.channel_handler = guard.guarding(server.channel_handler)
        return cls(xoscar, pool)

    @property
    def address(self) -> str | None:
        """See `ControlBus`."""
        return None if self._pool is None else str(self._pool.external_address)

    async def serve(self, name: str, target: object | None) -> None:
        """See `ControlBus`."""
        assert self._pool is not None, "this bus only calls"
        async with self._serving:
            if self._is_closing:
                return
            old = self._actors.pop(name, None)
            if old is not None:
                await self._xoscar.destroy_actor(old)
            if target is None:
                return
            service = Service(name, target)
            self._actors[name] = await self._xoscar.create_actor(
                _service_actor(self._xoscar),
                service,
                self._stamps,
                uid=name,
                address=self.address,
            )

    async def call(
        self,
        endpoint: Endpoint,
        method: str,
        *arguments: object,
        returns: Any = None,
        timeout_seconds: float,
    ) -> Any:
        """See `ControlBus`."""
        encoded = encode_arguments(arguments)
        answer = await self._detached(
            endpoint,
            lambda ref: self._invoke(endpoint.address, ref, method, encoded),
            timeout_seconds,
        )
        return decode_answer(answer, returns, f"{endpoint}.{method}")

    async def lookup(self, endpoint: Endpoint, *, timeout_seconds: float) -> Presence:
        """See `ControlBus`."""
        self._reached_at.pop(endpoint.address, None)
        self._refs.pop(endpoint, None)
        deadline = time.monotonic() + timeout_seconds
        try:
            await self._detached(endpoint, lambda ref: ref.exists(), timeout_seconds)
        except self._xoscar.ActorNotExist:
            return Presence.ABSENT
        except PeerUnreachable as unreachable:
            if not isinstance(unreachable.__cause__, self._xoscar.ServerClosed):
                raise
            # It let us connect and then closed. Dying peers do that once; a second time, while
            # the port is still open, it is the key.
            await self._probe(endpoint, deadline - time.monotonic())
            return Presence.REFUSED
        return Presence.PRESENT

    def on_peer_lost(self, address: str, callback: Callable[[], None]) -> Callable[[], None]:
        """See `ControlBus`."""
        watch = asyncio.ensure_future(self._watch(address))
        self._watches.add(watch)
        watch.add_done_callback(self._watches.discard)
        watch.add_done_callback(lambda done: None if done.cancelled() else callback())

        def unwatch() -> None:
            watch.cancel()

        return unwatch

    async def close(self) -> None:
        """See `ControlBus`."""
        self._is_closing = True
        for pending in self._pending:
            if not pending.done():
                pending.set_exception(PeerUnreachable(peer="control bus", problem="it is closed"))
        for watch in list(self._watches):
            watch.cancel()
        # Why first: an actor that is being made or ended needs the pool and the connections.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(CLOSE_TIMEOUT_SECONDS), self._serving:
                pass
        # Calls in flight end with their connections, which xoscar has no public way to close.
        # Why not by cancelling them: that sends a message and waits for the peer's answer.
        from xoscar.backends.router import Router

        for client in list(Router.get_instance_or_empty()._cache.values()):
            with contextlib.suppress(OSError):  # the peer was quicker
                await client.close()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=CLOSE_TIMEOUT_SECONDS)
        if self._pool is not None:
            await self._pool.stop()

    async def _detached(
        self, endpoint: Endpoint, invoke: Callable[[Any], Any], timeout_seconds: float
    ) -> Any:
        """Run an xoscar call in a task that outlives its caller; wait on a future of our own."""
        address = endpoint.address
        if self._calls[address] >= MAX_CALLS_PER_PEER:
            raise PeerUnreachable(peer=str(endpoint), problem="too many calls wait for it")
        deadline = time.monotonic() + timeout_seconds
        await self._probe(endpoint, timeout_seconds)
        outcome: asyncio.Future[Any] = asyncio.get_running_loop().create_future()

        def settle(task: "asyncio.Task[Any]") -> None:
            self._tasks.discard(task)
            self._calls[address] -= 1
            error = (
                ConnectionError("the call was cancelled") if task.cancelled() else task.exception()
            )
            if error is None:
                self._reached_at[address] = time.monotonic()
            elif not isinstance(error, self._xoscar.ActorNotExist):
                self._reached_at.pop(address, None)
            if outcome.done():
                return
            if error is None:
                outcome.set_result(task.result())
            else:
                outcome.set_exception(error)

        self._calls[address] += 1
        task = asyncio.ensure_future(self._send(endpoint, invoke))
        self._tasks.add(task)
        task.add_done_callback(settle)
        self._pending.add(outcome)
        try:
            done, _ = await asyncio.wait({outcome}, timeout=max(0.0, deadline - time.monotonic()))
            if not done:
                raise PeerUnreachable(
                    peer=str(endpoint), problem=f"no answer within {timeout_seconds:g} s"
                )
            return outcome.result()
        except self._xoscar.ActorNotExist:
            raise
        except (OSError, EOFError, self._xoscar.ServerClosed) as error:
            raise PeerUnreachable(peer=str(endpoint), problem=str(error)) from error
        finally:
            self._pending.discard(outcome)
            outcome.cancel()

    async def _invoke(self, address: str, ref: Any, method: str, encoded: bytes) -> bytes:
        """Call a method with a stamp that the process there takes.

        Raises:
            ProtocolError: it takes none.
        """
        for receiver in (self._receivers.get(address), None):
            if receiver is None:
                receiver = self._receivers[address] = await ref.receiver()
            stamp = self._stamper.stamp(receiver)
            answer: bytes | None = await ref.invoke(astuple(stamp), method, encoded)
            if answer is not None:
                return answer
            # Another process listens there now; it has not run the method.
        raise ProtocolError(problem=f"{address} takes no call of this process")

    async def _send(self, endpoint: Endpoint, invoke: Callable[[Any], Any]) -> Any:
        ref = self._refs.get(endpoint)
        if ref is None:
            ref = await self._xoscar.actor_ref(uid=endpoint.name, address=endpoint.address)
            self._refs[endpoint] = ref
        return await invoke(ref)

    async def _probe(self, endpoint: Endpoint, timeout_seconds: float) -> None:
        address = endpoint.address
        since = time.monotonic() - self._reached_at.get(address, -3600.0)
        if since < PROBE_IS_GOOD_FOR_SECONDS or address == self.address:
            return
        where = Address.parse(address)
        try:
            async with asyncio.timeout(max(0.0, min(PROBE_TIMEOUT_SECONDS, timeout_seconds))):
                _, writer = await asyncio.open_connection(where.host, where.port)
        except (OSError, TimeoutError) as error:
            reason = str(error) or "it does not answer"
            raise PeerUnreachable(peer=str(endpoint), problem=reason) from error
        writer.close()

    async def _watch(self, address: str) -> None:
        """Return when the process at `address` is gone."""
        where = Address.parse(address)
        with contextlib.suppress(OSError, TimeoutError):
            async with asyncio.timeout(PROBE_TIMEOUT_SECONDS):
                reader, writer = await asyncio.open_connection(where.host, where.port)
            try:
                await reader.read(1)
            finally:
                writer.close()


def _spare_the_log(loop: asyncio.AbstractEventLoop, lost: type[Exception]) -> None:
    """Do not log futures that nobody waits for and that ended because a peer is gone."""
    handler = loop.get_exception_handler()

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        future, error = context.get("future"), context.get("exception")
        if isinstance(error, lost) and not isinstance(future, asyncio.Task):
            logger.debug("An answer that nobody waits for will not come: %s", error)
        elif handler is not None:
            handler(loop, context)
        else:
            loop.default_exception_handler(context)

    loop.set_exception_handler(handle)


def _service_actor(xoscar: Any) -> type:
    """Return the actor class; made here because its base is only importable once a bus opens."""

    class ServiceActor(xoscar.StatelessActor):  # type: ignore[misc]  # a Cython base
        """Stateless: calls interleave at awaits, and no lock is held across them."""

        def __init__(self, service: Service, stamps: StampCheck) -> None:
            self._service = service
            self._stamps = stamps

        async def exists(self) -> bool:
            return True

        async def receiver(self) -> str:
            return self._stamps.receiver

        async def invoke(
            self, stamp: tuple[str, str, int], method: str, arguments: bytes
        ) -> bytes | None:
            """Run a method, or return None: the stamp is for another process, or was used."""
            if not self._stamps.take(Stamp(*stamp)):
                logger.debug("%s was called with a stamp that is not new", method)
                return None
            return await self._service.invoke(method, arguments)

    return ServiceActor
