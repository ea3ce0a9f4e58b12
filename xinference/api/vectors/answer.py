# SPDX-License-Identifier: Apache-2.0
"""A request for vectors or scores as an HTTP answer: asked when it is sent, written when whole.

While the cluster works, the client's side of the connection is watched; when the client leaves,
the request is aborted at once. What the JSON looks like is a function of the route.
"""

from collections.abc import AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xinference.api.connection import WhileConnected, departure_of
from xinference.api.gateway import Gateway, gateway_of
from xinference.api.metrics import Observation
from xinference.api.patience import patience_of
from xinference.cluster.interface import Cluster
from xinference.errors import ReplicaLost, RequestAborted
from xinference.identifiers import ModelUid
from xinference.protocol.generation import Accepted, Finished, FinishReason, Usage
from xinference.protocol.vectors import VectorPiece, VectorRequest

JSON_HEADERS = [(b"content-type", b"application/json")]


@dataclass(frozen=True, slots=True, kw_only=True)
class Computed:
    """A whole answer of a model."""

    accepted: Accepted
    pieces: list[VectorPiece]
    usage: Usage


Write = Callable[[Computed], AsyncIterator[bytes]]
"""Yields the body; awaits now and then, for a large body takes long to write."""


async def computed(cluster: Cluster, model: ModelUid, asked: VectorRequest) -> Computed:
    """Ask, and return the answer when it is whole.

    Raises:
        XinferenceError: it was refused, or failed.
    """
    stream = await cluster.compute(model, asked)
    pieces: list[VectorPiece] = []
    try:
        async for event in stream:
            if not isinstance(event, Finished):
                pieces.append(event)
            elif event.reason is FinishReason.ABORT:
                raise RequestAborted(request_id=asked.request_id)
            else:
                return Computed(accepted=stream.accepted, pieces=pieces, usage=event.usage)
    finally:
        await stream.aclose()
    raise ReplicaLost(model=model, problem="its answer ended before it was whole")


async def whole_vectors(gateway: Gateway, model: str, asked: VectorRequest, write: Write) -> bytes:
    """Return the body of an answer that nobody waits for at a connection.

    Raises:
        XinferenceError: the request was refused, or failed.
    """
    uid = ModelUid(model)
    with gateway.observe(uid, stream=False) as observation:
        return await _written(await computed(gateway.cluster, uid, asked), observation, write)


async def _written(answer: Computed, observation: Observation, write: Write) -> bytes:
    observation.note([answer.accepted, Finished(reason=FinishReason.STOP, usage=answer.usage)])
    # Why whole: its length tells a client whether it has come whole.
    async with aclosing(write(answer)) as pieces:  # type: ignore[type-var]
        return b"".join([piece async for piece in pieces])


class VectorAnswer(Response):
    """Sends the request to the cluster when it is itself sent; used once."""

    def __init__(self, request: Request, model: str, asked: VectorRequest, write: Write) -> None:
        super().__init__()
        self._gateway = gateway_of(request)
        self._model = ModelUid(model)
        self._asked = asked
        self._write = write

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; a client that leaves gets nothing more, and its request is aborted.

        Raises:
            XinferenceError: the request was refused, or failed.
        """
        with self._gateway.observe(self._model, stream=False) as observation:
            patience = patience_of(
                scope, stream=False, default_seconds=self._gateway.answer_timeout_seconds
            )
            with WhileConnected(departure_of(scope, receive)) as client:
                async with patience.waiting(self._model):
                    answer = await computed(self._gateway.cluster, self._model, self._asked)
            if client.has_left:
                return
            body = await _written(answer, observation, self._write)
        headers = [*JSON_HEADERS, (b"content-length", b"%d" % len(body))]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        await send({"type": "http.response.body", "body": body})
