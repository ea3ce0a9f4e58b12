# SPDX-License-Identifier: Apache-2.0
"""The gateway over a fake cluster: called in-process, or over real sockets."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
import uvicorn

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app

MESSAGES = [{"role": "user", "content": "What is a replica?"}]
ANSWER = "You said: What is a replica?"


class _Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.listens = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self.listens.set()


@asynccontextmanager
async def serving(app: Any) -> AsyncIterator[int]:
    """Serve an application on a loopback port that the kernel picks; yield the port."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        server = _Server(uvicorn.Config(app, log_config=None, timeout_graceful_shutdown=5))
        running = asyncio.create_task(server.serve(sockets=[listener]))
        await asyncio.wait_for(server.listens.wait(), 10)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            await asyncio.wait_for(running, 20)


@pytest.fixture
async def cluster() -> FakeCluster:
    """A cluster that runs one model, "guide"."""
    return await FakeCluster.running()


@pytest.fixture
async def http(cluster: FakeCluster) -> AsyncIterator[httpx.AsyncClient]:
    """A client that calls the application without a socket."""
    transport = httpx.ASGITransport(app=create_app(cluster))
    async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
        yield client


@pytest.fixture
async def port(cluster: FakeCluster) -> AsyncIterator[int]:
    """The port of a real server."""
    async with serving(create_app(cluster)) as port:
        yield port


def chat(**fields: Any) -> dict[str, Any]:
    """Return a chat body."""
    return {"model": "guide", "messages": MESSAGES, **fields}


def completion(**fields: Any) -> dict[str, Any]:
    """Return a completion body."""
    return {"model": "guide", "prompt": "What is a replica?", **fields}


def chunks_of(text: str) -> list[str]:
    """Return the data of each server-sent event."""
    assert text.endswith("\n\n")
    events = text.removesuffix("\n\n").split("\n\n")
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [event.removeprefix("data: ") for event in events]
