# SPDX-License-Identifier: Apache-2.0
"""`/v1/responses`: make a response, and look at, go on from or forget a stored one."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.gateway import Gateway, gateway_of
from xinference.api.generation import Generation, GenerationAnswer, count_prompt_tokens
from xinference.api.openai.lists import After, Limit, Order, page_of_items
from xinference.api.openapi import body_of, refusals
from xinference.api.store.answers import AnswerKind, StoredAnswer
from xinference.errors import InvalidRequest, ObjectNotFound
from xinference.identifiers import ModelUid, RequestId

from .convert import count_request, response_request
from .form import FIELD_NAMES, ResponseForm
from .items import kept_items, messages_of
from .schema import Includable, InputTokensRequest, ResponseRequest

router = APIRouter(tags=["OpenAI"])

ResponseId = Annotated[str, Path(description="The id of a stored response.")]
Include = Annotated[
    list[Includable] | None, Query(alias="include[]", description="Told in any case.")
]


async def response_generation(
    gateway: Gateway, body: ResponseRequest, request_id: RequestId
) -> Generation:
    """Return what is to be done for a body.

    Raises:
        InvalidRequest
        ObjectNotFound: there is no response that it could go on from.
    """
    before = await _items_before(gateway, body.previous_response_id)
    items = kept_items(body.input)
    response_id = f"resp_{secrets.token_hex(24)}"

    async def keep(whole: bytes) -> None:
        await gateway.store.answers.save(
            gateway.owner,
            AnswerKind.RESPONSE,
            response_id,
            model=body.model,
            given=items,
            body=whole,
            previous_id=body.previous_response_id,
        )

    return Generation(
        model=ModelUid(body.model),
        asked=response_request(body, messages_of(before, items), request_id),
        form=ResponseForm(body, response_id),
        keep=None if body.store is False else keep,
    )


async def _items_before(gateway: Gateway, previous_id: str | None) -> list[dict[str, Any]]:
    if previous_id is None:
        return []
    try:
        turns = await gateway.store.answers.turns(gateway.owner, previous_id)
    except ObjectNotFound as error:
        raise InvalidRequest(
            field="previous_response_id", problem=f"there is no response {error.id}"
        ) from None
    return [item for turn in turns for item in _items_of(turn)]


def _items_of(turn: StoredAnswer) -> list[dict[str, Any]]:
    output: list[dict[str, Any]] = turn.body["output"]
    return [*turn.given, *output]


@router.post(
    "/v1/responses",
    response_model=None,
    openapi_extra=body_of(ResponseRequest),
    responses={
        200: {"content": {"text/event-stream": {}}},
        **refusals(400, 404, 409, 413, 422, 429, 503),
    },
)
async def create_response(request: Request) -> Response:
    """Answer a text or the items of a conversation, in one piece or as a stream of events."""
    gateway = gateway_of(request)
    body = await read_body(request, ResponseRequest)
    request_id = name_request(request, body.request_id)
    generation = await response_generation(gateway, body, request_id)
    return GenerationAnswer(gateway, generation, stream=bool(body.stream))


@router.post(
    "/v1/responses/input_tokens",
    response_model=None,
    openapi_extra=body_of(InputTokensRequest),
    responses=refusals(400, 404, 413, 429, 503),
)
async def count_input_tokens(request: Request) -> Response:
    """Say how many tokens the prompt of a response has, without making it."""
    gateway = gateway_of(request)
    body = await read_body(request, InputTokensRequest)
    before = await _items_before(gateway, body.previous_response_id)
    messages = messages_of(before, kept_items(body.input))
    count = await count_prompt_tokens(
        gateway.cluster,
        ModelUid(body.model),
        count_request(body, messages, name_request(request, None)),
        field_names=FIELD_NAMES,
    )
    return json_answer({"object": "response.input_tokens", "input_tokens": count})


@router.get("/v1/responses/{response_id}", response_model=None, responses=refusals(400, 404, 503))
async def retrieve_response(
    request: Request,
    response_id: ResponseId,
    include: Include = None,
    stream: Annotated[bool, Query(description="Refused: only finished ones are stored.")] = False,
) -> Response:
    """Return a stored response."""
    if stream:
        raise InvalidRequest(field="stream", problem="a stored response is whole; leave it out")
    gateway = gateway_of(request)
    found = await gateway.store.answers.get(gateway.owner, AnswerKind.RESPONSE, response_id)
    return json_answer(found.body)


@router.delete("/v1/responses/{response_id}", response_model=None, responses=refusals(404, 503))
async def delete_response(request: Request, response_id: ResponseId) -> Response:
    """Forget a stored response. Nothing can go on from it any more."""
    gateway = gateway_of(request)
    await gateway.store.answers.delete(gateway.owner, AnswerKind.RESPONSE, response_id)
    return json_answer({"id": response_id, "object": "response", "deleted": True})


@router.post(
    "/v1/responses/{response_id}/cancel", response_model=None, responses=refusals(400, 404, 503)
)
async def cancel_response(request: Request, response_id: ResponseId) -> Response:
    """Refuse: what is stored has ended, and what runs ends with its connection."""
    gateway = gateway_of(request)
    await gateway.store.answers.get(gateway.owner, AnswerKind.RESPONSE, response_id)
    raise InvalidRequest(
        field="response_id",
        problem="this response has ended; one that runs is cancelled by closing its connection",
    )


@router.get(
    "/v1/responses/{response_id}/input_items",
    response_model=None,
    responses=refusals(400, 404, 503),
)
async def list_input_items(
    request: Request,
    response_id: ResponseId,
    after: After = None,
    include: Include = None,
    limit: Limit = 20,
    order: Order = "desc",
) -> Response:
    """List what a response is an answer to: the turns before it, and its own input."""
    gateway = gateway_of(request)
    *earlier, last = await gateway.store.answers.turns(gateway.owner, response_id)
    items = [item for turn in earlier for item in _items_of(turn)] + last.given
    return page_of_items(items, kind="item", after=after, limit=limit, order=order)
