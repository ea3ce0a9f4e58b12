# SPDX-License-Identifier: Apache-2.0
"""The official client chats and completes, streamed and not, one and sixteen at a time."""

import asyncio

import openai
import pytest

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform

QUESTIONS = [
    "What is Xinference?",
    "How do I launch a model?",
    "How do I chat with a model from Python?",
    "How do I stop a model?",
    "How do I use my own model?",
    "hello",
    "What is the weather in Paris?",
    "Which port does it listen on?",
]


@pytest.fixture
def client(guide: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guide.endpoint}/v1", api_key="none", max_retries=0)


def asked(question: str) -> dict[str, object]:
    return {
        "model": GUIDE,
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 96,
    }


def test_a_chat_answers_the_same_streamed_and_not(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**asked(QUESTIONS[1]))  # type: ignore[call-overload]
    with client.chat.completions.create(
        **asked(QUESTIONS[1]),  # type: ignore[call-overload]
        stream=True,
        stream_options={"include_usage": True},
    ) as stream:
        chunks = list(stream)

    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert "xinference launch" in whole.choices[0].message.content
    assert "".join(piece.delta.content or "" for piece in pieces) == (
        whole.choices[0].message.content
    )
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["stop"]
    assert whole.choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage


def test_a_completion_answers_the_same_streamed_and_not(client: openai.OpenAI) -> None:
    asked_for = {"model": GUIDE, "prompt": "To launch a model, run", "temperature": 0}

    whole = client.completions.create(**asked_for, max_tokens=24)  # type: ignore[call-overload]
    with client.completions.create(**asked_for, max_tokens=24, stream=True) as stream:  # type: ignore[call-overload]
        text = "".join(chunk.choices[0].text for chunk in stream if chunk.choices)

    assert text == whole.choices[0].text != ""
    assert 0 < whole.usage.completion_tokens <= 24


async def test_sixteen_at_once_each_get_the_answer_they_get_alone(guide: Platform) -> None:
    async with openai.AsyncOpenAI(
        base_url=f"{guide.endpoint}/v1", api_key="none", max_retries=0
    ) as client:

        async def answer(question: str) -> str:
            reply = await client.chat.completions.create(**asked(question))  # type: ignore[call-overload]
            return str(reply.choices[0].message.content)

        async def streamed(question: str) -> str:
            stream = await client.chat.completions.create(**asked(question), stream=True)  # type: ignore[call-overload]
            return "".join(
                [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
            )

        alone = [await answer(question) for question in QUESTIONS]
        together = await asyncio.gather(
            *(answer(question) for question in QUESTIONS),
            *(streamed(question) for question in QUESTIONS),
        )

    assert together == [*alone, *alone]


def test_a_seeded_answer_can_be_had_again(client: openai.OpenAI) -> None:
    drawn = {**asked("Tell me about Xinference"), "temperature": 1.5, "seed": 7}

    first, second = (client.chat.completions.create(**drawn) for _ in range(2))  # type: ignore[call-overload]
    other = client.chat.completions.create(**{**drawn, "seed": 8})  # type: ignore[call-overload]

    assert first.choices[0].message.content == second.choices[0].message.content
    assert first.choices[0].message.content != other.choices[0].message.content


def test_an_unknown_model_is_a_404_the_client_understands(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="nobody"):
        client.chat.completions.create(**{**asked("hello"), "model": "nobody"})  # type: ignore[call-overload]


def test_what_a_text_model_cannot_do_is_refused_by_name(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="web_search_options"):
        client.chat.completions.create(**asked("hello"), web_search_options={})  # type: ignore[call-overload]


def test_a_prompt_that_does_not_fit_is_refused_with_the_numbers(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="context"):
        client.chat.completions.create(**asked("word " * 20_000))  # type: ignore[call-overload]
