# SPDX-License-Identifier: Apache-2.0
"""Batches: every line gets one outcome, whoever works on it, and however often."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from tests.fakes.cluster import FakeCluster, echo
from xinference.api.app import create_app
from xinference.api.keys.key import KeySpec, Scope
from xinference.api.keys.store import KeyStore
from xinference.api.openai.batches import runner
from xinference.api.store import batches as leases
from xinference.api.store.limits import StoreLimits
from xinference.api.store.store import Store
from xinference.errors import ModelOverloaded, ReplicaLost

from .conftest import serving
from .test_clients import with_openai

CHAT = "/v1/chat/completions"
DEADLINE_SECONDS = 20.0

pytestmark = pytest.mark.usefixtures("quick")


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let workers look and leases end in a fraction of the time."""
    monkeypatch.setattr(runner, "LOOK_SECONDS", 0.05)
    monkeypatch.setattr(runner, "MAX_WAIT_SECONDS", 0.1)
    monkeypatch.setattr(leases, "LEASE_SECONDS", 0.5)


@asynccontextmanager
async def gateway(
    cluster: FakeCluster, home: Path, **options: Any
) -> AsyncIterator[httpx.AsyncClient]:
    """Run an application with its lifespan; yield a client of it."""
    app = create_app(cluster, store=Store(home / "store.db"), **options)
    async with (
        running(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://gateway"
        ) as http,
    ):
        yield http


def running(app: FastAPI) -> contextlib.AbstractAsyncContextManager[Any]:
    return app.router.lifespan_context(app)


def line(custom_id: str, content: str = "Hi", url: str = CHAT, **fields: Any) -> dict[str, Any]:
    body: dict[str, Any] = {"model": "guide", **fields}
    if url == CHAT:
        body["messages"] = [{"role": "user", "content": content}]
    else:
        body["prompt" if url == "/v1/completions" else "input"] = content
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


async def ordered(
    http: httpx.AsyncClient, lines: list[dict[str, Any]] | bytes, **fields: Any
) -> dict[str, Any]:
    """Upload lines and make a batch of them."""
    if not isinstance(lines, bytes):
        lines = b"".join(json.dumps(one).encode() + b"\n" for one in lines)
    file = await http.post(
        "/v1/files", files={"file": ("in.jsonl", lines)}, data={"purpose": "batch"}
    )
    asked = {"input_file_id": file.json()["id"], "endpoint": CHAT, "completion_window": "24h"}
    answer = await http.post("/v1/batches", json=asked | fields)
    assert answer.status_code == 200, answer.text
    batch: dict[str, Any] = answer.json()
    return batch


async def eventually(
    look: Callable[[], Awaitable[dict[str, Any]]], is_so: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Return a batch when it has come so far."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while True:
        found = await look()
        if is_so(found):
            return found
        assert time.monotonic() < deadline, found
        await asyncio.sleep(0.01)


async def until(
    http: httpx.AsyncClient, batch: dict[str, Any], is_so: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """Ask until a batch has come so far."""

    async def look() -> dict[str, Any]:
        found: dict[str, Any] = (await http.get(f"/v1/batches/{batch['id']}")).json()
        return found

    return await eventually(look, is_so)


async def ended(http: httpx.AsyncClient, batch: dict[str, Any]) -> dict[str, Any]:
    return await until(
        http, batch, lambda one: one["status"] in ("completed", "failed", "cancelled", "expired")
    )


async def results(http: httpx.AsyncClient, file_id: str | None) -> dict[str, dict[str, Any]]:
    """Return the outcomes of a file, by custom id; each has one."""
    if file_id is None:
        return {}
    text = (await http.get(f"/v1/files/{file_id}/content")).text
    outcomes = [json.loads(one) for one in text.splitlines()]
    found = {one["custom_id"]: one for one in outcomes}
    assert len(found) == len(outcomes)
    return found


async def test_every_line_is_answered_as_its_route_answers(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        batch = await ordered(http, [line(f"line-{n}", f"Question {n}") for n in range(30)])
        done = await ended(http, batch)
        outcomes = await results(http, done["output_file_id"])
        file = (await http.get(f"/v1/files/{done['output_file_id']}")).json()
        alone = (await http.post(CHAT, json=line("", "Question 3")["body"])).json()

    assert (batch["status"], batch["request_counts"]["total"]) == ("validating", 0)
    assert done["status"] == "completed"
    assert done["request_counts"] == {"total": 30, "completed": 30, "failed": 0}
    assert done["error_file_id"] is None
    assert done["usage"]["total_tokens"] == sum(
        one["response"]["body"]["usage"]["total_tokens"] for one in outcomes.values()
    )
    assert list(outcomes) == [f"line-{n}" for n in range(30)]
    third = outcomes["line-3"]
    assert (third["error"], third["response"]["status_code"]) == (None, 200)
    assert third["response"]["body"]["choices"] == alone["choices"]
    assert third["response"]["body"]["id"].endswith(third["response"]["request_id"])
    assert (file["purpose"], file["filename"]) == ("batch_output", f"{batch['id']}_output.jsonl")
    for when in ("in_progress_at", "finalizing_at", "completed_at"):
        assert done["created_at"] <= done[when] <= done["expires_at"]


@pytest.mark.parametrize("url", ["/v1/completions", "/v1/responses"])
async def test_the_other_endpoints_are_there_too(tmp_path: Path, url: str) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        batch = await ordered(http, [line("one", url=url)], endpoint=url)
        done = await ended(http, batch)
        (outcome,) = (await results(http, done["output_file_id"])).values()

    assert "You said: Hi" in json.dumps(outcome["response"]["body"])
    assert done["usage"]["output_tokens"] == 3


async def test_texts_are_embedded_as_their_route_embeds(tmp_path: Path) -> None:
    url = "/v1/embeddings"
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        lines = [
            line("one", "one two", url, encoding_format="base64"),
            line("nobody", url=url, model="nobody"),
            line("named", url=url, request_id="mine"),
        ]
        done = await ended(http, await ordered(http, lines, endpoint=url))
        (outcome,) = (await results(http, done["output_file_id"])).values()
        refused = await results(http, done["error_file_id"])
        alone = (await http.post(url, json=lines[0]["body"])).json()

    assert outcome["response"]["body"] == alone
    assert done["usage"]["input_tokens"] == alone["usage"]["prompt_tokens"]
    errors = {name: one["response"]["body"]["error"] for name, one in refused.items()}
    assert errors["nobody"]["code"] == "model_not_found"
    assert errors["named"]["param"] == "request_id"


async def test_lines_wait_for_those_who_wait_for_an_answer(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        lines = [line("one"), line("two", priority=-5), line("three", service_tier="priority")]
        await ended(http, await ordered(http, lines))

    assert sorted(request.priority for request in cluster.requests) == [-5, -1, 1]


async def test_what_is_refused_is_in_the_error_file(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        lines = [
            line("good"),
            line("nobody", model="nobody"),
            line("hot", temperature=9),
            line("streamed", stream=True),
            line("named", request_id="mine"),
        ]
        done = await ended(http, await ordered(http, lines))
        good = await results(http, done["output_file_id"])
        bad = await results(http, done["error_file_id"])

    assert done["request_counts"] == {"total": 5, "completed": 1, "failed": 4}
    assert list(good) == ["good"]
    told = {
        name: (one["response"]["status_code"], one["response"]["body"]["error"]["param"])
        for name, one in bad.items()
    }
    assert told == {
        "nobody": (404, "model"),
        "hot": (400, "temperature"),
        "streamed": (400, "stream"),
        "named": (400, "request_id"),
    }


@pytest.mark.parametrize(
    "error",
    [
        ModelOverloaded(model="guide", num_waiting=1, retry_after_seconds=1),
        ReplicaLost(model="guide", problem="killed"),
    ],
)
async def test_what_passes_by_itself_is_tried_again(tmp_path: Path, error: Exception) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        cluster.failure = error
        batch = await ordered(http, [line("one"), line("two")])
        await until(http, batch, lambda one: one["status"] == "in_progress")
        cluster.failure = None
        done = await ended(http, batch)

    assert done["request_counts"] == {"total": 2, "completed": 2, "failed": 0}


@pytest.mark.parametrize(
    ("lines", "number", "words"),
    [
        (b"", None, "no requests"),
        (b"\n\n", None, "no requests"),
        (b"{", 1, "not JSON"),
        (b"[1]", 1, "must be an object"),
        ([line("a"), line("a")], 2, "line 1"),
        ([line("a"), line("b", url="/v1/completions")], 2, "url"),
        ([line("a") | {"method": "GET"}], 1, "method"),
        ([line("a") | {"colour": "red"}], 1, "colour"),
        ([{"custom_id": "a"}], 1, "method"),
    ],
)
async def test_an_input_that_cannot_be_run_fails_with_the_line(
    tmp_path: Path, lines: Any, number: int | None, words: str
) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        done = await ended(http, await ordered(http, lines))

    (error,) = done["errors"]["data"]
    assert done["status"] == "failed"
    assert error["line"] == number
    assert words in error["message"]
    assert cluster.requests == []


async def test_a_cancelled_batch_stops_at_once_and_gives_what_it_has(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        cluster.words = lambda request: (
            iter(["done"]) if "quick" in str(request.prompt) else iter(lambda: "more ", None)
        )
        cluster.allow(2)
        lines = [line("first", "quick"), *(line(f"slow-{n}") for n in range(20))]
        batch = await ordered(http, lines)
        await until(http, batch, lambda one: one["request_counts"]["completed"] == 1)
        asked = (await http.post(f"/v1/batches/{batch['id']}/cancel")).json()
        done = await ended(http, batch)
        good = await results(http, done["output_file_id"])
        bad = await results(http, done["error_file_id"])
        again = await http.post(f"/v1/batches/{batch['id']}/cancel")

    assert asked["status"] == "cancelling"
    assert done["status"] == "cancelled"
    assert done["cancelling_at"] <= done["cancelled_at"]
    assert done["request_counts"] == {"total": 21, "completed": 1, "failed": 20}
    assert list(good) == ["first"]
    assert {one["error"]["code"] for one in bad.values()} == {"batch_cancelled"}
    assert cluster.live_requests("guide") == []
    assert (again.status_code, again.json()["error"]["param"]) == (400, "batch_id")


@pytest.mark.parametrize(("lines", "num_failed"), [(b"{", 0), ([line("one")], 1)])
async def test_a_batch_may_be_cancelled_before_anybody_looked_at_it(
    tmp_path: Path, lines: Any, num_failed: int
) -> None:
    cluster = await FakeCluster.running()
    store = Store(tmp_path / "store.db")
    idle = httpx.ASGITransport(app=create_app(cluster, store=store))
    async with httpx.AsyncClient(transport=idle, base_url="http://gateway") as http:
        batch = await ordered(http, lines)
        await http.post(f"/v1/batches/{batch['id']}/cancel")
    await store.aclose()
    async with gateway(cluster, tmp_path) as http:
        done = await ended(http, batch)

    assert done["status"] == "cancelled"
    assert done["request_counts"] == {"total": num_failed, "completed": 0, "failed": num_failed}
    assert cluster.requests == []


async def test_a_batch_that_takes_too_long_expires(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xinference.api.openai.batches.routes.WINDOW_SECONDS", 0)
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        cluster.allow(0)
        done = await ended(http, await ordered(http, [line("one")]))
        bad = await results(http, done["error_file_id"])

    assert done["status"] == "expired"
    assert bad["one"]["error"]["code"] == "batch_expired"
    assert cluster.live_requests("guide") == []


async def test_a_batch_goes_on_in_another_gateway_when_its_own_ends(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as second:
        async with gateway(cluster, tmp_path) as first:
            cluster.words = lambda request: echo(request)
            batch = await ordered(first, [line(f"line-{n}", f"Q {n}") for n in range(200)])
            await until(second, batch, lambda one: one["request_counts"]["completed"] > 10)
        done = await ended(second, batch)
        outcomes = await results(second, done["output_file_id"])

    assert done["request_counts"] == {"total": 200, "completed": 200, "failed": 0}
    assert len(outcomes) == 200


async def test_a_batch_is_taken_over_from_a_gateway_that_died(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    cluster.words = echo
    dead = Store(tmp_path / "store.db")
    async with gateway(cluster, tmp_path) as http:
        cluster.allow(0)
        batch = await ordered(http, [line("one")])
        await until(http, batch, lambda one: one["status"] == "in_progress")
        # A gateway that holds the lease and is never heard of again.
        await dead._database.write(
            lambda connection: connection.execute(
                "UPDATE batch SET lease_holder = 'dead', lease_until = ?", (time.time() + 0.5,)
            )
        )
        await cluster.wait_until(lambda: cluster.aborted)
        cluster.allow(None)
        done = await ended(http, batch)
        outcomes = await results(http, done["output_file_id"])
    await dead.aclose()

    assert done["status"] == "completed"
    assert list(outcomes) == ["one"]


async def test_who_lost_the_lease_cannot_write(tmp_path: Path) -> None:
    store = Store(tmp_path / "store.db")
    await store.batches.create(
        "",
        {"id": "batch_a", "status": "validating", "request_counts": {"total": 1}, "created_at": 0},
    )
    first = await store.batches.claim()
    assert first is not None
    assert await store.batches.claim() is None
    await store.batches.release(first)
    second = await store.batches.claim()
    assert second is not None

    for write in (
        store.batches.renew(first),
        store.batches.change(first, {"status": "failed"}),
        store.batches.end(first, {"status": "failed"}),
        store.batches.save_line(first, 0, b"{}", is_error=False),
    ):
        with pytest.raises(leases.LeaseLostError):
            await write
    await store.batches.save_line(second, 0, b"{}", is_error=False)
    assert await store.batches.positions_done(second) == {0}
    await store.aclose()


async def test_two_gateways_share_the_batches_and_answer_each_line_once(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as first, gateway(cluster, tmp_path) as second:
        made = [
            await ordered(one, [line(f"{n}") for n in range(20)]) for one in (first, second) * 4
        ]
        for batch in made:
            assert (await ended(first, batch))["request_counts"]["completed"] == 20

    assert len(cluster.requests) == 20 * len(made)


async def test_results_are_kept_though_files_are_too_much_already(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    app = create_app(cluster, store=Store(tmp_path / "store.db", StoreLimits(max_files_bytes=1000)))
    async with (
        app.router.lifespan_context(app),
        httpx.AsyncClient(
            transport=httpx.ASGITransport(app=app), base_url="http://gateway"
        ) as http,
    ):
        done = await ended(http, await ordered(http, [line("one", "x" * 500)]))
        outcomes = await results(http, done["output_file_id"])
        upload = await http.post("/v1/files", files={"file": b"x"}, data={"purpose": "batch"})

    assert list(outcomes) == ["one"]
    assert upload.status_code == 400


async def test_a_deleted_input_fails_the_batch(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with gateway(cluster, tmp_path) as http:
        cluster.failure = ReplicaLost(model="guide", problem="killed")
        lines = [line(f"{n}", "x" * 100_000) for n in range(40)]
        batch = await ordered(http, lines)
        await until(http, batch, lambda one: one["status"] == "in_progress")
        await http.delete(f"/v1/files/{batch['input_file_id']}")
        cluster.failure = None
        done = await ended(http, batch)

    assert done["status"] == "failed"
    assert "no file" in done["errors"]["data"][0]["message"]


async def test_a_batch_runs_with_the_key_of_its_owner(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    keys = KeyStore.in_memory()
    boss, _ = keys.create(KeySpec(name="boss", scopes=frozenset({Scope.ADMIN})))
    narrow, _ = keys.create(KeySpec(name="narrow", models=frozenset({"other"})))
    ending, ending_key = keys.create(KeySpec(name="ending"))

    def headers(key: str) -> dict[str, str]:
        return {"authorization": f"Bearer {key}"}

    async with gateway(cluster, tmp_path, key_store=keys) as http:
        http.headers = httpx.Headers(headers(narrow))
        narrowed = await ended(http, await ordered(http, [line("one")]))
        bad = await results(http, narrowed["error_file_id"])

        http.headers = httpx.Headers(headers(ending))
        cluster.allow(0)
        batch = await ordered(http, [line(f"{n}") for n in range(20)])
        await cluster.wait_until(lambda: cluster.requests)
        http.headers = httpx.Headers(headers(boss))
        revoked = await http.delete(f"/v1/admin/keys/{ending_key.key_id}")
        hidden = await http.get(f"/v1/batches/{batch['id']}")
        cluster.allow(None)
        looking = Store(tmp_path / "store.db")
        found = await eventually(
            lambda: looking.batches.get(ending_key.key_id, batch["id"]),
            lambda one: one["errors"] is not None,
        )
        await looking.aclose()

    assert bad["one"]["response"]["status_code"] == 403
    assert revoked.status_code == 200
    assert hidden.status_code == 404
    assert found["status"] == "failed"
    assert "revoked" in found["errors"]["data"][0]["message"]
    assert len(cluster.requests) < 20


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"input_file_id": "file-0"}, "input_file_id"),
        ({"endpoint": "/v1/rerank"}, "endpoint"),
        ({"endpoint": "/v1/images/generations"}, "endpoint"),
        ({"completion_window": "1h"}, "completion_window"),
        ({"metadata": {"k": 1}}, "metadata.k"),
        ({"output_expires_after": {"anchor": "created_at"}}, "output_expires_after.seconds"),
        ({"colour": "red"}, "colour"),
    ],
)
async def test_a_bad_order_is_refused_by_name(
    http: httpx.AsyncClient, given: dict[str, Any], named: str
) -> None:
    file = await http.post("/v1/files", files={"file": b"{}"}, data={"purpose": "batch"})
    other = await http.post("/v1/files", files={"file": b"{}"}, data={"purpose": "user_data"})
    asked = {
        "input_file_id": file.json()["id"],
        "endpoint": CHAT,
        "completion_window": "24h",
        **given,
    }

    answer = await http.post("/v1/batches", json=asked)
    wrong = await http.post("/v1/batches", json=asked | {"input_file_id": other.json()["id"]})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)
    assert wrong.status_code == 400
    assert (await http.get("/v1/batches")).json()["data"] == []


async def test_openais_client_works_with_batches(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    app = create_app(cluster, store=Store(tmp_path / "store.db"))

    def use(client: openai.OpenAI) -> None:
        lines = "".join(json.dumps(line(str(n))) + "\n" for n in range(3))
        file = client.files.create(file=("in.jsonl", lines.encode()), purpose="batch")
        batches = [
            client.batches.create(
                input_file_id=file.id,
                endpoint=CHAT,
                completion_window="24h",
                metadata={"k": str(n)},
            )
            for n in range(3)
        ]
        assert [one.id for one in client.batches.list(limit=2)] == [
            one.id for one in reversed(batches)
        ]
        deadline = time.monotonic() + DEADLINE_SECONDS
        while (batch := client.batches.retrieve(batches[0].id)).status != "completed":
            assert time.monotonic() < deadline
            time.sleep(0.02)
        assert batch.metadata == {"k": "0"}
        assert batch.output_file_id is not None
        text = client.files.content(batch.output_file_id).text
        assert [json.loads(one)["custom_id"] for one in text.splitlines()] == ["0", "1", "2"]
        with pytest.raises(openai.BadRequestError):
            client.batches.cancel(batch.id)

    async with serving(app) as port:
        await with_openai(port, use)
