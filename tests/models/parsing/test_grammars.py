# SPDX-License-Identifier: Apache-2.0
"""Every grammar reads what its models write, whole or in pieces, and loses nothing of the rest."""

import itertools
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xinference.catalog.schema import TOOL_PARSERS
from xinference.models.parsing.grammars import GRAMMARS, AnswerFormat
from xinference.models.parsing.reader import AnswerParser
from xinference.protocol.generation import (
    Delta,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)

WEATHER = {"type": "object", "properties": {"city": {"type": "string"}, "days": {}}}
TOOLS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "get_time": {}}


@dataclass
class Answer:
    """An answer put together, and whether its order was kept."""

    content: str = ""
    reasoning: str = ""
    calls: list[list[str]] = field(default_factory=list)
    """Name and arguments of each."""
    order: list[str] = field(default_factory=list)
    num_complete: int = 0

    @property
    def parsed(self) -> list[tuple[str, Any]]:
        return [(name, json.loads(arguments)) for name, arguments in self.calls]


def parser_of(name: str | None, *, thinks: bool = False, prompt: str = "") -> AnswerParser:
    numbers = itertools.count()
    tags = ("<think>", "</think>") if thinks else (None, None)
    answers = AnswerFormat(tool_parser=name, reasoning_start_tag=tags[0], reasoning_end_tag=tags[1])
    parser = answers.parser(prompt=prompt, tools=TOOLS, new_call_id=lambda: f"{next(numbers):024d}")
    assert parser is not None
    return parser


def read(parser: AnswerParser, pieces: list[str]) -> Answer:
    answer = Answer()
    deltas: list[Delta] = []
    for piece in pieces:
        deltas += parser.push(piece)
    deltas += parser.finish()
    for delta in deltas:
        match delta:
            case TextDelta(text=text):
                kind, answer.content = "content", answer.content + text
            case ReasoningDelta(text=text):
                kind, answer.reasoning = "reasoning", answer.reasoning + text
            case ToolCallStart(index=index, name=name):
                assert index == len(answer.calls)
                kind = f"call {index}"
                answer.calls.append([name, ""])
            case ToolCallArguments(index=index, text=text):
                assert index == len(answer.calls) - 1
                kind = f"call {index}"
                answer.calls[index][1] += text
        if answer.order[-1:] != [kind]:
            answer.order.append(kind)
    answer.num_complete = parser.num_complete_calls
    return answer


def whole(name: str | None, text: str, **options: Any) -> Answer:
    return read(parser_of(name, **options), [text])


# --- what models write

ONE = [("get_weather", {"city": "Paris", "days": 3})]
TWO = [*ONE, ("get_time", {})]

BEGIN, END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END, SEP = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", "<｜tool▁sep｜>"
ARGUMENTS = '{"city": "Paris", "days": 3}'

WRITTEN: list[tuple[str, str, Any]] = [
    (
        "qwen",
        f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>',
        ONE,
    ),
    (
        "qwen",
        f'<tool_call>\n{{"arguments": {ARGUMENTS}, "name": "get_weather"}}\n</tool_call>\n'
        '<tool_call>\n{"name": "get_time", "arguments": {}}\n</tool_call>',
        TWO,
    ),
    ("qwen", f'<tool_call>{{"name":"get_weather","arguments":{json.dumps(ARGUMENTS)}}}', ONE),
    ("qwen", '<tool_call>\n{"name": "get_time"}\n</tool_call>', TWO[1:]),
    ("qwen", '<tool_call>\n{"name": "get_time", "arguments": null}\n</tool_call>', TWO[1:]),
    ("llama3", f'{{"name": "get_weather", "parameters": {ARGUMENTS}}}', ONE),
    (
        "llama3",
        f'<|python_tag|>{{"type": "function", "name": "get_weather", "parameters": {ARGUMENTS}}}; '
        '{"name": "get_time", "parameters": {}}',
        TWO,
    ),
    (
        "mistral",
        f'[TOOL_CALLS] [{{"name": "get_weather", "arguments": {ARGUMENTS}}}, '
        '{"name": "get_time", "arguments": {}, "id": "abcdefghi"}]',
        TWO,
    ),
    ("mistral", f"[TOOL_CALLS]get_weather[ARGS]{ARGUMENTS}[TOOL_CALLS]get_time[ARGS]{{}}", TWO),
    ("mistral", f"[TOOL_CALLS]get_weather[CALL_ID]abcdefghi[ARGS]{ARGUMENTS}", ONE),
    ("mistral", f"[TOOL_CALLS]get_weather{ARGUMENTS}", ONE),
    (
        "deepseek-v3",
        f"{BEGIN}{CALL}function{SEP}get_weather\n```json\n{ARGUMENTS}\n```{CALL_END}\n"
        f"{CALL}function{SEP}get_time\n```json\n{{}}\n```{CALL_END}{END}",
        TWO,
    ),
    (
        "deepseek-v3.1",
        f"{BEGIN}{CALL}get_weather{SEP}{ARGUMENTS}{CALL_END}{CALL}get_time{SEP}{{}}{CALL_END}{END}",
        TWO,
    ),
    ("glm4", f"get_weather\n{ARGUMENTS}", ONE),
    ("glm4", f"\nget_weather\n{ARGUMENTS}<|assistant|>get_time\n{{}}", TWO),
    (
        "glm4.5",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n"
        "<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call>\n"
        "<tool_call>get_time\n</tool_call>",
        TWO,
    ),
    (
        "glm4.5",
        "<tool_call>get_weather<arg_key>city</arg_key><arg_value>Paris</arg_value>"
        "<arg_key>days</arg_key><arg_value>3</arg_value></tool_call>",
        ONE,
    ),
    (
        "harmony",
        "<|channel|>commentary to=functions.get_weather <|constrain|>json<|message|>"
        f"{ARGUMENTS}<|call|>",
        ONE,
    ),
    (
        "harmony",
        f" to=functions.get_weather<|channel|>commentary json<|message|>{ARGUMENTS}<|call|>"
        "<|start|>assistant<|channel|>commentary to=functions.get_time<|message|>{}",
        TWO,
    ),
    (
        "gemma",
        '<|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>'
        "<|tool_call>call:get_time{}<tool_call|>",
        TWO,
    ),
    (
        "gemma",
        "<start_function_call>call:get_weather{city:<escape>Paris<escape>,days:3}"
        "<end_function_call>",
        ONE,
    ),
]
"""A grammar, what a model wrote in it, and the calls in it."""

TEXTS = [text for _, text, _ in WRITTEN]
FINAL = {"harmony": "<|start|>assistant<|channel|>final<|message|>"}
"""What comes before text in a grammar that has no text outside of messages."""


def test_every_grammar_can_be_named_by_a_family_and_is_tested() -> None:
    assert GRAMMARS.keys() <= set(TOOL_PARSERS)
    assert set(GRAMMARS.values()) == {GRAMMARS[name] for name, _, _ in WRITTEN}


@pytest.mark.parametrize(("name", "text", "calls"), WRITTEN)
def test_calls_are_read(name: str, text: str, calls: Any) -> None:
    answer = whole(name, text)

    assert answer.parsed == calls
    assert answer.num_complete == len(calls)
    assert answer.content == answer.reasoning == ""


@pytest.mark.parametrize(("name", "text", "calls"), WRITTEN)
def test_text_around_calls_is_kept(name: str, text: str, calls: Any) -> None:
    before = "Let me look.\n"
    if name == "harmony":
        text = f"<|channel|>final<|message|>{before}<|end|><|start|>assistant{text.lstrip()}"
        text = text.replace("assistantto=", "assistant to=")
    elif name == "glm4":
        text = f"{before}<|assistant|>{text.lstrip()}"
    elif name == "llama3":
        text = f"{before}<|python_tag|>{text.removeprefix('<|python_tag|>')}"
    else:
        text = before + text

    answer = whole(name, text)
    after = whole(name, f"{text}{FINAL.get(name, '')} Done.")

    assert answer.parsed == after.parsed == calls
    assert answer.content == "Let me look."
    assert answer.order == ["content", *(f"call {index}" for index in range(len(calls)))]
    assert after.content.startswith("Let me look.\n")
    assert after.content.endswith("Done.")


@pytest.mark.parametrize("name", [*GRAMMARS])
@pytest.mark.parametrize(
    "text",
    [
        "Hello!",
        "  A line.\n\n  Another. \n",
        '{"name": "Bob", "age": 3}',
        '[{"a": 1}]',
        "a < b, <tool>, [TOOL] and <|x|>",
        "get_weather is a function\n",
        "",
    ],
)
def test_a_plain_answer_is_content_as_it_was_written(name: str, text: str) -> None:
    answer = whole(name, text)

    assert (answer.content, answer.calls) == (text, [])


MALFORMED = [
    ("qwen", '<tool_call>\n{"name": "get_time", "arguments": oops}\n</tool_call> end'),
    ("qwen", "<tool_call>\nget_time()\n</tool_call>"),
    ("qwen", '<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>'),
    ("qwen", '<tool_call>\n{"arguments": {"a": 1}}\n</tool_call>'),
    ("qwen", '<tool_call>\n{"name": "\\ud800", "arguments": {}}\n</tool_call>'),
    ("qwen", '<tool_call>\n{"name": "get_time", "arguments"'),
    ("llama3", '<|python_tag|>brave_search.call(query="x")'),
    ("llama3", '{"name": "unknown", "parameters": {}}'),
    ("mistral", "[TOOL_CALLS] nothing to see\n here"),
    ("mistral", "[TOOL_CALLS] [5]"),
    ("deepseek-v3", f"{BEGIN} {CALL}function{SEP}get_time\nno json{CALL_END}{END}"),
    ("deepseek-v3", f"{BEGIN} and no call"),
    ("glm4", "get_weather\nis a function"),
    ("glm4.5", "<tool_call>get_weather\nfor Paris</tool_call>"),
    ("harmony", "<|channel|>commentary to=browser.search<|message|>cats"),
    ("gemma", "<|tool_call>get_weather()<tool_call|>"),
]


@pytest.mark.parametrize(("name", "text"), MALFORMED)
def test_what_is_no_call_is_content_as_it_was_written(name: str, text: str) -> None:
    for sort in (text, f"So: {text}") if name not in ("llama3", "glm4", "harmony") else (text,):
        answer = whole(name, sort)

        assert (answer.content, answer.calls, answer.num_complete) == (sort, [], 0)


@pytest.mark.parametrize(
    ("name", "text"), [*MALFORMED, *((name, text) for name, text, _ in WRITTEN)]
)
def test_character_by_character_it_is_the_same(name: str, text: str) -> None:
    for sort in (text, f"So: {text}", f"{text} End.", text + text, text[: len(text) // 2] + text):
        assert read(parser_of(name), list(sort)) == whole(name, sort)
        assert read(parser_of(name, thinks=True), list(sort)) == whole(name, sort, thinks=True)


def test_arguments_that_break_off_stay_told_and_the_rest_is_content() -> None:
    answer = whole(
        "qwen", '<tool_call>\n{"name": "get_time", "arguments": {"a": [1, oops]}}\n</tool_call>'
    )

    assert answer.calls == [["get_time", '{"a": [1, ']]
    assert answer.content == "oops]}}\n</tool_call>"
    assert answer.num_complete == 0


def test_a_call_without_tools_is_content() -> None:
    assert AnswerFormat(tool_parser="qwen").parser(prompt="", tools={}, new_call_id=str) is None


def test_ids_are_as_templates_want_them() -> None:
    text = '[TOOL_CALLS] [{"name": "get_time", "arguments": {}}]'
    (start,) = [d for d in parser_of("mistral").push(text) if isinstance(d, ToolCallStart)]
    assert start.call_id == "0" * 9

    text = '<tool_call>{"name": "get_time", "arguments": {}}'
    (start,) = [d for d in parser_of("qwen").push(text) if isinstance(d, ToolCallStart)]
    assert start.call_id == f"call_{'0' * 24}"


def test_a_long_argument_is_told_while_it_is_written() -> None:
    for name, begin in (
        ("qwen", '<tool_call>{"name": "get_weather", "arguments": {"city": "'),
        ("glm4.5", "<tool_call>get_weather\n<arg_key>city</arg_key><arg_value>"),
        ("gemma", '<|tool_call>call:get_weather{city:<|"|>'),
    ):
        parser = parser_of(name)
        parser.push(begin)
        assert parser.push("Par") == [ToolCallArguments(index=0, text="Par")], name


def test_values_follow_the_schema_where_a_grammar_does_not_quote() -> None:
    answer = whole(
        "glm4.5",
        "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>12</arg_value>\n"
        '<arg_key>days</arg_key>\n<arg_value>[1, "a"]</arg_value>\n'
        "<arg_key>other</arg_key>\n<arg_value>in\nwords</arg_value>\n</tool_call>",
    )

    assert answer.parsed == [
        ("get_weather", {"city": "12", "days": [1, "a"], "other": "in\nwords"})
    ]


def test_gemmas_nested_values_become_json() -> None:
    answer = whole(
        "gemma",
        '<|tool_call>call:get_time{a:{b:[1,<|"|>x"y\n<|"|>,true],c:{}},d:null,e:[]}<tool_call|>',
    )

    assert answer.parsed == [
        ("get_time", {"a": {"b": [1, 'x"y\n', True], "c": {}}, "d": None, "e": []})
    ]


# --- reasoning


@pytest.mark.parametrize(
    ("prompt", "text", "reasoning", "content"),
    [
        ("", "<think>\nHm.\n</think>\n\nHi!", "Hm.", "Hi!"),
        ("", "\n<think>Hm.</think>Hi!", "Hm.", "Hi!"),
        ("assistant\n<think>\n", "Hm. \n Yes.\n</think>\n\nHi!\n", "Hm. \n Yes.", "Hi!\n"),
        ("<think>\n", "<think>\nHm.</think>Hi!", "Hm.", "Hi!"),
        ("<think>\n\n</think>\n\n", "Hi <think>!", "", "Hi <think>!"),
        ("", " Hi <think>x</think>", "", " Hi <think>x</think>"),
        ("<think>\n", "Hm. \n", "Hm. \n", ""),
        ("", "<think>\n\n</think>\n\nHi!", "", "Hi!"),
        ("", "<thin", "", "<thin"),
    ],
)
def test_thoughts_are_split_off(prompt: str, text: str, reasoning: str, content: str) -> None:
    answer = whole(None, text, thinks=True, prompt=prompt)

    assert (answer.reasoning, answer.content) == (reasoning, content)


def test_a_call_after_the_thoughts_is_read_and_one_inside_is_not() -> None:
    call = WRITTEN[0][1]

    answer = whole("qwen", f"<think>\nI could {call}.\n</think>\n\n{call}", thinks=True)

    assert answer.reasoning == f"I could {call}."
    assert answer.parsed == ONE
    assert answer.content == ""


def test_harmonys_channels_are_thoughts_and_content() -> None:
    answer = whole(
        "harmony",
        "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Hi!",
    )

    assert (answer.reasoning, answer.content) == ("Hm.", "Hi!")


# --- properties

MARKERS = sorted(
    {token for grammar in GRAMMARS.values() for token in grammar.special_tokens}
    | {
        "<think>",
        "</think>",
        "call:",
        "get_time",
        "get_weather",
        "```json\n",
        "to=functions.",
        "\n",
    }
    | {'{"name": "get_time", "arguments": ', '"city"', "{", "}", "[", "]", ",", ":", '"', " ", "\\"}
    | {"true", "-1.5e3", "é☃𝄞", "analysis", "final", "x"}
)
soups = st.lists(st.sampled_from(MARKERS), max_size=25).map("".join)
"""Texts of the pieces that grammars are made of, in any order."""
changed = st.tuples(
    st.sampled_from(TEXTS), st.integers(0, 400), st.integers(0, 12), st.sampled_from(MARKERS)
).map(lambda it: it[0][: it[1]] + it[3] + it[0][it[1] + it[2] :])
"""Real calls with a piece of them replaced."""
texts = st.one_of(
    soups,
    changed,
    st.tuples(st.sampled_from(["", "Hi ", "<think>Hm. </think>\n"]), st.sampled_from(TEXTS)).map(
        "".join
    ),
    st.text(max_size=30),
)


@st.composite
def cut(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A text, possibly truncated, and the same in pieces."""
    text = draw(texts)
    text = text[: draw(st.integers(0, len(text)))] if draw(st.booleans()) else text
    if draw(st.booleans()):
        return text, list(text)
    cuts = sorted(draw(st.lists(st.integers(0, len(text)), max_size=8)))
    return text, [text[i:j] for i, j in itertools.pairwise([0, *cuts, len(text)])]


@pytest.mark.parametrize("name", [*dict.fromkeys(GRAMMARS), None])
@pytest.mark.parametrize("thinks", [False, True])
@settings(max_examples=60, deadline=None)
@given(case=cut(), is_open=st.booleans())
def test_pieces_of_any_size_say_what_the_whole_says(
    name: str | None, thinks: bool, case: tuple[str, list[str]], is_open: bool
) -> None:
    if name is None and not thinks:
        return
    text, pieces = case
    prompt = "<think>\n" if is_open else ""

    answer = whole(name, text, thinks=thinks, prompt=prompt)

    assert read(parser_of(name, thinks=thinks, prompt=prompt), pieces) == answer
    parsed = 0
    for _, arguments in answer.calls:
        try:
            json.loads(arguments)
        except ValueError:
            continue
        parsed += 1
    assert answer.num_complete <= parsed
    if not answer.calls and not thinks and name != "harmony":
        assert answer.content == text


@pytest.mark.parametrize(("name", "text", "calls"), WRITTEN)
def test_every_truncation_keeps_what_was_told(name: str, text: str, calls: Any) -> None:
    full = whole(name, text)
    for length in range(len(text)):
        answer = whole(name, text[:length])
        for told, all_of_it in zip(answer.calls, full.calls, strict=False):
            assert told[0] == all_of_it[0]
            # Half of an end marker is text, as long as nothing follows it.
            assert all_of_it[1].startswith(told[1].partition("<")[0])
        assert len(answer.calls) <= len(calls)
        if not answer.calls:
            assert answer.content == text[:length]
