# SPDX-License-Identifier: Apache-2.0
"""Completions, in one piece and streamed."""

import json
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.protocol.generation import Prompt, TextPrompt, TokenPrompt

from .conftest import ANSWER, chunks_of, completion

COMPLETIONS = "/v1/completions"


async def test_a_completion_is_answered_in_openais_form(http: httpx.AsyncClient) -> None:
    answer = await http.post(COMPLETIONS, json=completion())

    body = answer.json()
    assert body["object"] == "text_completion"
    assert body["id"] == f"cmpl-{answer.headers['x-request-id']}"
    assert body["choices"] == [
        {"index": 0, "text": ANSWER, "logprobs": None, "finish_reason": "stop"}
    ]
    assert body["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 6,
        "total_tokens": 10,
        "prompt_tokens_details": {"cached_tokens": 0},
        "completion_tokens_details": {"reasoning_tokens": 0},
    }


async def test_a_stream_of_a_completion_ends_with_done(http: httpx.AsyncClient) -> None:
    options = {"include_usage": True}
    answer = await http.post(COMPLETIONS, json=completion(stream=True, stream_options=options))

    *chunks, last = chunks_of(answer.text)
    *texts, reason, usage = [json.loads(chunk) for chunk in chunks]
    assert last == "[DONE]"
    assert "".join(chunk["choices"][0]["text"] for chunk in texts) == ANSWER
    assert reason["choices"] == [
        {"index": 0, "text": "", "logprobs": None, "finish_reason": "stop"}
    ]
    assert (usage["choices"], usage["usage"]["total_tokens"]) == ([], 10)


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("Once", TextPrompt(text="Once")),
        (["Once"], TextPrompt(text="Once")),
        ([5, 0, 7], TokenPrompt(token_ids=(5, 0, 7))),
        ([[5, 0, 7]], TokenPrompt(token_ids=(5, 0, 7))),
    ],
)
async def test_a_prompt_is_a_text_or_token_ids(
    http: httpx.AsyncClient, cluster: FakeCluster, given: Any, meant: Prompt
) -> None:
    answer = await http.post(COMPLETIONS, json=completion(prompt=given))

    assert answer.status_code == 200
    assert cluster.requests[0].prompt == meant


@pytest.mark.parametrize(
    "given", [[], [[]], [["a"], ["b"]], [1, "a"], [-1], [1.5], [True], None, 7, {}, [2**31]]
)
async def test_any_other_prompt_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, given: Any
) -> None:
    answer = await http.post(COMPLETIONS, json=completion(prompt=given))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "prompt"
    assert cluster.requests == []
