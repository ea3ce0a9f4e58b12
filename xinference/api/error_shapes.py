# SPDX-License-Identifier: Apache-2.0
"""How each protocol writes an error. The path of a request says which protocol its caller speaks.

What is told is decided in `errors.py`; this knows the words and the places for it alone:

    OpenAI, Xinference   {"error": {"message", "type", "param", "code"}, "detail"}
    Anthropic            {"type": "error", "error": {"type", "message"}, "request_id"}
    Ollama               {"error": message}
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class ToldError:
    """An error as callers are told of it."""

    status: int
    message: str
    code: str
    param: str | None = None
    """The field that is wrong."""


def openai_body(told: ToldError, trace_id: str) -> dict[str, Any]:
    """Return OpenAI's, with `detail` beside it for Xinference's published client."""
    error = {
        "message": told.message,
        "type": _openai_type(told.status),
        "param": told.param,
        "code": told.code,
    }
    return {"error": error, "detail": told.message}


def _openai_type(status: int) -> str:
    if status == 429:
        return "rate_limit_error"
    return "invalid_request_error" if status < 500 else "server_error"


ANTHROPIC_TYPES: Mapping[int, str] = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    503: "overloaded_error",
}
"""By status; below 500 the others are `invalid_request_error`, above `api_error`."""


def anthropic_body(told: ToldError, trace_id: str) -> dict[str, Any]:
    """Return Anthropic's, which events of a stream have too."""
    other = "invalid_request_error" if told.status < 500 else "api_error"
    error: dict[str, Any] = {
        "type": ANTHROPIC_TYPES.get(told.status, other),
        "message": told.message,
    }
    if told.param == "thread":
        # Why: by this Anthropic's client knows that it has to send whole conversations.
        error["details"] = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
    return {"type": "error", "error": error, "request_id": trace_id}


def ollama_body(told: ToldError, trace_id: str) -> dict[str, Any]:
    """Return Ollama's, which is the last line of a stream that has failed, too."""
    return {"error": told.message}


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorShape:
    """What a protocol's callers read errors from."""

    body: Callable[[ToldError, str], dict[str, Any]]
    """Of an error and the id of its request."""
    id_headers: tuple[bytes, ...] = (b"x-request-id",)
    """Where they look for that id, in answers of every kind."""


OPENAI = ErrorShape(body=openai_body)
ANTHROPIC = ErrorShape(body=anthropic_body, id_headers=(b"x-request-id", b"request-id"))
OLLAMA = ErrorShape(body=ollama_body)


def shape_of(path: str) -> ErrorShape:
    """Return what callers of this path understand, whether or not there is such a route."""
    if path == "/v1/messages" or path.startswith(("/v1/messages/", "/anthropic/")):
        return ANTHROPIC
    return OLLAMA if path.startswith("/api/") else OPENAI
