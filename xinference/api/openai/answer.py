# SPDX-License-Identifier: Apache-2.0
"""A generation as an HTTP answer, streamed or whole, assembled from the same events.

The headers wait for the replica's ACCEPT, so that every refusal is a status. What goes wrong
later is, in a stream, an error event after which the connection closes without `[DONE]`.
What the JSON looks like is the `Form`'s business.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xinference.api.errors import error_event
from xinference.api.gateway import gateway_of
from xinference.api.inbox import AnswerEvent, answer_events
from xinference.identifiers import ModelUid
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Failed,
    Finished,
    GenerationRequest,
)

from .form import Form
from .schema import SharedParameters

STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]
JSON_HEADERS = [(b"content-type", b"application/json")]


class GenerationAnswer(Response):
    """Sends the request to the cluster when it is itself sent; used once."""

    def __init__(
        self, request: Request, body: SharedParameters, asked: GenerationRequest, form: Form
    ) -> None:
        super().__init__()
        self._gateway = gateway_of(request)
        self._model = ModelUid(body.model)
        self._stream = bool(body.stream)
        self._asked = asked
        self._form = form
        self._observation = self._gateway.metrics.observe(self._model, stream=self._stream)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that leaves gets nothing more, and its request is aborted.

        Raises:
            XinferenceError: the answer failed while a status can still say so.
        """
        events = answer_events(self._gateway.cluster, self._model, self._asked, receive)
        with self._observation:
            async with aclosing(events):
                if self._stream:
                    await self._send_stream(events, send)
                else:
                    await self._send_whole(events, send)

    async def _send_stream(self, batches: AsyncIterator[list[AnswerEvent]], send: Send) -> None:
        has_begun = False
        async for batch in batches:
            last = batch[-1]
            if not has_begun:
                if isinstance(batch[0], Failed):
                    raise batch[0].error
                has_begun = True
                await send(
                    {"type": "http.response.start", "status": 200, "headers": STREAM_HEADERS}
                )
            self._observation.note(batch)
            await send(
                {
                    "type": "http.response.body",
                    "body": b"".join([self._written(event) for event in batch]),
                    "more_body": not isinstance(last, Finished | Failed),
                }
            )

    def _written(self, event: AnswerEvent) -> bytes:
        match event:
            case Accepted():
                return self._form.opening()
            case Finished():
                return self._form.ending(event)
            case Failed(error=error):
                return error_event(error)
        return self._form.delta(event)

    async def _send_whole(self, batches: AsyncIterator[list[AnswerEvent]], send: Send) -> None:
        deltas: list[Delta] = []
        async for batch in batches:
            self._observation.note(batch)
            deltas += [
                event for event in batch if not isinstance(event, Accepted | Finished | Failed)
            ]
            match batch[-1]:
                case Failed(error=error):
                    raise error
                case Finished() as finished:
                    body = self._form.whole(deltas, finished)
                    headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body))]
                    await send({"type": "http.response.start", "status": 200, "headers": headers})
                    await send({"type": "http.response.body", "body": body})
