# SPDX-License-Identifier: Apache-2.0
"""A caller that will not wait for ever: `X-Request-Timeout`, and what the gateway is told."""

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app

from .conftest import chat, chunks_of

SHORT = {"X-Request-Timeout": "0.05"}


@pytest.mark.parametrize("stream", [False, True])
async def test_f32_a_request_that_is_not_accepted_in_time_is_a_504_and_aborted(
    stream: bool, cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    cluster.holds_accept = True

    answer = await http.post("/v1/chat/completions", json=chat(stream=stream), headers=SHORT)

    assert answer.status_code == 504
    assert answer.json()["error"]["code"] == "deadline_passed"
    assert 1 <= int(answer.headers["Retry-After"]) <= 60
    assert len(cluster.aborted) == 1
    assert cluster.live_requests("guide") == []


async def test_f32_one_that_waits_in_the_queue_is_aborted(
    cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    cluster.allow(0)

    whole = await http.post("/v1/chat/completions", json=chat(), headers=SHORT)
    streamed = await http.post("/v1/chat/completions", json=chat(stream=True), headers=SHORT)

    assert whole.status_code == 504
    assert streamed.status_code == 200  # it was accepted
    assert '"deadline_passed"' in chunks_of(streamed.text)[-1]
    assert len(cluster.aborted) == 2


async def test_a_stream_that_has_begun_may_take_its_time_and_a_whole_answer_may_not(
    cluster: FakeCluster, http: httpx.AsyncClient
) -> None:
    cluster.allow(1)

    whole = await http.post("/v1/chat/completions", json=chat(), headers=SHORT)
    assert whole.status_code == 504

    async with http.stream(
        "POST", "/v1/completions", json={"model": "guide", "prompt": "x"}, headers=SHORT
    ) as answer:
        assert answer.status_code == 504
    cluster.allow(None)
    streamed = await http.post("/v1/chat/completions", json=chat(stream=True), headers=SHORT)
    assert chunks_of(streamed.text)[-1] == "[DONE]"


async def test_vectors_have_a_deadline_too(cluster: FakeCluster, http: httpx.AsyncClient) -> None:
    cluster.holds_accept = True

    answer = await http.post(
        "/v1/embeddings", json={"model": "guide", "input": "hello"}, headers=SHORT
    )

    assert answer.status_code == 504
    assert len(cluster.aborted) == 1


async def test_the_gateway_has_a_deadline_where_the_caller_says_nothing(
    cluster: FakeCluster,
) -> None:
    cluster.holds_accept = True
    transport = httpx.ASGITransport(app=create_app(cluster, answer_timeout_seconds=0.05))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
        answer = await http.post("/v1/chat/completions", json=chat())

    assert answer.status_code == 504


@pytest.mark.parametrize("said", ["", "soon", "0", "-1", "nan", "inf", "86401"])
async def test_what_is_no_number_of_seconds_is_refused(said: str, http: httpx.AsyncClient) -> None:
    answer = await http.post(
        "/v1/chat/completions", json=chat(), headers={"X-Request-Timeout": said}
    )

    assert answer.status_code == 400
    assert "X-Request-Timeout" in answer.json()["error"]["message"]
