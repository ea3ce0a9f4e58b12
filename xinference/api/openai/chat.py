# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/chat/completions`: the route, and what is a chat's own in its answer."""

from collections.abc import Sequence
from typing import Any, ClassVar

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.gateway import Gateway, gateway_of
from xinference.api.generation import Generation, GenerationAnswer
from xinference.api.openapi import body_of, refusals
from xinference.api.store.answers import AnswerKind
from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.generation import (
    Delta,
    ReasoningDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)

from .convert import chat_request, wants_obfuscation, wants_usage
from .form import AnswerParts, Form, with_top
from .schema import ChatAnswer, ChatRequest
from .stored_chats import stored_messages
from .tier import served_as

router = APIRouter(tags=["OpenAI"])


class ChatForm(Form):
    """Writes a chat's answer."""

    id_prefix: ClassVar[str] = "chatcmpl"
    whole_object: ClassVar[str] = "chat.completion"
    chunk_object: ClassVar[str] = "chat.completion.chunk"

    def first_piece(self) -> dict[str, Any]:
        """Return who speaks."""
        return {"delta": {"role": "assistant", "content": ""}}

    def piece(self, text: str) -> dict[str, Any]:
        """Return the delta of a piece of text."""
        return {"delta": {"content": text}}

    def last_piece(self) -> dict[str, Any]:
        """Return an empty delta."""
        return {"delta": {}}

    def other_piece(self, delta: Delta) -> dict[str, Any] | None:
        """Return the delta of a thought, or of a piece of a call."""
        match delta:
            case ReasoningDelta(text=text):
                return {"delta": {"reasoning_content": text}} if text else None
            case ToolCallStart(index=index):
                return {"delta": {"tool_calls": [{"index": index, **_call(delta, "")}]}}
            case ToolCallArguments(index=index, text=text):
                return {
                    "delta": {"tool_calls": [{"index": index, "function": {"arguments": text}}]}
                }
        return None

    def answer(self, parts: AnswerParts) -> dict[str, Any]:
        """Return the assistant's turn."""
        text, calls = parts.text, parts.tool_calls
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if calls and not text else text,
            "refusal": None,
        }
        if parts.reasoning:
            message["reasoning_content"] = parts.reasoning
        if calls:
            message["tool_calls"] = [_call(start, arguments) for start, arguments in calls]
        return {"message": message}

    def logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return the tokens, each with what might have stood there."""
        return {"content": [with_top(one) for one in told], "refusal": None}


def _call(start: ToolCallStart, arguments: str) -> dict[str, Any]:
    function = {"name": start.name, "arguments": arguments}
    return {"id": start.call_id, "type": "function", "function": function}


async def chat_generation(gateway: Gateway, body: ChatRequest, request_id: RequestId) -> Generation:
    """Return what is to be done for a body.

    Raises:
        InvalidRequest
    """
    asked = chat_request(body, request_id)
    tier = served_as(body.service_tier) if body.service_tier is not None else None
    form = ChatForm(
        asked,
        body.model,
        with_usage=wants_usage(body),
        is_padded=wants_obfuscation(body),
        service_tier=tier,
    )

    async def keep(whole: bytes) -> None:
        labels = {"metadata": body.metadata, "prompt_cache_key": body.prompt_cache_key}
        answer = orjson.loads(whole) | labels
        await gateway.store.answers.save(
            gateway.owner,
            AnswerKind.CHAT,
            form.answer_id,
            model=body.model,
            given=stored_messages(form.answer_id, body.messages),
            body=orjson.dumps(answer),
        )

    return Generation(
        model=ModelUid(body.model), asked=asked, form=form, keep=keep if body.store else None
    )


@router.post(
    "/v1/chat/completions",
    response_model=None,
    openapi_extra=body_of(ChatRequest),
    responses={
        200: {"model": ChatAnswer, "content": {"text/event-stream": {}}},
        **refusals(400, 404, 409, 413, 422, 429, 503),
    },
)
async def create_chat_completion(request: Request) -> Response:
    """Answer a conversation, in one piece or as a stream of server-sent events."""
    gateway = gateway_of(request)
    body = await read_body(request, ChatRequest)
    generation = await chat_generation(gateway, body, name_request(request, body.request_id))
    return GenerationAnswer(gateway, generation, stream=bool(body.stream))
