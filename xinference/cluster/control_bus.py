# SPDX-License-Identifier: Apache-2.0
"""`ControlBus`: how control processes talk, in five methods, and what it promises.

A process serves named targets at one address; a peer calls their methods. Arguments and
results are values that msgspec can encode: builtins and the frozen dataclasses of `protocol`
and `messages`. They travel as msgpack, so no peer can make another unpickle an object, and the
in-process twin (`local_bus.py`) carries exactly what the real one (`xoscar_bus.py`) does.

Only methods marked `@remote` can be called. They never raise across the wire: whatever a
method raises becomes the wire form of an error of `xinference.errors`.

It does not know what is said over it.
"""

import asyncio
import functools
import inspect
import logging
import typing
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Protocol, TypeVar, overload

import msgspec

from xinference.errors import (
    InternalError,
    PeerUnreachable,
    ProtocolError,
    XinferenceError,
    from_wire,
)

logger = logging.getLogger(__name__)

ResultT = TypeVar("ResultT")
MethodT = TypeVar("MethodT", bound=Callable[..., Any])

_REMOTE = "__xinference_remote__"


def remote(method: MethodT) -> MethodT:
    """Mark an async method as callable by peers. Its annotations say what is decoded."""
    setattr(method, _REMOTE, True)
    return method


class Presence(StrEnum):
    """What `lookup` found."""

    PRESENT = "present"
    ABSENT = "absent"
    """The process is there, but serves nothing of that name."""
    REFUSED = "refused"
    """The process is there, but closes the connection on us: its cluster key is another one."""


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A served target: where, and its name there."""

    address: str
    name: str

    def __str__(self) -> str:
        return f"{self.name} at {self.address}"


class ControlBus(Protocol):
    """One process's way to its peers. Belongs to the event loop that opened it."""

    @property
    def address(self) -> str | None:
        """Where peers reach this process, "host:port"; None if it only calls."""
        ...

    async def serve(self, name: str, target: object | None) -> None:
        """Let peers call the `@remote` methods of `target`; they run interleaved, unlocked.

        Serving a name again replaces its target; serving None ends it. Once the bus closes,
        nothing is served, and this does nothing.
        """
        ...

    async def call(
        self,
        endpoint: Endpoint,
        method: str,
        *arguments: object,
        returns: Any = None,
        timeout_seconds: float,
    ) -> Any:
        """Call a method and return its result, decoded as `returns` (None: thrown away).

        When this raises `PeerUnreachable` the method may have run, may be running, or may run
        later; so methods are idempotent. Cancelling the caller does not stop the method.

        Raises:
            PeerUnreachable: no answer within the deadline, or the process is gone.
            XinferenceError: what the method raised.
        """
        ...

    async def lookup(self, endpoint: Endpoint, *, timeout_seconds: float) -> Presence:
        """Ask whether a target is served.

        Raises:
            PeerUnreachable
        """
        ...

    def on_peer_lost(self, address: str, callback: Callable[[], None]) -> Callable[[], None]:
        """Call back once, within milliseconds, when the process at `address` is gone.

        At once if it is not there. Returns a function that ends the watch.
        """
        ...

    async def close(self) -> None:
        """End every call with `PeerUnreachable`, every watch silently, and stop serving."""
        ...


class Service:
    """The `@remote` methods of one object, callable with bytes. Never raises."""

    def __init__(self, name: str, target: object) -> None:
        self._name = name
        self._methods: dict[str, Callable[..., Any]] = {}
        self._decoders: dict[str, msgspec.msgpack.Decoder[tuple[Any, ...]]] = {}
        for method_name, function in inspect.getmembers(type(target), inspect.isfunction):
            if not getattr(function, _REMOTE, False):
                continue
            self._methods[method_name] = functools.partial(function, target)
            self._decoders[method_name] = _decoder_of(function)

    async def invoke(self, method: str, arguments: bytes) -> bytes:
        """Run one method; return the msgpack of {"ok": result} or {"error": wire form}."""
        try:
            if method not in self._methods:
                raise ProtocolError(problem=f"{self._name} has no method {method}")
            values = _decode(self._decoders[method], arguments, f"{self._name}.{method}")
            return _encode({"ok": await self._methods[method](*values)})
        except XinferenceError as error:
            return _encode({"error": error.to_wire()})
        except asyncio.CancelledError:
            # Its caller is gone, or this process ends; nobody reads the answer.
            return _encode({"error": PeerUnreachable(peer=self._name, problem="ended").to_wire()})
        # Why BaseException: a SystemExit that crossed the wire would end the caller's process.
        except BaseException as error:
            logger.exception("%s.%s failed", self._name, method)
            wrapped = InternalError(
                where=f"{self._name}.{method}", problem=f"{type(error).__name__}: {error}"
            )
            return _encode({"error": wrapped.to_wire()})


@functools.cache
def _decoder_of(function: Callable[..., Any]) -> "msgspec.msgpack.Decoder[tuple[Any, ...]]":
    hints = typing.get_type_hints(function)
    parameters = list(inspect.signature(function).parameters)[1:]
    wanted = tuple(hints[name] for name in parameters)
    return msgspec.msgpack.Decoder(tuple[wanted] if wanted else tuple[()])  # type: ignore[valid-type]  # built from annotations


def _encode(value: object) -> bytes:
    return msgspec.msgpack.encode(value)


def _decode(decoder: "msgspec.msgpack.Decoder[ResultT]", encoded: bytes, what: str) -> ResultT:
    try:
        return decoder.decode(encoded)
    except msgspec.DecodeError as error:
        raise ProtocolError(problem=f"{what}: {error}") from error


def encode_arguments(arguments: tuple[object, ...]) -> bytes:
    """Return what `Service.invoke` takes."""
    return _encode(arguments)


@functools.cache
def _answer_decoder(returns: Any) -> "msgspec.msgpack.Decoder[Any]":
    class Answer(msgspec.Struct):
        ok: returns | msgspec.UnsetType = msgspec.UNSET
        error: dict[str, Any] | None = None

    return msgspec.msgpack.Decoder(Answer)


@overload
def decode_answer(encoded: bytes, returns: type[ResultT], what: str) -> ResultT: ...
@overload
def decode_answer(encoded: bytes, returns: Any, what: str) -> Any: ...
def decode_answer(encoded: bytes, returns: Any, what: str) -> Any:
    """Return the result that `Service.invoke` encoded, or raise its error.

    Args:
        returns: the type of the result; None if it does not matter.
        what: names the call in a `ProtocolError`.
    """
    answer = _decode(_answer_decoder(Any if returns is None else returns), encoded, what)
    if answer.error is not None:
        raise from_wire(answer.error)
    return None if returns is None or answer.ok is msgspec.UNSET else answer.ok
