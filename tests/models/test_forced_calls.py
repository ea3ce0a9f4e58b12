# SPDX-License-Identifier: Apache-2.0
"""Models that would rather write anything else call tools when they have to, and the calls fit."""

import json
from collections.abc import Iterator
from functools import partial
from typing import Any

import jsonschema
import pytest

from tests.json_schemas import BOUNDED, DIGIT, WORD, Schema, record
from xinference.errors import InvalidRequest, XinferenceError
from xinference.models.parsing.grammars import AnswerFormat
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.generation import (
    ChatPrompt,
    FinishReason,
    Grammar,
    GrammarKind,
    Message,
    ToolChoice,
)

from .parsing.test_call_rules import NAMES, tokenizer
from .running import Choice, Running, guide, random_weights

HOT = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}
TEMPLATE = (
    "{% for tool in tools or [] %}{{ tool.function.name }}{{ tool.function.strict }} {% endfor %}"
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{{ reasoning_effort or '' }}[assistant]{% if enable_thinking %}<think>\n{% endif %}"
)
WEATHER = record({"city": WORD, "unit": {"enum": ["C", "F"]}, "days": DIGIT})
TIME = record({"zone": {"type": "integer", "minimum": -12, "maximum": 12}})
SCHEMAS: dict[str, Schema] = {"get_weather": WEATHER, "get_time": TIME}
OPEN = Grammar(kind=GrammarKind.CHOICE, text='["yes", "no"]')


def tool(name: str, schema: Schema | None, **more: Any) -> dict[str, Any]:
    described = {"name": name, **more} | ({} if schema is None else {"parameters": schema})
    return {"type": "function", "function": described}


TOOLS = tuple(tool(name, schema) for name, schema in SCHEMAS.items())


def asked(**fields: Any) -> ChatPrompt:
    given: dict[str, Any] = {"tools": TOOLS, "tool_choice": ToolChoice.REQUIRED, **fields}
    return ChatPrompt(messages=(Message(role="user", content="hi"),), **given)


def noise(parser: str, **source: Any) -> Running:
    tags = {"reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}
    markers = AnswerFormat(tool_parser=parser, **tags).special_tokens
    return random_weights(
        partial(tokenizer, markers),
        tool_parser=parser,
        chat_template=TEMPLATE,
        **tags,
        **source,
    )


@pytest.fixture(scope="module", params=NAMES)
def of_each_form(request: pytest.FixtureRequest) -> Iterator[Running]:
    running = noise(request.param)
    yield running
    running.stop()


@pytest.fixture(scope="module")
def qwen() -> Iterator[Running]:
    running = noise("qwen")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def packaged() -> Iterator[Running]:
    running = guide()
    yield running
    running.stop()


def check(choice: Choice, schemas: dict[str, Schema] = SCHEMAS) -> None:
    assert choice.content == ""
    assert choice.calls
    for name, arguments in choice.calls:
        jsonschema.validate(json.loads(arguments), schemas[name])


def test_in_every_form_the_answer_is_calls_that_fit(of_each_form: Running) -> None:
    for seed in range(2):
        prompt = asked(parallel_tool_calls=False, enable_thinking=False, thinking_budget=3)
        (choice,), end = of_each_form.ask(prompt, **HOT, seed=seed)

        assert end.reason is FinishReason.TOOL_CALLS
        assert len(choice.calls) == 1
        check(choice)


@pytest.mark.parametrize("name", [name for name, one in BOUNDED.items() if "properties" in one])
def test_the_guide_calls_what_it_must(packaged: Running, name: str, is_long: bool) -> None:
    tools = (tool("it", BOUNDED[name]),)
    for seed in range(10 if is_long else 1):
        prompt = asked(tools=tools, tool_name="it", parallel_tool_calls=False)
        (choice,), end = packaged.ask(prompt, **HOT, seed=seed)

        assert end.reason is FinishReason.TOOL_CALLS
        check(choice, {"it": BOUNDED[name]})


def test_a_named_or_allowed_function_is_the_one_that_is_called(qwen: Running) -> None:
    for fields in ({"tool_name": "get_time"}, {"allowed_tools": ("get_time",)}):
        for seed in range(4):
            prompt = asked(parallel_tool_calls=False, enable_thinking=False, **fields)
            (choice,), _ = qwen.ask(prompt, **HOT, seed=seed)

            assert [name for name, _ in choice.calls] == ["get_time"]
            check(choice)


def test_each_of_several_answers_is_calls(qwen: Running) -> None:
    prompt = asked(parallel_tool_calls=False, enable_thinking=False)

    choices, _ = qwen.ask(prompt, **HOT, seed=1, n=4)

    for choice in choices:
        assert choice.reason is FinishReason.TOOL_CALLS
        check(choice)
    assert len({str(choice.calls) for choice in choices}) > 1


def test_a_function_without_parameters_is_called_without(qwen: Running) -> None:
    prompt = asked(tools=(tool("go", None),), parallel_tool_calls=False, enable_thinking=False)

    (choice,), _ = qwen.ask(prompt, **HOT, seed=2)

    assert [(name, json.loads(arguments)) for name, arguments in choice.calls] == [("go", {})]


def test_an_answer_that_is_cut_short_is_the_beginning_of_a_call(qwen: Running) -> None:
    prompt = asked(enable_thinking=False, parallel_tool_calls=False)
    (whole,), end = qwen.ask(prompt, **HOT, seed=7)
    # Why not the last two: the answer ends with its call, and not with what closes it.
    for max_tokens in range(1, end.usage.num_completion_tokens - 2, 9):
        (choice,), cut = qwen.ask(prompt, **HOT, seed=7, max_tokens=max_tokens)
        assert cut.reason is FinishReason.LENGTH
        for told, all_of_it in zip(choice.calls, whole.calls, strict=False):
            assert told[0] == all_of_it[0]
            # Why stripped: it may be cut inside of a character.
            assert all_of_it[1].startswith(told[1].rstrip("\N{REPLACEMENT CHARACTER}"))


# --- calls that are free


def test_strict_functions_are_called_as_they_say_also_where_calls_are_free(qwen: Running) -> None:
    tools = tuple(tool(name, schema, strict=True) for name, schema in SCHEMAS.items())
    bias = {qwen.model._tokenizer.convert_tokens_to_ids("<tool_call>"): 100.0}
    for seed in range(4):
        prompt = asked(
            tools=tools,
            tool_choice=ToolChoice.AUTO,
            parallel_tool_calls=False,
            enable_thinking=False,
        )
        (choice,), end = qwen.ask(prompt, **HOT, seed=seed, logit_bias=bias)

        assert end.reason is FinishReason.TOOL_CALLS
        check(choice)


def test_where_calls_are_free_a_strict_function_need_not_be_called(qwen: Running) -> None:
    prompt = asked(
        tools=(tool("go", None, strict=True),), tool_choice=ToolChoice.AUTO, enable_thinking=False
    )

    (choice,), _ = qwen.ask(prompt, **HOT, seed=3, max_tokens=30)

    assert choice.content
    assert not choice.calls


def test_a_free_answer_with_a_structure_is_one_or_the_other(qwen: Running) -> None:
    num_calls = num_structures = 0
    for seed in range(8):
        prompt = asked(
            tool_choice=ToolChoice.AUTO,
            tools=tuple(tool(name, one, strict=True) for name, one in SCHEMAS.items()),
            enable_thinking=False,
            parallel_tool_calls=False,
        )
        (choice,), _ = qwen.ask(prompt, **HOT, seed=seed, grammar=OPEN)
        if choice.calls:
            check(choice)
            num_calls += 1
        else:
            assert choice.content in ("yes", "no")
            num_structures += 1
    assert num_calls > 0
    assert num_structures > 0


def test_the_model_is_not_told_how_strictly_it_is_held(qwen: Running) -> None:
    prompt = asked(tools=(tool("go", None, strict=True),))

    rendered = qwen.model.conversation.template.render(prompt)

    assert rendered.startswith("go [user]")


# --- thoughts


def test_thoughts_come_before_what_has_to_be(qwen: Running) -> None:
    for fields, sampling in (
        ({"parallel_tool_calls": False}, {}),
        ({"tools": (), "tool_choice": ToolChoice.AUTO}, {"grammar": OPEN}),
    ):
        for seed in range(2):
            prompt = asked(enable_thinking=True, thinking_budget=8, **fields)
            (choice,), end = qwen.ask(prompt, **HOT, **sampling, seed=seed)
            assert choice.reasoning
            assert 8 < end.usage.num_reasoning_tokens <= 8 + 3 + 2
            if sampling:
                assert choice.content in ("yes", "no")
                assert end.reason is FinishReason.STOP
            else:
                check(choice)


def test_the_launch_says_how_long_to_think_where_the_request_does_not() -> None:
    running = noise("qwen", options=EngineOptions(thinking_budget=5))
    try:
        spent = [
            running.ask(asked(enable_thinking=True, thinking_budget=budget), **HOT, seed=1)[1]
            for budget in (None, 9)
        ]
    finally:
        running.stop()

    # Half a character, and what closes the thoughts, come on top.
    for end, budget in zip(spent, (5, 9), strict=True):
        assert budget < end.usage.num_reasoning_tokens <= budget + 3 + 2


@pytest.mark.parametrize("budget", [0, 6])
def test_gpt_oss_thinks_in_a_message_that_has_a_budget(budget: int) -> None:
    running = noise("harmony")
    try:
        for seed in range(3):
            prompt = asked(thinking_budget=budget, tools=(), tool_choice=ToolChoice.AUTO)
            (choice,), end = running.ask(prompt, **HOT, seed=seed, grammar=OPEN)
            assert choice.content in ("yes", "no")
            assert end.usage.num_reasoning_tokens <= budget + 8
    finally:
        running.stop()


def test_effort_is_the_templates_to_know(qwen: Running) -> None:
    prompt = asked(reasoning_effort="low", enable_thinking=False)

    assert "low[assistant]" in qwen.model.conversation.template.render(prompt)


# --- refusals


@pytest.mark.parametrize(
    ("fields", "sampling", "field"),
    [
        ({}, {"grammar": OPEN}, "tool_choice"),
        ({"tools": ()}, {}, "tool_choice"),
        ({"tools": (tool("f", {"type": "array"}),)}, {}, "tools"),
        ({"tools": (tool("f", {"$ref": "#/nowhere"}, strict=True),)}, {}, "tools"),
        (
            {
                "tools": (tool("f", record({"a": {"not": {}}}), strict=True),),
                "tool_choice": ToolChoice.AUTO,
            },
            {},
            "tools",
        ),
    ],
    ids=["structure", "no tools", "no object", "reference", "keyword"],
)
def test_what_cannot_be_kept_is_refused_by_name(
    qwen: Running, fields: dict[str, Any], sampling: dict[str, Any], field: str
) -> None:
    with pytest.raises(XinferenceError) as refused:
        qwen.ask(asked(**fields), **sampling)

    assert isinstance(refused.value, InvalidRequest)
    assert refused.value.field == field


def test_a_keyword_that_cannot_be_followed_is_passed_over_unless_strict(qwen: Running) -> None:
    tools = (tool("f", record({"a": {**DIGIT, "not": {"const": 3}}})),)

    prompt = asked(tools=tools, parallel_tool_calls=False, enable_thinking=False)
    (choice,), _ = qwen.ask(prompt, **HOT, seed=0)

    assert set(json.loads(choice.calls[0][1])) == {"a"}


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"thinking_budget": 3}, "thinking_budget"),
        ({"reasoning_effort": "low"}, "reasoning_effort"),
    ],
)
def test_a_model_that_does_not_think_refuses_to_be_told_how(
    packaged: Running, fields: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        packaged.ask(asked(tool_choice=ToolChoice.AUTO, **fields))

    assert refused.value.field == field
