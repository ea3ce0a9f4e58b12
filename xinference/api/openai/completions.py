# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/completions`: the route, and what is a completion's own in its answer."""

from collections.abc import Sequence
from typing import Any, ClassVar

from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.gateway import Gateway, gateway_of
from xinference.api.generation import Generation, GenerationAnswer
from xinference.api.openapi import body_of, refusals
from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.generation import TokenLogprob

from .convert import completion_request, wants_obfuscation, wants_usage
from .form import AnswerParts, Form, token_text
from .schema import CompletionAnswer, CompletionRequest

router = APIRouter(tags=["OpenAI"])


class CompletionForm(Form):
    """Writes a completion's answer."""

    id_prefix: ClassVar[str] = "cmpl"
    whole_object: ClassVar[str] = "text_completion"
    chunk_object: ClassVar[str] = "text_completion"

    def first_piece(self) -> None:
        """Return nothing: a completion has no role to tell."""
        return None

    def piece(self, text: str) -> dict[str, Any]:
        """Return the text itself."""
        return {"text": text}

    def last_piece(self) -> dict[str, Any]:
        """Return an empty text."""
        return {"text": ""}

    def answer(self, parts: AnswerParts) -> dict[str, Any]:
        """Return the text itself."""
        return {"text": parts.text}

    def logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return four lists of one length."""
        return {
            "tokens": [token_text(one.token) for one in told],
            "token_logprobs": [one.logprob for one in told],
            "top_logprobs": [_top(one) for one in told],
            "text_offset": [one.text_offset for one in told],
        }


def _top(one: TokenLogprob) -> dict[str, float] | None:
    """Return the likeliest tokens and the one itself; None where nothing was expected."""
    if one.logprob is None:
        return None
    found: dict[str, float] = {}
    for each in one.top:
        found.setdefault(token_text(each.token), each.logprob)  # of two with one text the likelier
    found.setdefault(token_text(one.token), one.logprob)
    return found


async def completion_generation(
    gateway: Gateway, body: CompletionRequest, request_id: RequestId
) -> Generation:
    """Return what is to be done for a body.

    Raises:
        InvalidRequest
    """
    asked = completion_request(body, request_id)
    form = CompletionForm(
        asked, body.model, with_usage=wants_usage(body), is_padded=wants_obfuscation(body)
    )
    return Generation(model=ModelUid(body.model), asked=asked, form=form)


@router.post(
    "/v1/completions",
    response_model=None,
    openapi_extra=body_of(CompletionRequest),
    responses={
        200: {"model": CompletionAnswer, "content": {"text/event-stream": {}}},
        **refusals(400, 404, 409, 413, 422, 429, 503),
    },
)
async def create_completion(request: Request) -> Response:
    """Go on from a text or from token ids, in one piece or as a stream of server-sent events."""
    gateway = gateway_of(request)
    body = await read_body(request, CompletionRequest)
    generation = await completion_generation(gateway, body, name_request(request, body.request_id))
    return GenerationAnswer(gateway, generation, stream=bool(body.stream))
