# SPDX-License-Identifier: Apache-2.0
"""More requests than a model can take: those it takes are answered, the others told so at once."""

import asyncio
import time
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started, wait_until

NUM_RUNNING, NUM_QUEUED = 2, 4
LONG = {"max_tokens": 1500, "ignore_eos": True}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform whose guide takes six requests at a time."""
    with started(tmp_path_factory.mktemp("home")) as platform:
        launch_guide(platform, max_num_seqs=NUM_RUNNING, max_queue_size=NUM_QUEUED)
        yield platform


def body(**fields: object) -> dict[str, object]:
    return {"model": GUIDE, "messages": [{"role": "user", "content": "hello"}], **fields}


def num_live(platform: Platform) -> tuple[int, int]:
    """Return how many requests run and wait in the engine."""
    page = httpx.get(f"{platform.endpoint}/metrics", timeout=10).text
    values = dict(line.rsplit(" ", 1) for line in page.splitlines() if not line.startswith("#"))
    running, waiting = (
        int(float(values[f'xinference:engine_{name}{{model_uid="{GUIDE}",replica_index="0"}}']))
        for name in ("num_running", "num_waiting")
    )
    return running, waiting


async def test_f31_ten_times_too_many_requests_are_shed(small: Platform) -> None:
    (replica,) = small.replicas
    before = replica.memory_info().rss
    num_requests = 10 * (NUM_RUNNING + NUM_QUEUED)
    limits = httpx.Limits(max_connections=num_requests)
    async with httpx.AsyncClient(base_url=small.endpoint, timeout=120, limits=limits) as http:

        async def ask(number: int) -> tuple[httpx.Response, float]:
            started_at = time.monotonic()
            asked = body(max_tokens=64, ignore_eos=True, user=f"user {number}")
            answer = await http.post("/v1/chat/completions", json=asked)
            return answer, time.monotonic() - started_at

        answers = await asyncio.gather(*map(ask, range(num_requests)))

    good = [seconds for answer, seconds in answers if answer.status_code == 200]
    shed = [(answer, seconds) for answer, seconds in answers if answer.status_code != 200]
    assert len(good) >= NUM_RUNNING + NUM_QUEUED
    assert shed
    for answer, _ in shed:
        assert answer.status_code == 429, answer.text
        assert answer.json()["error"]["code"] == "model_overloaded"
        assert 1 <= int(answer.headers["Retry-After"]) <= 60
    # What is refused need not wait for what is answered.
    assert min(seconds for _, seconds in shed) < max(good)
    assert replica.memory_info().rss - before < 64 * 2**20
    wait_until("it is idle again", lambda: num_live(small) == (0, 0), timeout_seconds=30)


async def test_f32_a_request_whose_time_is_over_in_the_queue_is_not_started(
    small: Platform,
) -> None:
    async with httpx.AsyncClient(base_url=small.endpoint, timeout=60) as http:
        running = [
            asyncio.create_task(http.post("/v1/chat/completions", json=body(**LONG)))
            for _ in range(NUM_RUNNING)
        ]
        await asyncio.to_thread(
            wait_until,
            "both run",
            lambda: num_live(small) == (NUM_RUNNING, 0),
            timeout_seconds=30,
        )
        started_at = time.monotonic()
        late = await http.post(
            "/v1/chat/completions", json=body(), headers={"X-Request-Timeout": "0.2"}
        )
        seconds = time.monotonic() - started_at

        assert late.status_code == 504, late.text
        assert late.json()["error"]["code"] == "deadline_passed"
        assert "Retry-After" in late.headers
        assert seconds >= 0.2
        await asyncio.to_thread(
            wait_until, "it left the queue", lambda: num_live(small)[1] == 0, timeout_seconds=10
        )
        assert all(not task.done() for task in running), "they were to hold the model"
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
