# SPDX-License-Identifier: Apache-2.0
"""What is counted by key and model is what the answers said, however they ended."""

import json
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform, wait_until

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Return the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}},
            "required": ["city"],
        },
    },
}
KINDS = ("prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens", "requests")


@pytest.fixture
def http(guide: Platform) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=guide.endpoint, timeout=60) as client:
        yield client


def used(http: httpx.Client) -> dict[str, int]:
    rows = [row for row in http.get("/v1/usage").json()["data"] if row["model"] == GUIDE]
    return {kind: sum(row[kind] for row in rows) for kind in KINDS}


def chat(question: str, **fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": question}]
    return {"model": GUIDE, "messages": messages, "temperature": 0, "max_tokens": 64, **fields}


def usage_of(answer: httpx.Response) -> dict[str, int]:
    """Return the usage that a whole answer, or the last chunk of a stream, tells."""
    assert answer.status_code == 200, answer.text
    if answer.headers["content-type"].startswith("application/json"):
        usage = answer.json()["usage"]
    else:
        *_, last, done, _ = answer.text.split("\n\n")
        assert done == "data: [DONE]"
        usage = json.loads(last.removeprefix("data: "))["usage"]
    return {
        "prompt_tokens": usage["prompt_tokens"],
        "completion_tokens": usage["completion_tokens"],
        "cached_tokens": usage["prompt_tokens_details"]["cached_tokens"],
        "reasoning_tokens": usage["completion_tokens_details"]["reasoning_tokens"],
        "requests": 1,
    }


def test_it_is_the_sum_of_what_the_answers_said(http: httpx.Client) -> None:
    streamed = {"stream": True, "stream_options": {"include_usage": True}}
    asked = [
        chat("What is Xinference?"),
        chat("What is Xinference?", **streamed),
        chat("How do I launch a model?", stop=["launch"]),
        chat("How do I launch a model?", stop=["launch"], **streamed),
        chat("hello", max_tokens=3),
        chat("What is the weather in Paris?", tools=[WEATHER]),
        chat("What is the weather in Paris?", tools=[WEATHER], **streamed),
        chat("What is Xinference?", n=3, temperature=1, seed=1),
    ]
    before = used(http)

    told = [usage_of(http.post("/v1/chat/completions", json=body)) for body in asked]
    refused = http.post("/v1/chat/completions", json=chat("x", max_tokens=-1))

    assert refused.status_code == 400
    after = used(http)
    assert {kind: after[kind] - before[kind] for kind in KINDS} == {
        kind: sum(one[kind] for one in told) for kind in KINDS
    }


def test_a_stream_that_is_left_counts_what_was_delivered(http: httpx.Client) -> None:
    before = used(http)
    num_chunks = 0
    body = {"model": GUIDE, "prompt": "To launch a model", "stream": True, "ignore_eos": True}
    with http.stream("POST", "/v1/completions", json=body) as answer:
        for line in answer.iter_lines():
            num_chunks += line.startswith("data: {")
            if num_chunks == 20:
                break

    def counted() -> dict[str, int] | None:
        after = used(http)
        return after if after["requests"] > before["requests"] else None

    after = wait_until("it is counted", counted, timeout_seconds=10)
    assert after is not None
    num_tokens = after["completion_tokens"] - before["completion_tokens"]
    assert after["requests"] - before["requests"] == 1
    assert after["prompt_tokens"] > before["prompt_tokens"]
    # A token without text of its own has no chunk; what is on its way is delivered, too.
    assert 20 <= num_tokens < 1000
