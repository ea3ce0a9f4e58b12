# SPDX-License-Identifier: Apache-2.0
"""`/v1/files`: put files here, which batches read, and get those that batches have written."""

import re
from collections.abc import AsyncIterator
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Path, Query, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.responses import Response, StreamingResponse
from starlette.types import Message

from xinference.api.answers import json_answer
from xinference.api.body import checked
from xinference.api.fields import Body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import refusals
from xinference.api.store.files import StoredFile
from xinference.api.store.page import Page
from xinference.errors import InvalidRequest

from .batches.schema import MAX_LIFETIME_SECONDS, Lifetime
from .lists import After, Order, page_answer

router = APIRouter(tags=["OpenAI"])

FileId = Annotated[str, Path(description="The id of a file.")]
PIECE_BYTES = 2**20
FORM_BYTES = 64 * 2**10
"""What a form may have beside its file."""
MAX_FIELDS = 8
MAX_PAGE = 10_000
MAX_NAME_LEN = 255
FORM = {
    "type": "object",
    "required": ["file", "purpose"],
    "properties": {
        "file": {"type": "string", "format": "binary"},
        "purpose": {"enum": ["batch", "user_data"]},
        "expires_after[anchor]": {"enum": ["created_at"]},
        "expires_after[seconds]": {"type": "integer"},
    },
}


class FileFields(Body):
    """The fields of `POST /v1/files`, beside the file itself."""

    purpose: Literal["batch", "user_data"]
    expires_after: Lifetime | None = None
    """Null: a file for batches goes after 30 days, others stay."""


@router.post(
    "/v1/files",
    response_model=None,
    openapi_extra={"requestBody": {"content": {"multipart/form-data": {"schema": FORM}}}},
    responses=refusals(400, 413, 503),
)
async def upload_file(request: Request) -> Response:
    """Store a file."""
    gateway = gateway_of(request)
    bounded = Request(
        request.scope, _bounded(request, gateway.store.limits.max_file_bytes + FORM_BYTES)
    )
    async with bounded.form(max_files=1, max_fields=MAX_FIELDS) as form:
        fields = dict(form)
        upload = fields.pop("file", None)
        if not isinstance(upload, UploadFile):
            raise InvalidRequest(field="file", problem="is needed, as a file of a form")
        about = checked(_unfolded(fields), FileFields)
        name = upload.filename or "file"
        if len(name) > MAX_NAME_LEN:
            raise InvalidRequest(
                field="file", problem=f"its name is longer than {MAX_NAME_LEN} characters"
            )
        lifetime_seconds = about.expires_after.seconds if about.expires_after else None
        if about.expires_after is None and about.purpose == "batch":
            lifetime_seconds = MAX_LIFETIME_SECONDS
        file = await gateway.store.files.create(
            gateway.owner,
            _pieces(upload),
            filename=name,
            purpose=about.purpose,
            lifetime_seconds=lifetime_seconds,
        )
    return json_answer(_shown(file))


def _bounded(request: Request, max_bytes: int) -> Any:
    """Return the receiving side of a request whose body may not be larger."""
    too_large = HTTPException(413, f"The body is larger than {max_bytes} bytes.")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > max_bytes:
        raise too_large
    num_bytes = 0

    async def receive() -> Message:
        nonlocal num_bytes
        message = await request.receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > max_bytes:
            raise too_large
        return message

    return receive


_FOLDED = re.compile(r"expires_after\[(\w+)\]")


def _unfolded(fields: dict[str, Any]) -> dict[str, Any]:
    """Return the fields of a form as JSON would have them."""
    plain: dict[str, Any] = {}
    for name, value in fields.items():
        if isinstance(value, UploadFile):
            raise InvalidRequest(field=name, problem="must be a text, not a file")
        if found := _FOLDED.fullmatch(name):
            number = int(value) if found[1] == "seconds" and value.isdecimal() else value
            plain.setdefault("expires_after", {})[found[1]] = number
        else:
            plain[name] = value
    return plain


async def _pieces(upload: UploadFile) -> AsyncIterator[bytes]:
    while piece := await upload.read(PIECE_BYTES):
        yield piece


@router.get("/v1/files", response_model=None, responses=refusals(400, 404, 503))
async def list_files(
    request: Request,
    purpose: str | None = None,
    after: After = None,
    limit: Annotated[int, Query(ge=1, le=MAX_PAGE)] = MAX_PAGE,
    order: Order = "desc",
) -> Response:
    """List files."""
    gateway = gateway_of(request)
    page = Page(limit=limit, after=after, newest_first=order == "desc")
    found, has_more = await gateway.store.files.page(gateway.owner, page, purpose=purpose)
    return page_answer([_shown(file) for file in found], has_more=has_more)


@router.get("/v1/files/{file_id}", response_model=None, responses=refusals(404, 503))
async def retrieve_file(request: Request, file_id: FileId) -> Response:
    """Say what is known of a file."""
    gateway = gateway_of(request)
    return json_answer(_shown(await gateway.store.files.get(gateway.owner, file_id)))


@router.get(
    "/v1/files/{file_id}/content",
    response_model=None,
    response_class=StreamingResponse,
    responses={200: {"content": {"application/octet-stream": {}}}, **refusals(404, 503)},
)
async def file_content(request: Request, file_id: FileId) -> Response:
    """Return what is in a file."""
    gateway = gateway_of(request)
    file = await gateway.store.files.get(gateway.owner, file_id)
    return StreamingResponse(
        gateway.store.files.pieces(gateway.owner, file_id),
        headers={"content-length": str(file.num_bytes)},
        media_type="application/octet-stream",
    )


@router.delete("/v1/files/{file_id}", response_model=None, responses=refusals(404, 503))
async def delete_file(request: Request, file_id: FileId) -> Response:
    """Forget a file. A batch that still reads it fails."""
    gateway = gateway_of(request)
    await gateway.store.files.delete(gateway.owner, file_id)
    return json_answer({"id": file_id, "object": "file", "deleted": True})


def _shown(file: StoredFile) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.num_bytes,
        "created_at": file.created_ts,
        "expires_at": file.expires_ts,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }
