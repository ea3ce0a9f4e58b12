# SPDX-License-Identifier: Apache-2.0
"""A client that leaves stops its request at once, over real sockets, and nobody else's."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster, endless
from xinference.api.app import create_app
from xinference.api.inbox import MAX_WAITING_EVENTS

from .conftest import chat, serving

both = pytest.mark.parametrize("stream", [False, True])


async def post(port: int, **fields: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a chat request over a socket and leave it open."""
    body = json.dumps(chat(**fields)).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
    writer.write(head.encode() + body)
    await writer.drain()
    return reader, writer


@asynccontextmanager
async def gateway(**options: Any) -> AsyncIterator[tuple[FakeCluster, int]]:
    cluster = await FakeCluster.running(**options)
    async with serving(create_app(cluster)) as port:
        yield cluster, port


@both
async def test_leaving_while_tokens_come_aborts_the_request(stream: bool) -> None:
    async with gateway(words=endless) as (cluster, port):
        cluster.allow(5)
        _, writer = await post(port, stream=stream, request_id="mine")
        await cluster.wait_until(lambda: cluster.num_steps == 5)

        writer.transport.abort()

        await cluster.wait_until(lambda: cluster.aborted)
        assert cluster.aborted == ["mine"]
        assert cluster.live_requests("guide") == []
        assert cluster.num_steps == 5


@both
async def test_leaving_before_accept_aborts_the_request(stream: bool) -> None:
    async with gateway() as (cluster, port):
        cluster.holds_accept = True
        _, writer = await post(port, stream=stream, request_id="mine")
        await cluster.wait_until(lambda: cluster.requests)

        writer.transport.abort()

        await cluster.wait_until(lambda: cluster.aborted)
        assert cluster.aborted == ["mine"]


@both
async def test_closing_politely_counts_as_leaving(stream: bool) -> None:
    async with gateway(words=endless) as (cluster, port):
        cluster.allow(3)
        _, writer = await post(port, stream=stream)
        await cluster.wait_until(lambda: cluster.num_steps == 3)

        writer.close()

        await cluster.wait_until(lambda: cluster.aborted)


@both
async def test_one_who_leaves_does_not_stop_the_others(stream: bool) -> None:
    async with gateway() as (cluster, port):
        cluster.allow(2)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            stays = asyncio.create_task(
                http.post("/v1/chat/completions", json=chat(stream=stream, request_id="stays"))
            )
            _, writer = await post(port, stream=stream, request_id="leaves")
            await cluster.wait_until(lambda: cluster.num_steps == 4)
            writer.transport.abort()
            await cluster.wait_until(lambda: cluster.aborted)
            cluster.allow(None)
            answer = await stays

        assert cluster.aborted == ["leaves"]
        assert answer.status_code == 200
        assert "replica" in answer.text


@both
async def test_an_answer_that_ended_is_not_aborted_afterwards(stream: bool) -> None:
    async with gateway() as (cluster, port):
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            await http.post("/v1/chat/completions", json=chat(stream=stream))
            await http.post("/v1/chat/completions", json=chat(stream=stream))

        assert cluster.aborted == []
        assert cluster.live_requests("guide") == []


@both
async def test_an_abort_by_id_ends_the_answer_of_a_running_request(stream: bool) -> None:
    async with gateway(words=endless) as (cluster, port):
        cluster.allow(3)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            body = chat(stream=stream, request_id="mine")
            running = asyncio.create_task(http.post("/v1/chat/completions", json=body))
            await cluster.wait_until(lambda: cluster.num_steps == 3)
            done = await http.post(
                "/v1/models/guide/requests/mine/abort", json={"block_duration": 0}
            )
            answer = await running
            again = await http.post(
                "/v1/models/guide/requests/mine/abort", json={"block_duration": 0}
            )

        assert (done.json(), again.json()) == ({"msg": "DONE"}, {"msg": "NO_OP"})
        assert answer.status_code == (200 if stream else 409)
        assert "request_aborted" in answer.text
        assert "[DONE]" not in answer.text


async def test_a_client_that_does_not_read_does_not_fill_the_gateway() -> None:
    async with gateway(words=lambda request: iter(lambda: "x" * 10_000, None)) as (cluster, port):
        cluster.burst = 50
        reader, writer = await post(port, stream=True, max_tokens=1000)
        head = await reader.readuntil(b"\r\n\r\n")
        # A reader of asyncio takes 64 KiB, the sockets some MiB; then the gateway stops reading.
        await _until_still(cluster)

        assert b"200 OK" in head
        assert MAX_WAITING_EVENTS < cluster.num_steps < 1000
        writer.transport.abort()
        await cluster.wait_until(lambda: cluster.aborted)


async def _until_still(cluster: FakeCluster) -> None:
    """Return when nothing more was generated in many turns of the loop."""
    last, turns = -1, 0
    while turns < 2000:
        last, turns = (last, turns + 1) if cluster.num_steps == last else (cluster.num_steps, 0)
        await asyncio.sleep(0)


async def test_half_a_body_harms_nobody(caplog: pytest.LogCaptureFixture) -> None:
    async with gateway() as (cluster, port):
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        await writer.drain()
        writer.transport.abort()
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http:
            answer = await http.post("/v1/chat/completions", json=chat())

        assert answer.status_code == 200
        assert len(cluster.requests) == 1
    assert "Traceback" not in caplog.text
