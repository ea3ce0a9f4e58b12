# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client and LangChain make a real model call tools, streamed and not."""

import json
from typing import Any

import jsonschema
import openai
import pydantic
import pytest
from langchain_core.messages import AIMessageChunk
from langchain_core.tools import tool
from langchain_openai import ChatOpenAI

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform

ASK: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "maxLength": 12},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 7},
    },
    "required": ["city", "unit", "days"],
    "additionalProperties": False,
}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": "get_weather", "parameters": SCHEMA}},
    {"type": "function", "function": {"name": "get_time"}},
]
HOT: dict[str, Any] = {"temperature": 1.5, "seed": 3}


class GetWeather(pydantic.BaseModel):
    """The weather of the next days."""

    model_config = pydantic.ConfigDict(extra="forbid")

    city: str = pydantic.Field(max_length=12)
    days: int = pydantic.Field(ge=1, le=7)


@tool
def get_capital(country: str) -> str:
    """Return the capital of a country."""
    return f"the capital of {country}"


@pytest.fixture
def client(guide: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guide.endpoint}/v1", api_key="none", max_retries=0)


@pytest.fixture
def langchain(guide: Platform) -> ChatOpenAI:
    return ChatOpenAI(
        model=GUIDE,
        base_url=f"{guide.endpoint}/v1",
        api_key=pydantic.SecretStr("none"),
        temperature=1.5,
        seed=5,
        max_retries=0,
    )


# --- OpenAI's client


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "get_weather"}},
        {
            "type": "allowed_tools",
            "allowed_tools": {
                "mode": "required",
                "tools": [{"type": "function", "function": {"name": "get_weather"}}],
            },
        },
    ],
    ids=["required", "named", "allowed"],
)
def test_a_forced_call_is_the_same_streamed_and_not(client: openai.OpenAI, choice: Any) -> None:
    asked: dict[str, Any] = {
        "model": GUIDE,
        "messages": ASK,
        "tools": TOOLS,
        "tool_choice": choice,
        "parallel_tool_calls": False,
        **HOT,
    }

    whole = client.chat.completions.create(**asked)
    with client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    ) as stream:
        chunks = list(stream)

    pieces = [
        call
        for chunk in chunks
        if chunk.choices
        for call in chunk.choices[0].delta.tool_calls or ()
    ]
    (called,) = whole.choices[0].message.tool_calls
    assert (pieces[0].index, pieces[0].function.name) == (0, called.function.name)
    assert len(pieces) > 3, "the arguments come in pieces"
    assert "".join(piece.function.arguments or "" for piece in pieces) == called.function.arguments
    reasons = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert reasons[-1] == whole.choices[0].finish_reason == "tool_calls"
    assert whole.choices[0].message.content is None
    for name in ("prompt_tokens", "completion_tokens", "completion_tokens_details"):
        assert getattr(chunks[-1].usage, name) == getattr(whole.usage, name)
    arguments = json.loads(called.function.arguments)
    jsonschema.validate(arguments, SCHEMA if called.function.name == "get_weather" else {})
    if choice != "required":
        assert called.function.name == "get_weather"


def test_the_client_gets_its_own_class_back_as_arguments(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=GUIDE,
        messages=ASK,
        tools=[openai.pydantic_function_tool(GetWeather)],
        tool_choice="required",
        parallel_tool_calls=False,
        **HOT,
    )

    (called,) = answer.choices[0].message.tool_calls or ()
    assert isinstance(called.function.parsed_arguments, GetWeather)


def test_a_call_and_its_result_go_back_to_the_model(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": GUIDE, "tools": TOOLS, "max_tokens": 60, **HOT}
    turn = client.chat.completions.create(
        **asked, messages=ASK, tool_choice="required", parallel_tool_calls=False
    )
    message = turn.choices[0].message
    if not message.tool_calls:
        pytest.fail("a call was asked for")
    result = {"role": "tool", "tool_call_id": message.tool_calls[0].id, "content": "12 °C"}

    answer = client.chat.completions.create(
        **asked, messages=[*ASK, message, result], tool_choice="none"
    )

    assert answer.choices[0].message.content


def test_what_cannot_be_kept_is_a_400_that_names_its_field(client: openai.OpenAI) -> None:
    bad = {"type": "object", "properties": {"a": {"not": {"type": "string"}}}}
    strict = [{"type": "function", "function": {"name": "f", "parameters": bad, "strict": True}}]
    for fields, field in (
        ({"tools": strict}, "tools"),
        (
            {
                "tools": TOOLS,
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "tool_choice",
        ),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model=GUIDE, messages=ASK, **fields)  # type: ignore[call-overload]
        assert refused.value.param == field


# --- LangChain


def test_langchain_binds_tools_and_gets_calls(langchain: ChatOpenAI) -> None:
    bound = langchain.bind_tools(
        [get_capital, GetWeather], tool_choice="any", parallel_tool_calls=False
    )

    answer = bound.invoke("What is the capital of France?")

    (called,) = answer.tool_calls
    assert called["name"] in ("get_capital", "GetWeather")
    assert not answer.invalid_tool_calls


def test_langchain_puts_streamed_calls_together(langchain: ChatOpenAI) -> None:
    bound = langchain.bind_tools(
        [GetWeather], tool_choice="GetWeather", strict=True, parallel_tool_calls=False
    )

    chunks = list(bound.stream("What is the weather in Paris?"))

    gathered = chunks[0]
    for chunk in chunks[1:]:
        gathered += chunk
    assert isinstance(gathered, AIMessageChunk)
    assert sum(len(chunk.tool_call_chunks) for chunk in chunks) > 3
    assert gathered.tool_calls
    for called in gathered.tool_calls:
        assert called["name"] == "GetWeather"
        GetWeather(**called["args"])


@pytest.mark.parametrize("method", ["function_calling", "json_schema"])
def test_langchain_gets_its_own_class_back(langchain: ChatOpenAI, method: Any) -> None:
    structured = langchain.with_structured_output(GetWeather, method=method)

    assert isinstance(structured.invoke("What is the weather in Paris?"), GetWeather)
