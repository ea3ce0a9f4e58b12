# SPDX-License-Identifier: Apache-2.0
"""API keys over HTTP: who gets in where, how often, and what that was."""

import asyncio
import re
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import xinference_client
from starlette.routing import Route

from tests.fakes.cluster import FakeCluster, endless
from tests.fakes.http import serving as serving_in_thread
from xinference.api.access import ACCESS, ADMIN, INVOKE, MONITOR, PUBLIC, guarded, rows_of
from xinference.api.app import create_app
from xinference.api.keys.key import KeySpec, Scope
from xinference.api.keys.keyring import Keyring
from xinference.api.keys.store import FILE, KeyStore
from xinference.client import AsyncClient, Client, Unauthorized
from xinference.errors import InvalidApiKey

from .conftest import chat, serving

SCOPES = {"invoke": INVOKE, "monitor": MONITOR, "admin": ADMIN}


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


async def make(http: httpx.AsyncClient, admin: str | None = None, **fields: Any) -> str:
    headers = bearer(admin) if admin else {}
    answer = await http.post("/v1/admin/keys", json=fields, headers=headers)
    assert answer.status_code == 200, answer.text
    return str(answer.json()["key"])


async def until(holds: Callable[[], Awaitable[object]], *, seconds: float) -> None:
    """Ask again and again until it holds; fails when the time is up."""
    async with asyncio.timeout(seconds):
        while not await holds():  # noqa: ASYNC110  # what it waits for is on a server
            await asyncio.sleep(0.02)


@pytest.fixture
async def admin(http: httpx.AsyncClient) -> str:
    """The first key; with it the gateway is locked."""
    return await make(http, name="admin", scopes=["admin"])


def all_rows() -> list[tuple[str, str]]:
    app = create_app(FakeCluster())
    return [
        (row, row.partition(" ")[2])
        for route in app.routes
        for row in rows_of(route)  # type: ignore[arg-type]
    ]


def test_the_table_has_every_route_and_no_other() -> None:
    assert sorted(row for row, _ in all_rows()) == sorted(ACCESS)


def test_a_route_without_a_row_keeps_the_gateway_from_starting() -> None:
    route = Route("/v1/forgotten", endpoint=lambda request: None)

    with pytest.raises(KeyError, match="/v1/forgotten"):
        guarded([route], Keyring(KeyStore.in_memory()))


async def test_the_gateway_is_open_until_there_is_a_key(http: httpx.AsyncClient) -> None:
    assert (await http.get("/v1/cluster/auth")).json() == {"auth": False}
    assert (await http.get("/v1/models", headers=bearer("anything"))).status_code == 200

    await make(http, name="admin", scopes=["admin"])

    assert (await http.get("/v1/cluster/auth")).json() == {"auth": True}
    refused = await http.get("/v1/models")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert refused.json()["error"]["code"] == "invalid_api_key"
    assert "--api-key" in refused.json()["detail"]


async def test_each_route_opens_for_its_scope_and_no_other(
    http: httpx.AsyncClient, admin: str
) -> None:
    keys = {"admin": admin}
    for scope in ("invoke", "monitor"):
        keys[scope] = await make(http, admin, name=scope, scopes=[scope])

    for row, path in all_rows():
        if path == "/v1/clusters":
            continue  # it ends the fake for the other rows
        method, needed = row.partition(" ")[0], ACCESS[row]
        path = re.sub(r"{\w+(:path)?}", "0", path)
        if needed is not PUBLIC:
            assert (await http.request(method, path)).status_code == 401, row
        for name, key in keys.items():
            answer = await http.request(method, path, headers=bearer(key))
            opens = needed in (PUBLIC, SCOPES[name]) or name == "admin"
            assert (answer.status_code == 403) == (not opens), (row, name, answer.text)


@pytest.mark.parametrize(
    "text",
    ["", "x", "xin-0-0", "xin-000000000000-" + "a" * 43, "ü", "Bearer", "xin-" + "a" * 5000],
)
async def test_what_is_no_key_is_refused_whatever_it_looks_like(
    http: httpx.AsyncClient, admin: str, text: str
) -> None:
    for headers in ({"Authorization": f"Bearer {text}".encode()}, {"x-api-key": text.encode()}):
        assert (await http.get("/v1/models", headers=headers)).status_code == 401
    wrong = admin[:-1] + ("a" if admin[-1] != "a" else "b")
    assert (await http.get("/v1/models", headers=bearer(wrong))).status_code == 401


async def test_a_key_comes_in_either_header(http: httpx.AsyncClient, admin: str) -> None:
    for headers in (bearer(admin), {"authorization": f"bearer {admin}"}, {"x-api-key": admin}):
        assert (await http.get("/v1/models", headers=headers)).status_code == 200


async def test_a_key_for_some_models_sees_and_asks_only_those(cluster: FakeCluster) -> None:
    for uid in ("mine", "theirs"):
        spec = cluster.launched[0]
        await cluster.launch(
            type(spec)(model_uid=uid, model_name=spec.model_name, model_engine="transformers"),  # type: ignore[arg-type]
            wait_ready=True,
        )
    transport = httpx.ASGITransport(app=create_app(cluster))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        admin = await make(http, name="admin", scopes=["admin"])
        key = bearer(await make(http, admin, name="one", models=["mine"]))

        listed = (await http.get("/v1/models", headers=key)).json()["data"]
        asked = await http.post("/v1/chat/completions", json=chat(model="mine"), headers=key)
        refused = await http.post("/v1/chat/completions", json=chat(model="theirs"), headers=key)
        aborted = await http.post("/v1/models/theirs/requests/r/abort", headers=key)
        described = await http.get("/v1/models/theirs", headers=key)
        embedded = [
            await http.post("/v1/embeddings", json={"model": uid, "input": "a b"}, headers=key)
            for uid in ("mine", "theirs")
        ]

    assert [model["id"] for model in listed] == ["mine"]
    assert asked.status_code == 200
    assert [refused.status_code, aborted.status_code, described.status_code] == [403] * 3
    assert "theirs" in refused.json()["detail"]
    assert [answer.status_code for answer in embedded] == [200, 403]
    assert [asked.request_id.count(".") for asked in cluster.computed] == [1]


async def test_requests_take_turns_by_key_whatever_user_they_name(
    http: httpx.AsyncClient, cluster: FakeCluster, admin: str
) -> None:
    for user in ("one", "two"):
        await http.post("/v1/chat/completions", json=chat(user=user), headers=bearer(admin))

    one, two = cluster.requests
    assert one.fairness_key == two.fairness_key == admin.split("-")[1]


async def test_one_keys_request_ids_are_nothing_to_another(
    http: httpx.AsyncClient, cluster: FakeCluster, admin: str
) -> None:
    cluster.words = endless
    cluster.allow(1)
    keys = [bearer(await make(http, admin, name=name)) for name in ("one", "two")]
    abort = "/v1/models/guide/requests/same/abort"

    asking = [
        asyncio.create_task(
            http.post("/v1/chat/completions", json=chat(request_id="same"), headers=key)
        )
        for key in keys
    ]
    await cluster.wait_until(lambda: len(cluster.live_requests("guide")) == 2)
    again = await http.post("/v1/chat/completions", json=chat(request_id="same"), headers=keys[0])
    mine = await http.post(abort, headers=keys[0])
    ended = await asking[0]

    assert again.status_code == 409
    assert "same" in again.json()["detail"]
    assert "." not in again.json()["detail"].split(" is ")[0]
    assert mine.json() == {"msg": "DONE"}
    assert ended.json()["error"]["code"] == "request_aborted"
    assert not asking[1].done()
    (theirs,) = cluster.live_requests("guide")
    by_admin = await http.post(f"/v1/models/guide/requests/{theirs}/abort", headers=bearer(admin))
    assert by_admin.json() == {"msg": "DONE"}
    assert (await asking[1]).status_code == 409


async def test_a_key_is_not_told_of_models_that_are_not_its(
    http: httpx.AsyncClient, admin: str
) -> None:
    key = bearer(await make(http, admin, name="one", models=["mine"]))

    answer = await http.post("/v1/chat/completions", json=chat(model="mine"), headers=key)

    assert answer.status_code == 404
    assert "guide" not in answer.text


async def test_a_limit_is_a_429_that_says_when(http: httpx.AsyncClient, admin: str) -> None:
    key = bearer(await make(http, admin, name="slow", requests_per_minute=2))

    answers = [
        await http.post("/v1/chat/completions", json=chat(stream=turn > 0), headers=key)
        for turn in range(3)
    ]

    assert [answer.status_code for answer in answers] == [200, 200, 429]
    assert answers[2].json()["detail"].startswith("Rate limit reached")
    assert 25 <= int(answers[2].headers["retry-after"]) <= 30
    assert (await http.get("/v1/models", headers=key)).status_code == 200


async def test_tokens_are_limited_by_what_was_used(http: httpx.AsyncClient, admin: str) -> None:
    key = bearer(await make(http, admin, name="short", tokens_per_minute=5))

    answers = [await http.post("/v1/chat/completions", json=chat(), headers=key) for _ in range(2)]

    assert [answer.status_code for answer in answers] == [200, 429]


async def test_a_key_ends_when_its_time_is_over() -> None:
    now = 1000.0
    keyring = Keyring(KeyStore.in_memory(clock=lambda: now), clock=lambda: now)
    spec = KeySpec(name="a", scopes=frozenset({Scope.ADMIN}), expires_ts=1010)
    text, _ = keyring.create(spec)
    keyring.authenticate(text)
    now = 1010.0

    with pytest.raises(InvalidApiKey, match="expired"):
        keyring.authenticate(text)
    assert keyring.is_locked


async def test_a_revoked_key_is_refused_by_every_process_within_a_second(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    apps = [create_app(cluster, key_store=KeyStore.open(tmp_path)) for _ in range(2)]
    async with serving(apps[0]) as one, serving(apps[1]) as other, httpx.AsyncClient() as http:

        async def refuses(port: int, key: str) -> bool:
            answer = await http.get(f"http://127.0.0.1:{port}/v1/models", headers=bearer(key))
            return answer.status_code == 401

        made = await http.post(
            f"http://127.0.0.1:{one}/v1/admin/keys", json={"name": "admin", "scopes": ["admin"]}
        )
        key, key_id = made.json()["key"], made.json()["id"]
        await until(lambda: refuses(other, "none"), seconds=1.0)
        assert not await refuses(other, key)

        revoked = await http.delete(
            f"http://127.0.0.1:{one}/v1/admin/keys/{key_id}", headers=bearer(key)
        )
        assert revoked.json()["status"] == "revoked"
        assert await refuses(one, key)
        await until(lambda: refuses(other, key), seconds=1.0)


async def test_a_file_of_keys_that_does_not_work_is_a_503(
    cluster: FakeCluster, tmp_path: Path
) -> None:
    app = create_app(cluster, key_store=KeyStore.open(tmp_path))
    with closing(sqlite3.connect(tmp_path / FILE)) as other:
        other.execute("ALTER TABLE api_key RENAME TO elsewhere")
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            body = {"name": "admin", "scopes": ["admin"]}
            refused = await http.post("/v1/admin/keys", json=body)
            other.execute("ALTER TABLE elsewhere RENAME TO api_key")
            made = await http.post("/v1/admin/keys", json=body)

    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "store_unavailable"
    assert made.status_code == 200


async def test_keys_are_listed_without_their_secrets(http: httpx.AsyncClient, admin: str) -> None:
    made = await make(http, admin, name="app", models=["guide"], expires_in_seconds=60)
    key_id = made.split("-")[1]
    await http.delete(f"/v1/admin/keys/{key_id}", headers=bearer(admin))

    active = (await http.get("/v1/admin/keys", headers=bearer(admin))).json()["data"]
    every = await http.get("/v1/admin/keys?ended=true", headers=bearer(admin))

    assert [key["name"] for key in active] == ["admin"]
    assert [key["status"] for key in every.json()["data"]] == ["active", "revoked"]
    assert made not in every.text
    assert made.split("-", 2)[2] not in every.text
    missing = await http.delete("/v1/admin/keys/none", headers=bearer(admin))
    assert missing.json()["error"]["code"] == "api_key_not_found"


async def usage(http: httpx.AsyncClient, key: str) -> dict[tuple[str, str], dict[str, int]]:
    rows = (await http.get("/v1/usage", headers=bearer(key))).json()["data"]
    return {(row["key_name"], row["model"]): row for row in rows}


async def test_what_was_used_adds_up_by_key_and_model(http: httpx.AsyncClient, admin: str) -> None:
    app = await make(http, admin, name="app")
    told = []
    for stop in (None, "is"):
        answer = await http.post("/v1/chat/completions", json=chat(stop=stop), headers=bearer(app))
        told.append(answer.json()["usage"])
    await http.post("/v1/chat/completions", json=chat(max_tokens=2), headers=bearer(admin))
    await http.post("/v1/chat/completions", json=chat(n=-1), headers=bearer(app))

    found = await usage(http, admin)

    assert set(found) == {("app", "guide"), ("admin", "guide")}
    row = found["app", "guide"]
    assert row["requests"] == 2
    assert row["prompt_tokens"] == sum(one["prompt_tokens"] for one in told)
    assert row["completion_tokens"] == sum(one["completion_tokens"] for one in told)
    assert row["total_tokens"] == sum(one["total_tokens"] for one in told)
    assert found["admin", "guide"]["completion_tokens"] == 2
    assert set(await usage(http, app)) == {("app", "guide")}
    page = (await http.get("/metrics", headers=bearer(admin))).text
    assert "xinference:api_keys_expired_total 0.0" in page
    counted = 'api_key_tokens_total{api_key_name="app",kind="completion",model_uid="guide"}'
    assert f"{counted} {float(row['completion_tokens'])}" in page


async def test_days_choose_what_was_used(http: httpx.AsyncClient, admin: str) -> None:
    await http.post("/v1/chat/completions", json=chat(), headers=bearer(admin))

    past = await http.get("/v1/usage?until=2000-01-01", headers=bearer(admin))
    wrong = await http.get("/v1/usage?since=2026-02-30", headers=bearer(admin))

    assert past.json()["data"] == []
    assert wrong.status_code == 400
    assert wrong.json()["error"]["param"] == "since"


@pytest.fixture
async def locked(cluster: FakeCluster) -> AsyncIterator[tuple[str, str]]:
    """The endpoint of a real server, and its admin's key."""
    app = create_app(cluster)
    async with serving(app) as port:
        endpoint = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=endpoint) as http:
            yield endpoint, await make(http, name="admin", scopes=["admin"])


async def test_a_client_that_leaves_is_charged_for_what_it_got(
    locked: tuple[str, str], cluster: FakeCluster
) -> None:
    endpoint, admin = locked
    cluster.words = endless
    cluster.allow(7)
    async with httpx.AsyncClient(base_url=endpoint, headers=bearer(admin)) as http:
        async with http.stream("POST", "/v1/chat/completions", json=chat(stream=True)) as answer:
            async for line in answer.aiter_lines():
                if '"6 "' in line:
                    break
        await cluster.wait_until(lambda: cluster.aborted)

        await until(lambda: usage(http, admin), seconds=5.0)
        found = await usage(http, admin)

    row = found["admin", "guide"]
    assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (1, 5, 7)


async def test_an_aborted_request_counts_what_it_was_given(
    locked: tuple[str, str], cluster: FakeCluster
) -> None:
    endpoint, admin = locked
    cluster.words = endless
    cluster.allow(3)
    async with httpx.AsyncClient(base_url=endpoint, headers=bearer(admin)) as http:
        body = chat(request_id="r", stream=False)
        asking = asyncio.create_task(http.post("/v1/chat/completions", json=body))
        await cluster.wait_until(lambda: cluster.num_steps == 3)
        await http.post("/v1/models/guide/requests/r/abort")
        assert (await asking).status_code == 409

        found = await usage(http, admin)

    assert found["admin", "guide"]["completion_tokens"] == 3


async def test_openais_client_is_told_that_a_key_is_wrong(
    locked: tuple[str, str],
) -> None:
    endpoint, admin = locked
    async with openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key=admin) as good:
        assert [model.id for model in (await good.models.list()).data] == ["guide"]
    async with openai.AsyncOpenAI(base_url=f"{endpoint}/v1", api_key="sk-wrong") as bad:
        with pytest.raises(openai.AuthenticationError):
            await bad.models.list()
    async with httpx.AsyncClient(base_url=endpoint, headers={"x-api-key": admin}) as http:
        assert (await http.get("/v1/models")).status_code == 200


def test_the_published_client_logs_in_with_a_key() -> None:
    cluster = asyncio.run(FakeCluster.running())
    with serving_in_thread(create_app(cluster)) as endpoint:
        with Client(endpoint) as ours:
            admin = ours.create_api_key("admin", scopes=["admin"])["key"]
        client = xinference_client.RESTfulClient(endpoint)
        with pytest.raises(RuntimeError, match="needs an API key"):
            client.list_models()
        with pytest.raises(RuntimeError, match="Failed to login"):
            client.login("admin", "wrong")

        client.login("admin", admin)

        assert list(client.list_models()) == ["guide"]
        by_key = xinference_client.RESTfulClient(endpoint, api_key=admin)
        assert list(by_key.list_models()) == ["guide"]
        client.close()
        by_key.close()


def test_our_client_makes_lists_and_revokes_keys_and_logs_in() -> None:
    cluster = asyncio.run(FakeCluster.running())
    with serving_in_thread(create_app(cluster)) as endpoint, Client(endpoint) as client:
        client.login("nobody", "nothing")  # an open server asks for none
        made = client.create_api_key("admin", scopes=["admin"])
        with pytest.raises(Unauthorized):
            client.list_models()

        client.login(made["id"], made["key"])

        app = client.create_api_key("app", tokens_per_minute=10, models=["guide"])
        assert [key["name"] for key in client.list_api_keys()] == ["admin", "app"]
        assert client.revoke_api_key(app["id"])["status"] == "revoked"
        assert client.get_usage() == []

        async def logged_in() -> dict[str, Any]:
            async with AsyncClient(endpoint) as other:
                await other.login("admin", made["key"])
                return await other.list_models()

        assert list(asyncio.run(logged_in())) == ["guide"]
