# SPDX-License-Identifier: Apache-2.0
"""`GET /metrics`."""

import asyncio
import os

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.errors import PeerUnreachable, ReplicaLost
from xinference.protocol.histograms import SECONDS, Histogram

from .conftest import chat


async def scrape(http: httpx.AsyncClient) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = await http.get("/metrics")
    assert answer.status_code == 200
    assert answer.headers["content-type"].startswith("text/plain")
    return {
        (sample.name.removeprefix("xinference:"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def labels(**given: str) -> frozenset[tuple[str, str]]:
    return frozenset(given.items())


async def test_requests_tokens_and_times_are_counted_per_model(http: httpx.AsyncClient) -> None:
    await http.post("/v1/chat/completions", json=chat())
    await http.post("/v1/chat/completions", json=chat(stream=True))

    page = await scrape(http)

    guide = labels(model_uid="guide")
    assert page["model_request_total", labels(model_uid="guide", stream="true")] == 1
    assert page["model_request_total", labels(model_uid="guide", stream="false")] == 1
    assert page["input_tokens_total", guide] == 10
    assert page["generate_tokens_total", guide] == 12
    assert page["model_request_duration_seconds_count", guide] == 2
    first = page["time_to_first_token_seconds_count", labels(model_uid="guide", stream="true")]
    assert first == 1
    assert page["time_per_output_token_seconds_count", guide] == 1  # of the one that was streamed
    assert page["model_serve_count", guide] == 0
    served = labels(method="POST", route="/v1/chat/completions", status="200")
    assert page["http_requests_total", served] == 2


async def test_errors_are_counted_by_code_and_invented_names_make_no_labels(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    for n in range(3):
        await http.post("/v1/chat/completions", json=chat(model=f"made-up-{n}"))
    await http.request("BREW", "/made/up")
    cluster.queue_is_full = True
    await http.post("/v1/chat/completions", json=chat())

    page = await scrape(http)

    unknown = labels(model_uid="", code="model_not_found")
    assert page["model_request_errors_total", unknown] == 3
    full = labels(model_uid="guide", code="model_overloaded")
    assert page["model_request_errors_total", full] == 1
    assert "made" not in "".join(value for _, given in page for _, value in given)
    assert "BREW" not in "".join(value for _, given in page for _, value in given)


@pytest.mark.parametrize("stream", [False, True])
async def test_aborts_are_counted_by_their_cause(
    http: httpx.AsyncClient, cluster: FakeCluster, stream: bool
) -> None:
    async def abort() -> None:
        await cluster.wait_until(lambda: cluster.live_requests("guide"))
        (request_id,) = cluster.live_requests("guide")
        await http.post(f"/v1/models/guide/requests/{request_id}/abort")

    body = chat(stream=stream)
    cluster.allow(0)
    await asyncio.gather(http.post("/v1/chat/completions", json=body), abort())
    short = {"X-Request-Timeout": "0.05"}
    await http.post("/v1/chat/completions", json=body, headers=short)
    cluster.allow(None)
    cluster.queue_is_full = True
    await http.post("/v1/chat/completions", json=body)
    cluster.queue_is_full = False
    cluster.failure = ReplicaLost(model="guide", problem="killed")
    await http.post("/v1/chat/completions", json=body)
    cluster.failure = None
    await http.post("/v1/chat/completions", json=chat(max_tokens="many"))
    await http.post("/v1/chat/completions", json=body)

    page = await scrape(http)

    aborts = {
        key: value
        for key, value in page.items()
        if key[0] == "model_request_aborts_total" and value
    }
    causes = ("abort_by_id", "deadline", "replica_lost", "shed")
    assert aborts == {
        ("model_request_aborts_total", labels(model_uid="guide", cause=cause)): 1
        for cause in causes
    }


async def test_a_histogram_of_an_engine_is_one_on_the_page(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    waited = Histogram(SECONDS)
    for seconds in (0.002, 0.3, 700.0):
        waited.observe(seconds)
    cluster.more_counters = {"busy_seconds": 2.5, **waited.counters("queue_seconds")}

    page = await scrape(http)

    def at_most(bound: str) -> float:
        found = labels(model_uid="guide", replica_index="0", le=bound)
        return page["engine_queue_seconds_bucket", found]

    replica = labels(model_uid="guide", replica_index="0")
    assert [at_most(bound) for bound in ("0.005", "0.25", "0.5", "120.0", "+Inf")] == [
        1,
        1,
        2,
        2,
        3,
    ]
    assert page["engine_queue_seconds_count", replica] == 3
    assert page["engine_queue_seconds_sum", replica] == 700.302
    assert page["engine_busy_seconds_total", replica] == 2.5


async def test_the_cluster_and_the_engines_are_on_the_page(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await http.post("/v1/chat/completions", json=chat())
    cluster.lose_replica("guide")
    cluster.finish_launch("guide")

    page = await scrape(http)

    assert page["supervisor_up", labels()] == 1
    assert page["workers_total", labels()] == 1
    replica = labels(model_uid="guide", replica_index="0")
    assert page["engine_steps_total", replica] == 6
    assert page["engine_num_running", replica] == 0
    assert page["models_loaded_total", labels(model_type="LLM")] == 1
    status = labels(model_uid="guide", model_name="xinference-guide", status="READY")
    assert page["model_status", status] == 1
    assert page["replica_restarts_total", labels(model_uid="guide", replica_index="0")] == 1


async def test_the_page_comes_without_the_supervisor_too(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await http.post("/v1/chat/completions", json=chat())
    cluster.failure = PeerUnreachable(peer="supervisor", problem="gone")

    page = await scrape(http)

    assert page["supervisor_up", labels()] == 0
    assert page["model_request_total", labels(model_uid="guide", stream="false")] == 1


async def test_there_is_no_page_when_it_is_switched_off(cluster: FakeCluster) -> None:
    transport = httpx.ASGITransport(app=create_app(cluster, disable_metrics=True))

    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        answer = await http.get("/metrics")

    assert answer.status_code == 404


async def test_routing_and_workers_are_on_the_page(http: httpx.AsyncClient) -> None:
    page = (await http.get("/metrics")).text

    mine = f'{{gateway_pid="{os.getpid()}"}}'
    assert f"xinference:requests_retried_total{mine} 3.0" in page
    assert f"xinference:streams_continued_total{mine} 2.0" in page
    assert f"xinference:replicas_ejected{mine} 1.0" in page
    assert f"xinference:replica_ejections_total{mine} 4.0" in page
    version = f'{{gateway_pid="{os.getpid()}",supervisor_epoch="2"}}'
    assert f"xinference:routes_version{version} 5.0" in page
    gpu = '{gpu_index="0",gpu_name="Fake",worker_address="127.0.0.1:5001"}'
    assert f"xinference:worker_gpu_utilization_percent{gpu} 50.0" in page
    assert f"xinference:worker_gpu_quarantined{gpu} 0.0" in page
    state = '{model_uid="guide",replica_index="0",status="ready"}'
    assert f"xinference:replica_status{state} 1.0" in page
    assert 'xinference:worker_status{status="ready",worker_address="127.0.0.1:5001"} 1.0' in page
