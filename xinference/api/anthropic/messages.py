# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/messages` and `POST /v1/messages/count_tokens`.

Both are below `/anthropic`, too, where Xinference has them.
"""

from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.errors import TRACE_ID
from xinference.api.gateway import gateway_of
from xinference.api.generation import Generation, GenerationAnswer, count_prompt_tokens
from xinference.api.openapi import body_of, refusals
from xinference.identifiers import ModelUid

from .convert import count_request, messages_request
from .form import FIELD_NAMES, MessageForm
from .schema import (
    AnthropicErrorAnswer,
    CountAnswer,
    CountTokensRequest,
    MessageAnswer,
    MessagesRequest,
)

router = APIRouter(tags=["Anthropic"])

REFUSALS = refusals(400, 404, 413, 422, 429, 503, body=AnthropicErrorAnswer)


MESSAGE: dict[str, Any] = {
    "response_model": None,
    "openapi_extra": body_of(MessagesRequest),
    "responses": {
        200: {"model": MessageAnswer, "content": {"text/event-stream": {}}},
        **REFUSALS,
    },
}
COUNT: dict[str, Any] = {
    "response_model": None,
    "openapi_extra": body_of(CountTokensRequest),
    "responses": {200: {"model": CountAnswer}, **REFUSALS},
}


@router.post("/anthropic/v1/messages", **MESSAGE)
@router.post("/v1/messages", **MESSAGE)
async def create_message(request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream of server-sent events."""
    body = await read_body(request, MessagesRequest)
    asked = messages_request(body, name_request(request, None))
    form = MessageForm(asked, body.model, trace_id=request.scope[TRACE_ID])
    generation = Generation(model=ModelUid(body.model), asked=asked, form=form)
    return GenerationAnswer(gateway_of(request), generation, stream=bool(body.stream))


@router.post("/anthropic/v1/messages/count_tokens", **COUNT)
@router.post("/v1/messages/count_tokens", **COUNT)
async def count_message_tokens(request: Request) -> Response:
    """Say how many tokens a prompt has, without answering it."""
    body = await read_body(request, CountTokensRequest)
    asked = count_request(body, name_request(request, None))
    count = await count_prompt_tokens(
        gateway_of(request).cluster, ModelUid(body.model), asked, field_names=FIELD_NAMES
    )
    return json_answer({"input_tokens": count})
