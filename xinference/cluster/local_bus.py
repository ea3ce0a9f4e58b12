# SPDX-License-Identifier: Apache-2.0
"""`LocalBus`: the in-process twin of `XoscarBus`, on which the cluster's logic is tested.

A `LocalNetwork` stands for the wires between processes that all live in one event loop. Its
faults are the ones that matter: a process that is killed, one that hangs, a link that is cut.
Values cross it as the same msgpack as on the real bus.
"""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from xinference.errors import PeerUnreachable

from .control_bus import Endpoint, Presence, Service, decode_answer, encode_arguments


@dataclass(slots=True)
class _Process:
    services: dict[str, Service] = field(default_factory=dict)
    watches: list[Callable[[], None]] = field(default_factory=list)
    lost: "asyncio.Event" = field(default_factory=asyncio.Event)
    resumed: "asyncio.Event" = field(default_factory=asyncio.Event)
    key: str = ""


class LocalNetwork:
    """Which processes live, which hang, and which pairs cannot hear each other."""

    def __init__(self) -> None:
        self._processes: dict[str, _Process] = {}
        self._cut: set[frozenset[str | None]] = set()

    def kill(self, address: str) -> None:
        """End the process at `address`: its callers fail and its watchers are told."""
        process = self._processes.pop(address, None)
        if process is None:
            return
        process.lost.set()
        for callback in process.watches:
            asyncio.get_running_loop().call_soon(callback)

    def hang(self, address: str) -> None:
        """Let calls to `address` wait until `resume`; nobody is told."""
        self._processes[address].resumed.clear()

    def resume(self, address: str) -> None:
        """End `hang`."""
        self._processes[address].resumed.set()

    def cut(self, one: str | None, other: str) -> None:
        """Let nothing through between two addresses; nobody is told."""
        self._cut.add(frozenset({one, other}))

    def heal(self) -> None:
        """Undo every `cut`."""
        self._cut.clear()

    def is_cut(self, one: str | None, other: str) -> bool:
        """Return whether messages between the two are lost."""
        return frozenset({one, other}) in self._cut

    def add(self, address: str, key: str) -> _Process:
        """Start a process; for `LocalBus`."""
        process = _Process(key=key)
        process.resumed.set()
        self._processes[address] = process
        return process

    def find(self, address: str) -> _Process | None:
        """Return the living process at `address`; for `LocalBus`."""
        return self._processes.get(address)


class LocalBus:
    """`ControlBus` over a `LocalNetwork`. With `address=None` it only calls."""

    def __init__(self, network: LocalNetwork, address: str | None, *, key: str = "") -> None:
        self._network = network
        self._address = address
        self._key = key
        self._process = network.add(address, key) if address is not None else None
        self._calls: set[asyncio.Task[bytes]] = set()
        self._closed = asyncio.Event()

    @property
    def address(self) -> str | None:
        """See `ControlBus`."""
        return self._address

    async def serve(self, name: str, target: object | None) -> None:
        """See `ControlBus`."""
        assert self._process is not None, "this bus only calls"
        if target is None:
            self._process.services.pop(name, None)
        else:
            self._process.services[name] = Service(name, target)

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
        process = self._reach(endpoint, self._key)
        # Why a task of its own: as on the real bus, a caller that gives up stops nothing.
        answer = asyncio.ensure_future(self._deliver(process, endpoint, method, encoded))
        self._calls.add(answer)
        answer.add_done_callback(self._calls.discard)
        lost = asyncio.ensure_future(process.lost.wait())
        closed = asyncio.ensure_future(self._closed.wait())
        try:
            await asyncio.wait(
                {answer, lost, closed},
                timeout=timeout_seconds,
                return_when=asyncio.FIRST_COMPLETED,
            )
        finally:
            lost.cancel()
            closed.cancel()
        if not answer.done():
            problem = "the process is gone" if process.lost.is_set() else "no answer in time"
            raise PeerUnreachable(peer=str(endpoint), problem=problem)
        return decode_answer(answer.result(), returns, f"{endpoint}.{method}")

    async def lookup(self, endpoint: Endpoint, *, timeout_seconds: float) -> Presence:
        """See `ControlBus`."""
        process = self._network.find(endpoint.address)
        if process is not None and process.key != self._key:
            return Presence.REFUSED
        process = self._reach(endpoint, self._key)
        return Presence.PRESENT if endpoint.name in process.services else Presence.ABSENT

    def on_peer_lost(self, address: str, callback: Callable[[], None]) -> Callable[[], None]:
        """See `ControlBus`."""
        process = self._network.find(address)
        if process is None:
            handle = asyncio.get_running_loop().call_soon(callback)
            return handle.cancel
        process.watches.append(callback)
        return lambda: process.watches.remove(callback) if callback in process.watches else None

    async def close(self) -> None:
        """See `ControlBus`."""
        self._closed.set()
        if self._address is not None and self._network.find(self._address) is self._process:
            self._network.kill(self._address)
        for call in self._calls:
            call.cancel()

    def _reach(self, endpoint: Endpoint, key: str) -> _Process:
        process = self._network.find(endpoint.address)
        if process is None or process.key != key:
            raise PeerUnreachable(peer=str(endpoint), problem="the process is gone")
        return process

    async def _deliver(
        self, process: _Process, endpoint: Endpoint, method: str, encoded: bytes
    ) -> bytes:
        if self._network.is_cut(self._address, endpoint.address):
            await asyncio.get_running_loop().create_future()
        await process.resumed.wait()
        service = process.services.get(endpoint.name)
        if service is None:
            return await Service(endpoint.name, object()).invoke(method, encoded)
        return await service.invoke(method, encoded)
