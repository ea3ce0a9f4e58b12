# SPDX-License-Identifier: Apache-2.0
"""The lines of a batch: requests that go in, outcomes that come out. Pure, but for reading."""

import secrets
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass
from typing import Any

import orjson

from xinference.api.body import checked
from xinference.api.error_shapes import openai_body
from xinference.api.errors import told
from xinference.errors import InvalidRequest, XinferenceError
from xinference.identifiers import RequestId

from .schema import BatchLine

MAX_LINES = 50_000
MAX_LINE_BYTES = 32 * 2**20
MAX_TOLD_ERRORS = 100


async def split_lines(pieces: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """Yield the lines of a file; those that are blank as well.

    Raises:
        InvalidRequest: one is longer than `MAX_LINE_BYTES`.
    """
    rest = b""
    async for piece in pieces:
        *lines, rest = (rest + piece).split(b"\n")
        for line in lines:
            yield line
        if len(rest) > MAX_LINE_BYTES:
            raise InvalidRequest(
                field="input_file_id", problem=f"has a line of more than {MAX_LINE_BYTES} bytes"
            )
    if rest:
        yield rest


def parse_line(raw: bytes, *, endpoint: str) -> BatchLine:
    """Read a line.

    Raises:
        InvalidRequest: it is no JSON, not a line of a batch, or for another endpoint.
    """
    try:
        given = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(field="", problem=f"The line is not JSON: {error}") from None
    line = checked(given, BatchLine)
    if line.url != endpoint:
        raise InvalidRequest(field="url", problem=f"must be that of the batch, {endpoint}")
    return line


@dataclass(frozen=True, slots=True, kw_only=True)
class FoundLines:
    """What was found in an input file."""

    num_lines: int
    errors: list[dict[str, Any]]
    """Why it cannot be run, as OpenAI's batches tell it."""


async def check_lines(pieces: AsyncIterable[bytes], *, endpoint: str) -> FoundLines:
    """Read all lines, and return how many there are and what is wrong with them."""
    errors: list[dict[str, Any]] = []
    first_places: dict[str, int] = {}
    number = 0
    try:
        async for raw in split_lines(pieces):
            number += 1
            if not raw.strip():
                continue
            try:
                line = parse_line(raw, endpoint=endpoint)
                if (first := first_places.setdefault(line.custom_id, number)) != number:
                    raise InvalidRequest(
                        field="custom_id", problem=f"is that of line {first} already"
                    )
                if len(first_places) > MAX_LINES:
                    raise InvalidRequest(
                        field="input_file_id", problem=f"has more than {MAX_LINES} requests"
                    )
            except InvalidRequest as error:
                errors.append(batch_error(error, line=number))
                if len(errors) >= MAX_TOLD_ERRORS or len(first_places) > MAX_LINES:
                    break
    except InvalidRequest as error:
        errors.append(batch_error(error, line=number + 1))
    if not first_places and not errors:
        nothing = InvalidRequest(field="input_file_id", problem="has no requests")
        errors.append(batch_error(nothing))
    return FoundLines(num_lines=len(first_places), errors=errors)


def batch_error(error: XinferenceError, *, line: int | None = None) -> dict[str, Any]:
    """Return why a batch cannot be run, or not further."""
    about = told(error)
    return {"code": about.code, "line": line, "message": about.message, "param": about.param}


def answered(custom_id: str, request_id: RequestId, body: bytes) -> bytes:
    """Return the outcome of a line that was answered."""
    response = {"status_code": 200, "request_id": request_id, "body": orjson.Fragment(body)}
    return _outcome(custom_id, response, None)


def refused(custom_id: str, request_id: RequestId, error: XinferenceError) -> bytes:
    """Return the outcome of a line that was refused, or failed."""
    about = told(error)
    body = openai_body(about, request_id)
    response = {"status_code": about.status, "request_id": request_id, "body": body}
    return _outcome(custom_id, response, None)


def given_up(custom_id: str, *, code: str, message: str) -> bytes:
    """Return the outcome of a line that nobody came to."""
    return _outcome(custom_id, None, {"code": code, "message": message})


def _outcome(
    custom_id: str, response: dict[str, Any] | None, error: dict[str, str] | None
) -> bytes:
    return orjson.dumps(
        {
            "id": f"batch_req_{secrets.token_hex(16)}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
    )
