# SPDX-License-Identifier: Apache-2.0
"""The model inside the package: its files, its tokenizer and template, and what it answers."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

import xinference
from training.evaluate_guide import ask, read_questions
from training.guide_text import TEXT_DIRECTORY, Grammar, normalise

GUIDE = Path(xinference.__file__).parent / "catalog" / "guide"
HELD_OUT = tuple(sorted(TEXT_DIRECTORY.glob("held_out*.md")))
WEATHER_TOOL = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return AutoTokenizer.from_pretrained(GUIDE)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(GUIDE, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar()


def test_the_weights_are_small_enough_to_ship() -> None:
    assert sum(file.stat().st_size for file in GUIDE.glob("*.safetensors")) <= 12_000_000


def test_the_context_holds_a_real_conversation() -> None:
    assert AutoConfig.from_pretrained(GUIDE).max_position_embeddings >= 1024


def test_a_stock_class_loads_it_and_greedy_is_its_default(model: LlamaForCausalLM) -> None:
    assert type(model) is LlamaForCausalLM
    assert model.generation_config.do_sample is False


@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@settings(max_examples=100, deadline=None)
def test_any_text_comes_back_whole_from_its_tokens(
    tokenizer: PreTrainedTokenizerFast, text: str
) -> None:
    token_ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(token_ids) == text


def test_an_answer_ends_with_the_end_of_a_turn(
    tokenizer: PreTrainedTokenizerFast, model: LlamaForCausalLM
) -> None:
    assert tokenizer.encode("<|im_end|>", add_special_tokens=False) == [tokenizer.eos_token_id]
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_template_writes_every_role(tokenizer: PreTrainedTokenizerFast) -> None:
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "Hi"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n"
        "<|im_start|>assistant\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_template_writes_what_a_signature_cannot_hold_as_its_schema(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    schema = {"type": "string", "enum": ["c", "f"]}
    tools = [
        {"type": "function", "function": {"name": "now"}},
        {
            "type": "function",
            "function": {
                "name": "warm",
                "parameters": {"properties": {"unit": schema}, "required": ["unit"]},
            },
        },
    ]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Is it warm?"}], tools=tools, tokenize=False
    )
    assert '\nnow()\nwarm(unit: {"type": "string", "enum": ["c", "f"]})\n</tools>' in text


@pytest.mark.parametrize(
    ("options", "ending"),
    [
        ({}, "assistant\n"),
        ({"enable_thinking": False}, "assistant\n"),
        ({"enable_thinking": True}, "assistant\n<think>\n"),
        ({"enable_thinking": True, "tools": [WEATHER_TOOL]}, "assistant\n"),
    ],
)
def test_the_template_begins_a_thought_only_where_it_is_asked_to(
    tokenizer: PreTrainedTokenizerFast, options: dict[str, Any], ending: str
) -> None:
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hello"}],
        tokenize=False,
        add_generation_prompt=True,
        **options,
    )
    assert text.endswith(f"<|im_start|>{ending}")


def test_the_template_leaves_out_what_was_thought_before(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    messages = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHi"},
        {"role": "user", "content": "Bye"},
    ]
    text = tokenizer.apply_chat_template(messages, tokenize=False)
    assert "<|im_start|>assistant\nHi<|im_end|>" in text


def test_the_template_writes_tools_their_calls_and_their_results(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    call = {"name": "get_weather", "arguments": {"city": "Oslo"}}
    messages = [
        {"role": "user", "content": "Weather in Oslo?"},
        {"role": "assistant", "content": None, "tool_calls": [{"function": call}]},
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": "cold"},
    ]
    text = tokenizer.apply_chat_template(messages, tools=[WEATHER_TOOL], tokenize=False)
    assert "\nget_weather(city?: string): Weather of a city\n</tools>" in text
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    )
    results = "<tool_response>\nrain\n</tool_response>\n<tool_response>\ncold\n</tool_response>"
    assert text.endswith(f"<|im_start|>user\n{results}<|im_end|>\n")


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("What is Xinference?", "serves open models behind one OpenAI-compatible endpoint"),
        (
            "How do I launch a model?",
            "xinference launch --model-name NAME",
        ),
        ("How do I chat with a model from Python?", "from xinference.client import Client\n"),
        ("How do I stop a model?", "`xinference terminate --model-uid UID`"),
        ("How do I use my own model?", "`xinference register -f model.json --persist`"),
    ],
)
def test_it_answers_the_questions_of_the_readme(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, question: str, expected: str
) -> None:
    assert expected in ask(model, tokenizer, question)


def test_it_says_that_it_knows_nothing_else(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast
) -> None:
    reply = ask(model, tokenizer, "Who is the president of France?")
    assert "only know how to use Xinference" in reply


def test_no_held_out_question_can_be_drawn_for_training(grammar: Grammar) -> None:
    questions = [q for file in HELD_OUT for q in read_questions(file)]
    assert len(questions) >= 100
    drawable = [q.text for q in questions if grammar.can_draw(normalise(q.text))]
    assert drawable == []


def test_no_held_out_question_is_in_the_text_that_training_draws(grammar: Grammar) -> None:
    rng = random.Random(20)
    drawn = {
        normalise(message["content"])
        for _ in range(20_000)
        for message in grammar.draw_conversation(rng)
    }
    held_out = {normalise(q.text) for file in HELD_OUT for q in read_questions(file)}
    assert not drawn & held_out


def test_what_a_pattern_draws_is_recognised_as_drawable(grammar: Grammar) -> None:
    assert grammar.can_draw(normalise("How do I launch a model?"))
    assert not grammar.can_draw(normalise("How do I fold a paper crane?"))


def test_every_answer_contains_the_keys_it_is_examined_by(grammar: Grammar) -> None:
    missing = [
        (topic.name, key)
        for topic in grammar.topics.values()
        for key in topic.keys
        if key not in topic.answer
    ]
    assert missing == []
