# SPDX-License-Identifier: Apache-2.0
"""A generation as an HTTP answer, streamed or whole, assembled from the same events.

The headers wait for the replica's ACCEPT, so that every refusal is a status. What goes wrong
later is, in a stream, its last record, after which the connection closes. What records and whole
answers look like is the `Form`'s business; each protocol has its own.
"""

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from typing import ClassVar

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xinference.errors import InvalidRequest, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
)

from .errors import log_fault
from .gateway import gateway_of
from .inbox import AnswerEvent, Tick, answer_events

JSON_HEADERS = [(b"content-type", b"application/json")]


class Form(ABC):
    """Writes the answer of one request; used once. A stream is whole records, put together."""

    stream_type: ClassVar[bytes] = b"text/event-stream; charset=utf-8"
    """The content type of a stream."""
    field_names: ClassVar[Mapping[str, str]] = {}
    """What this protocol calls the fields that a replica may refuse, where its word is another."""

    @abstractmethod
    def opening(self, accepted: Accepted) -> bytes:
        """Return what comes before the first piece; may be empty."""

    @abstractmethod
    def delta(self, delta: Delta) -> bytes:
        """Return the record of a piece; nothing if it says nothing."""

    @abstractmethod
    def ending(self, finished: Finished) -> bytes:
        """Return what comes after the last piece."""

    @abstractmethod
    def failure(self, error: XinferenceError) -> bytes:
        """Return the record that ends a stream which has failed."""

    @abstractmethod
    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the body of the answer in one piece."""

    def keep_alive(self) -> bytes:
        """Return what tells client and proxies that the stream lives while it has nothing."""
        return b": keep-alive\n\n"


class GenerationAnswer(Response):
    """Sends the request to the cluster when it is itself sent; used once."""

    def __init__(
        self, request: Request, model: str, asked: GenerationRequest, form: Form, *, stream: bool
    ) -> None:
        super().__init__()
        self._gateway = gateway_of(request)
        self._model = ModelUid(model)
        self._stream = stream
        self._asked = asked
        self._form = form
        self._is_silent = False
        """Whether nothing was written since the last tick."""
        self._observation = self._gateway.metrics.observe(self._model, stream=stream)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that leaves gets nothing more, and its request is aborted.

        Raises:
            XinferenceError: the answer failed while a status can still say so.
        """
        events = answer_events(
            self._gateway.cluster,
            self._model,
            self._asked,
            receive,
            tick_seconds=self._gateway.keep_alive_seconds / 2 if self._stream else None,
        )
        with self._observation:
            async with aclosing(events):
                if self._stream:
                    await self._send_stream(events, scope, send)
                else:
                    await self._send_whole(events, send)

    async def _send_stream(
        self, batches: AsyncIterator[list[AnswerEvent]], scope: Scope, send: Send
    ) -> None:
        has_begun = False
        async for batch in batches:
            last = batch[-1]
            if not has_begun:
                if isinstance(batch[0], Failed):
                    raise self._in_its_words(batch[0].error)
                has_begun = True
                headers = _stream_headers(self._form)
                await send({"type": "http.response.start", "status": 200, "headers": headers})
            self._observation.note(batch)
            if isinstance(last, Failed):
                log_fault(last.error, scope)
            body = b"".join([self._written(event) for event in batch])
            is_last = isinstance(last, Finished | Failed)
            if body or is_last:
                self._is_silent = False
                await send({"type": "http.response.body", "body": body, "more_body": not is_last})

    def _written(self, event: AnswerEvent) -> bytes:
        match event:
            case Accepted():
                return self._form.opening(event)
            case Finished():
                return self._form.ending(event)
            case Failed(error=error):
                return self._form.failure(self._in_its_words(error))
            case Tick():
                return self._on_tick()
        return self._form.delta(event)

    def _on_tick(self) -> bytes:
        """Return a sign of life if nothing was written since the last tick."""
        was_silent, self._is_silent = self._is_silent, True
        return self._form.keep_alive() if was_silent else b""

    async def _send_whole(self, batches: AsyncIterator[list[AnswerEvent]], send: Send) -> None:
        deltas: list[Delta] = []
        async for batch in batches:
            self._observation.note(batch)
            deltas += [
                event
                for event in batch
                if not isinstance(event, Accepted | Finished | Failed | Tick)
            ]
            match batch[-1]:
                case Failed(error=error):
                    raise self._in_its_words(error)
                case Finished() as finished:
                    body = self._form.whole(deltas, finished)
                    headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body))]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await send({"type": "http.response.body", "body": body})

    def _in_its_words(self, error: XinferenceError) -> XinferenceError:
        """Return an error that names the field as this protocol does."""
        if isinstance(error, InvalidRequest) and error.field in self._form.field_names:
            field = self._form.field_names[error.field]
            return InvalidRequest(field=field, problem=error.problem)
        return error


def _stream_headers(form: Form) -> list[tuple[bytes, bytes]]:
    return [
        (b"content-type", form.stream_type),
        (b"cache-control", b"no-cache"),
        # Why: proxies would collect a stream before they pass it on.
        (b"x-accel-buffering", b"no"),
    ]
