# SPDX-License-Identifier: Apache-2.0
"""What was logged, over HTTP: the last lines, what came since, a stream; the log of requests."""

import asyncio
import base64
import json
import logging
from collections.abc import AsyncIterator

import httpx
import pytest

from tests.api.conftest import chat, serving
from tests.fakes.cluster import NODE, FakeCluster
from xinference.api.admin import logs as log_routes
from xinference.api.app import create_app
from xinference.identifiers import NodeId
from xinference.protocol.logs import REQUEST_ID, LogLine

GUIDE = "/v1/models/guide/logs"
HOST = "/v1/cluster/logs"


def line(message: str, *, level: str = "INFO", replica: str | None = "guide-rep0") -> LogLine:
    return LogLine(
        time=1.5,
        level=level,
        message=message,
        process="replica[7]",
        logger="xinference.engine",
        node=NODE,
        replica=replica,
    )


async def test_lines_have_all_that_is_known_of_them(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.log = [line("one"), line("two", level="ERROR")]

    answer = await http.get(GUIDE, params={"lines": 1})

    assert answer.json()["lines"] == [
        {
            "time": 1.5,
            "level": "ERROR",
            "node": NODE,
            "replica": "guide-rep0",
            "process": "replica[7]",
            "logger": "xinference.engine",
            "request_id": None,
            "message": "two",
        }
    ]
    assert answer.json()["silent"] == []


async def test_a_cursor_gives_what_came_since(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.log = [line("one")]
    cursor = (await http.get(GUIDE)).json()["cursor"]
    cluster.log.append(line("two"))

    answer = (await http.get(GUIDE, params={"cursor": cursor})).json()

    assert [one["message"] for one in answer["lines"]] == ["two"]
    again = (await http.get(GUIDE, params={"cursor": answer["cursor"]})).json()
    assert again["lines"] == []


async def test_a_host_that_does_not_answer_is_named(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.log = [line("of the host", replica=None)]
    cluster.silent = {NodeId("10.0.0.9:7000"): "no answer within 3 s"}

    answer = (await http.get(HOST)).json()

    assert [one["message"] for one in answer["lines"]] == ["of the host"]
    assert answer["silent"] == [{"node": "10.0.0.9:7000", "problem": "no answer within 3 s"}]


@pytest.mark.parametrize(
    ("path", "params", "status", "param"),
    [
        ("/v1/models/nobody/logs", {}, 404, "model"),
        ("/v1/models/..%2Fkeys/logs", {}, 404, "model"),
        (HOST, {"node": "10.0.0.9"}, 400, "node"),
        (GUIDE, {"lines": -1}, 400, "lines"),
        (GUIDE, {"lines": 10**6}, 400, "lines"),
        (GUIDE, {"level": "loud"}, 400, "level"),
        (GUIDE, {"replica": -1}, 400, "replica"),
        (GUIDE, {"cursor": "no cursor"}, 400, "cursor"),
        (GUIDE, {"cursor": base64.b64encode(b"[[1]]").decode()}, 400, "cursor"),
        (GUIDE, {"cursor": base64.b64encode(b'[["a","b",-1,0]]').decode()}, 400, "cursor"),
        (GUIDE, {"cursor": base64.b64encode(b'[["a","b",1e3,true]]').decode()}, 400, "cursor"),
    ],
)
async def test_what_cannot_be_is_refused_by_name(
    http: httpx.AsyncClient, path: str, params: dict[str, str], status: int, param: str
) -> None:
    answer = await http.get(path, params=params)

    assert answer.status_code == status, answer.text
    assert param in (answer.json()["error"]["param"] or "model")


async def test_only_an_admin_reads_logs(http: httpx.AsyncClient) -> None:
    made = await http.post("/v1/admin/keys", json={"name": "boss", "scopes": ["admin"]})
    admin = {"authorization": f"Bearer {made.json()['key']}"}
    body = {"name": "eye", "scopes": ["monitor"]}
    eye = (await http.post("/v1/admin/keys", json=body, headers=admin)).json()["key"]

    for path in (GUIDE, HOST):
        assert (await http.get(path)).status_code == 401
        refused = await http.get(path, headers={"authorization": f"Bearer {eye}"})
        assert refused.status_code == 403
        assert (await http.get(path, headers=admin)).status_code == 200


async def events_of(answer: httpx.Response) -> AsyncIterator[str]:
    async for text in answer.aiter_lines():
        if text:
            yield text


async def test_a_log_is_followed_until_its_reader_leaves(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_routes, "POLL_SECONDS", 0.01)
    cluster.log = [line("one")]
    app = create_app(cluster, keep_alive_seconds=0.05)
    async with serving(app) as port, httpx.AsyncClient(timeout=20) as client:
        url = f"http://127.0.0.1:{port}{GUIDE}"
        async with client.stream("GET", url, params={"follow": True}) as answer:
            events = events_of(answer)
            first = json.loads((await anext(events)).removeprefix("data: "))
            assert await anext(events) == ": keep-alive"
            cluster.log.append(line("two"))
            second = ": keep-alive"
            while second == ": keep-alive":
                second = await anext(events)

        assert [one["message"] for one in first["lines"]] == ["one"]
        told = json.loads(second.removeprefix("data: "))
        assert [one["message"] for one in told["lines"]] == ["two"]
        followers = app.state.gateway.log_followers
        async with asyncio.timeout(20):
            while followers:  # noqa: ASYNC110  # nothing tells of the end
                await asyncio.sleep(0.01)
        asked = cluster.num_log_queries
        await asyncio.sleep(0.1)
        assert cluster.num_log_queries == asked  # nobody looks any more


async def test_a_stream_ends_after_a_while_and_one_goes_on_from_its_cursor(
    http: httpx.AsyncClient, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_routes, "FOLLOW_SECONDS", 0.05)
    cluster.log = [line("one")]

    answer = await http.get(GUIDE, params={"follow": True})

    said = [text for text in answer.text.split("\n\n") if text.startswith("data: ")]
    assert said[-1] == "data: [DONE]"
    cluster.log.append(line("two"))
    cursor = json.loads(said[0].removeprefix("data: "))["cursor"]
    more = (await http.get(GUIDE, params={"cursor": cursor})).json()
    assert [one["message"] for one in more["lines"]] == ["two"]


async def test_a_supervisor_that_is_away_is_told_in_the_stream(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    from xinference.errors import PeerUnreachable

    monkeypatch.setattr(log_routes, "POLL_SECONDS", 0.01)
    async with serving(create_app(cluster)) as port, httpx.AsyncClient(timeout=20) as client:
        url = f"http://127.0.0.1:{port}{GUIDE}"
        async with client.stream("GET", url, params={"follow": True}) as answer:
            events = events_of(answer)
            await anext(events)
            cluster.failure = PeerUnreachable(peer="supervisor", problem="it is gone")
            silent = json.loads((await anext(events)).removeprefix("data: "))["silent"]
            cluster.failure = None
            back = json.loads((await anext(events)).removeprefix("data: "))["silent"]

    assert "it is gone" in silent[0]["problem"]
    assert back == []


async def test_no_more_than_so_many_follow(
    http: httpx.AsyncClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_routes, "MAX_FOLLOWERS", 0)

    answer = await http.get(GUIDE, params={"follow": True})

    assert answer.status_code == 503
    assert "cursor" in answer.json()["error"]["message"]


@pytest.mark.parametrize("what", ["none", "summary", "prompts"])
async def test_of_each_request_as_much_is_logged_as_is_wanted(
    cluster: FakeCluster, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    caplog.set_level(logging.DEBUG)
    ids: list[str | None] = []
    caplog.handler.addFilter(lambda record: bool(ids.append(REQUEST_ID.get())) or True)
    transport = httpx.ASGITransport(app=create_app(cluster, log_requests=what))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        caplog.clear()
        ids.clear()
        question = chat(messages=[{"role": "user", "content": "a secret of mine"}])
        answer = await client.post(
            "/v1/chat/completions", json=question, headers={"x-request-id": "call-1"}
        )
        key = {"name": "boss-of-all", "scopes": ["admin"]}
        made = (await client.post("/v1/admin/keys", json=key)).json()["key"]
        await client.post("/token", json={"username": "boss-of-all", "password": made})
        await client.head("/health")

    assert answer.status_code == 200
    told = [one.getMessage() for one in caplog.records if one.name.startswith("xinference")]
    assert bool([one for one in told if "POST /v1/chat/completions 200 in" in one]) == (
        what != "none"
    )
    assert ("HEAD /health 200 in" in caplog.text) == (what != "none")
    assert ("a secret of mine" in caplog.text) == (what == "prompts")
    assert made not in caplog.text
    assert "boss-of-all" not in caplog.text
    if what != "none":
        assert "call-1" in ids
