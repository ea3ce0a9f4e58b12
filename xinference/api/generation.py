# SPDX-License-Identifier: Apache-2.0
"""A generation as an HTTP answer, streamed or whole, assembled from the same events.

The headers wait for the replica's ACCEPT, so that every refusal is a status. What goes wrong
later is, in a stream, an event after which the connection closes. What the bytes look like is the
`AnswerForm`'s business; each protocol has its own.
"""

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import ClassVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xinference.cluster.interface import Cluster
from xinference.errors import InvalidRequest, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
)

from .connection import Departure, departure_of
from .errors import log_fault
from .gateway import Gateway
from .inbox import FOR_EVER, AnswerEvent, Tick, answer_events, deliver
from .metrics import Observation
from .patience import Patience, patience_of

STREAM_HEADERS = [
    (b"cache-control", b"no-cache"),
    # Why: proxies would collect a stream before they pass it on.
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS = [(b"content-type", b"application/json")]


class AnswerForm(ABC):
    """How a protocol writes the answer of one request; used once, for one of its two ways."""

    stream_type: ClassVar[bytes] = b"text/event-stream; charset=utf-8"
    """The content type of a stream."""
    field_names: ClassVar[Mapping[str, str]] = {}
    """What this protocol calls fields that a replica may refuse, where OpenAI's word is another."""

    @abstractmethod
    def opening(self, accepted: Accepted) -> bytes:
        """Return what a stream says before the first delta; may be empty."""

    @abstractmethod
    def delta(self, delta: Delta) -> bytes:
        """Return what a stream says of a delta; may be empty."""

    @abstractmethod
    def ending(self, finished: Finished) -> bytes:
        """Return what a stream says after the last delta."""

    @abstractmethod
    def failure(self, error: XinferenceError) -> bytes:
        """Return how a stream that has begun says that it failed."""

    @abstractmethod
    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the body of the answer in one piece."""

    def arrived(self, batch: Sequence[AnswerEvent]) -> None:  # noqa: B027  # optional
        """Look at events as they come, streamed or not, before anything is written of them.

        For forms that tell times; others need not look.
        """

    def keep_alive(self) -> bytes:
        """Return what tells client and proxies that a stream lives which has nothing to say."""
        return b": keep-alive\n\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """A request on its way: to whom it goes, what it asks, and how its answer is written."""

    model: ModelUid
    asked: GenerationRequest
    form: AnswerForm
    keep: Callable[[bytes], Awaitable[None]] | None = None
    """Is given the whole answer before the last byte is sent, streamed or not."""


class GenerationAnswer(Response):
    """Sends the request to the cluster when it is itself sent; used once."""

    def __init__(self, gateway: Gateway, generation: Generation, *, stream: bool) -> None:
        # Why not super().__init__: it would make the headers of an empty answer, for nothing.
        self.background = None
        self._gateway = gateway
        self._generation = generation
        self._stream = stream
        self._is_silent = False
        """Whether nothing was written since the last tick."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that leaves gets nothing more, and its request is aborted.

        Raises:
            XinferenceError: the answer failed while a status can still say so.
        """
        if self._stream:
            await self._send_stream(scope, receive, send)
            return
        patience = patience_of(
            scope, stream=False, default_seconds=self._gateway.answer_timeout_seconds
        )
        body = await whole_answer(
            self._gateway, self._generation, departure_of(scope, receive), patience=patience
        )
        if body is not None:
            headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body))]
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            await send({"type": "http.response.body", "body": body})

    async def _send_stream(self, scope: Scope, receive: Receive, send: Send) -> None:
        gateway, generation = self._gateway, self._generation
        events = answer_events(
            gateway.cluster,
            generation.model,
            generation.asked,
            departure_of(scope, receive),
            tick_seconds=gateway.keep_alive_seconds / 2,
            patience=patience_of(
                scope, stream=True, default_seconds=gateway.answer_timeout_seconds
            ),
        )
        headers = [(b"content-type", generation.form.stream_type), *STREAM_HEADERS]
        deltas: list[Delta] = []
        has_begun = False
        with gateway.observe(generation.model, stream=True) as observation:
            async with aclosing(events):
                async for batch in events:
                    if not has_begun:
                        if isinstance(batch[0], Failed):
                            raise _in_words_of(generation.form, batch[0].error)
                        has_begun = True
                        await send(
                            {"type": "http.response.start", "status": 200, "headers": headers}
                        )
                    if generation.keep is not None:
                        deltas += _deltas(batch)
                        batch[-1] = await _kept(generation, deltas, batch[-1])
                    observation.note(batch)
                    generation.form.arrived(batch)
                    last = batch[-1]
                    if isinstance(last, Failed):
                        log_fault(last.error, scope)
                    body = _in_plain_lines(b"".join([self._written(event) for event in batch]))
                    is_last = isinstance(last, Finished | Failed)
                    if body or is_last:
                        self._is_silent = False
                        await send(
                            {"type": "http.response.body", "body": body, "more_body": not is_last}
                        )

    def _written(self, event: AnswerEvent) -> bytes:
        form = self._generation.form
        match event:
            case Accepted():
                return form.opening(event)
            case Finished():
                return form.ending(event)
            case Failed(error=error):
                return form.failure(_in_words_of(form, error))
            case Tick():
                was_silent, self._is_silent = self._is_silent, True
                return form.keep_alive() if was_silent else b""
        return form.delta(event)


async def whole_answer(
    gateway: Gateway,
    generation: Generation,
    departure: Departure,
    *,
    patience: Patience = FOR_EVER,
) -> bytes | None:
    """Return the body of an answer in one piece; None if the client left.

    Raises:
        XinferenceError: the request was refused, or failed.
    """
    with gateway.observe(generation.model, stream=False) as observation:
        parts = _Parts(generation.form, observation)
        has_stayed = await deliver(
            parts, gateway.cluster, generation.model, generation.asked, departure, patience=patience
        )
        if not has_stayed:
            return None
        match parts.last:
            case Failed(error=error):
                raise _in_words_of(generation.form, error)
            case Finished() as finished:
                body = generation.form.whole(parts.deltas, finished)
                if generation.keep is not None:
                    await generation.keep(body)
                return body
    return None


class _Parts:
    """A `Sink` of an answer in one piece."""

    def __init__(self, form: AnswerForm, observation: Observation) -> None:
        self.deltas: list[Delta] = []
        self.last: AnswerEvent | None = None
        self._form = form
        self._observation = observation

    async def put(self, event: AnswerEvent) -> None:
        """Take the next event."""
        self._observation.note((event,))
        self._form.arrived((event,))
        self.last = event
        if not isinstance(event, Accepted | Tick | Finished | Failed):
            self.deltas.append(event)


async def count_prompt_tokens(
    cluster: Cluster,
    model: ModelUid,
    asked: GenerationRequest,
    *,
    field_names: Mapping[str, str],
) -> int:
    """Return how many tokens the prompt of a `count_only` request has.

    Args:
        field_names: see `AnswerForm`.

    Raises:
        XinferenceError: the request was refused.
    """
    try:
        stream = await cluster.generate(model, asked)
    except XinferenceError as error:
        raise _renamed(error, field_names) from error
    async for _ in stream:
        pass  # its end; there is nothing before it
    return stream.accepted.num_prompt_tokens


async def _kept(generation: Generation, deltas: Sequence[Delta], last: AnswerEvent) -> AnswerEvent:
    """Give the whole answer away if `last` ends it; return `last`, or why that failed."""
    if generation.keep is None or not isinstance(last, Finished):
        return last
    try:
        await generation.keep(generation.form.whole(deltas, last))
    except XinferenceError as error:
        return Failed(error=error)
    return last


def _deltas(batch: Sequence[AnswerEvent]) -> list[Delta]:
    return [event for event in batch if not isinstance(event, Accepted | Tick | Finished | Failed)]


UNICODE_LINE_ENDS = {
    end.encode(): f"\\u{ord(end):04x}".encode() for end in ("\u0085", "\u2028", "\u2029")
}


def _in_plain_lines(body: bytes) -> bytes:
    """Return records of a stream in which only line feeds end lines.

    Why: many clients split a stream as Python splits lines of text. These characters can stand
    in a JSON string alone, where they may be escaped.
    """
    for end, escaped in UNICODE_LINE_ENDS.items():
        if end in body:
            body = body.replace(end, escaped)
    return body


def _in_words_of(form: AnswerForm, error: XinferenceError) -> XinferenceError:
    return _renamed(error, form.field_names)


def _renamed(error: XinferenceError, field_names: Mapping[str, str]) -> XinferenceError:
    """Return an error that names the field as the caller's protocol does."""
    if isinstance(error, InvalidRequest) and error.field in field_names:
        return InvalidRequest(field=field_names[error.field], problem=error.problem)
    return error
