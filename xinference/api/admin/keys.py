# SPDX-License-Identifier: Apache-2.0
"""API keys: make, list, revoke, log in with one; and what was used with them."""

import time
from dataclasses import asdict
from datetime import date
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import Gateway, gateway_of
from xinference.api.keys.key import ApiKey, KeySpec, Scope
from xinference.api.openapi import body_of, refusals
from xinference.errors import InvalidApiKey, InvalidRequest

from .schema import KeyItem, KeyList, KeyRequest, LoginRequest, MadeKey, TokenAnswer, UsageList

router = APIRouter(tags=["API keys"], default_response_class=Response)

FIRST_DAY, LAST_DAY = "0001-01-01", "9999-12-31"

Day = Annotated[
    str | None,
    Query(pattern=r"^\d{4}-\d{2}-\d{2}$", description="Such as 2026-01-31, in UTC; included."),
]


@router.post(
    "/v1/admin/keys",
    openapi_extra=body_of(KeyRequest),
    responses={200: {"model": MadeKey}, **refusals(400, 401, 403, 413, 503)},
)
async def create_key(request: Request) -> Response:
    """Make a key. Its text is in this answer and nowhere else; with the first key the gateway is
    locked."""
    spec = _spec(await read_body(request, KeyRequest))
    text, key = gateway_of(request).keyring.create(spec)
    return json_answer(key.as_item(now=time.time()) | {"key": text})


@router.get("/v1/admin/keys", responses={200: {"model": KeyList}, **refusals(400, 401, 403)})
async def list_keys(request: Request, ended: bool = False) -> Response:
    """List the keys that are active; with `ended` those that expired or were revoked, too."""
    items = [key.as_item(now=time.time()) for key in gateway_of(request).keyring.all_keys()]
    shown = [item for item in items if ended or item["status"] == "active"]
    return json_answer({"object": "list", "data": shown})


@router.delete(
    "/v1/admin/keys/{key_id}", responses={200: {"model": KeyItem}, **refusals(401, 403, 404, 503)}
)
async def revoke_key(request: Request, key_id: str) -> Response:
    """Revoke a key for good; every gateway process refuses it within a second."""
    key = gateway_of(request).keyring.revoke(key_id)
    return json_answer(key.as_item(now=time.time()))


@router.get("/v1/usage", responses={200: {"model": UsageList}, **refusals(400, 401, 403, 503)})
async def list_usage(request: Request, since: Day = None, until: Day = None) -> Response:
    """Say what was used, by key and model: all of it, or for a key without the scope monitor its
    own."""
    gateway = gateway_of(request)
    asker = gateway.key
    found = gateway.keyring.usage(
        since=_day("since", since) or FIRST_DAY,
        until=_day("until", until) or LAST_DAY,
        key_id=None if asker is None or asker.may(Scope.MONITOR) else asker.key_id,
    )
    rows = [
        {
            "key_id": key_id or None,
            "key_name": gateway.keyring.name_of(key_id) or None,
            "model": model,
            **asdict(used),
            "total_tokens": used.prompt_tokens + used.completion_tokens,
        }
        for (key_id, model), used in found.items()
    ]
    return json_answer({"object": "list", "data": rows})


@router.post(
    "/token",
    openapi_extra=body_of(LoginRequest),
    responses={200: {"model": TokenAnswer}, **refusals(400, 401, 413)},
)
async def log_in(request: Request) -> Response:
    """Check a key: `username` is its name or id, `password` the key. The token is the key itself,
    so that revoking it ends every login."""
    body = await read_body(request, LoginRequest)
    key = _logged_in(gateway_of(request), body)
    if body.username not in (key.spec.name, key.key_id):
        raise InvalidApiKey(problem="The username must be the name or the id of the API key.")
    return json_answer({"access_token": body.password, "token_type": "bearer"})


def _logged_in(gateway: Gateway, body: LoginRequest) -> ApiKey:
    if not gateway.keyring.is_locked:
        raise InvalidRequest(field="", problem="This gateway has no API keys; no login is needed.")
    return gateway.keyring.authenticate(body.password)


def _spec(body: KeyRequest) -> KeySpec:
    lifetime = body.expires_in_seconds
    return KeySpec(
        name=body.name,
        scopes=frozenset({Scope.INVOKE} if body.scopes is None else map(Scope, body.scopes)),
        models=None if body.models is None else frozenset(body.models),
        expires_ts=None if lifetime is None else int(time.time()) + lifetime,
        requests_per_minute=body.requests_per_minute,
        tokens_per_minute=body.tokens_per_minute,
    )


def _day(name: str, given: str | None) -> str | None:
    try:
        return given and date.fromisoformat(given).isoformat()
    except ValueError as error:
        raise InvalidRequest(field=name, problem=f"is no day: {error}") from None
