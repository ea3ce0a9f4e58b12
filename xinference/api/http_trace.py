# SPDX-License-Identifier: Apache-2.0
"""The span of an HTTP request: what it was, how it ended, and which model it went to.

Requests that change or ask something have one; those that only look (GET, HEAD, OPTIONS) have none,
for pages and monitors make many of them.
"""

from starlette.types import Scope

from xinference.errors import XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.generation import Usage
from xinference.tracing import MODEL_UID, AttributeValue, Span, Tracer

from .errors import TRACE_ID

METHODS = frozenset({"DELETE", "PATCH", "POST", "PUT"})
CARRIERS = frozenset({b"traceparent", b"tracestate"})
CLIENT_LEFT_STATUS = 499
"""As proxies write it: the client left before there was an answer."""


def begin_http_span(tracer: Tracer, scope: Scope) -> Span | None:
    """Begin the span of a request, as a part of what its caller says; None: it gets none."""
    method = scope["method"]
    if method not in METHODS:
        return None
    carrier = {
        name.decode(): value.decode("latin-1")
        for name, value in scope["headers"]
        if name in CARRIERS
    }
    span = tracer.begin(method, carrier, {"http.request.method": method, "url.path": scope["path"]})
    span.name_request(scope[TRACE_ID])
    return span


def end_http_span(span: Span, scope: Scope, status: int) -> None:
    """End it.

    Args:
        status: of the answer; 0: the client left before there was one.
    """
    route = getattr(scope.get("route"), "path", None)
    attributes: dict[str, AttributeValue] = {
        "http.response.status_code": status or CLIENT_LEFT_STATUS,
        # Another one than the request's, where its caller has sent one.
        "http.response.header.x-request-id": [scope[TRACE_ID]],
    }
    if route is not None:
        attributes["http.route"] = route
        span.rename(f"{scope['method']} {route}")
    span.set(attributes)
    if status >= 500:
        span.fail(f"status {status}")
    span.end()


def note_outcome(
    span: Span,
    model: ModelUid,
    *,
    error: XinferenceError | None,
    cause: str | None,
    usage: Usage | None,
) -> None:
    """Note how the request to a model ended that an HTTP request was for.

    Args:
        cause: why it got no whole answer, if that was not its own fault.
    """
    attributes: dict[str, AttributeValue] = {MODEL_UID: model}
    if usage is not None:
        attributes["gen_ai.usage.input_tokens"] = usage.num_prompt_tokens
        attributes["gen_ai.usage.output_tokens"] = usage.num_completion_tokens
    if error is not None:
        attributes["error.type"] = error.code
    if cause is not None:
        attributes["xinference.abort_cause"] = cause
    span.set(attributes)
    if error is not None and cause is not None:
        # A stream that has begun has a status of success, whatever becomes of it.
        span.fail(str(error))
