# SPDX-License-Identifier: Apache-2.0
"""Ollama's routes: what they ask of the model, how they answer, streamed and whole the same."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx
import ollama
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.api.ollama.schema import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaParameters,
)
from xinference.errors import InvalidRequest
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    GrammarKind,
    Message,
    ReasoningDelta,
    SamplingParams,
    TextDelta,
    TextPrompt,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
)

from .conftest import ANSWER, MESSAGES, serving
from .test_parameters import PAGE, passing, refused, shown

CHAT = "/api/chat"
GENERATE = "/api/generate"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA},
}
STORY: list[str | Delta] = [
    ReasoningDelta(text="I must "),
    ReasoningDelta(text="look."),
    "Let me ",
    "look.",
    ToolCallStart(index=0, call_id="call_a", name="get_weather"),
    TextDelta(text="", token_ids=(7,)),
    ToolCallArguments(index=0, text='{"city": '),
    ToolCallArguments(index=0, text='"Paris"}'),
    ToolCallStart(index=1, call_id="call_b", name="get_weather"),
]
CALLS = [
    {
        "id": "call_a",
        "function": {"index": 0, "name": "get_weather", "arguments": {"city": "Paris"}},
    },
    {"id": "call_b", "function": {"index": 1, "name": "get_weather", "arguments": {}}},
]
TIMES = ("total_duration", "load_duration", "prompt_eval_duration", "eval_duration")


def chat(**fields: Any) -> dict[str, Any]:
    return {"model": "guide", "messages": MESSAGES, "stream": False, **fields}


def prompted(**fields: Any) -> dict[str, Any]:
    return {"model": "guide", "prompt": "What is a replica?", "stream": False, **fields}


BODIES = {CHAT: chat, GENERATE: prompted}
both = pytest.mark.parametrize("path", [CHAT, GENERATE])


async def lines_of(http: httpx.AsyncClient, path: str, **fields: Any) -> list[dict[str, Any]]:
    """Return the lines of a stream, which is what there is if nothing is said of it."""
    answer = await http.post(path, json=BODIES[path](**fields, stream=None))
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"] == "application/x-ndjson"
    assert answer.text.endswith("\n")
    return [json.loads(line) for line in answer.text.splitlines()]


def told(answer: dict[str, Any]) -> dict[str, Any]:
    """Return what an answer or a line says, wherever its protocol puts it."""
    message: dict[str, Any] = answer.get("message") or {"content": answer["response"], **answer}
    return {name: message.get(name) for name in ("content", "thinking", "tool_calls")}


def put_together(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return what the lines of a stream say, as clients put them together."""
    pieces = [told(line) for line in lines]
    calls = [call for piece in pieces for call in piece["tool_calls"] or []]
    return {
        "content": "".join(piece["content"] for piece in pieces),
        "thinking": "".join(piece["thinking"] or "" for piece in pieces) or None,
        "tool_calls": calls or None,
    }


async def asked(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str = CHAT, **fields: Any
) -> ChatPrompt:
    """Return what the model was asked."""
    answer = await http.post(path, json=BODIES[path](**fields))
    assert answer.status_code == 200, answer.text
    prompt = cluster.requests[-1].prompt
    assert isinstance(prompt, ChatPrompt)
    return prompt


async def refusal(http: httpx.AsyncClient, path: str, **fields: Any) -> str:
    """Return why a body is refused."""
    answer = await http.post(path, json=BODIES[path](**fields))
    assert answer.status_code == 400, answer.text
    assert answer.json().keys() == {"error"}
    message: str = answer.json()["error"]
    return message


@pytest.fixture
async def client(cluster: FakeCluster) -> AsyncIterator[ollama.AsyncClient]:
    """Ollama's client at a real server."""
    async with serving(create_app(cluster)) as port:
        client = ollama.AsyncClient(host=f"http://127.0.0.1:{port}")
        yield client
        await client._client.aclose()


# What comes back.


async def test_a_chat_is_answered_in_ollamas_form(http: httpx.AsyncClient) -> None:
    answer = (await http.post(CHAT, json=chat())).json()

    times = {name: answer.pop(name) for name in TIMES}
    assert answer.pop("created_at").endswith("Z")
    assert answer == {
        "model": "guide",
        "message": {"role": "assistant", "content": ANSWER},
        "done": True,
        "done_reason": "stop",
        "prompt_eval_count": 5,
        "eval_count": 6,
    }
    assert all(isinstance(time, int) and time >= 0 for time in times.values())
    assert times["total_duration"] == sum(times[name] for name in TIMES[1:])


async def test_a_prompt_is_answered_in_ollamas_form(http: httpx.AsyncClient) -> None:
    answer = (await http.post(GENERATE, json=prompted())).json()

    assert answer["response"] == ANSWER
    assert "message" not in answer
    assert answer["done"] is True


@both
@pytest.mark.parametrize(
    ("words", "options"),
    [
        (None, {}),
        (None, {"num_predict": 3}),
        (None, {"stop": ["replica"]}),
        (STORY, {}),
        (STORY, {"num_predict": 7}),
        (STORY, {"num_predict": 1}),
        ([], {}),
        (["é☃𝄞", "\u2028\r\n\n"], {}),
    ],
    ids=["text", "cut", "stop", "story", "cut in a call", "cut in a thought", "empty", "unicode"],
)
async def test_a_stream_and_a_whole_answer_say_the_same(
    http: httpx.AsyncClient,
    cluster: FakeCluster,
    path: str,
    words: list[str | Delta] | None,
    options: dict[str, Any],
) -> None:
    if words is not None:
        cluster.words = lambda request: iter(words)

    whole = (await http.post(path, json=BODIES[path](options=options))).json()
    lines = await lines_of(http, path, options=options)

    assert put_together(lines) == told(whole)
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    ends = ("done_reason", "prompt_eval_count", "eval_count")
    assert [lines[-1][name] for name in ends] == [whole[name] for name in ends]
    assert lines[-1].keys() >= set(TIMES)


async def test_calls_come_whole(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    cluster.words = lambda request: iter(STORY)

    lines = await lines_of(http, CHAT)

    assert [call for line in lines for call in told(line)["tool_calls"] or []] == CALLS
    assert lines[-1]["done_reason"] == "stop"


async def test_logprobs_are_told_with_their_pieces(http: httpx.AsyncClient) -> None:
    whole = (await http.post(CHAT, json=chat(logprobs=True, top_logprobs=2))).json()
    lines = await lines_of(http, CHAT, logprobs=True, top_logprobs=2)

    assert "".join(one["token"] for one in whole["logprobs"]) == ANSWER
    assert len(whole["logprobs"][0]["top_logprobs"]) == 2
    assert [one for line in lines for one in line.get("logprobs", [])] == whole["logprobs"]


@both
async def test_a_silent_stream_sends_pieces_without_text(cluster: FakeCluster, path: str) -> None:
    cluster.allow(1)
    async with (
        serving(create_app(cluster, keep_alive_seconds=0.05)) as port,
        httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as http,
        http.stream("POST", path, json=BODIES[path](stream=True)) as answer,
    ):
        lines = []
        async for line in answer.aiter_lines():
            lines.append(json.loads(line))
            if sum(told(one)["content"] == "" for one in lines) == 2:
                cluster.allow(None)

    assert put_together(lines)["content"] == ANSWER


# What the model is asked.


@both
async def test_every_option_reaches_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str
) -> None:
    options = {
        "num_predict": 9,
        "num_ctx": 512,
        "temperature": 0,
        "top_k": 3,
        "top_p": 0.5,
        "min_p": 0.1,
        "typical_p": 0.9,
        "repeat_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "stop": "x",
    }
    assert options.keys() == OllamaOptions.model_fields.keys() - refused(OllamaOptions).keys()

    await asked(http, cluster, path, options=options)

    assert cluster.requests[-1].max_total_tokens == 512
    assert cluster.requests[-1].sampling == SamplingParams(
        max_tokens=9,
        temperature=0.0,
        top_k=3,
        top_p=0.5,
        min_p=0.1,
        typical_p=0.9,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        seed=7,
        stop=("x",),
    )


@pytest.mark.parametrize("given", [-1, -2, None])
async def test_as_many_tokens_as_the_context_holds(
    http: httpx.AsyncClient, cluster: FakeCluster, given: int | None
) -> None:
    await asked(http, cluster, options={"num_predict": given})

    assert cluster.requests[-1].sampling.max_tokens is None


@both
@pytest.mark.parametrize(
    ("given", "schema"), [("json", {"type": "object"}), (SCHEMA, SCHEMA), ("", None)]
)
async def test_a_format_holds_the_answer_to_its_schema(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str, given: Any, schema: Any
) -> None:
    await asked(http, cluster, path, format=given)

    grammar = cluster.requests[-1].sampling.grammar
    if schema is None:
        assert grammar is None
    else:
        assert grammar is not None
        assert (grammar.kind, grammar.field) == (GrammarKind.JSON_SCHEMA, "format")
        assert json.loads(grammar.text) == schema


async def test_a_conversation_with_thoughts_calls_and_results_is_passed_on(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    def call(city: str) -> dict[str, Any]:
        return {"function": {"name": "get_weather", "arguments": {"city": city}}}

    prompt = await asked(
        http,
        cluster,
        tools=[TOOL],
        messages=[
            {"role": "system", "content": "Be brief."},
            *MESSAGES,
            {
                "role": "assistant",
                "content": "",
                "thinking": "Hm.",
                "tool_calls": [call("Paris"), call("Rome"), call("Oslo") | {"id": "mine"}],
            },
            {"role": "tool", "tool_name": "get_weather", "content": "20 °C"},
            {"role": "tool", "tool_call_id": "mine", "content": "5 °C"},
            {"role": "tool", "content": "30 °C"},
        ],
    )

    arguments = [f'{{"city":"{city}"}}' for city in ("Paris", "Rome", "Oslo")]
    ids = ["000000000", "000000001", "mine"]
    assert prompt.tools == (TOOL,)
    assert prompt.messages[0] == Message(role="system", content="Be brief.")
    assert prompt.messages[2:] == (
        Message(
            role="assistant",
            content=None,
            reasoning_content="Hm.",
            tool_calls=tuple(
                ToolCall(call_id=one, name="get_weather", arguments=text)
                for one, text in zip(ids, arguments, strict=True)
            ),
        ),
        Message(role="tool", content="20 °C", tool_call_id="000000000", name="get_weather"),
        Message(role="tool", content="5 °C", tool_call_id="mine", name="get_weather"),
        Message(role="tool", content="30 °C", tool_call_id="000000001", name="get_weather"),
    )


async def test_results_with_ids_answer_calls_that_came_without(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    call = {"function": {"name": "get_weather", "arguments": {}}}
    result = {"role": "tool", "content": "20 °C"}

    # As LiteLLM sends what it was answered.
    prompt = await asked(
        http,
        cluster,
        messages=[
            *MESSAGES,
            {"role": "assistant", "tool_calls": [call, call, call | {"id": "mine"}]},
            *(result | {"tool_call_id": one} for one in ("mine", "theirs", "others")),
        ],
    )

    answered = [message.tool_call_id for message in prompt.messages[-3:]]
    assert answered == ["mine", "000000000", "000000001"]


@both
@pytest.mark.parametrize("think", [None, True, False])
async def test_thinking_is_passed_on(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str, think: bool | None
) -> None:
    assert (await asked(http, cluster, path, think=think)).enable_thinking is think


@both
async def test_an_effort_is_passed_on(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str
) -> None:
    assert (await asked(http, cluster, path, think="low")).reasoning_effort == "low"


async def test_a_prompt_is_what_a_user_says_after_the_system(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    prompt = await asked(http, cluster, GENERATE, system="Be brief.")

    assert prompt.messages == (
        Message(role="system", content="Be brief."),
        Message(role="user", content="What is a replica?"),
    )


async def test_a_raw_prompt_is_gone_on_from(http: httpx.AsyncClient, cluster: FakeCluster) -> None:
    await http.post(GENERATE, json=prompted(raw=True))

    assert cluster.requests[-1].prompt == TextPrompt(text="What is a replica?")


@both
async def test_a_model_may_be_called_latest(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str
) -> None:
    answer = await http.post(path, json=BODIES[path](model="guide:latest"))

    assert answer.json()["model"] == "guide:latest"
    assert len(cluster.requests) == 1


@both
@pytest.mark.parametrize("keep_alive", [-1, 300, 0.5, "5m", "-1", "1h30m", None])
async def test_a_model_stays_as_long_as_anybody_wants(
    http: httpx.AsyncClient, path: str, keep_alive: Any
) -> None:
    assert (await http.post(path, json=BODIES[path](keep_alive=keep_alive))).status_code == 200


@pytest.mark.parametrize(
    ("path", "body"),
    [(CHAT, {"model": "guide", "messages": []}), (GENERATE, {"model": "guide"})],
)
async def test_asking_nothing_asks_whether_the_model_is_loaded(
    http: httpx.AsyncClient, cluster: FakeCluster, path: str, body: dict[str, Any]
) -> None:
    ready = (await http.post(path, json=body)).json()
    missing = await http.post(path, json=body | {"model": "nobody"})
    cluster.lose_replica("guide")
    restarting = await http.post(path, json=body)

    assert (ready["done"], ready["done_reason"]) == (True, "load")
    assert (missing.status_code, restarting.status_code) == (404, 503)
    assert cluster.requests == []


# What is listed.


async def test_the_models_are_listed_as_ollamas_client_reads_them(
    client: ollama.AsyncClient, cluster: FakeCluster
) -> None:
    (listed,) = (await client.list()).models
    (running,) = (await client.ps()).models
    shown = await client.show("guide:latest")

    assert listed.model == running.model == "guide"
    assert listed.modified_at is not None
    assert listed.digest == running.digest
    assert running.context_length == 1024
    assert shown.capabilities == ["completion"]
    assert shown.template == "{{ messages }}"
    assert shown.modelinfo is not None
    assert shown.modelinfo["xinference-guide.context_length"] == 1024
    assert listed.details == shown.details


async def test_what_is_not_ready_is_not_listed(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.lose_replica("guide")

    assert (await http.get("/api/tags")).json() == {"models": []}
    assert (await http.get("/api/ps")).json() == {"models": []}


async def test_older_clients_call_the_model_by_name(http: httpx.AsyncClient) -> None:
    assert (await http.post("/api/show", json={"name": "guide"})).status_code == 200
    assert (await http.post("/api/show", json={})).json() == {"error": "model: is required"}
    assert (await http.post("/api/show", json={"model": "nobody"})).status_code == 404


async def test_clients_can_see_that_somebody_is_there(http: httpx.AsyncClient) -> None:
    version = (await http.get("/api/version")).json()["version"]

    assert [int(part) for part in version.split(".")] >= [0, 6, 4]
    assert (await http.head("/")).status_code == 200


# What is refused.

DEEP = json.loads('{"a":' * 70 + "1" + "}" * 70)
CALL = {"function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("message", "problem"),
    [
        ({"role": "user", "content": "x", "images": ["aGk="]}, "images: is not supported"),
        ({"role": "user", "content": "x", "tool_calls": [CALL]}, "tool_calls: is only for"),
        ({"role": "user", "content": "x", "thinking": "Hm."}, "thinking: is only for"),
        ({"role": "user", "content": "x", "tool_name": "f"}, "tool_name: is only for"),
        ({"role": "tool", "content": "x"}, "tool_name: is that of no call"),
        ({"role": "tool", "content": "x", "tool_call_id": "a"}, "tool_call_id: is that of no"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": DEEP}}]},
            "tool_calls[0].function.arguments: must be at most 64 levels deep",
        ),
        ({"role": "developer", "content": "x"}, "role: must be"),
    ],
)
async def test_a_message_that_cannot_be_read_is_refused_by_its_place(
    http: httpx.AsyncClient, message: dict[str, Any], problem: str
) -> None:
    assert (await refusal(http, CHAT, messages=[message])).startswith(f"messages[0].{problem}")


@pytest.mark.parametrize(
    ("path", "fields", "problem"),
    [
        (CHAT, {"options": {"num_predict": 0}}, "options.num_predict: must be at least 1"),
        (CHAT, {"options": {"temperature": 3}}, "options.temperature: "),
        (CHAT, {"options": {"num_gpu": 1}}, "options.num_gpu: is not supported"),
        (CHAT, {"options": {"mirostat": 1}}, "options.mirostat: is not supported"),
        (CHAT, {"options": {"tempreature": 1}}, "options.tempreature: is not a field"),
        (CHAT, {"format": "yaml"}, 'format: must be "json" or a JSON Schema'),
        (CHAT, {"think": "deeply"}, "think: must be"),
        (CHAT, {"keep_alive": 0}, "keep_alive: 0 would end the model for everybody"),
        (CHAT, {"keep_alive": "0s"}, "keep_alive: 0 would end the model for everybody"),
        (CHAT, {"messages": [], "keep_alive": 0}, "keep_alive: 0 would end"),
        (CHAT, {"top_logprobs": 2}, "top_logprobs: is only for requests with logprobs"),
        (CHAT, {"tools": [TOOL, TOOL]}, "tools: must have a name each"),
        (GENERATE, {"context": [1, 2]}, "context: is not supported"),
        (GENERATE, {"suffix": "x"}, "suffix: is not supported"),
        (GENERATE, {"template": "x"}, "template: is not supported"),
        (GENERATE, {"images": ["aGk="]}, "images: is not supported"),
        (GENERATE, {"raw": True, "system": "x"}, "system: is only for requests without raw"),
        (GENERATE, {"raw": True, "think": True}, "think: is only for requests without raw"),
    ],
)
async def test_what_is_wrong_is_refused_by_name(
    http: httpx.AsyncClient,
    cluster: FakeCluster,
    path: str,
    fields: dict[str, Any],
    problem: str,
) -> None:
    assert (await refusal(http, path, **fields)).startswith(problem)
    assert cluster.requests == []


@both
@pytest.mark.parametrize("stream", [False, True])
async def test_refusals_are_statuses_that_ollamas_client_raises(
    client: ollama.AsyncClient, cluster: FakeCluster, path: str, stream: bool
) -> None:
    async def ask() -> None:
        if path == CHAT:
            answer = await client.chat("guide", MESSAGES, stream=stream)  # type: ignore[call-overload]
        else:
            answer = await client.generate("guide", "Hi", stream=stream)  # type: ignore[call-overload]
        if stream:
            async for _ in answer:
                pass

    cluster.queue_is_full = True
    with pytest.raises(ollama.ResponseError) as full:
        await ask()
    cluster.failure = InvalidRequest(field="temperature", problem="is bad")
    with pytest.raises(ollama.ResponseError) as bad:
        await ask()

    assert (full.value.status_code, bad.value.status_code) == (429, 400)
    assert bad.value.error == "options.temperature: is bad"


async def test_a_stream_that_fails_ends_in_a_line_that_ollamas_client_raises(
    client: ollama.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.allow(2)

    async def read() -> None:
        async for _ in await client.chat("guide", MESSAGES, stream=True):
            cluster.lose_replica("guide")

    with pytest.raises(ollama.ResponseError, match="is gone"):
        await read()


# What is known and told.


def test_the_page_says_which_values_pass() -> None:
    page = PAGE.with_name("ollama.md").read_text()

    assert passing(page, "chat") == shown(refused(OllamaChatRequest))
    assert passing(page, "generate") == shown(refused(OllamaGenerateRequest))
    shared = shown(refused(OllamaParameters))
    assert passing(page, "options") == shared | shown(refused(OllamaOptions))


def test_every_field_of_ollamas_client_is_known() -> None:
    fields = ollama._types

    assert fields.ChatRequest.model_fields.keys() <= OllamaChatRequest.model_fields.keys()
    assert fields.GenerateRequest.model_fields.keys() <= OllamaGenerateRequest.model_fields.keys()
    assert fields.Options.model_fields.keys() <= OllamaOptions.model_fields.keys()
    assert ollama.Message.model_fields.keys() <= OllamaMessage.model_fields.keys()
