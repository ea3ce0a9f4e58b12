# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/rerank` and `/v2/rerank`: one route for the clients of Cohere, Jina and Xinference."""

from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.openapi import body_of, refusals
from xinference.errors import InternalError, InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.vectors import RerankRequest, Scores

from .answer import Computed, VectorAnswer
from .schema import RerankAnswer, RerankBody

router = APIRouter(tags=["Rerank"])

ANSWERS: dict[str, Any] = {
    "response_model": None,
    "openapi_extra": body_of(RerankBody),
    "responses": {200: {"model": RerankAnswer}, **refusals(400, 404, 409, 413, 429, 503)},
}


@router.post("/v1/rerank", **ANSWERS)
async def rerank(request: Request) -> Response:
    """Sort documents by their relevance to a query."""
    body = await read_body(request, RerankBody)
    documents = [_text_of(index, one) for index, one in enumerate(body.documents)]
    asked = rerank_request(body, documents, name_request(request, body.request_id))

    async def write(answer: Computed) -> AsyncIterator[bytes]:
        yield orjson.dumps(_answer(body, asked, answer))

    return VectorAnswer(request, body.model, asked, write)


@router.post("/v2/rerank", **ANSWERS)
async def rerank_v2(request: Request) -> Response:
    """Do as `/v1/rerank`: the second version of Cohere's API asks here."""
    return await rerank(request)


def rerank_request(body: RerankBody, documents: list[str], request_id: RequestId) -> RerankRequest:
    """Return what a body asks for.

    Raises:
        InvalidRequest
    """
    return RerankRequest(
        request_id=request_id,
        query=body.query,
        documents=tuple(documents),
        instruction=body.instruction or _instruction_in(body.kwargs),
        max_chunks_per_doc=body.max_chunks_per_doc,
        max_tokens_per_doc=body.max_tokens_per_doc,
    )


def _text_of(index: int, document: str | dict[str, Any]) -> str:
    if isinstance(document, str):
        return document
    text = document.get("text")
    if not isinstance(text, str) or len(document) != 1:
        raise InvalidRequest(
            field=f"documents.{index}", problem="must be a text, or an object with a text alone"
        )
    return text


def _instruction_in(kwargs: str | None) -> str | None:
    if kwargs is None:
        return None
    try:
        given = orjson.loads(kwargs)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(field="kwargs", problem=f"is not JSON: {error}") from None
    instruction = given.get("instruction") if isinstance(given, dict) else None
    is_text = instruction is None or isinstance(instruction, str)
    if not isinstance(given, dict) or not given.keys() <= {"instruction"} or not is_text:
        raise InvalidRequest(field="kwargs", problem="may have an instruction, a text, and no more")
    return instruction or None


def _answer(body: RerankBody, asked: RerankRequest, answer: Computed) -> dict[str, Any]:
    scores = [score for piece in answer.pieces for score in _scores_of(piece)]
    if len(scores) != len(asked.documents):
        raise InternalError(where="a replica", problem="it did not score every document")
    best = sorted(range(len(scores)), key=lambda index: (-scores[index], index))[: body.top_n]
    num_tokens = answer.usage.num_prompt_tokens
    tokens = {"input_tokens": num_tokens, "output_tokens": 0} if body.return_len else None
    return {
        "id": asked.request_id,
        "model": body.model,
        "results": [
            {
                "index": index,
                "relevance_score": scores[index],
                "document": {"text": asked.documents[index]} if body.return_documents else None,
            }
            for index in best
        ],
        "meta": {"api_version": None, "billed_units": None, "tokens": tokens, "warnings": None},
        "usage": {"prompt_tokens": num_tokens, "total_tokens": num_tokens},
    }


def _scores_of(piece: object) -> tuple[float, ...]:
    if not isinstance(piece, Scores):
        raise InternalError(where="a replica", problem="it embedded, not scored")
    return piece.scores
