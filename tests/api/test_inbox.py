# SPDX-License-Identifier: Apache-2.0
"""What is ready together is written together, and waiting is bounded."""

import asyncio
import json
from typing import Any

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.api.inbox import MAX_WAITING_EVENTS, Inbox
from xinference.protocol.generation import TextDelta

from .conftest import chat


async def sent_by(cluster: FakeCluster, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the ASGI messages that answer a chat."""
    asked = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]
    sent: list[dict[str, Any]] = []
    is_over = asyncio.Event()

    async def receive() -> dict[str, Any]:
        if asked:
            return asked.pop()
        await is_over.wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {
        "type": "http",
        "method": "POST",
        "path": "/v1/chat/completions",
        "query_string": b"",
        "headers": [],
        "root_path": "",
    }
    await create_app(cluster)(scope, receive, send)
    return sent


async def test_tokens_that_are_ready_together_are_written_together() -> None:
    cluster = await FakeCluster.running(words=lambda request: ["a "] * 100)
    cluster.burst = 1000

    _, *bodies = await sent_by(cluster, chat(stream=True))

    assert len(bodies) <= 3
    assert b"".join(body["body"] for body in bodies).count(b'"content":"a "') == 100
    assert [body["more_body"] for body in bodies] == [True] * (len(bodies) - 1) + [False]


async def test_a_token_that_is_ready_alone_is_not_held_back() -> None:
    cluster = await FakeCluster.running(words=lambda request: ["a "] * 20)

    _, *bodies = await sent_by(cluster, chat(stream=True))

    assert len(bodies) >= 20


async def test_a_full_inbox_waits_until_it_is_emptied() -> None:
    inbox = Inbox()
    for _ in range(MAX_WAITING_EVENTS):
        await inbox.put(TextDelta(text="x"))
    waits = asyncio.create_task(inbox.put(TextDelta(text="last")))
    await asyncio.sleep(0)
    assert not waits.done()

    taken = await inbox.take()
    await waits
    inbox.close()

    assert len(taken) == MAX_WAITING_EVENTS
    assert await inbox.take() == [TextDelta(text="last")]
    assert await inbox.take() == []
