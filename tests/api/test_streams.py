# SPDX-License-Identifier: Apache-2.0
"""What holds for streams of every protocol: they live through silence, and they end in words."""

import asyncio
import json
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import httpx
import pytest
from openai import APIError, AsyncOpenAI

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app

from .conftest import ANSWER, MESSAGES, chat, serving

CHAT = "/v1/chat/completions"


@asynccontextmanager
async def impatient() -> AsyncIterator[tuple[FakeCluster, httpx.AsyncClient]]:
    """A gateway that says every 50 ms that a silent stream lives."""
    cluster = await FakeCluster.running()
    async with serving(create_app(cluster, keep_alive_seconds=0.05)) as port:
        url = f"http://127.0.0.1:{port}"
        async with httpx.AsyncClient(base_url=url, timeout=10) as http:
            yield cluster, http


@pytest.mark.parametrize("num_words", [0, 2], ids=["before the first word", "between words"])
async def test_a_stream_that_waits_says_that_it_lives(num_words: int) -> None:
    async with impatient() as (cluster, http):
        cluster.allow(num_words)
        async with http.stream("POST", CHAT, json=chat(stream=True)) as answer:
            lines: list[str] = []
            async for line in answer.aiter_lines():
                lines.append(line)
                if lines.count(": keep-alive") == 3:
                    cluster.allow(None)
            text = "\n".join(lines)

    assert answer.status_code == 200
    assert text.count("data: {") == len(ANSWER.split()) + 2
    assert text.rstrip().endswith("data: [DONE]")


async def test_nothing_but_line_feeds_ends_a_line_of_a_stream(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    said = "a\u2028b\u2029c\x85d\x0be\rf"
    cluster.words = lambda request: iter([said])

    answer = await http.post(CHAT, json=chat(stream=True))

    lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
    deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines]
    assert "".join(delta.get("content", "") for delta in deltas) == said


async def test_openais_client_does_not_see_the_signs_of_life() -> None:
    async with impatient() as (cluster, http):
        cluster.allow(2)
        async with AsyncOpenAI(base_url=f"{http.base_url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(
                model="guide",
                messages=MESSAGES,  # type: ignore[arg-type]
                stream=True,
                extra_body={"request_id": "mine"},
            )
            text = ""
            async for chunk in stream:
                text += chunk.choices[0].delta.content or ""
                if len(text.split()) == 2:
                    async with http.stream("POST", CHAT, json=chat(stream=True)) as other:
                        async for line in other.aiter_lines():
                            if line == ": keep-alive":
                                break
                    cluster.allow(None)

    assert text == ANSWER


async def test_an_answer_in_one_piece_gets_no_sign_of_life() -> None:
    async with impatient() as (cluster, http):
        cluster.allow(0)
        waiting = asyncio.create_task(http.post(CHAT, json=chat()))
        await cluster.wait_until(lambda: cluster.live_requests("guide"))
        # Why a stream beside it: its signs of life tell that the time is up for the other, too.
        async with http.stream("POST", CHAT, json=chat(stream=True)) as other:
            async for line in other.aiter_lines():
                if line == ": keep-alive":
                    break
        cluster.allow(None)
        whole = await waiting

    assert whole.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    ("path", "has"),
    [
        ("/v1/messages/nothing", {"type", "error", "request_id"}),
        ("/api/nothing", {"error"}),
        ("/v1/nothing", {"error", "detail"}),
        ("/v1/messagesque", {"error", "detail"}),
    ],
)
async def test_an_error_has_the_shape_of_its_path_even_where_there_is_no_route(
    http: httpx.AsyncClient, path: str, has: set[str]
) -> None:
    answer = await http.get(path)

    assert answer.status_code == 404
    assert answer.json().keys() == has


async def test_a_fault_is_logged_under_the_id_that_the_answer_has(
    http: httpx.AsyncClient, cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.failure = ValueError("a bug")
    with caplog.at_level(logging.WARNING):
        named = await http.post(CHAT, json=chat(), headers={"X-Request-Id": "caller-7"})
        unnamed = await http.get("/v1/models")

    assert named.status_code == unnamed.status_code == 500
    assert named.headers["x-request-id"] == "caller-7"
    assert "[caller-7]" in caplog.text
    assert f"[{unnamed.headers['x-request-id']}]" in caplog.text


async def test_a_stream_that_fails_is_logged_under_its_id_and_raised_by_openais_client(
    cluster: FakeCluster, port: int, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.allow(2)
    async with AsyncOpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none") as client:
        stream = await client.chat.completions.create(
            model="guide",
            messages=MESSAGES,  # type: ignore[arg-type]
            stream=True,
            extra_headers={"X-Request-Id": "caller-8"},
        )

        async def read() -> None:
            async for chunk in stream:
                if chunk.choices[0].delta.content:
                    cluster.lose_replica("guide")

        with caplog.at_level(logging.WARNING), pytest.raises(APIError, match="is gone"):
            await read()

    assert "[caller-8]" in caplog.text
