# SPDX-License-Identifier: Apache-2.0
"""The published clients of this environment, each as its users use it, on a real cluster.

The guide answers questions and keeps to structures; the reciting model calls tools and thinks, so
that what must come out of a client is known. Clients whose requirements collide with ours have an
environment of their own, in `test_foreign_clients.py`.
"""

import json
import warnings
from collections.abc import Iterator
from typing import Any, Literal

import anthropic
import jsonschema
import ollama
import openai
import pydantic
import pytest

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform
from tests.e2e.reciting_model import (
    ANSWER,
    ANSWER_AFTER_THOUGHT,
    CALL,
    NAME,
    RESULT,
    THOUGHT,
)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from xinference_client import RESTfulClient

QUESTION = "How do I launch a model?"
MESSAGES: list[Any] = [{"role": "user", "content": QUESTION}]
WEATHER = "What is the weather in San Francisco, CA?"
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {"location": {"type": "string", "maxLength": 40}},
    "required": ["location"],
    "additionalProperties": False,
}
FUNCTION: dict[str, Any] = {
    "name": "get_weather",
    "description": "Get the weather at a location.",
    "parameters": SCHEMA,
}
TOOL: dict[str, Any] = {"type": "function", "function": FUNCTION}


class Topic(pydantic.BaseModel):
    """What clients parse."""

    model_config = pydantic.ConfigDict(extra="forbid")

    topic: Literal["ports", "models"]
    sure: bool


@pytest.fixture(scope="module")
def models(guide: Platform, reciter: Platform) -> Platform:
    """A platform on which both models are ready."""
    return reciter


# OpenAI's.


@pytest.fixture
def of_openai(models: Platform) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{models.endpoint}/v1", api_key="none", max_retries=0) as client:
        yield client


def test_openais_client_chats_calls_a_tool_and_reads_its_result(of_openai: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": NAME, "tools": [TOOL]}
    messages: list[Any] = [{"role": "user", "content": WEATHER}]

    plain = of_openai.chat.completions.create(model=NAME, messages=messages)
    first = of_openai.chat.completions.create(messages=messages, **asked).choices[0]
    (call,) = first.message.tool_calls or []
    result = {"role": "tool", "tool_call_id": call.id, "content": "It's sunny."}
    then = of_openai.chat.completions.create(
        messages=[*messages, first.message, result],  # type: ignore[list-item]
        **asked,
    )

    assert plain.choices[0].message.content == ANSWER
    assert first.finish_reason == "tool_calls"
    assert (call.function.name, json.loads(call.function.arguments)) == ("get_weather", CALL)
    assert then.choices[0].message.content == RESULT


def test_openais_client_streams_the_same_call(of_openai: openai.OpenAI) -> None:
    with of_openai.chat.completions.stream(
        model=NAME,
        messages=[{"role": "user", "content": WEATHER}],
        tools=[TOOL],  # type: ignore[list-item]
    ) as stream:
        message = stream.get_final_completion().choices[0].message

    (call,) = message.tool_calls or []
    assert json.loads(call.function.arguments) == CALL


# Anthropic's.


@pytest.fixture
def of_anthropic(models: Platform) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=models.endpoint, api_key="none", max_retries=0) as client:
        yield client


ANTHROPIC_TOOL: Any = {
    "name": "get_weather",
    "description": "Get the weather at a location.",
    "input_schema": SCHEMA,
}


def test_anthropics_client_chats_streamed_and_not(of_anthropic: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"model": GUIDE, "max_tokens": 96, "messages": MESSAGES}

    whole = of_anthropic.messages.create(**asked)
    with of_anthropic.messages.stream(**asked) as stream:
        text = "".join(stream.text_stream)
        streamed = stream.get_final_message()
    count = of_anthropic.messages.count_tokens(model=GUIDE, messages=MESSAGES)

    assert whole.content[0].type == "text"
    assert "xinference launch" in whole.content[0].text == text
    assert streamed.content[0].model_dump(include={"text"}) == {"text": text}
    assert (streamed.stop_reason, whole.stop_reason) == ("end_turn", "end_turn")
    used = [_prompt_tokens(one.usage) for one in (whole, streamed)]
    assert used == [count.input_tokens] * 2
    assert whole.usage.output_tokens == streamed.usage.output_tokens > 0


def _prompt_tokens(usage: anthropic.types.Usage) -> int:
    return usage.input_tokens + (usage.cache_read_input_tokens or 0)


def test_anthropics_client_calls_a_tool_and_reads_its_result(
    of_anthropic: anthropic.Anthropic,
) -> None:
    asked: dict[str, Any] = {"model": NAME, "max_tokens": 96, "tools": [ANTHROPIC_TOOL]}
    messages: list[Any] = [{"role": "user", "content": WEATHER}]

    first = of_anthropic.messages.create(messages=messages, **asked)
    with of_anthropic.messages.stream(messages=messages, **asked) as stream:
        streamed = stream.get_final_message()
    (call,) = first.content
    assert call.type == "tool_use"
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "It's sunny."}
    turns = [*messages, {"role": "assistant", "content": first.content}]
    then = of_anthropic.messages.create(
        messages=[*turns, {"role": "user", "content": [result]}], **asked
    )

    assert first.stop_reason == streamed.stop_reason == "tool_use"
    assert (call.name, call.input) == ("get_weather", CALL)
    assert streamed.content[0].model_dump(include={"name", "input"}) == {
        "name": "get_weather",
        "input": CALL,
    }
    assert [block.model_dump(include={"text"}) for block in then.content] == [{"text": RESULT}]


def test_anthropics_client_gets_its_own_class_back(of_anthropic: anthropic.Anthropic) -> None:
    message = of_anthropic.messages.parse(
        model=GUIDE, max_tokens=96, messages=MESSAGES, output_format=Topic
    )

    assert isinstance(message.parsed_output, Topic)


def test_anthropics_client_raises_its_own_errors(of_anthropic: anthropic.Anthropic) -> None:
    asked: dict[str, Any] = {"max_tokens": 96, "messages": MESSAGES}
    image = [{"role": "user", "content": [{"type": "image", "source": {}}]}]

    with pytest.raises(anthropic.NotFoundError, match="nobody"):
        of_anthropic.messages.create(**asked, model="nobody")
    with pytest.raises(anthropic.BadRequestError, match=r"2048.* 20000") as refused:
        of_anthropic.messages.create(**asked | {"max_tokens": 20_000}, model=GUIDE)
    with pytest.raises(anthropic.BadRequestError, match="image"):
        of_anthropic.messages.create(**asked | {"messages": image}, model=GUIDE)
    assert refused.value.request_id


# Xinference's.


@pytest.fixture
def of_xinference(models: Platform) -> Iterator[RESTfulClient]:
    client = RESTfulClient(models.endpoint)
    yield client
    client.close()


def test_xinferences_client_chats_streamed_and_not(of_xinference: RESTfulClient) -> None:
    model = of_xinference.get_model(GUIDE)
    config = {"max_tokens": 96, "temperature": 0}

    whole = model.chat(MESSAGES, generate_config=config)
    chunks = list(model.chat(MESSAGES, generate_config=config | {"stream": True}))
    plain = model.generate("To launch a model, run", generate_config=config)
    model.close()

    text = "".join(
        chunk["choices"][0]["delta"].get("content") or "" for chunk in chunks if chunk["choices"]
    )
    assert "xinference launch" in whole["choices"][0]["message"]["content"] == text
    assert plain["choices"][0]["text"]
    assert {GUIDE, NAME} <= of_xinference.list_models().keys()


def test_xinferences_client_calls_tools_and_keeps_to_structures(
    of_xinference: RESTfulClient,
) -> None:
    reciter, guide = of_xinference.get_model(NAME), of_xinference.get_model(GUIDE)
    asked = [{"role": "user", "content": WEATHER}]
    schema = Topic.model_json_schema()
    structure = {"type": "json_schema", "json_schema": {"name": "topic", "schema": schema}}

    called = reciter.chat(asked, tools=[TOOL])
    answer = guide.chat(MESSAGES, generate_config={"response_format": structure})
    reciter.close()
    guide.close()

    (call,) = called["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) == CALL
    jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


# Ollama's.


@pytest.fixture
def of_ollama(models: Platform) -> Iterator[ollama.Client]:
    client = ollama.Client(host=models.endpoint)
    yield client
    client._client.close()


def test_ollamas_client_chats_and_generates_streamed_and_not(of_ollama: ollama.Client) -> None:
    asked: dict[str, Any] = {"model": GUIDE, "options": {"num_predict": 96, "temperature": 0}}

    whole = of_ollama.chat(messages=MESSAGES, **asked)
    parts = list(of_ollama.chat(messages=MESSAGES, stream=True, **asked))
    generated = of_ollama.generate(prompt=QUESTION, **asked)
    pieces = list(of_ollama.generate(prompt=QUESTION, stream=True, **asked))

    assert "xinference launch" in (whole.message.content or "")
    assert "".join(part.message.content or "" for part in parts) == whole.message.content
    assert generated.response == whole.message.content
    assert "".join(piece.response or "" for piece in pieces) == generated.response
    for last in (whole, parts[-1], generated, pieces[-1]):
        assert (last.done, last.done_reason) == (True, "stop")
        assert last.eval_count == whole.eval_count
        assert (last.total_duration or 0) >= (last.eval_duration or 0) > 0


def test_ollamas_client_calls_a_python_function(of_ollama: ollama.Client) -> None:
    def get_weather(location: str) -> str:
        """Get the weather at a location.

        Args:
            location: where
        """
        return f"It's sunny in {location}."

    messages: list[Any] = [{"role": "user", "content": WEATHER}]

    first = of_ollama.chat(NAME, messages, tools=[get_weather])
    streamed = list(of_ollama.chat(NAME, messages, tools=[get_weather], stream=True))
    (call,) = first.message.tool_calls or []
    given = dict(call.function.arguments)
    result = {"role": "tool", "tool_name": "get_weather", "content": get_weather(**given)}
    then = of_ollama.chat(NAME, [*messages, first.message, result], tools=[get_weather])

    (again,) = [one for part in streamed for one in part.message.tool_calls or []]
    assert (call.function.name, given) == ("get_weather", CALL)
    assert again.function == call.function
    assert then.message.content == RESULT


def test_ollamas_client_thinks_if_it_is_told_to(of_ollama: ollama.Client) -> None:
    messages: list[Any] = [{"role": "user", "content": "Where are you?"}]

    thought = of_ollama.chat(NAME, messages, think=True).message
    parts = [part.message for part in of_ollama.chat(NAME, messages, think=True, stream=True)]
    plain = of_ollama.chat(NAME, messages, think=False).message

    assert (thought.thinking, thought.content) == (THOUGHT, ANSWER_AFTER_THOUGHT)
    assert "".join(part.thinking or "" for part in parts) == THOUGHT
    assert "".join(part.content or "" for part in parts) == ANSWER_AFTER_THOUGHT
    assert (plain.thinking, plain.content) == (None, ANSWER)


def test_ollamas_client_keeps_an_answer_to_a_schema(of_ollama: ollama.Client) -> None:
    answer = of_ollama.chat(GUIDE, MESSAGES, format=Topic.model_json_schema())
    any_object = of_ollama.generate(GUIDE, QUESTION, format="json", options={"num_predict": 200})

    Topic.model_validate_json(answer.message.content or "")
    assert any_object.response.startswith("{")


def test_ollamas_client_lists_and_shows(of_ollama: ollama.Client) -> None:
    assert {model.model for model in of_ollama.list().models} == {GUIDE, NAME}
    assert {model.model for model in of_ollama.ps().models} == {GUIDE, NAME}
    assert of_ollama.show(NAME).capabilities == ["completion", "tools", "thinking"]


def test_ollamas_client_ends_an_answer_where_its_context_does(of_ollama: ollama.Client) -> None:
    counted = of_ollama.chat(GUIDE, MESSAGES, options={"num_predict": 1}).prompt_eval_count or 0

    cut = of_ollama.chat(GUIDE, MESSAGES, options={"num_ctx": counted + 5})
    with pytest.raises(ollama.ResponseError, match="context length is 3 tokens"):
        of_ollama.chat(GUIDE, MESSAGES, options={"num_ctx": 3})

    assert (cut.done_reason, cut.eval_count) == ("length", 5)
