# SPDX-License-Identifier: Apache-2.0
"""A request that nobody wants any more stops using the engine within one step.

The engine's own counters show it, on a model whose answers never end by themselves. One request
runs alone, so each step makes one token, and what was made after the order to stop is counted by
the tokens made in all, less those that were there when the order was given.
"""

import asyncio
import math
import string
import time
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest
import pytest_asyncio
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig

from tests.e2e.platform import Platform
from tests.models_tiny import VOCAB_SIZE, make_tokenizer, save_model

MODEL = "endless"
NUM_TOKENS = 3000
LONG = {"model": MODEL, "prompt": "hello", "max_tokens": NUM_TOKENS, "temperature": 0}
FRESH_SECONDS = 1.2
"""The gateway keeps a reading of the counters for up to a second."""
NOTICE_SECONDS = 0.25
"""How long the word of a client that left may take to the engine."""


@dataclass(frozen=True)
class Reading:
    """The engine's counters at one moment."""

    num_running: int
    num_blocks_used: int
    num_steps: int
    num_generated: int
    num_aborts: int
    step_seconds: float


@pytest.fixture(scope="module")
def endless(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A platform with a model that goes on to `max_tokens`, some milliseconds a step."""
    config = LlamaConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=512,
        intermediate_size=1536,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
    )
    path = save_model(tmp_path_factory.mktemp("endless"), config=config)
    say_plain_letters_only(path)
    launch = {"model_name": "gpt-2", "model_engine": "transformers", "model_path": str(path)}
    body = {**launch, "model_uid": MODEL, "context_length": 4096, "dtype": "float32"}
    reply = httpx.post(f"{platform.endpoint}/v1/models", json=body, timeout=90)
    assert reply.status_code == 200, reply.text
    return platform


def say_plain_letters_only(path: Path) -> None:
    """Let only ASCII letters win, so that every token is a piece of text of its own."""
    letters = set(make_tokenizer().convert_tokens_to_ids(list(string.ascii_letters)))
    weights = load_file(path / "model.safetensors")
    for token_id in set(range(VOCAB_SIZE)) - letters:
        weights["lm_head.weight"][token_id] = 0
    save_file(weights, path / "model.safetensors", metadata={"format": "pt"})


@pytest_asyncio.fixture
async def client(endless: Platform) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=endless.endpoint, timeout=60) as client:
        await until(client, "the engine is idle", lambda now: now.num_running == 0)
        yield client


async def read(client: httpx.AsyncClient) -> Reading:
    """Read the engine's numbers off the metrics page; they may be a second old."""
    found = {}
    for line in (await client.get("/metrics")).text.splitlines():
        if line.startswith("xinference:engine_") and f'model_uid="{MODEL}"' in line:
            name, _, value = line.partition("{")
            found[name.removeprefix("xinference:engine_")] = float(value.rpartition(" ")[2])
    return Reading(
        num_running=int(found["num_running"]),
        num_blocks_used=int(found["num_blocks_used"]),
        num_steps=int(found["steps_total"]),
        num_generated=int(found["generated_tokens_total"]),
        num_aborts=int(found["aborts_total"]),
        step_seconds=found["last_step_seconds"],
    )


async def until(client: httpx.AsyncClient, what: str, holds: Callable[[Reading], bool]) -> Reading:
    """Return the first reading that `holds`."""
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        now = await read(client)
        if holds(now):
            return now
    raise AssertionError(f"never: {what}; last: {now}")


async def at_rest(client: httpx.AsyncClient) -> Reading:
    """Return a reading that a later one confirms, both fresh: the engine has stopped."""
    readings = []
    for what in ("a fresh reading", "a second one"):
        began = time.monotonic()
        readings.append(
            await until(client, what, lambda _, t=began: time.monotonic() - t > FRESH_SECONDS)
        )
    assert readings[0] == readings[1], "the engine went on"
    assert readings[1].num_running == 0
    return readings[1]


class Asked:
    """A streamed request under way, and how many pieces of its answer have come."""

    def __init__(self) -> None:
        self.num_pieces = 0
        self.text = ""

    async def run(self, endpoint: httpx.URL, body: dict[str, object]) -> None:
        async with (
            httpx.AsyncClient(base_url=endpoint, timeout=60) as own,
            own.stream("POST", "/v1/completions", json=body) as reply,
        ):
            async for line in reply.aiter_lines():
                self.text += line
                self.num_pieces += line.startswith('data: {"id"')

    async def wait_pieces(self, number: int) -> None:
        deadline = time.monotonic() + 30
        while self.num_pieces < number:
            assert time.monotonic() < deadline, self.text
            await asyncio.sleep(0.001)


def abort_of(request_id: str) -> str:
    return f"/v1/models/{MODEL}/requests/{request_id}/abort"


async def test_a_streamed_request_aborted_by_its_id_stops_within_one_step(
    client: httpx.AsyncClient,
) -> None:
    before = await read(client)
    asked = Asked()
    body = {**LONG, "stream": True, "request_id": "one"}
    task = asyncio.create_task(asked.run(client.base_url, body))
    await asked.wait_pieces(20)

    num_at_order, ordered = asked.num_pieces, time.monotonic()
    outcome = await client.post(abort_of("one"), json={"block_duration": 0})
    order_seconds = time.monotonic() - ordered
    await task

    assert outcome.json() == {"msg": "DONE"}
    assert "request_aborted" in asked.text
    assert "[DONE]" not in asked.text
    after = await at_rest(client)
    assert after.num_aborts == before.num_aborts + 1
    assert after.num_blocks_used == 0
    # Made while the order was on its way, and the one step that it found running.
    made = after.num_generated - before.num_generated - num_at_order
    assert made <= math.ceil(order_seconds / after.step_seconds) + 2
    assert after.num_steps - before.num_steps < NUM_TOKENS / 2


async def test_a_whole_answer_aborted_by_its_id_ends_as_a_refusal(
    client: httpx.AsyncClient,
) -> None:
    before = await read(client)
    asked = asyncio.create_task(client.post("/v1/completions", json={**LONG, "request_id": "two"}))
    await until(client, "it runs", lambda now: now.num_running == 1)

    outcome = await client.post(abort_of("two"), json={"block_duration": 0})

    assert outcome.json() == {"msg": "DONE"}
    reply = await asked
    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "request_aborted"
    after = await at_rest(client)
    assert after.num_aborts == before.num_aborts + 1
    assert after.num_blocks_used == 0


async def test_a_streaming_client_that_leaves_stops_its_request(
    client: httpx.AsyncClient,
) -> None:
    before = await read(client)
    asked = Asked()
    task = asyncio.create_task(asked.run(client.base_url, {**LONG, "stream": True}))
    await asked.wait_pieces(20)

    num_at_leaving = asked.num_pieces
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    after = await at_rest(client)
    assert after.num_aborts == before.num_aborts + 1
    assert after.num_blocks_used == 0
    made = after.num_generated - before.num_generated - num_at_leaving
    assert made <= math.ceil(NOTICE_SECONDS / after.step_seconds) + 2


async def test_a_client_that_leaves_a_whole_answer_stops_its_request(
    client: httpx.AsyncClient,
) -> None:
    before = await read(client)
    async with httpx.AsyncClient(base_url=client.base_url, timeout=60) as leaver:
        asked = asyncio.create_task(leaver.post("/v1/completions", json=LONG))
        await until(client, "it runs", lambda now: now.num_running == 1)
        asked.cancel()
        await asyncio.gather(asked, return_exceptions=True)

    after = await at_rest(client)

    assert after.num_aborts == before.num_aborts + 1
    assert after.num_blocks_used == 0
    assert after.num_generated - before.num_generated < NUM_TOKENS


async def test_an_abort_that_comes_before_its_request_still_works(
    client: httpx.AsyncClient,
) -> None:
    early = await client.post(abort_of("too-late"), json={"block_duration": 5})
    assert early.json() == {"msg": "NOT_FOUND"}

    reply = await client.post("/v1/completions", json={**LONG, "request_id": "too-late"})

    assert reply.status_code == 409
    assert reply.json()["error"]["code"] == "request_aborted"


async def test_an_abort_of_an_ended_request_changes_nothing(client: httpx.AsyncClient) -> None:
    body = {**LONG, "max_tokens": 2, "request_id": "ended"}
    assert (await client.post("/v1/completions", json=body)).status_code == 200

    outcome = await client.post(abort_of("ended"), json={"block_duration": 0})

    assert outcome.json()["msg"] in {"NO_OP", "NOT_FOUND"}
