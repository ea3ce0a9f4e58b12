# SPDX-License-Identifier: Apache-2.0
"""LiteLLM, as OpenAI's client and as Anthropic's."""

import json
from typing import Any, Literal

import litellm
import pytest
from conftest import ANSWER, ASKED, CALL, ENDPOINT, GUIDE, QUESTION, RECITER, RESULT, TOOL, WEATHER
from pydantic import BaseModel, ConfigDict

OPENAI: dict[str, Any] = {"api_base": f"{ENDPOINT}/v1", "api_key": "none", "num_retries": 0}
ANTHROPIC: dict[str, Any] = {"api_base": ENDPOINT, "api_key": "none", "num_retries": 0}
WAYS = {"openai": OPENAI, "anthropic": ANTHROPIC}
ways = pytest.mark.parametrize("way", WAYS)


class Topic(BaseModel):
    """What it parses."""

    model_config = ConfigDict(extra="forbid")

    topic: Literal["ports", "models"]
    sure: bool


def asked(way: str, model: str, question: str, **fields: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {
        "model": f"{way}/{model}",
        "messages": messages,
        "max_tokens": 96,
        **WAYS[way],
        **fields,
    }


@ways
def test_it_chats_streamed_and_not(way: str) -> None:
    whole = litellm.completion(**asked(way, GUIDE, QUESTION))
    chunks = list(litellm.completion(**asked(way, GUIDE, QUESTION), stream=True))

    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert ASKED in whole.choices[0].message.content == text
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens


@ways
async def test_it_chats_asynchronously(way: str) -> None:
    whole = await litellm.acompletion(**asked(way, RECITER, QUESTION))
    stream = await litellm.acompletion(**asked(way, RECITER, QUESTION), stream=True)
    text = "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert whole.choices[0].message.content == text == ANSWER


@ways
@pytest.mark.parametrize("stream", [False, True])
def test_it_calls_a_tool_and_reads_its_result(way: str, stream: bool) -> None:
    question = asked(way, RECITER, WEATHER, tools=[TOOL])

    first = litellm.completion(**question, stream=stream)
    if stream:
        first = litellm.stream_chunk_builder(list(first), messages=question["messages"])
    message = first.choices[0].message
    (call,) = message.tool_calls
    result = {"role": "tool", "tool_call_id": call.id, "content": "It's sunny."}
    turns = [*question["messages"], message, result]
    then = litellm.completion(**question | {"messages": turns})

    assert first.choices[0].finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", CALL)
    assert then.choices[0].message.content == RESULT


def test_it_keeps_to_a_class() -> None:
    answer = litellm.completion(**asked("openai", GUIDE, QUESTION, response_format=Topic))

    Topic.model_validate_json(answer.choices[0].message.content)


@ways
def test_it_raises_its_own_errors(way: str) -> None:
    with pytest.raises(litellm.NotFoundError):
        litellm.completion(**asked(way, "nobody", QUESTION))
    with pytest.raises(litellm.BadRequestError, match="2048"):
        litellm.completion(**asked(way, GUIDE, QUESTION) | {"max_tokens": 20_000})
