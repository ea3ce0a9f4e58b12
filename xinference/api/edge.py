# SPDX-License-Identifier: Apache-2.0
"""The outermost layer of ours: every request gets an id, and no error leaves without our shape.

It is plain ASGI and looks at the first message of an answer only, so a stream passes through it
at no cost per token. What can be asked for by GET can be by HEAD: how some clients, Ollama's among
them, and many monitors ask whether somebody is there.
"""

import logging
import re

from fastapi import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from xinference.errors import InternalError
from xinference.identifiers import RequestId, new_request_id
from xinference.protocol.logs import REQUEST_ID
from xinference.tracing import Tracer, current_span, working_for

from .error_shapes import shape_of
from .errors import TRACE_ID, answer_to, error_response
from .http_trace import begin_http_span, end_http_span
from .metrics import Metrics
from .request_log import RequestLog

logger = logging.getLogger(__name__)

METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})
_FOREIGN_ID = re.compile(r"[\x21-\x7e]{1,128}")


def name_request(request: Request, given: str | None) -> RequestId:
    """Return the id of a generation: the one given in its body, or a new one.

    The answer's `X-Request-Id` is the same, unless the caller sent a header of that name: then
    the caller finds it again.
    """
    has_named_it = _given_id(request.scope) is not None
    if given is not None:
        request_id = RequestId(given)
    elif has_named_it:
        # Why another: one header may stand on many requests, and live ones must differ.
        request_id = new_request_id()
    else:
        request_id = RequestId(request.scope[TRACE_ID])
    span = current_span()
    if span is not None:
        span.name_request(request_id)
    if given is not None and not has_named_it:
        request.scope[TRACE_ID] = request_id
        REQUEST_ID.set(request_id)
    return request_id


class Edge:
    """Middleware; see the module."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        metrics: Metrics,
        request_log: RequestLog,
        tracer: Tracer | None = None,
    ) -> None:
        self._app = app
        self._metrics = metrics
        self._request_log = request_log
        self._tracer = tracer

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on; what it raises becomes an answer, a 500 if nobody expected it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope[TRACE_ID] = _given_id(scope) or new_request_id()
        REQUEST_ID.set(scope[TRACE_ID])
        span = None if self._tracer is None else begin_http_span(self._tracer, scope)
        if span is None:
            await self._answer(scope, receive, send)
            return
        with working_for(span):
            status = 0
            try:
                status = await self._answer(scope, receive, send)
            except BaseException as error:
                span.fail(f"its answer broke off: {error!r}")
                raise
            finally:
                end_http_span(span, scope, status)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> int:
        """Return the status of the answer; 0: the client left before there was one."""
        receive = self._request_log.begin(scope, receive)
        method, status = scope["method"], 0
        if method == "HEAD":
            # Why a copy: the server, which keeps the body back, goes by its own.
            scope = {**scope, "method": "GET"}

        async def send_marked(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                trace_id = scope[TRACE_ID].encode()
                named = [(name, trace_id) for name in shape_of(scope["path"]).id_headers]
                headers = [*message.get("headers", ()), *named]
                message = {**message, "headers": headers}
            await send(message)

        try:
            await self._app(scope, receive, send_marked)
        except Exception as error:
            if status:
                # Why raise: a status cannot be taken back; the server logs this and cuts the
                # connection, so that the client does not take the answer for whole.
                raise
            answer = answer_to(error, scope) or self._broken(scope)
            await answer(scope, receive, send_marked)
        finally:
            scope["method"] = method
            self._count(scope, status)
            self._request_log.end(scope, status)
        return status

    @staticmethod
    def _broken(scope: Scope) -> Response:
        """Log what is being handled, and return an answer that says where to look."""
        logger.exception("%s %s failed [%s]", scope["method"], scope["path"], scope[TRACE_ID])
        problem = f"the log has more under the request id {scope[TRACE_ID]}"
        return error_response(InternalError(where="the gateway", problem=problem))

    def _count(self, scope: Scope, status: int) -> None:
        route = getattr(scope.get("route"), "path", "none")
        method = scope["method"] if scope["method"] in METHODS else "other"
        # 499, as proxies write it: the client left before there was an answer.
        self._metrics.child(self._metrics.http_requests, method, route, status or 499).inc()


def _given_id(scope: Scope) -> str | None:
    for name, value in scope["headers"]:
        if name == b"x-request-id":
            text = str(value.decode("latin-1"))
            return text if _FOREIGN_ID.fullmatch(text) else None
    return None
