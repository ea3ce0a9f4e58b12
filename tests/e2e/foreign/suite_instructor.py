# SPDX-License-Identifier: Apache-2.0
"""Instructor: classes out of answers, in every mode that OpenAI's API has for it."""

from typing import Literal

import instructor
import openai
import pytest
from conftest import ENDPOINT, GUIDE, QUESTION, RECITER
from pydantic import BaseModel, ConfigDict


class Topic(BaseModel):
    """What it is about."""

    model_config = ConfigDict(extra="forbid")

    topic: Literal["ports", "models"]
    sure: bool


MESSAGES = [{"role": "user", "content": QUESTION}]


def client(mode: instructor.Mode) -> instructor.Instructor:
    plain = openai.OpenAI(base_url=f"{ENDPOINT}/v1", api_key="none", max_retries=0)
    return instructor.from_openai(plain, mode=mode)


@pytest.mark.parametrize(
    ("mode", "model"),
    [
        (instructor.Mode.JSON_SCHEMA, GUIDE),
        (instructor.Mode.TOOLS_STRICT, RECITER),
        (instructor.Mode.TOOLS, RECITER),
    ],
)
def test_it_gets_its_own_class_back(mode: instructor.Mode, model: str) -> None:
    topic = client(mode).chat.completions.create(
        model=model, messages=MESSAGES, response_model=Topic, max_retries=0
    )

    assert isinstance(topic, Topic)


def test_it_gets_the_plain_answer_with_it() -> None:
    topic, answer = client(instructor.Mode.TOOLS).chat.completions.create_with_completion(
        model=RECITER, messages=MESSAGES, response_model=Topic, max_retries=0
    )

    assert isinstance(topic, Topic)
    assert answer.usage.completion_tokens > 0


@pytest.mark.parametrize(
    ("mode", "model"), [(instructor.Mode.JSON_SCHEMA, GUIDE), (instructor.Mode.TOOLS, RECITER)]
)
def test_it_streams_a_class_that_grows(mode: instructor.Mode, model: str) -> None:
    parts = list(
        client(mode).chat.completions.create_partial(
            model=model, messages=MESSAGES, response_model=Topic, max_retries=0
        )
    )

    assert len(parts) > 1
    Topic.model_validate(parts[-1].model_dump())
