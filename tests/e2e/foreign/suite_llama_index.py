# SPDX-License-Identifier: Apache-2.0
"""LlamaIndex's client of servers that are like OpenAI's."""

from typing import Any, Literal

from conftest import ANSWER, ASKED, CALL, ENDPOINT, GUIDE, QUESTION, RECITER, RESULT, WEATHER
from llama_index.core.llms import ChatMessage, MessageRole
from llama_index.core.tools import FunctionTool
from llama_index.llms.openai_like import OpenAILike
from pydantic import BaseModel, ConfigDict


class Topic(BaseModel):
    """What it is about."""

    model_config = ConfigDict(extra="forbid")

    topic: Literal["ports", "models"]
    sure: bool


def model(name: str, **options: Any) -> OpenAILike:
    return OpenAILike(
        model=name,
        api_base=f"{ENDPOINT}/v1",
        api_key="none",
        is_chat_model=True,
        is_function_calling_model=True,
        max_retries=0,
        context_window=2048,
        max_tokens=96,
        temperature=0,  # it sends 0.1 by itself, and two draws of one answer may differ
        **options,
    )


MESSAGES = [ChatMessage(role=MessageRole.USER, content=QUESTION)]


def test_it_chats_streamed_and_not() -> None:
    whole = model(GUIDE).chat(MESSAGES)
    parts = list(model(GUIDE).stream_chat(MESSAGES))

    assert ASKED in (whole.message.content or "")
    assert "".join(part.delta or "" for part in parts) == whole.message.content


async def test_it_chats_asynchronously() -> None:
    whole = await model(RECITER).achat(MESSAGES)
    parts = [part async for part in await model(RECITER).astream_chat(MESSAGES)]

    assert whole.message.content == "".join(part.delta or "" for part in parts) == ANSWER


def test_it_completes_streamed_and_not() -> None:
    guide = model(GUIDE)
    guide.is_chat_model = False

    whole = guide.complete("To launch a model, run")
    parts = list(guide.stream_complete("To launch a model, run"))

    assert whole.text
    assert "".join(part.delta or "" for part in parts) == whole.text


def get_weather(location: str) -> str:
    """Get the weather at a location."""
    return "It's sunny."


def test_it_calls_a_tool_and_reads_its_result() -> None:
    reciter, tools = model(RECITER), [FunctionTool.from_defaults(get_weather)]

    first = reciter.chat_with_tools(tools, user_msg=WEATHER)
    (call,) = reciter.get_tool_calls_from_response(first)
    result = ChatMessage(
        role=MessageRole.TOOL,
        content=get_weather(**call.tool_kwargs),
        additional_kwargs={"tool_call_id": call.tool_id},
    )
    asked = ChatMessage(role=MessageRole.USER, content=WEATHER)
    then = reciter.chat_with_tools(tools, chat_history=[asked, first.message, result])

    assert (call.tool_name, call.tool_kwargs) == ("get_weather", CALL)
    assert then.message.content == RESULT


def test_it_streams_the_same_call() -> None:
    reciter, tools = model(RECITER), [FunctionTool.from_defaults(get_weather)]

    *_, last = reciter.stream_chat_with_tools(tools, user_msg=WEATHER)

    (call,) = reciter.get_tool_calls_from_response(last)
    assert (call.tool_name, call.tool_kwargs) == ("get_weather", CALL)


def test_it_gets_its_own_class_back() -> None:
    topic = model(RECITER).as_structured_llm(Topic).chat(MESSAGES).raw

    assert isinstance(topic, Topic)
