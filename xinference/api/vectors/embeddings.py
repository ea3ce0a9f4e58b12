# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/embeddings`: the route, and its body ⇄ values."""

import asyncio
import base64
from collections.abc import AsyncIterator
from typing import Any

import numpy as np
import orjson
from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.openapi import body_of, refusals
from xinference.errors import InternalError
from xinference.identifiers import RequestId
from xinference.protocol.vectors import (
    DenseVectors,
    EmbeddingRequest,
    Input,
    InputType,
    Scores,
    SparseVector,
    TokenVectors,
    VectorKind,
)

from .answer import Computed, VectorAnswer, Write
from .schema import EmbeddingsAnswer, EmbeddingsRequest

router = APIRouter(tags=["OpenAI"])

ITEMS_AT_A_TIME = 64
"""Written before other requests have their turn."""


@router.post(
    "/v1/embeddings",
    response_model=None,
    openapi_extra=body_of(EmbeddingsRequest),
    responses={200: {"model": EmbeddingsAnswer}, **refusals(400, 404, 409, 413, 429, 503)},
)
async def create_embeddings(request: Request) -> Response:
    """Turn texts into vectors."""
    body = await read_body(request, EmbeddingsRequest)
    asked = embedding_request(body, name_request(request, body.request_id))
    return VectorAnswer(request, body.model, asked, writer_of(body, asked))


def writer_of(body: EmbeddingsRequest, asked: EmbeddingRequest) -> Write:
    """Return what writes the answer to a body."""

    async def write(answer: Computed) -> AsyncIterator[bytes]:
        vectors = VectorsByInput(len(asked.inputs), answer)
        yield b'{"object":"list","model":' + orjson.dumps(body.model) + b',"data":['
        for index in range(len(asked.inputs)):
            if index and index % ITEMS_AT_A_TIME == 0:
                await asyncio.sleep(0)
            item = vectors.item(index, as_base64=body.encoding_format == "base64")
            written = orjson.dumps(item, option=orjson.OPT_SERIALIZE_NUMPY)
            yield (b"," if index else b"") + written
        num_tokens = answer.usage.num_prompt_tokens
        usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens}
        yield b'],"usage":' + orjson.dumps(usage) + b"}"

    return write


def embedding_request(body: EmbeddingsRequest, request_id: RequestId) -> EmbeddingRequest:
    """Return what a body asks for.

    Raises:
        InvalidRequest
    """
    kinds = {
        VectorKind.DENSE: body.return_dense,
        VectorKind.SPARSE: body.return_sparse,
        VectorKind.MULTI_VECTOR: body.return_multi_vector,
    }
    if body.return_dense is None:
        kinds[VectorKind.DENSE] = not (body.return_sparse or body.return_multi_vector)
    return EmbeddingRequest(
        request_id=request_id,
        inputs=inputs_of(body.input),
        kinds=tuple(kind for kind, is_wanted in kinds.items() if is_wanted),
        dimensions=body.dimensions,
        prompt=body.prompt,
        prompt_name=body.prompt_name,
        input_type=body.input_type and InputType(body.input_type.removeprefix("search_")),
        truncate_to=body.truncate_prompt_tokens,
    )


def inputs_of(given: str | list[str] | list[int] | list[list[int]]) -> tuple[Input, ...]:
    """Return the inputs that a body names in one of four ways."""
    if isinstance(given, str):
        return (given,)
    if isinstance(given[0], int):
        return (tuple(given),)
    return tuple(one if isinstance(one, str) else tuple(one) for one in given)


class VectorsByInput:
    """The pieces of an answer, sorted by the inputs they belong to."""

    def __init__(self, num_inputs: int, answer: Computed) -> None:
        self._dense: list[Any] = [None] * num_inputs
        self._sparse: list[dict[str, float] | None] = [None] * num_inputs
        self._tokens: list[list[Any]] = [[] for _ in range(num_inputs)]
        for piece in answer.pieces:
            match piece:
                case DenseVectors(indices=indices, data=data):
                    rows = np.frombuffer(data, dtype="<f4").reshape(len(indices), -1)
                    for index, row in zip(indices, rows, strict=True):
                        self._dense[index] = row
                case SparseVector(index=index, token_ids=token_ids, weights=weights):
                    numbers = np.frombuffer(weights, dtype="<f4").tolist()
                    self._sparse[index] = dict(zip(map(str, token_ids), numbers, strict=True))
                case TokenVectors(index=index, dimensions=dimensions, data=data):
                    rows = np.frombuffer(data, dtype="<f4").reshape(-1, dimensions)
                    self._tokens[index].append(rows)
                case Scores():
                    raise InternalError(where="a replica", problem="it scored, not embedded")

    def dense(self, index: int) -> Any:
        """Return the vector of one input, or None."""
        return self._dense[index]

    def item(self, index: int, *, as_base64: bool) -> dict[str, Any]:
        """Return what the answer says of one input; arrays are left as they are."""
        dense, sparse, tokens = self._dense[index], self._sparse[index], self._tokens[index]
        item: dict[str, Any] = {"index": index, "object": "embedding"}
        if dense is not None:
            item["embedding"] = _encoded(dense) if as_base64 else dense
            if sparse is not None:
                item["sparse_embedding"] = sparse
        else:
            item["embedding"] = [] if sparse is None else sparse
        if tokens:
            rows = np.concatenate(tokens)
            item["multi_vector"] = _encoded(rows) if as_base64 else rows
        return item


def _encoded(numbers: Any) -> str:
    return base64.b64encode(numbers.tobytes()).decode("ascii")
