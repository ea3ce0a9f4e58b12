# SPDX-License-Identifier: Apache-2.0
"""Where the lines of a batch may go: the routes' own work, with what a line cannot ask refused."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

from xinference.api.body import checked
from xinference.api.gateway import Gateway
from xinference.api.generation import Generation
from xinference.api.openai.chat import chat_generation
from xinference.api.openai.completions import completion_generation
from xinference.api.openai.responses.routes import response_generation
from xinference.api.openai.responses.schema import ResponseRequest
from xinference.api.openai.schema import ChatRequest, CompletionRequest
from xinference.api.openai.tier import PRIORITIES, served_as
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId

from .runner import Prepare

SomeRequest = TypeVar("SomeRequest", ChatRequest, CompletionRequest, ResponseRequest)


def _endpoint(
    schema: type[SomeRequest],
    generation: Callable[[Gateway, SomeRequest, RequestId], Awaitable[Generation]],
) -> Prepare:
    async def prepare(gateway: Gateway, given: dict[str, Any], request_id: RequestId) -> Generation:
        body = checked(given, schema)
        if body.stream:
            raise InvalidRequest(field="stream", problem="is not for batches; leave it out")
        if body.request_id is not None:
            raise InvalidRequest(
                field="request_id", problem="is not for batches; custom_id names the line"
            )
        tier = getattr(body, "service_tier", None)
        if body.priority is None and served_as(tier) == "default":
            # Why: who waits for an answer goes before who comes back for it tomorrow.
            body = body.model_copy(update={"priority": PRIORITIES["flex"]})
        return await generation(gateway, body, request_id)

    return prepare


ENDPOINTS: Mapping[str, Prepare] = {
    "/v1/chat/completions": _endpoint(ChatRequest, chat_generation),
    "/v1/completions": _endpoint(CompletionRequest, completion_generation),
    "/v1/responses": _endpoint(ResponseRequest, response_generation),
}
