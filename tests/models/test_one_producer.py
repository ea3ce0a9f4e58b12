# SPDX-License-Identifier: Apache-2.0
"""Streamed and whole answers are one answer, and the one that its tokens spell.

A model of a real engine writes a text that was made up before: calls whole and broken, thoughts,
characters of four bytes, text beside them. It is cut by `max_tokens` and by stop texts, and made
several times over. What is streamed must be what is told in one piece, and both must be what
comes out if all tokens of an answer are decoded and read at once.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.api.conftest import chunks_of
from tests.long_runs import RecordLongRun
from xinference.api.openai.chat import ChatForm
from xinference.engine.batch import Batch
from xinference.models.answer import AnswerReader, AnswerReaders
from xinference.models.language import LanguageModel
from xinference.models.parsing.grammars import GRAMMARS, AnswerFormat
from xinference.protocol.generation import (
    Accepted,
    ChatPrompt,
    Delta,
    Finished,
    FinishReason,
    Message,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    Usage,
)

from .parsing.test_call_rules import END, NAMES, tokenizer
from .parsing.test_grammars import TOOLS as SCHEMAS
from .parsing.test_grammars import WRITTEN, parser_of, soups
from .running import Running, random_weights
from .test_forced_calls import TEMPLATE

NUM_EXAMPLES_OF_CI = 8
NUM_EXAMPLES = 500
MAX_SCRIPT_BYTES = 300
TAGS = {"reasoning_start_tag": "<think>", "reasoning_end_tag": "</think>"}
TOOLS = tuple(
    {"type": "function", "function": {"name": name, "parameters": schema or {"type": "object"}}}
    for name, schema in SCHEMAS.items()
)


class Script:
    """In the place of a model: the logits of a text, in which digits may become the next ones."""

    def __init__(self, vocab_size: int, digits: list[int]) -> None:
        self._vocab_size = vocab_size
        self._next = dict(zip(digits, [*digits[1:], digits[0]], strict=True))
        self._token_ids: list[int] = []
        self._first: int | None = None

    def say(self, token_ids: list[int]) -> None:
        self._token_ids, self._first = token_ids, None

    def forward(self, batch: Batch) -> torch.Tensor:
        positions = np.asarray(batch.positions)[np.asarray(batch.sample_tokens)]
        logits = torch.zeros(len(positions), self._vocab_size)
        for row, position in enumerate(positions.tolist()):
            # The first position that is asked for is the prompt's last.
            self._first = position if self._first is None else self._first
            token_id = self._token_ids[position - self._first]
            logits[row, token_id] = logits[row, self._next.get(token_id, token_id)] = 1e4
        return logits


class Player:
    """A running model of one form, and the script that it plays."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.answers = AnswerFormat(tool_parser=name, **TAGS)
        markers = self.answers.special_tokens
        self.running: Running = random_weights(
            lambda: tokenizer(markers), tool_parser=name, chat_template=TEMPLATE, **TAGS
        )
        model: LanguageModel = self.running.model
        self.tokenizer = tokenizer(markers)
        self.markers = {self.tokenizer.convert_tokens_to_ids(one): one for one in markers}
        self.end = self.tokenizer.convert_tokens_to_ids(END)
        digits = self.tokenizer.convert_tokens_to_ids(list("0123456789"))
        self.script = Script(model._engine.vocab_size, digits)
        model._engine._runner = self.script  # type: ignore[assignment]

    def ids(self, text: str) -> list[int]:
        token_ids: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return token_ids

    def text(self, token_ids: list[int]) -> str:
        pieces = []
        for is_marker, group in itertools.groupby(token_ids, lambda one: one in self.markers):
            ids = list(group)
            pieces += [self.markers[one] for one in ids] if is_marker else [self._decoded(ids)]
        return "".join(pieces)

    def _decoded(self, token_ids: list[int]) -> str:
        return str(self.tokenizer.decode(token_ids, skip_special_tokens=True))


@dataclass(frozen=True)
class Case:
    """What is written, and how it is asked for."""

    text: str
    n: int
    max_tokens: int | None
    stop: tuple[str, ...]
    has_tools: bool
    parallel: bool
    is_open: bool
    seed: int

    @property
    def prompt(self) -> ChatPrompt:
        return ChatPrompt(
            messages=(Message(role="user", content="hi"),),
            tools=TOOLS if self.has_tools else (),
            parallel_tool_calls=self.parallel,
            enable_thinking=self.is_open,
        )


@st.composite
def cases(draw: st.DrawFn, name: str) -> Case:
    written = [text for form, text, _ in WRITTEN if GRAMMARS[form] is GRAMMARS[name]]
    calls = st.lists(st.sampled_from(written), max_size=2).map("\n".join)
    plain = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
    thought = st.one_of(st.just(""), plain.map(lambda it: f"<think>\n{it} 12</think>\n\n"))
    text = draw(
        st.one_of(
            st.tuples(thought, plain, calls, plain).map("".join),
            st.tuples(thought, plain, soups).map("".join),
        )
    )
    text = text.replace(END, "").encode()[:MAX_SCRIPT_BYTES].decode(errors="ignore")
    begin = draw(st.integers(0, max(0, len(text) - 1)))
    inside = text[begin : begin + draw(st.integers(1, 4))]
    stop = tuple(
        one for one in draw(st.lists(st.sampled_from([inside, "3", "xyz"]), max_size=2)) if one
    )
    return Case(
        text=text,
        n=draw(st.integers(1, 3)),
        max_tokens=draw(st.none() | st.integers(1, 60)),
        stop=stop,
        has_tools=draw(st.booleans()),
        parallel=draw(st.booleans()),
        is_open=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
    )


@dataclass
class Told:
    """What a reader of an answer has."""

    content: str = ""
    reasoning: str = ""
    calls: Any = None
    reason: str = ""


def streamed(form: ChatForm, deltas: list[Delta], finished: Finished, n: int) -> tuple[Any, Any]:
    """Return what a client makes of a stream, and its usage."""
    body = form.opening(Accepted(num_prompt_tokens=1))
    body += b"".join(form.delta(delta) for delta in deltas) + form.ending(finished)
    found = [Told(calls=[]) for _ in range(n)]
    usage = None
    for chunk in map(json.loads, chunks_of(body.decode())[:-1]):
        usage = chunk["usage"] or usage
        for choice in chunk["choices"]:
            told, delta = found[choice["index"]], choice["delta"]
            assert not told.reason, "nothing comes after the end"
            told.content += delta.get("content") or ""
            told.reasoning += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", ()):
                if "id" in call:
                    told.calls.append([call["function"]["name"], ""])
                told.calls[call["index"]][1] += call["function"]["arguments"]
            told.reason = choice["finish_reason"] or told.reason
    return found, usage


def whole(form: ChatForm, deltas: list[Delta], finished: Finished) -> tuple[Any, Any]:
    """Return what a client makes of an answer in one piece, and its usage."""
    body = json.loads(form.whole(deltas, finished))
    found = []
    for choice in sorted(body["choices"], key=lambda one: one["index"]):
        message = choice["message"]
        calls = [
            [call["function"]["name"], call["function"]["arguments"]]
            for call in message.get("tool_calls", ())
        ]
        thought = message.get("reasoning_content", "")
        found.append(Told(message["content"] or "", thought, calls, choice["finish_reason"]))
    return found, body["usage"]


def spelled(player: Player, case: Case, token_ids: list[int], rendered: str) -> Told:
    """Return what these tokens say, all at once."""
    is_ended = token_ids[-1:] == [player.end]
    text = player.text(token_ids[:-1] if is_ended else token_ids)
    # The first to end is what a reader of a stream meets first.
    ends = [(text.find(one) + len(one), text.find(one)) for one in case.stop if one in text]
    reason = FinishReason.STOP if is_ended or ends else FinishReason.LENGTH
    text = text[: min(ends)[1]] if ends else text
    schemas = SCHEMAS if case.has_tools else {}
    parser = player.answers.parser(prompt=rendered, tools=schemas, new_call_id=lambda: "0" * 24)
    deltas: list[Delta] = [TextDelta(text=text)]
    if parser is not None:
        deltas = [*parser.push(text), *parser.finish()]
        num_complete = parser.num_complete_calls
        is_over = case.has_tools and not case.parallel and num_complete > 0
        if is_over:
            starts = [i for i, one in enumerate(deltas) if isinstance(one, ToolCallStart)]
            deltas = deltas[: starts[1]] if len(starts) > 1 else deltas
        if num_complete and (reason is FinishReason.STOP or is_over):
            reason = FinishReason.TOOL_CALLS
    return replace(told_of(deltas), reason=str(reason))


def check(player: Player, case: Case) -> None:
    player.script.say([*player.ids(case.text), player.end])
    rendered = player.running.model.conversation.template.render(case.prompt)
    asked = player.running.request(
        case.prompt,
        n=case.n,
        max_tokens=case.max_tokens,
        stop=case.stop,
        seed=case.seed,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
    )
    deltas, finished = player.running.deltas(asked)
    form = ChatForm(asked, "m", with_usage=True)

    in_pieces, streamed_usage = streamed(form, deltas, finished, case.n)
    at_once, whole_usage = whole(form, deltas, finished)

    assert in_pieces == at_once
    assert streamed_usage == whole_usage
    num_tokens = 0
    for index, told in enumerate(at_once):
        token_ids = [
            token_id
            for delta in deltas
            if delta.choice_index == index and isinstance(delta, TextDelta | ReasoningDelta)
            for token_id in delta.token_ids
        ]
        num_tokens += len(token_ids)
        expected = spelled(player, case, token_ids, rendered)
        if case.has_tools and not case.parallel and expected.calls:
            # The rest of the token that ended the call is not part of the answer.
            expected.content = told.content = ""
        assert told == expected
    assert finished.usage.num_completion_tokens >= num_tokens
    assert finished.usage.num_reasoning_tokens <= num_tokens
    if case.n == 1 and case.parallel:
        assert finished.usage.num_completion_tokens == num_tokens


@pytest.fixture(scope="module", params=NAMES)
def player(request: pytest.FixtureRequest) -> Iterator[Player]:
    made = Player(request.param)
    yield made
    made.running.stop()


def test_a_stream_and_a_whole_answer_say_what_the_tokens_spell(
    player: Player, is_long: bool, record_long_run: RecordLongRun
) -> None:
    counted = {"answers": 0, "with_tools": 0, "opened_thoughts": 0}

    @settings(
        max_examples=NUM_EXAMPLES if is_long else NUM_EXAMPLES_OF_CI,
        derandomize=not is_long,
        deadline=None,
        database=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(case=cases(player.name))
    def run(case: Case) -> None:
        check(player, case)
        counted["answers"] += case.n
        counted["with_tools"] += case.has_tools
        counted["opened_thoughts"] += case.is_open

    run()
    record_long_run("Streamed is whole", **counted)


# --- several answers, each with a text of its own


@settings(max_examples=60, deadline=None)
@given(data=st.data(), name=st.sampled_from(NAMES))
def test_answers_that_come_mixed_are_read_apart(data: st.DataObject, name: str) -> None:
    texts = [data.draw(soups) for _ in range(3)]
    alone = []
    for text in texts:
        reader = AnswerReader(parser_of(name, thinks=True), one_call=False)
        deltas = [*reader.read(TextDelta(text=text)), *reader.finish()]
        alone.append(told_of(deltas))
    readers = AnswerReaders(
        [AnswerReader(parser_of(name, thinks=True), one_call=False) for _ in texts]
    )
    left = [list(text) for text in texts]
    mixed: list[Any] = []
    while any(left):
        index = data.draw(st.sampled_from([i for i, rest in enumerate(left) if rest]))
        num_chars = data.draw(st.integers(1, len(left[index])))
        piece, left[index] = "".join(left[index][:num_chars]), left[index][num_chars:]
        mixed += readers.read(TextDelta(text=piece, choice_index=index, token_ids=(1,)))
    usage = Usage(num_prompt_tokens=1, num_completion_tokens=1)
    *rest, _ = readers.read(Finished(reason=FinishReason.STOP, usage=usage))
    mixed += rest

    for index, expected in enumerate(alone):
        own = [delta for delta in mixed if delta.choice_index == index]
        assert told_of(own) == expected


def told_of(deltas: list[Delta]) -> Told:
    told = Told(calls=[])
    for delta in deltas:
        match delta:
            case TextDelta(text=piece):
                told.content += piece
            case ReasoningDelta(text=piece):
                told.reasoning += piece
            case ToolCallStart(name=called):
                told.calls.append([called, ""])
            case ToolCallArguments(index=index, text=piece):
                told.calls[index][1] += piece
    return told
