# SPDX-License-Identifier: Apache-2.0
"""`/v1/chat/completions/…`: chats that were asked for with `store`."""

import re
from collections.abc import Sequence
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import body_of, refusals
from xinference.api.store.answers import AnswerKind
from xinference.api.store.page import Page

from .lists import After, Limit, Order, page_answer, page_of_items
from .schema import ChatMessage, RelabelRequest

router = APIRouter(tags=["OpenAI"])

CompletionId = Annotated[str, Path(description="The id of a stored chat completion.")]
_LABEL = re.compile(r"metadata\[(.+)\]")


def stored_messages(completion_id: str, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
    """Return the messages of a chat as they are listed."""
    return [
        {
            **message.model_dump(exclude_none=True),
            "id": f"{completion_id}-{position}",
            "content": message.content if isinstance(message.content, str) else None,
            "content_parts": _parts(message),
        }
        for position, message in enumerate(messages)
    ]


def _parts(message: ChatMessage) -> list[dict[str, Any]] | None:
    if not isinstance(message.content, list):
        return None
    return [part.model_dump(exclude_none=True) for part in message.content]


@router.get("/v1/chat/completions", response_model=None, responses=refusals(400, 404, 503))
async def list_chat_completions(
    request: Request,
    model: str | None = None,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Response:
    """List stored chat completions; `metadata[name]=value` picks those that have this label."""
    gateway = gateway_of(request)
    labels = {
        found[1]: value
        for name, value in request.query_params.items()
        if (found := _LABEL.fullmatch(name))
    }
    answers, has_more = await gateway.store.answers.page(
        gateway.owner,
        AnswerKind.CHAT,
        Page(limit=limit, after=after, newest_first=order == "desc"),
        model=model,
        metadata=labels,
    )
    return page_answer([answer.body for answer in answers], has_more=has_more)


@router.get(
    "/v1/chat/completions/{completion_id}", response_model=None, responses=refusals(404, 503)
)
async def retrieve_chat_completion(request: Request, completion_id: CompletionId) -> Response:
    """Return a stored chat completion."""
    gateway = gateway_of(request)
    found = await gateway.store.answers.get(gateway.owner, AnswerKind.CHAT, completion_id)
    return json_answer(found.body)


@router.post(
    "/v1/chat/completions/{completion_id}",
    response_model=None,
    openapi_extra=body_of(RelabelRequest),
    responses=refusals(400, 404, 413, 503),
)
async def relabel_chat_completion(request: Request, completion_id: CompletionId) -> Response:
    """Give a stored chat completion other metadata."""
    gateway = gateway_of(request)
    body = await read_body(request, RelabelRequest)
    found = await gateway.store.answers.relabel(
        gateway.owner, AnswerKind.CHAT, completion_id, body.metadata
    )
    return json_answer(found.body)


@router.delete(
    "/v1/chat/completions/{completion_id}", response_model=None, responses=refusals(404, 503)
)
async def delete_chat_completion(request: Request, completion_id: CompletionId) -> Response:
    """Forget a stored chat completion."""
    gateway = gateway_of(request)
    await gateway.store.answers.delete(gateway.owner, AnswerKind.CHAT, completion_id)
    deleted = {"id": completion_id, "object": "chat.completion.deleted", "deleted": True}
    return json_answer(deleted)


@router.get(
    "/v1/chat/completions/{completion_id}/messages",
    response_model=None,
    responses=refusals(400, 404, 503),
)
async def list_chat_messages(
    request: Request,
    completion_id: CompletionId,
    after: After = None,
    limit: Limit = 20,
    order: Order = "asc",
) -> Response:
    """List the messages that a stored chat completion is the answer to."""
    gateway = gateway_of(request)
    found = await gateway.store.answers.get(gateway.owner, AnswerKind.CHAT, completion_id)
    return page_of_items(found.given, kind="message", after=after, limit=limit, order=order)
