# SPDX-License-Identifier: Apache-2.0
"""`/v1/batches`: order the answers of a file of requests, look how far they are, give them up."""

import secrets
import time
from typing import Annotated, Any

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openai.lists import After, Limit, page_answer
from xinference.api.openapi import body_of, refusals
from xinference.api.store.batches import BatchStatus
from xinference.api.store.page import Page
from xinference.errors import InvalidRequest, ObjectNotFound

from .schema import BatchRequest

router = APIRouter(tags=["OpenAI"])

BatchId = Annotated[str, Path(description="The id of a batch.")]
WINDOW_SECONDS = 24 * 3600
UNSET = (
    "errors",
    "output_file_id",
    "error_file_id",
    "in_progress_at",
    "finalizing_at",
    "completed_at",
    "failed_at",
    "expired_at",
    "cancelling_at",
    "cancelled_at",
    "usage",
)
"""What a batch gets on its way."""


@router.post(
    "/v1/batches",
    response_model=None,
    openapi_extra=body_of(BatchRequest),
    responses=refusals(400, 404, 413, 503),
)
async def create_batch(request: Request) -> Response:
    """Order the answers of a file of requests."""
    gateway = gateway_of(request)
    body = await read_body(request, BatchRequest)
    try:
        file = await gateway.store.files.get(gateway.owner, body.input_file_id)
    except ObjectNotFound as error:
        raise InvalidRequest(field="input_file_id", problem=str(error)) from None
    if file.purpose != "batch":
        raise InvalidRequest(
            field="input_file_id", problem=f"is a file for {file.purpose}, not for batch"
        )
    now = int(time.time())
    expires_after = body.output_expires_after
    batch = {
        "id": f"batch_{secrets.token_hex(16)}",
        "object": "batch",
        "endpoint": body.endpoint,
        "input_file_id": body.input_file_id,
        "completion_window": body.completion_window,
        "status": BatchStatus.VALIDATING,
        "created_at": now,
        "expires_at": now + WINDOW_SECONDS,
        "request_counts": {"total": 0, "completed": 0, "failed": 0},
        "metadata": body.metadata,
        "output_expires_after": expires_after.model_dump() if expires_after else None,
        **dict.fromkeys(UNSET),
    }
    await gateway.store.batches.create(gateway.owner, batch)
    return json_answer(_shown(batch))


@router.get("/v1/batches", response_model=None, responses=refusals(400, 404, 503))
async def list_batches(request: Request, after: After = None, limit: Limit = 20) -> Response:
    """List batches, the newest first."""
    gateway = gateway_of(request)
    page = Page(limit=limit, after=after, newest_first=True)
    found, has_more = await gateway.store.batches.page(gateway.owner, page)
    return page_answer([_shown(batch) for batch in found], has_more=has_more)


@router.get("/v1/batches/{batch_id}", response_model=None, responses=refusals(404, 503))
async def retrieve_batch(request: Request, batch_id: BatchId) -> Response:
    """Say how far a batch is."""
    gateway = gateway_of(request)
    return json_answer(_shown(await gateway.store.batches.get(gateway.owner, batch_id)))


@router.post(
    "/v1/batches/{batch_id}/cancel", response_model=None, responses=refusals(400, 404, 503)
)
async def cancel_batch(request: Request, batch_id: BatchId) -> Response:
    """Give a batch up. What is answered already can be had."""
    gateway = gateway_of(request)
    return json_answer(_shown(await gateway.store.batches.cancel(gateway.owner, batch_id)))


def _shown(batch: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name != "output_expires_after"}
