# SPDX-License-Identifier: Apache-2.0
"""OpenAI's client and the Responses API on the guide model: streams, structure, conversations."""

from typing import Any

import openai
import pytest
from pydantic import BaseModel, Field

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform

QUESTION = "How do I launch a model?"


@pytest.fixture
def client(guide: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guide.endpoint}/v1", api_key="none", max_retries=0)


def asked(**fields: Any) -> dict[str, Any]:
    return {"model": GUIDE, "temperature": 0, "max_output_tokens": 96, "input": QUESTION, **fields}


def test_a_stream_ends_in_the_answer_that_comes_whole(client: openai.OpenAI) -> None:
    whole = client.responses.create(**asked())
    with client.responses.stream(**asked()) as stream:
        pieces = [event.delta for event in stream if event.type == "response.output_text.delta"]
        streamed = stream.get_final_response()

    assert "xinference launch" in whole.output_text
    assert "".join(pieces) == streamed.output_text == whole.output_text
    assert whole.usage is not None
    assert streamed.usage is not None
    assert whole.usage.output_tokens == streamed.usage.output_tokens
    assert whole.status == streamed.status == "completed"


def test_a_response_says_what_the_chat_says(client: openai.OpenAI) -> None:
    chat = client.chat.completions.create(
        model=GUIDE, temperature=0, max_tokens=96, messages=[{"role": "user", "content": QUESTION}]
    )

    assert client.responses.create(**asked()).output_text == chat.choices[0].message.content


def test_a_conversation_is_kept_by_the_server(client: openai.OpenAI) -> None:
    first = client.responses.create(**asked())
    second = client.responses.create(
        **asked(input="How do I stop it?", previous_response_id=first.id)
    )
    alone = client.responses.create(**asked(input="How do I stop it?", store=False))

    assert second.usage is not None
    assert alone.usage is not None
    assert second.usage.input_tokens > alone.usage.input_tokens
    assert client.responses.retrieve(second.id) == second
    said = [item.type for item in client.responses.input_items.list(second.id, order="asc")]
    assert said == ["message", "message", "message"]


class Step(BaseModel):
    command: str = Field(max_length=60)
    is_safe: bool


def test_an_answer_is_parsed_into_a_type(client: openai.OpenAI) -> None:
    response = client.responses.parse(**asked(), text_format=Step)

    assert isinstance(response.output_parsed, Step)


def test_a_response_outlives_the_gateway(client: openai.OpenAI, guide: Platform) -> None:
    response = client.responses.create(**asked())
    gateway = guide.control("gateway")

    gateway.kill()
    gateway.wait(10)
    patient = client.with_options(max_retries=10)

    assert patient.responses.retrieve(response.id) == response
