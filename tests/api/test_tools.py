# SPDX-License-Identifier: Apache-2.0
"""Tools and thinking over HTTP: the shapes that OpenAI documents, streamed and whole the same."""

import asyncio
import json
from typing import Any

import httpx
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.protocol.generation import (
    ChatPrompt,
    Delta,
    Message,
    ReasoningDelta,
    TextDelta,
    ToolCall,
    ToolCallArguments,
    ToolCallStart,
    ToolChoice,
)

from .conftest import chat, chunks_of
from .test_clients import with_openai

CHAT = "/v1/chat/completions"
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOL: dict[str, Any] = {
    "type": "function",
    "function": {"name": "get_weather", "description": "Weather.", "parameters": SCHEMA},
}
ASK: list[Any] = [{"role": "user", "content": "How is it in Paris?"}]

CALLS: list[str | Delta] = [
    ReasoningDelta(text="I must "),
    ReasoningDelta(text="look."),
    "Let me ",
    "look.",
    ToolCallStart(index=0, call_id="call_a", name="get_weather"),
    ToolCallArguments(index=0, text='{"city": '),
    ToolCallArguments(index=0, text='"Paris"}'),
    ToolCallStart(index=1, call_id="call_b", name="get_weather"),
    ToolCallArguments(index=1, text="{}"),
]


def assembled(chunks: list[dict[str, Any]]) -> tuple[dict[str, Any], str]:
    """Put a stream together as clients do; return the message and the finish reason."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reason = ""
    for chunk in chunks:
        for choice in chunk["choices"]:
            delta = choice["delta"]
            for name in ("content", "reasoning_content"):
                message[name] += delta.get(name) or ""
            for piece in delta.get("tool_calls", ()):
                if "id" in piece:
                    assert piece["index"] == len(message["tool_calls"])
                    assert piece["type"] == "function"
                    assert piece["function"]["arguments"] == ""
                    message["tool_calls"].append(
                        {"id": piece["id"], "type": "function", "function": piece["function"]}
                    )
                else:
                    function = message["tool_calls"][piece["index"]]["function"]
                    function["arguments"] += piece["function"]["arguments"]
            reason = choice["finish_reason"] or reason
    return message, reason


async def both(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Ask whole and streamed, assert that they say the same, and return the whole choice."""
    whole = (await http.post(CHAT, json=chat(**fields))).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    streamed = await http.post(CHAT, json=chat(**options, **fields))
    *chunks, _ = [json.loads(chunk) for chunk in chunks_of(streamed.text)[:-1]] + [None]
    choice = whole["choices"][0]
    message, reason = assembled([chunk for chunk in chunks if chunk])
    assert message["content"] == (choice["message"]["content"] or "")
    assert message["reasoning_content"] == choice["message"].get("reasoning_content", "")
    assert message["tool_calls"] == choice["message"].get("tool_calls", [])
    assert reason == choice["finish_reason"]
    assert chunks[-1]["usage"] == whole["usage"]
    found: dict[str, Any] = choice
    return found


async def test_calls_are_answered_in_openais_form(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS

    choice = await both(http, tools=[TOOL])

    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"] == {
        "role": "assistant",
        "content": "Let me look.",
        "refusal": None,
        "reasoning_content": "I must look.",
        "tool_calls": [
            {
                "id": "call_a",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Paris"}'},
            },
            {
                "id": "call_b",
                "type": "function",
                "function": {"name": "get_weather", "arguments": "{}"},
            },
        ],
    }


async def test_content_is_null_beside_calls_alone(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS[4:]

    choice = await both(http, tools=[TOOL])

    assert choice["message"]["content"] is None


async def test_an_answer_that_is_cut_short_ends_with_length_in_both_ways(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS

    for num_words in range(1, len(CALLS)):
        choice = await both(http, tools=[TOOL], max_tokens=num_words)
        assert choice["finish_reason"] == "length"


texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)


@st.composite
def answers(draw: st.DrawFn) -> list[str | Delta]:
    said: list[str | Delta] = list(
        draw(
            st.lists(
                texts | st.builds(ReasoningDelta, text=texts) | st.builds(TextDelta, text=texts)
            )
        )
    )
    for index in range(draw(st.integers(0, 3))):
        said.append(ToolCallStart(index=index, call_id=f"call_{index}", name=draw(texts) or "f"))
        pieces = draw(st.lists(texts, max_size=3))
        said += [ToolCallArguments(index=index, text=piece) for piece in pieces]
    return said


@settings(max_examples=60, deadline=None)
@given(said=answers(), max_tokens=st.none() | st.integers(1, 8))
def test_a_stream_and_a_whole_answer_say_the_same_whatever_it_is(
    said: list[str | Delta], max_tokens: int | None
) -> None:
    async def ask() -> None:
        cluster = await FakeCluster.running(words=lambda _: said)
        transport = httpx.ASGITransport(app=create_app(cluster))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            await both(http, tools=[TOOL], max_tokens=max_tokens)

    asyncio.run(ask())


async def test_tools_and_their_results_reach_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.words = lambda _: CALLS[4:]
    turn = (await http.post(CHAT, json=chat(messages=ASK, tools=[TOOL]))).json()
    message = turn["choices"][0]["message"]

    await http.post(
        CHAT,
        json=chat(
            messages=[
                *ASK,
                message,
                {"role": "tool", "tool_call_id": "call_a", "content": "12 °C"},
                {
                    "role": "tool",
                    "tool_call_id": "call_b",
                    "content": [{"type": "text", "text": "?"}],
                },
            ],
            tools=[TOOL],
            tool_choice="none",
            parallel_tool_calls=False,
            enable_thinking=True,
        ),
    )

    call = ToolCall(call_id="call_a", name="get_weather", arguments='{"city": "Paris"}')
    assert cluster.requests[-1].prompt == ChatPrompt(
        messages=(
            Message(role="user", content="How is it in Paris?"),
            Message(
                role="assistant",
                content=None,
                tool_calls=(
                    call,
                    ToolCall(call_id="call_b", name="get_weather", arguments="{}"),
                ),
            ),
            Message(role="tool", content="12 °C", tool_call_id="call_a", name="get_weather"),
            Message(role="tool", content="?", tool_call_id="call_b", name="get_weather"),
        ),
        tools=(TOOL,),
        tool_choice=ToolChoice.NONE,
        parallel_tool_calls=False,
        enable_thinking=True,
    )


@pytest.mark.parametrize(
    ("choice", "expected"),
    [
        ("auto", (ToolChoice.AUTO, None, None)),
        ("required", (ToolChoice.REQUIRED, None, None)),
        (
            {"type": "function", "function": {"name": "get_weather"}},
            (ToolChoice.REQUIRED, "get_weather", None),
        ),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "required",
                    "tools": [{"type": "function", "function": {"name": "get_weather"}}] * 2,
                },
            },
            (ToolChoice.REQUIRED, None, ("get_weather",)),
        ),
    ],
)
async def test_the_choice_reaches_the_replica(
    http: httpx.AsyncClient, cluster: FakeCluster, choice: Any, expected: Any
) -> None:
    await http.post(CHAT, json=chat(tools=[TOOL], tool_choice=choice))

    prompt = cluster.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert (prompt.tool_choice, prompt.tool_name, prompt.allowed_tools) == expected


async def test_thinking_may_be_switched_in_the_extra_body(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    extra = {"enable_thinking": False, "chat_template_kwargs": {"a": 1}}
    await http.post(CHAT, json=chat(extra_body=extra))

    prompt = cluster.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert prompt.enable_thinking is False
    assert prompt.template_options == {"a": 1}


@pytest.mark.parametrize(
    "fields",
    [
        {"thinking_budget": 5},
        {"thinking_token_budget": 5},
        {"extra_body": {"thinking_budget": 5}},
        {"extra_body": {"thinking_token_budget": 5}, "thinking_budget": 5},
        {"chat_template_kwargs": {"thinking_budget": 5}},
    ],
)
async def test_a_budget_for_thoughts_may_stand_where_clients_put_it(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any]
) -> None:
    await http.post(CHAT, json=chat(**fields, reasoning_effort="low"))

    prompt = cluster.requests[0].prompt
    assert isinstance(prompt, ChatPrompt)
    assert (prompt.thinking_budget, prompt.reasoning_effort) == (5, "low")


async def test_openais_client_reads_calls_streamed_and_not(port: int, cluster: FakeCluster) -> None:
    cluster.words = lambda _: CALLS

    def use(client: openai.OpenAI) -> None:
        ask: Any = {"model": "guide", "messages": ASK, "tools": [TOOL]}
        whole = client.chat.completions.create(**ask).choices[0]
        with client.chat.completions.stream(**ask) as stream:
            names = [one.type for one in stream]
            final = stream.get_final_completion().choices[0]

        assert whole.finish_reason == final.finish_reason == "tool_calls"
        assert whole.message.content == final.message.content == "Let me look."
        calls = [
            (one.id, one.function.name, one.function.arguments)
            for one in whole.message.tool_calls or ()
        ]
        assert calls[0] == ("call_a", "get_weather", '{"city": "Paris"}')
        assert calls == [
            (one.id, one.function.name, one.function.arguments)
            for one in final.message.tool_calls or ()
        ]
        assert "tool_calls.function.arguments.delta" in names

    await with_openai(port, use)
