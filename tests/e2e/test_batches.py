# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client orders batches on the guide model; one outlives the gateway that ran it."""

import json
import time
from typing import Any

import openai
import psutil
import pytest
from openai.types import Batch

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, command_of, started, wait_until

CHAT = "/v1/chat/completions"
QUESTIONS = ["What is Xinference?", "How do I launch a model?", "How do I stop a model?"]


@pytest.fixture
def client(guide: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guide.endpoint}/v1", api_key="none", max_retries=10)


def asked(question: str) -> dict[str, Any]:
    return {
        "model": GUIDE,
        "temperature": 0,
        "max_tokens": 64,
        "messages": [{"role": "user", "content": question}],
    }


def ordered(client: openai.OpenAI, bodies: dict[str, dict[str, Any]]) -> Batch:
    lines = [
        json.dumps({"custom_id": name, "method": "POST", "url": CHAT, "body": body})
        for name, body in bodies.items()
    ]
    file = client.files.create(file=("in.jsonl", "\n".join(lines).encode()), purpose="batch")
    return client.batches.create(input_file_id=file.id, endpoint=CHAT, completion_window="24h")


def ended(client: openai.OpenAI, batch: Batch) -> Batch:
    """Return a batch when it has ended."""

    def look() -> Batch | None:
        found = client.batches.retrieve(batch.id)
        return found if found.status in ("completed", "failed", "cancelled") else None

    found = wait_until("the batch has ended", look, timeout_seconds=90)
    assert found is not None
    return found


def results(client: openai.OpenAI, file_id: str | None) -> dict[str, Any]:
    assert file_id is not None
    outcomes = [json.loads(line) for line in client.files.content(file_id).text.splitlines()]
    assert len({outcome["custom_id"] for outcome in outcomes}) == len(outcomes)
    return {outcome["custom_id"]: outcome["response"] for outcome in outcomes}


def test_a_batch_answers_as_the_route_does(client: openai.OpenAI) -> None:
    bodies = {question: asked(question) for question in QUESTIONS}

    batch = ended(client, ordered(client, {**bodies, "bad": asked("x") | {"top_p": 7}}))
    answers = results(client, batch.output_file_id)
    refusals = results(client, batch.error_file_id)

    assert batch.status == "completed"
    assert batch.request_counts is not None
    assert batch.request_counts.completed == len(QUESTIONS)
    for question in QUESTIONS:
        alone = client.chat.completions.create(**asked(question))
        assert answers[question]["body"]["choices"][0]["message"]["content"] == (
            alone.choices[0].message.content
        )
    assert refusals["bad"]["status_code"] == 400


def test_a_batch_goes_on_after_its_gateway_was_killed(
    client: openai.OpenAI, guide: Platform
) -> None:
    bodies = {f"{n}": asked(f"Tell me about model {n}.") for n in range(60)}
    batch = ordered(client, bodies)

    def has_begun() -> bool:
        counts = client.batches.retrieve(batch.id).request_counts
        return counts is not None and counts.completed >= 3

    wait_until("some lines are done", has_begun, timeout_seconds=60)
    guide.control("gateway").kill()
    done = ended(client, batch)

    assert done.status == "completed"
    assert set(results(client, done.output_file_id)) == bodies.keys()


def test_of_two_gateways_the_other_takes_a_batch_over(
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    with started(tmp_path_factory.mktemp("home"), "--api-workers", "2") as platform:
        launch_guide(platform)
        client = openai.OpenAI(base_url=f"{platform.endpoint}/v1", api_key="none", max_retries=10)
        bodies = {f"{n}": asked(f"Tell me about model {n}.") for n in range(60)}
        batch = ordered(client, bodies)
        before = time.monotonic()
        for gateway in gateways(platform):
            # One of them holds the lease; it does not say which.
            gateway.kill()
            gateway.wait(10)
            wait_until("both serve", lambda: len(gateways(platform)) == 2, timeout_seconds=30)
        done = ended(client, batch)

        assert done.status == "completed"
        assert set(results(client, done.output_file_id)) == bodies.keys()
        assert time.monotonic() - before < 90


def gateways(platform: Platform) -> list[psutil.Process]:
    found = platform.processes("xinference.cli.process")
    return [process for process in found if "gateway" in command_of(process)]


def test_a_cancelled_batch_ends(client: openai.OpenAI) -> None:
    batch = ordered(client, {f"{n}": asked(f"Tell me about model {n}.") for n in range(200)})

    cancelled = client.batches.cancel(batch.id)
    done = ended(client, batch)

    assert cancelled.status == "cancelling"
    assert done.status == "cancelled"
    assert done.request_counts is not None
    assert done.request_counts.completed < 200
