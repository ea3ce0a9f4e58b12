# SPDX-License-Identifier: Apache-2.0
"""Which scope of an API key each route needs: one table, without which the gateway does not start.

A route that is in no row is an error of `create_app`, so none can be forgotten and stand open.
"""

import copy
import inspect
from collections.abc import Iterable, Mapping

from fastapi.middleware.asyncexitstack import AsyncExitStackMiddleware
from starlette.requests import Request
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from .keys.key import ApiKey
from .keys.key import Scope as KeyScope
from .keys.keyring import Keyring

INVOKE, MONITOR, ADMIN = KeyScope.INVOKE, KeyScope.MONITOR, KeyScope.ADMIN
PUBLIC = None
"""No key is asked for."""

ACCESS: Mapping[str, KeyScope | None] = {
    # What a client must know before it can have a key, and what a worker asks before it joins.
    "GET /": PUBLIC,
    "GET /api/version": PUBLIC,
    "GET /docs": PUBLIC,
    "GET /ui": PUBLIC,
    "GET /ui/{path:path}": PUBLIC,
    "GET /openapi.json": PUBLIC,
    "GET /health": PUBLIC,
    "GET /ready": PUBLIC,
    "GET /status": PUBLIC,
    "GET /v1/address": PUBLIC,
    "GET /v1/cluster/auth": PUBLIC,
    "GET /v1/cluster/version": PUBLIC,
    "GET /web/{path:path}": PUBLIC,
    "POST /token": PUBLIC,
    # Asking models.
    "POST /v1/chat/completions": INVOKE,
    "POST /v1/completions": INVOKE,
    "POST /v1/embeddings": INVOKE,
    "POST /v1/rerank": INVOKE,
    "POST /v2/rerank": INVOKE,
    "GET /v1/chat/completions": INVOKE,
    "GET /v1/chat/completions/{completion_id}": INVOKE,
    "POST /v1/chat/completions/{completion_id}": INVOKE,
    "DELETE /v1/chat/completions/{completion_id}": INVOKE,
    "GET /v1/chat/completions/{completion_id}/messages": INVOKE,
    "POST /v1/messages": INVOKE,
    "POST /v1/messages/count_tokens": INVOKE,
    "POST /anthropic/v1/messages": INVOKE,
    "POST /anthropic/v1/messages/count_tokens": INVOKE,
    "POST /v1/responses": INVOKE,
    "POST /v1/responses/input_tokens": INVOKE,
    "GET /v1/responses/{response_id}": INVOKE,
    "DELETE /v1/responses/{response_id}": INVOKE,
    "POST /v1/responses/{response_id}/cancel": INVOKE,
    "GET /v1/responses/{response_id}/input_items": INVOKE,
    "POST /v1/files": INVOKE,
    "GET /v1/files": INVOKE,
    "GET /v1/files/{file_id}": INVOKE,
    "GET /v1/files/{file_id}/content": INVOKE,
    "DELETE /v1/files/{file_id}": INVOKE,
    "POST /v1/batches": INVOKE,
    "GET /v1/batches": INVOKE,
    "GET /v1/batches/{batch_id}": INVOKE,
    "POST /v1/batches/{batch_id}/cancel": INVOKE,
    "POST /api/chat": INVOKE,
    "POST /api/generate": INVOKE,
    "POST /api/embed": INVOKE,
    "POST /api/embeddings": INVOKE,
    "POST /api/show": INVOKE,
    "GET /api/tags": INVOKE,
    "GET /api/ps": INVOKE,
    "GET /v1/models": INVOKE,
    "GET /v1/models/{model_uid}": INVOKE,
    "POST /v1/models/{model_uid}/requests/{request_id:path}/abort": INVOKE,
    "GET /v1/usage": INVOKE,
    # The life of models.
    "POST /v1/models": ADMIN,
    "POST /v1/models/instance": ADMIN,
    "GET /v1/models/instances": MONITOR,
    "GET /v1/models/{model_type}/{model_name}/versions": MONITOR,
    "GET /v1/models/prompts": MONITOR,
    "GET /v1/models/families": MONITOR,
    "GET /v1/models/vllm-supported": MONITOR,
    "DELETE /v1/models/{model_uid}": ADMIN,
    "GET /v1/models/{model_uid}/progress": MONITOR,
    "POST /v1/models/{model_uid}/cancel": ADMIN,
    "GET /v1/models/{model_uid}/events": MONITOR,
    "GET /v1/models/{model_uid}/logs": ADMIN,
    "GET /v1/models/{model_uid}/replicas": MONITOR,
    "POST /v1/models/{model_uid}/replicas": ADMIN,
    "DELETE /v1/models/{model_uid}/replicas/{replica_id}": ADMIN,
    "GET /v1/autostart/models": ADMIN,
    "GET /v1/autostart/models/summary": MONITOR,
    "POST /v1/autostart/models": ADMIN,
    "DELETE /v1/autostart/models/{model_uid}": ADMIN,
    # The catalogue.
    "GET /v1/model_registrations/{model_type}": MONITOR,
    "POST /v1/model_registrations/{model_type}": ADMIN,
    "GET /v1/model_registrations/{model_type}/{model_name}": MONITOR,
    "DELETE /v1/model_registrations/{model_type}/{model_name}": ADMIN,
    "GET /v1/engines/{model_name}": MONITOR,
    "GET /v1/engines/{model_type}/{model_name}": MONITOR,
    # What is kept of models.
    "GET /v1/cache/models": MONITOR,
    "POST /v1/cache/models": ADMIN,
    "DELETE /v1/cache/models": ADMIN,
    "GET /v1/cache/models/files": MONITOR,
    "GET /v1/cache/models/{cache_uid}/progress": MONITOR,
    "POST /v1/cache/models/{cache_uid}/cancel": ADMIN,
    # The cluster.
    "GET /v1/cluster/history": MONITOR,
    "GET /v1/cluster/info": MONITOR,
    "GET /v1/cluster/logs": ADMIN,
    "GET /v1/cluster/devices": MONITOR,
    "GET /v1/workers": MONITOR,
    "GET /v1/supervisor": MONITOR,
    "DELETE /v1/clusters": ADMIN,
    "GET /v1/virtualenvs": MONITOR,
    "DELETE /v1/virtualenvs": ADMIN,
    "GET /metrics": MONITOR,
    # Keys.
    "GET /v1/admin/keys": ADMIN,
    "POST /v1/admin/keys": ADMIN,
    "DELETE /v1/admin/keys/{key_id}": ADMIN,
}

_KEY = "xinference.api_key"
"""In an ASGI scope: the key that was admitted; absent while the gateway is open."""


def rows_of(route: Route) -> list[str]:
    """Return what the rows of a route are called."""
    return [f"{method} {route.path}" for method in sorted(route.methods or ())]


def guarded(routes: Iterable[BaseRoute], keyring: Keyring) -> list[BaseRoute]:
    """Return the routes, each behind the scope that it needs.

    Why copies: routers are shared by the applications of a process.
    """
    behind: list[BaseRoute] = []
    for route in routes:
        assert isinstance(route, Route), f"{route} has no row in ACCESS"
        needed = {ACCESS[row] for row in rows_of(route)}
        assert len(needed) == 1, f"{route.path}: methods of one route need one scope"
        guard = copy.copy(route)
        guard.app = _Guard(_plain(route), needed.pop(), keyring)
        behind.append(guard)
    return behind


def is_plain(route: Route) -> bool:
    """Return whether the function of a route wants nothing but the request."""
    return list(inspect.signature(route.endpoint).parameters) == ["request"]


def _plain(route: Route) -> ASGIApp:
    """Return what answers a route.

    Why not always the framework's: what that does around a function that wants nothing but the
    request costs a third of the whole answer.
    """
    endpoint = route.endpoint
    if not is_plain(route):
        return AsyncExitStackMiddleware(route.app)

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        response = await endpoint(Request(scope, receive, send))
        await response(scope, receive, send)

    return answer


def key_of(request: Request) -> ApiKey | None:
    """Return the key that a request was admitted with; None while the gateway is open."""
    key: ApiKey | None = request.scope.get(_KEY)
    return key


class _Guard:
    """A route's application that runs for callers with the right key."""

    def __init__(self, app: ASGIApp, needed: KeyScope | None, keyring: Keyring) -> None:
        self._app = app
        self._needed = needed
        self._keyring = keyring

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises InvalidApiKey or NotAllowed before anything of the request was looked at."""
        if self._needed is not PUBLIC and self._keyring.is_locked:
            scope[_KEY] = self._keyring.admit(_presented(scope["headers"]), self._needed)
        await self._app(scope, receive, send)


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """Return the key of a request: of OpenAI's header, else of Anthropic's."""
    found: str | None = None
    for name, value in headers:
        if name == b"authorization" and value[:7].lower() == b"bearer ":
            return value[7:].strip().decode("latin-1")
        if name == b"x-api-key":
            found = value.strip().decode("latin-1")
    return found
