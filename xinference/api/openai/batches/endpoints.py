# SPDX-License-Identifier: Apache-2.0
"""Where the lines of a batch may go: the routes' own work, with what a line cannot ask refused."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from xinference.api.body import checked
from xinference.api.connection import Departure
from xinference.api.gateway import Gateway
from xinference.api.generation import Generation, whole_answer
from xinference.api.openai.chat import chat_generation
from xinference.api.openai.completions import completion_generation
from xinference.api.openai.responses.routes import response_generation
from xinference.api.openai.responses.schema import ResponseRequest
from xinference.api.openai.schema import ChatRequest, CompletionRequest
from xinference.api.openai.tier import PRIORITIES, served_as
from xinference.api.vectors.answer import whole_vectors
from xinference.api.vectors.embeddings import embedding_request, writer_of
from xinference.api.vectors.schema import EmbeddingsRequest
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId

from .runner import Answer

SomeRequest = TypeVar("SomeRequest", ChatRequest, CompletionRequest, ResponseRequest)


def _generating(
    schema: type[SomeRequest],
    generation: Callable[[Gateway, SomeRequest, RequestId], Awaitable[Generation]],
) -> Answer:
    async def answer(gateway: Gateway, given: dict[str, Any], request_id: RequestId) -> bytes:
        body = checked(given, schema)
        if body.stream:
            raise InvalidRequest(field="stream", problem="is not for batches; leave it out")
        _check_unnamed(body.request_id)
        tier = getattr(body, "service_tier", None)
        if body.priority is None and served_as(tier) == "default":
            # Why: who waits for an answer goes before who comes back for it tomorrow.
            body = body.model_copy(update={"priority": PRIORITIES["flex"]})
        asked = await generation(gateway, body, request_id)
        whole = await whole_answer(gateway, asked, Departure())
        assert whole is not None, "nobody leaves"
        return whole

    return answer


async def _embeddings(gateway: Gateway, given: dict[str, Any], request_id: RequestId) -> bytes:
    body = checked(given, EmbeddingsRequest)
    _check_unnamed(body.request_id)
    asked = embedding_request(body, request_id)
    return await whole_vectors(gateway, body.model, asked, writer_of(body, asked))


def _check_unnamed(request_id: str | None) -> None:
    if request_id is not None:
        raise InvalidRequest(
            field="request_id", problem="is not for batches; custom_id names the line"
        )


ENDPOINTS: Mapping[str, Answer] = {
    "/v1/chat/completions": _generating(ChatRequest, chat_generation),
    "/v1/completions": _generating(CompletionRequest, completion_generation),
    "/v1/responses": _generating(ResponseRequest, response_generation),
    "/v1/embeddings": _embeddings,
}
