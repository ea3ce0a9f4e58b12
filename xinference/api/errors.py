# SPDX-License-Identifier: Apache-2.0
"""Errors as HTTP answers: one table from type to status, one way to tell of them.

`error_shapes.py` writes them as the caller's protocol wants; a stream that has begun, where there
is no status any more, ends with the same body.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from xinference.errors import (
    ApiKeyNotFound,
    CacheInUse,
    CapacityError,
    ClusterError,
    ContextLengthExceeded,
    DeadlinePassed,
    DiskFull,
    DuplicateRequest,
    EnvironmentInUse,
    FamilyNotFound,
    InvalidApiKey,
    InvalidRequest,
    LaunchCancelled,
    LaunchError,
    ModelNotFound,
    ModelOverloaded,
    NotAllowed,
    ObjectNotFound,
    RateLimitReached,
    RepositoryNotFound,
    RequestAborted,
    RequestCrashesModel,
    RequestError,
    StateUnwritable,
    XinferenceError,
)

from .absent import instead_of
from .error_shapes import ToldError, openai_body, shape_of

logger = logging.getLogger(__name__)

STATUS: Mapping[type[XinferenceError], int] = {
    RequestError: 400,
    InvalidApiKey: 401,
    NotAllowed: 403,
    ModelNotFound: 404,
    FamilyNotFound: 404,
    ApiKeyNotFound: 404,
    ObjectNotFound: 404,
    RequestAborted: 409,
    RequestCrashesModel: 422,
    DuplicateRequest: 409,
    CacheInUse: 409,
    EnvironmentInUse: 409,
    CapacityError: 503,
    ModelOverloaded: 429,
    RateLimitReached: 429,
    DeadlinePassed: 504,
    StateUnwritable: 507,
    LaunchError: 503,
    RepositoryNotFound: 404,
    LaunchCancelled: 499,
    DiskFull: 507,
    ClusterError: 503,
    XinferenceError: 500,
}

TRACE_ID = "xinference.trace_id"
"""In an ASGI scope: the id that the log and the `X-Request-Id` header of the answer have."""

RETRY_AFTER_SECONDS = 5
"""Said with a 503 that passes by itself, when the error does not know better."""

MAX_MESSAGE_LEN = 2000
MAX_FIELD_LEN = 200
MAX_SHOWN_LEN = 60
MAX_SHOWN_ERRORS = 5


def status_of(error: XinferenceError) -> int:
    """Return the status of the nearest ancestor that has one."""
    return next(STATUS[cls] for cls in type(error).__mro__ if cls in STATUS)


def _param_of(error: XinferenceError) -> str | None:
    match error:
        case InvalidRequest(field=field):
            # Why cut: it may be a name that the caller made up.
            return field[:MAX_FIELD_LEN] or None
        case ModelNotFound():
            return "model"
        case ApiKeyNotFound():
            return "key_id"
        case FamilyNotFound() | RepositoryNotFound():
            return "model_name"
        case ContextLengthExceeded():
            return "max_tokens"
        case DuplicateRequest() | RequestAborted():
            return "request_id"
    return None


def _extra_headers(error: XinferenceError, status: int) -> dict[str, str]:
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    if isinstance(error, CapacityError | ClusterError):
        return {"Retry-After": str(getattr(error, "retry_after_seconds", RETRY_AFTER_SECONDS))}
    # Why: OpenAI's clients repeat a 409 by themselves, but what was aborted must stay aborted.
    return {"X-Should-Retry": "false"} if status == 409 else {}


def told(error: XinferenceError) -> ToldError:
    """Return what callers are told of an error."""
    return ToldError(
        status=status_of(error),
        message=str(error)[:MAX_MESSAGE_LEN],
        code=error.code,
        param=_param_of(error),
    )


def error_event(error: XinferenceError) -> bytes:
    """Return the server-sent event that ends a stream of OpenAI's which has failed."""
    return b"data: " + orjson.dumps(openai_body(told(error), "")) + b"\n\n"


class ErrorResponse(Response):
    """An error, in the shape of the path that it is an answer to."""

    def __init__(self, told: ToldError, headers: Mapping[str, str]) -> None:
        super().__init__(status_code=told.status, headers=headers)
        self._told = told
        self._own_headers = headers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer."""
        shape = shape_of(scope["path"])
        body = orjson.dumps(shape.body(self._told, scope.get(TRACE_ID, "")))
        answer = Response(body, self.status_code, self._own_headers, media_type="application/json")
        await answer(scope, receive, send)


def error_response(error: XinferenceError) -> Response:
    """Return the answer for an error that was known before the headers were sent."""
    answer = told(error)
    return ErrorResponse(answer, _extra_headers(error, answer.status))


def log_fault(error: XinferenceError, scope: Scope) -> None:
    """Log an error that the caller cannot help, with the id that the answer has."""
    status = status_of(error)
    if status >= 500:
        # Why no traceback of the others: they tell of a state, which their message describes.
        logger.log(
            logging.ERROR if status == 500 else logging.WARNING,
            "%s %s: %s [%s]",
            scope["method"],
            scope["path"],
            error,
            scope.get(TRACE_ID),
            exc_info=error if status == 500 else None,
        )


def invalid_request(errors: Sequence[Mapping[str, Any]], *, given: object) -> InvalidRequest:
    """Turn pydantic's findings into one error that names the first wrong field.

    Args:
        errors: `ValidationError.errors()`; at least one.
        given: what was validated. A location's steps that do not lead through it (the name of a
            union's branch) are not shown.
    """
    told = [(_path(error, given), _problem(error)) for error in errors[:MAX_SHOWN_ERRORS]]
    (field, problem), *others = told
    more = "".join(f"; {path}: {what}" for path, what in others if path != field)
    return InvalidRequest(field=field, problem=problem + more)


def _path(error: Mapping[str, Any], given: object) -> str:
    steps = list(error["loc"])
    named = error.get("ctx", {}).get("field") or (steps[-1] if error["type"] == "missing" else None)
    if error["type"] in UNION_FINDINGS:
        named = error["ctx"]["discriminator"].strip("'")
    path = ""
    for step in steps:
        if isinstance(given, dict) and step in given:
            path += f".{step}" if path else str(step)
        elif isinstance(given, list) and isinstance(step, int) and step < len(given):
            path += f"[{step}]"
        else:
            continue
        given = given[step]
    if named is None:
        return path
    return f"{path}.{named}" if path else str(named)


PROBLEMS = {
    "missing": "is required",
    "string_type": "must be a text",
    "int_type": "must be a whole number",
    "float_type": "must be a number",
    "bool_type": "must be true or false",
    "list_type": "must be a list",
    "dict_type": "must be an object",
    "model_type": "must be an object",
    "model_attributes_type": "must be an object",
    "too_short": "must have more items",
    "too_long": "must have fewer items",
    "string_too_short": "must be longer",
    "string_too_long": "must be shorter",
    "union_tag_not_found": "is required",
}
"""Pydantic's findings in JSON's words; the others are clear as they are."""

UNION_FINDINGS = frozenset({"union_tag_invalid", "union_tag_not_found"})
"""What it finds of the field that tells objects of several kinds apart."""


def _problem(error: Mapping[str, Any]) -> str:
    said = str(error["msg"])
    problem = PROBLEMS.get(error["type"]) or said.replace("Input should be", "must be", 1)
    if error["type"] in ("missing", "unknown_field", "union_tag_not_found"):
        return problem
    if error["type"] == "union_tag_invalid":
        # Why here: pydantic tells the kinds in a sentence of its own.
        return f"must be one of {error['ctx']['expected_tags']}, got {_shown(error['ctx']['tag'])}"
    return f"{problem}, got {_shown(error['input'])}"


def _shown(value: object) -> str:
    """Return a value of JSON, shortened; a large one is not walked through."""
    match value:
        case list():
            return f"a list of {len(value)}"
        case dict():
            return "an object"
        case str() if len(value) > MAX_SHOWN_LEN:
            return f'"{value[:MAX_SHOWN_LEN]}…"'
    return orjson.dumps(value).decode()


def answer_to(error: Exception, scope: Scope) -> Response | None:
    """Return the answer for what a route has raised; None: it is a fault of ours that has no type.

    What the caller cannot help is logged.
    """
    match error:
        case XinferenceError():
            log_fault(error, scope)
            return error_response(error)
        case RequestValidationError():
            return error_response(_of_parameters(error, Request(scope)))
        case HTTPException():
            return _of_http(error, Request(scope))
    return None


def _of_parameters(error: RequestValidationError, request: Request) -> InvalidRequest:
    given = {"path": dict(request.path_params), "query": dict(request.query_params)}
    refused = invalid_request(error.errors(), given=given)
    named = refused.field.removeprefix("query.").removeprefix("path.")
    return InvalidRequest(field=named, problem=refused.problem)


HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
"""What the HTTP layer itself refuses, before any of our types is involved."""


def _of_http(error: HTTPException, request: Request) -> Response:
    message = error.detail
    if error.status_code in (404, 405):
        path = request.url.path
        instead = instead_of(path) or "/docs lists what there is."
        message = f"{message}: {request.method} {path}. {instead}"
    code = HTTP_CODES.get(error.status_code, InvalidRequest.code)
    refused = ToldError(status=error.status_code, message=message[:MAX_MESSAGE_LEN], code=code)
    headers = dict(error.headers or {})
    if error.status_code == 405:
        headers["Allow"] = ", ".join(_methods_at(request))
    return ErrorResponse(refused, headers)


def _methods_at(request: Request) -> list[str]:
    """Return the methods of all routes with this path; the framework tells the first one's."""
    methods: set[str] = set()
    for route in request.app.routes:
        if route.matches(request.scope)[0] is not Match.NONE:
            methods |= route.methods
    return sorted(methods | {"HEAD"} if "GET" in methods else methods)
