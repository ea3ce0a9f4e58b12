# SPDX-License-Identifier: Apache-2.0
"""The one door for request bodies: bytes → JSON → a checked schema object, or a clear refusal.

Nothing that arrives here can raise anything but the errors below: NaN, lone surrogates, nesting
without end and numbers without end are refused by the JSON reader, whatever the content type
says (curl's default is not JSON's).
"""

from typing import Any, TypeVar

import orjson
from fastapi import Request
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from xinference.errors import InvalidRequest

from .errors import invalid_request
from .fields import Body

MAX_BODY_BYTES = 32 * 2**20

SomeBody = TypeVar("SomeBody", bound=Body)


async def read_body(request: Request, schema: type[SomeBody], *, empty: bool = False) -> SomeBody:
    """Read and check the body of a request.

    Args:
        empty: an absent body counts as `{}`.

    Raises:
        InvalidRequest: it is not JSON, or not what the schema says; the field is named.
        HTTPException: it is larger than `MAX_BODY_BYTES` (413), or the client left (400).
    """
    return checked(_parse(await _read(request), empty=empty), schema)


def checked(given: Any, schema: type[SomeBody]) -> SomeBody:
    """Check what was read as JSON.

    Raises:
        InvalidRequest: it is not what the schema says; the field is named.
    """
    try:
        return schema.model_validate(given)
    except ValidationError as error:
        raise invalid_request(error.errors(include_url=False), given=given) from None


async def _read(request: Request) -> bytes:
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > MAX_BODY_BYTES:
        raise _too_large()
    chunks: list[bytes] = []
    num_bytes = 0
    has_more = True
    while has_more:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise HTTPException(400, "The client left before its request was whole.")
        chunk = message.get("body", b"")
        has_more = message.get("more_body", False)
        num_bytes += len(chunk)
        if num_bytes > MAX_BODY_BYTES:
            raise _too_large()
        chunks.append(chunk)
    return b"".join(chunks)


def _too_large() -> HTTPException:
    return HTTPException(413, f"The body is larger than {MAX_BODY_BYTES} bytes.")


def _parse(raw: bytes, *, empty: bool) -> Any:
    if not raw.strip():
        if empty:
            return {}
        raise InvalidRequest(field="", problem="The body is empty; send a JSON object.")
    try:
        given = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(field="", problem=f"The body is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidRequest(field="", problem="The body must be a JSON object.")
    return given
