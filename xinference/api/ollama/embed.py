# SPDX-License-Identifier: Apache-2.0
"""`POST /api/embed` and the older `POST /api/embeddings`."""

import time
from collections.abc import AsyncIterator
from typing import Any

import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.openapi import body_of, refusals
from xinference.api.vectors.answer import Computed, VectorAnswer
from xinference.api.vectors.embeddings import VectorsByInput
from xinference.protocol.vectors import CUT_TO_MODEL, EmbeddingRequest

from .convert import check_keep_alive, model_of
from .schema import (
    OllamaEmbedAnswer,
    OllamaEmbeddingAnswer,
    OllamaEmbeddingRequest,
    OllamaEmbedRequest,
    OllamaErrorAnswer,
)

router = APIRouter(tags=["Ollama"])

REFUSALS = refusals(400, 404, 413, 429, 503, body=OllamaErrorAnswer)


@router.post(
    "/api/embed",
    response_model=None,
    openapi_extra=body_of(OllamaEmbedRequest),
    responses={200: {"model": OllamaEmbedAnswer}, **REFUSALS},
)
async def embed(request: Request) -> Response:
    """Turn texts into vectors."""
    started = time.perf_counter_ns()
    body = await read_body(request, OllamaEmbedRequest)
    check_keep_alive(body.keep_alive)
    inputs = (body.input,) if isinstance(body.input, str) else tuple(body.input)
    asked = EmbeddingRequest(
        request_id=name_request(request, None),
        inputs=inputs,
        dimensions=body.dimensions,
        # Why: here long texts are cut unless that is forbidden.
        truncate_to=None if body.truncate is False else CUT_TO_MODEL,
    )

    async def write(answer: Computed) -> AsyncIterator[bytes]:
        vectors = VectorsByInput(len(inputs), answer)
        said = {
            "model": body.model,
            "embeddings": [vectors.dense(index) for index in range(len(inputs))],
            "total_duration": time.perf_counter_ns() - started,
            "load_duration": 0,
            "prompt_eval_count": answer.usage.num_prompt_tokens,
        }
        yield _written(said)

    return VectorAnswer(request, model_of(body.model), asked, write)


@router.post(
    "/api/embeddings",
    response_model=None,
    openapi_extra=body_of(OllamaEmbeddingRequest),
    responses={200: {"model": OllamaEmbeddingAnswer}, **REFUSALS},
)
async def embeddings(request: Request) -> Response:
    """Turn one text into a vector."""
    body = await read_body(request, OllamaEmbeddingRequest)
    check_keep_alive(body.keep_alive)
    asked = EmbeddingRequest(
        request_id=name_request(request, None), inputs=(body.prompt,), truncate_to=CUT_TO_MODEL
    )

    async def write(answer: Computed) -> AsyncIterator[bytes]:
        yield _written({"embedding": VectorsByInput(1, answer).dense(0)})

    return VectorAnswer(request, model_of(body.model), asked, write)


def _written(said: dict[str, Any]) -> bytes:
    return orjson.dumps(said, option=orjson.OPT_SERIALIZE_NUMPY)
