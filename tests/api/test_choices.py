# SPDX-License-Identifier: Apache-2.0
"""Several answers, log probabilities and echoes: OpenAI's shapes, streamed and whole the same."""

import json
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster

from .conftest import ANSWER, chat, chunks_of, completion

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def joined(text: str) -> dict[int, dict[str, Any]]:
    """Put the chunks of a stream together, by choice."""
    *chunks, last = chunks_of(text)
    assert last == "[DONE]"
    choices: dict[int, dict[str, Any]] = {}
    for chunk in map(json.loads, chunks):
        for one in chunk["choices"]:
            choice = choices.setdefault(
                one["index"], {"text": "", "logprobs": {}, "finish_reason": None}
            )
            assert choice["finish_reason"] is None, "a choice that has ended goes on"
            choice["text"] += one["text"] if "text" in one else one["delta"].get("content", "")
            choice["finish_reason"] = one["finish_reason"]
            for name, values in (one["logprobs"] or {}).items():
                if values is not None:
                    choice["logprobs"].setdefault(name, []).extend(values)
    return choices


def whole(body: dict[str, Any]) -> dict[int, dict[str, Any]]:
    """Return the choices of an answer in one piece, in the same form."""
    return {
        one["index"]: {
            "text": one["text"] if "text" in one else one["message"]["content"],
            "logprobs": {k: v for k, v in (one["logprobs"] or {}).items() if v is not None},
            "finish_reason": one["finish_reason"],
        }
        for one in body["choices"]
    }


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"n": 3},
        {"logprobs": True},
        {"n": 2, "logprobs": True, "top_logprobs": 3},
        {"n": 4, "max_tokens": 2},
    ],
    ids=str,
)
@pytest.mark.parametrize("route", [CHAT, COMPLETIONS])
async def test_a_stream_says_what_the_whole_answer_says(
    http: httpx.AsyncClient, route: str, given: dict[str, Any]
) -> None:
    if route == COMPLETIONS and "logprobs" in given:
        given = {**given, "logprobs": given.get("top_logprobs", 0)}
        given.pop("top_logprobs", None)
    body = {CHAT: chat, COMPLETIONS: completion}[route]

    in_one = (await http.post(route, json=body(**given))).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = (await http.post(route, json=body(**given, **options))).text

    assert joined(streamed) == whole(in_one)
    assert sorted(joined(streamed)) == list(range(given.get("n", 1)))
    assert json.loads(chunks_of(streamed)[-2])["usage"] == in_one["usage"]


async def test_each_choice_of_a_chat_says_who_speaks(http: httpx.AsyncClient) -> None:
    chunks = chunks_of((await http.post(CHAT, json=chat(n=2, stream=True))).text)[:-1]

    choices = [choice for chunk in chunks for choice in json.loads(chunk)["choices"]]
    assert [one["index"] for one in choices if "role" in one["delta"]] == [0, 1]


async def test_log_probabilities_of_a_chat_have_openais_shape(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json=chat(logprobs=True, top_logprobs=2))

    logprobs = answer.json()["choices"][0]["logprobs"]
    assert logprobs["refusal"] is None
    assert logprobs["content"][0] == {
        "token": "You ",
        "logprob": -1.0,
        "bytes": list(b"You "),
        "top_logprobs": [
            {"token": "You ", "logprob": -1.0, "bytes": list(b"You ")},
            {"token": "You !", "logprob": -2.0, "bytes": list(b"You !")},
        ],
    }
    assert "".join(one["token"] for one in logprobs["content"]) == ANSWER


async def test_log_probabilities_of_a_completion_have_openais_shape(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.post(COMPLETIONS, json=completion(logprobs=2, max_tokens=2))

    assert answer.json()["choices"][0]["logprobs"] == {
        "tokens": ["You ", "said: "],
        "token_logprobs": [-1.0, -1.0],
        "top_logprobs": [{"You ": -1.0, "You !": -2.0}, {"said: ": -1.0, "said: !": -2.0}],
        "text_offset": [0, 4],
    }


async def test_the_request_names_what_is_asked(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    bias = {"5": -3, "7": 2.5}
    await http.post(COMPLETIONS, json=completion(logit_bias=bias, best_of=3, echo=True, logprobs=5))

    sampling = cluster.requests[0].sampling
    assert sampling.logit_bias == {5: -3.0, 7: 2.5}
    assert (sampling.n, sampling.num_made, sampling.echo, sampling.logprobs) == (1, 3, True, 5)
