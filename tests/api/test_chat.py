# SPDX-License-Identifier: Apache-2.0
"""Chat completions, in one piece and streamed."""

import json
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.errors import LoadFailed
from xinference.protocol.generation import ChatPrompt, Message, SamplingParams

from .conftest import ANSWER, MESSAGES, chat, chunks_of

CHAT = "/v1/chat/completions"


USAGE = {
    "prompt_tokens": 5,
    "completion_tokens": 6,
    "total_tokens": 11,
    "prompt_tokens_details": {"cached_tokens": 0},
    "completion_tokens_details": {"reasoning_tokens": 0},
}


async def streamed(http: httpx.AsyncClient, **fields: Any) -> list[dict[str, Any]]:
    answer = await http.post(CHAT, json=chat(stream=True, **fields))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    *chunks, last = chunks_of(answer.text)
    assert last == "[DONE]"
    return [json.loads(chunk) for chunk in chunks]


async def test_a_chat_is_answered_in_openais_form(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json=chat())

    body = answer.json()
    assert answer.status_code == 200
    assert body["object"] == "chat.completion"
    assert body["model"] == "guide"
    assert isinstance(body["created"], int)
    assert body["id"] == f"chatcmpl-{answer.headers['x-request-id']}"
    assert body["choices"] == [
        {
            "index": 0,
            "message": {"role": "assistant", "content": ANSWER, "refusal": None},
            "logprobs": None,
            "finish_reason": "stop",
        }
    ]
    assert body["usage"] == USAGE


async def test_a_stream_says_who_speaks_then_the_text_then_why_it_ends(
    http: httpx.AsyncClient,
) -> None:
    chunks = await streamed(http)

    deltas = [chunk["choices"][0]["delta"] for chunk in chunks]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert "".join(delta["content"] for delta in deltas[1:-1]) == ANSWER
    assert deltas[-1] == {}
    reasons = [chunk["choices"][0]["finish_reason"] for chunk in chunks]
    assert reasons == [None] * (len(chunks) - 1) + ["stop"]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert all("usage" not in chunk for chunk in chunks)


async def test_include_usage_adds_one_chunk_without_choices(http: httpx.AsyncClient) -> None:
    *chunks, last = await streamed(http, stream_options={"include_usage": True})

    assert last["choices"] == []
    assert last["usage"] == USAGE
    assert all(chunk["usage"] is None for chunk in chunks)


async def test_with_obfuscation_sizes_tell_nothing(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    chunks = await streamed(http, stream_options={"include_obfuscation": True})
    plain = await streamed(http)

    pieces = [chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks]
    sizes = {
        len(piece + chunk["obfuscation"])
        for piece, chunk in zip(pieces, chunks, strict=True)
        if piece
    }
    assert sizes == {32}
    assert "".join(pieces) == ANSWER
    assert all("obfuscation" not in chunk for chunk in plain)


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"max_tokens": 3},
        {"stop": ["replica"]},
        {"messages": [{"role": "user", "content": "é☃𝄞"}]},
    ],
)
async def test_a_stream_and_a_whole_answer_say_the_same(
    http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    whole = (await http.post(CHAT, json=chat(**fields))).json()
    chunks = await streamed(http, stream_options={"include_usage": True}, **fields)

    text = "".join(
        chunk["choices"][0]["delta"].get("content", "") for chunk in chunks if chunk["choices"]
    )
    assert text == whole["choices"][0]["message"]["content"]
    assert chunks[-2]["choices"][0]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]


async def test_headers_keep_proxies_from_holding_a_stream_back(http: httpx.AsyncClient) -> None:
    answer = await http.post(CHAT, json=chat(stream=True))

    assert answer.headers["cache-control"] == "no-cache"
    assert answer.headers["x-accel-buffering"] == "no"


async def test_every_honoured_parameter_reaches_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await http.post(
        CHAT,
        json=chat(
            messages=[
                {"role": "developer", "content": "Be short."},
                {
                    "role": "user",
                    "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                },
                {"role": "assistant", "content": "c"},
            ],
            max_tokens=9,
            max_completion_tokens=7,
            temperature=0,
            top_p=0.5,
            top_k=3,
            stop="x",
            stop_token_ids=[1, 2],
            seed=-5,
            request_id="mine/1",
            chat_template_kwargs={"enable_thinking": False},
        ),
    )

    (request,) = cluster.requests
    assert request.request_id == "mine/1"
    assert request.prompt == ChatPrompt(
        messages=(
            Message(role="system", content="Be short."),
            Message(role="user", content="ab"),
            Message(role="assistant", content="c"),
        ),
        template_options={"enable_thinking": False},
    )
    assert request.sampling == SamplingParams(
        max_tokens=7,
        temperature=0.0,
        top_p=0.5,
        top_k=3,
        stop=("x",),
        stop_token_ids=(1, 2),
        seed=-5,
    )


async def test_who_speaks_is_passed_on(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    said = {"role": "user", "name": "ann", "content": "Hi", "provider_specific_fields": {"a": 1}}

    await http.post(CHAT, json=chat(messages=[said]))

    prompt = cluster.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.messages == (Message(role="user", content="Hi", name="ann"),)


async def test_what_is_not_given_is_left_to_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await http.post(CHAT, json=chat())

    sampling = cluster.requests[0].sampling
    assert sampling == SamplingParams(seed=sampling.seed)  # a random one


async def test_a_turn_that_was_answered_can_be_sent_back_as_it_came(
    http: httpx.AsyncClient,
) -> None:
    first = (await http.post(CHAT, json=chat())).json()["choices"][0]["message"]

    again = await http.post(CHAT, json=chat(messages=[*MESSAGES, first, *MESSAGES]))

    assert again.status_code == 200


async def test_template_variables_may_come_as_json_text(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await http.post(CHAT, json=chat(chat_template_kwargs='{"a": [1]}'))

    prompt = cluster.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.template_options == {"a": [1]}


@pytest.mark.parametrize(
    "given", ['{"a"', "[1]", '"x"', 5, [1], {"a": [[[[[[[[[1]]]]]]]]]}, {"a": "x" * 20_000}]
)
async def test_bad_template_variables_are_refused_by_name(
    http: httpx.AsyncClient, given: object
) -> None:
    answer = await http.post(CHAT, json=chat(chat_template_kwargs=given))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "chat_template_kwargs"


@pytest.mark.parametrize("stream", [False, True])
async def test_a_refusal_is_a_status_streamed_or_not(
    http: httpx.AsyncClient, cluster: FakeCluster, stream: bool
) -> None:
    unknown = await http.post(CHAT, json=chat(model="nope", stream=stream))
    too_long = await http.post(CHAT, json=chat(max_tokens=5000, stream=stream))
    cluster.queue_is_full = True
    full = await http.post(CHAT, json=chat(stream=stream))
    cluster.lose_replica("guide")
    loading = await http.post(CHAT, json=chat(stream=stream))

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (too_long.status_code, too_long.json()["error"]["code"]) == (
        400,
        "context_length_exceeded",
    )
    assert (full.status_code, full.headers["retry-after"]) == (429, "7")
    assert full.json()["error"]["type"] == "rate_limit_error"
    assert (loading.status_code, loading.headers["retry-after"]) == (503, "2")


async def test_a_stream_whose_replica_dies_ends_with_an_error_and_without_done(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    def dies(request: object) -> Any:
        yield "Half "
        cluster.lose_replica("guide")
        yield "never"

    cluster.words = dies
    answer = await http.post(CHAT, json=chat(stream=True))

    last = json.loads(chunks_of(answer.text)[-1])
    assert answer.status_code == 200
    assert '"Half "' in answer.text
    assert "[DONE]" not in answer.text
    assert last["error"]["code"] == "replica_lost"
    assert last["error"]["type"] == "server_error"


async def test_a_whole_answer_whose_replica_dies_is_a_503(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    def dies(request: object) -> Any:
        yield "Half "
        cluster.lose_replica("guide")
        yield "never"

    cluster.words = dies
    answer = await http.post(CHAT, json=chat())

    assert answer.status_code == 503
    assert answer.json()["error"]["code"] == "replica_lost"
    assert int(answer.headers["retry-after"]) > 0


async def test_a_bug_in_a_stream_is_an_error_event_that_says_where_to_look(
    http: httpx.AsyncClient, cluster: FakeCluster, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(request: object) -> Any:
        yield "Half "
        raise ZeroDivisionError

    cluster.words = broken
    streamed = await http.post(CHAT, json=chat(stream=True, request_id="r1"))
    whole = await http.post(CHAT, json=chat(request_id="r2"))

    assert json.loads(chunks_of(streamed.text)[-1])["error"]["code"] == "internal_error"
    assert (whole.status_code, whole.json()["error"]["code"]) == (500, "internal_error")
    assert "r2" in whole.json()["detail"]
    assert "ZeroDivisionError" in caplog.text


async def test_an_aborted_request_says_so_in_both_forms(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    async def aborted(**fields: Any) -> httpx.Response:
        await http.post("/v1/models/guide/requests/mine/abort", json={"block_duration": 30})
        return await http.post(CHAT, json=chat(request_id="mine", **fields))

    whole, stream = await aborted(), await aborted(stream=True)

    for answer in (whole, stream):
        assert answer.status_code == 409
        assert answer.json()["error"]["code"] == "request_aborted"
        assert answer.headers["x-should-retry"] == "false"


async def test_an_id_that_is_refused_by_the_cluster_is_not_an_internal_error(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.failure = LoadFailed(model="guide", problem="bad file")

    answer = await http.post(CHAT, json=chat())

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "load_failed")
