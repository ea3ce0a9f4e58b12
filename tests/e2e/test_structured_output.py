# SPDX-License-Identifier: Apache-2.0
"""The official client asks for structures, and gets them or a 400, streamed and not."""

import json
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import Platform

QUESTION: list[Any] = [{"role": "user", "content": "Which port does it listen on?"}]


class Answer(pydantic.BaseModel):
    """What the client parses."""

    model_config = pydantic.ConfigDict(extra="forbid")

    topic: Literal["ports", "models", "other"]
    port: int = pydantic.Field(ge=1, le=65535)
    sure: bool


@pytest.fixture
def client(guide: Platform) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{guide.endpoint}/v1", api_key="none", max_retries=0)


def test_the_client_gets_its_own_class_back(client: openai.OpenAI) -> None:
    answer = client.chat.completions.parse(
        model=GUIDE, messages=QUESTION, response_format=Answer, temperature=1.5, seed=3
    )

    assert isinstance(answer.choices[0].message.parsed, Answer)
    assert answer.choices[0].finish_reason == "stop"


def test_a_streamed_structure_is_the_same(client: openai.OpenAI) -> None:
    schema = Answer.model_json_schema()
    asked: dict[str, Any] = {
        "model": GUIDE,
        "messages": QUESTION,
        "response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
        "temperature": 1.5,
        "seed": 4,
    }

    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.create(**asked, stream=True) as stream:
        pieces = [chunk.choices[0] for chunk in stream]

    assert "".join(piece.delta.content or "" for piece in pieces) == whole.message.content
    assert pieces[-1].finish_reason == whole.finish_reason == "stop"
    jsonschema.validate(json.loads(whole.message.content), schema)


def test_guided_fields_work_for_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model=GUIDE,
        prompt="Is it fast?",
        temperature=1.5,
        extra_body={"guided_choice": ["yes", "no"]},
    )

    assert answer.choices[0].text in ("yes", "no")


def test_a_schema_that_cannot_be_compiled_is_a_400_that_says_why(client: openai.OpenAI) -> None:
    bad: Any = {
        "type": "json_schema",
        "json_schema": {"name": "n", "schema": {"not": {"type": "string"}}},
    }
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(
                model=GUIDE, messages=QUESTION, response_format=bad, stream=stream
            )

        assert refused.value.param == "response_format.json_schema.schema"
        assert "not" in str(refused.value)
