# SPDX-License-Identifier: Apache-2.0
"""The cluster as a whole, the pages, and what every answer has."""

import asyncio
import logging
import re

import httpx
import pytest

from tests.fakes.cluster import NODE, SUPERVISOR, FakeCluster
from xinference import __version__
from xinference.api.app import create_app
from xinference.errors import PeerUnreachable
from xinference.identifiers import ModelUid

from .conftest import chat, serving


async def get(http: httpx.AsyncClient, path: str) -> object:
    answer = await http.get(path)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def test_status_shows_each_worker(http: httpx.AsyncClient) -> None:
    answer = await http.get("/status")

    status = answer.json()
    assert status["uptime"] == 42
    assert status["workers"][NODE]["status"]["cpu"]["total"] == 2
    assert status["workers"][NODE]["status"]["0"]["mem_usage"] == 0.25


async def test_what_clients_ask_before_they_start(http: httpx.AsyncClient) -> None:
    assert await get(http, "/v1/cluster/auth") == {"auth": False}
    assert await get(http, "/v1/address") == SUPERVISOR
    assert await get(http, "/v1/supervisor") == {"supervisor_ip": "127.0.0.1"}
    assert await get(http, "/v1/cluster/devices") == 1
    version = await get(http, "/v1/cluster/version")
    assert version == {"version": __version__, "full-revisionid": None}


async def test_cluster_info_lists_the_supervisor_then_the_workers(http: httpx.AsyncClient) -> None:
    short = (await http.get("/v1/cluster/info")).json()
    detailed = (await http.get("/v1/cluster/info", params={"detailed": True})).json()

    assert [node["node_type"] for node in short] == ["Supervisor", "Worker"]
    assert short[1]["gpu_vram_total"] == "81920MiB"
    assert detailed[1]["mem_available"] == 6 * 2**30
    assert detailed[1]["gpu_vram_available"] == 60 * 2**30


async def test_workers_show_what_runs_on_them(http: httpx.AsyncClient) -> None:
    (worker,) = (await http.get("/v1/workers")).json()

    assert worker["work-ip"] == NODE
    assert worker["models"]["guide-rep0"]["model_name"] == "xinference-guide"


async def test_the_cluster_can_be_stopped(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    answer = await http.delete("/v1/clusters")

    assert answer.json() == {"result": True}
    assert cluster.is_stopped


async def test_without_the_supervisor_routes_are_a_503_that_can_be_repeated(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.failure = PeerUnreachable(peer="supervisor", problem="no answer within 5 s")

    for path in ("/status", "/v1/models", "/v1/models/guide", "/v1/cluster/info"):
        answer = await http.get(path)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "peer_unreachable"
        assert int(answer.headers["retry-after"]) > 0


async def test_an_unexpected_error_is_a_500_in_the_same_shape_and_in_the_log(
    http: httpx.AsyncClient, cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.failure = ZeroDivisionError("our bug")

    answer = await http.get("/status", headers={"x-request-id": "trace-1"})

    assert answer.status_code == 500
    assert answer.json()["error"]["code"] == "internal_error"
    assert "trace-1" in answer.json()["detail"]
    assert "our bug" not in answer.text
    assert "our bug" in caplog.text
    assert "trace-1" in caplog.text


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/v1/nope", 404, "not_found"),
        ("POST", "/v1/moderations", 404, "not_found"),
        ("PUT", "/v1/chat/completions", 405, "method_not_allowed"),
        ("PUT", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/cluster/info?detailed=perhaps", 400, "invalid_request"),
        ("POST", "/v1/models?wait_ready=perhaps", 400, "invalid_request"),
        ("DELETE", "/v1/models/guide/replicas/first", 400, "invalid_request"),
        ("DELETE", "/v1/models/guide/replicas/99999999999999999999", 400, "invalid_request"),
    ],
)
async def test_every_refusal_has_the_one_shape(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    answer = await http.request(method, path)

    body = answer.json()
    assert (answer.status_code, body["error"]["code"]) == (status, code)
    assert body["error"].keys() == {"message", "type", "param", "code"}
    assert body["detail"] == body["error"]["message"]


async def test_a_405_says_which_methods_there_are(http: httpx.AsyncClient) -> None:
    answer = await http.put("/v1/models/guide")

    assert answer.status_code == 405
    assert answer.headers["allow"] == "DELETE, GET, HEAD"


@pytest.mark.parametrize("path", ["/health", "/api/tags", "/v1/models/guide", "/v1/models/nobody"])
async def test_what_can_be_had_can_be_asked_after(port: int, path: str) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        whole, head = await http.get(path), await http.head(path)

    assert (head.status_code, head.content) == (whole.status_code, b"")
    assert head.headers["content-length"] == whole.headers["content-length"]


async def test_an_answer_has_an_id_the_callers_if_it_is_sound(http: httpx.AsyncClient) -> None:
    ours = await http.get("/v1/cluster/auth")
    theirs = await http.get("/v1/cluster/auth", headers={"x-request-id": "a-1"})
    unsound = await http.get("/v1/cluster/auth", headers={"x-request-id": "a\tb"})
    named = await http.post("/v1/chat/completions", json=chat(request_id="mine"))

    assert re.fullmatch(r"[0-9a-f]{24}", ours.headers["x-request-id"])
    assert theirs.headers["x-request-id"] == "a-1"
    assert unsound.headers["x-request-id"] != "a\tb"
    assert named.headers["x-request-id"] == "mine"


async def test_the_root_points_to_the_pages(http: httpx.AsyncClient) -> None:
    root = (await http.get("/")).json()

    assert root["version"] == __version__
    for page in (root["docs"], root["openapi"]):
        assert (await http.get(page)).status_code == 200


async def test_no_origin_is_invited(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/models", headers={"origin": "http://evil.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]


async def test_a_server_that_ends_closes_the_cluster_once() -> None:
    closed: list[None] = []

    async def close() -> None:
        closed.append(None)

    async with serving(create_app(FakeCluster(), on_shutdown=close)):
        assert closed == []

    assert closed == [None]


async def test_many_requests_at_once_get_their_own_answers(port: int) -> None:
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
        answers = await asyncio.gather(
            *(
                http.post(
                    "/v1/chat/completions",
                    json=chat(stream=bool(n % 2), messages=[{"role": "user", "content": f"<{n}>"}]),
                )
                for n in range(32)
            )
        )

    for n, answer in enumerate(answers):
        assert f"<{n}>" in answer.text


async def test_a_refused_request_is_no_noise_in_the_log(
    http: httpx.AsyncClient, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, logger="xinference"):
        await http.post("/v1/chat/completions", json={})

    assert caplog.text == ""


async def test_health_asks_nobody(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    cluster.failure = PeerUnreachable(peer="supervisor", problem="gone")

    answer = await http.get("/health")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_a_gateway_is_ready_while_something_answers(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    good = await http.get("/ready")
    cluster.failure = PeerUnreachable(peer="supervisor", problem="gone")
    away = await http.get("/ready")
    cluster.failure = None
    await cluster.terminate(ModelUid("guide"))
    cluster.failure = PeerUnreachable(peer="supervisor", problem="gone")
    lost = await http.get("/ready")

    assert good.json() == {"ready": True, "problem": "", "num_ready_models": 1}
    assert away.status_code == 200
    assert (lost.status_code, lost.json()["problem"]) == (503, "the supervisor does not answer")


async def test_the_status_tells_how_each_worker_is(http: httpx.AsyncClient) -> None:
    (worker,) = (await http.get("/status")).json()["workers"].values()

    assert (worker["state"], worker["num_replicas"]) == ("ready", 1)
