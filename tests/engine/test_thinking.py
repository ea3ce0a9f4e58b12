# SPDX-License-Identifier: Apache-2.0
"""Thoughts end when they are as long as they may be, and not before; the rest is as it was."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest

from tests.engine.tiny_engines import Transcript, add, run_to_end, tiny_engine
from tests.models_tiny import make_tokenizer
from xinference.engine import Engine, Frame, ThinkingLimit
from xinference.engine.thinking import LimitedThinking
from xinference.engine.token_bytes import TokenBytes
from xinference.protocol.generation import Finished, FinishReason, Grammar, GrammarKind

TOKENIZER = make_tokenizer()
NUM_WORDS = -(-len(TOKENIZER) // 32)
CLOSING = "\n</think>\n\n"
HOT = {"temperature": 1.5, "top_p": 1.0, "top_k": 0}


def ids(text: str) -> list[int]:
    token_ids: list[int] = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    return token_ids


def limit(num_tokens: int, *, is_open: bool = True, is_first: bool = True) -> ThinkingLimit:
    return ThinkingLimit(
        num_tokens=num_tokens,
        start="<think>",
        end="</think>",
        closing_token_ids=tuple(ids(CLOSING)),
        is_open=is_open,
        is_first=is_first,
    )


def limited(limit: ThinkingLimit) -> LimitedThinking:
    return LimitedThinking(limit, TokenBytes(TOKENIZER).of, None)


def open_ids(matcher: LimitedThinking) -> list[int]:
    bits = np.zeros(NUM_WORDS, np.uint32)
    matcher.fill(bits)
    return [
        int(one) for one in np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little"))
    ]


def write(matcher: LimitedThinking, token_ids: Iterable[int]) -> str:
    """Go on by what has to come, and where anything may, by these; return what was written."""
    wanted = list(token_ids)
    written: list[int] = []
    while wanted:
        may = open_ids(matcher)
        assert wanted[0] in may or len(may) == 1
        written.append(wanted.pop(0) if wanted[0] in may else may[0])
        matcher.accept(written[-1])
    return str(TOKENIZER.decode(written))


# --- where thoughts end


@pytest.mark.parametrize("num_tokens", [0, 1, 5])
def test_thoughts_are_closed_after_as_many_tokens_as_they_may_have(num_tokens: int) -> None:
    thought = ids("abcdefghijkl")

    text = write(limited(limit(num_tokens)), thought)

    head = TOKENIZER.decode(thought[:num_tokens])
    assert text == f"{head}{CLOSING}{TOKENIZER.decode(thought[num_tokens:])}"


def test_thoughts_that_end_by_themselves_are_not_closed() -> None:
    text = "Hm.</think>\n\nand then a long answer, with <think>a tag</think> in it"

    assert write(limited(limit(len(ids("Hm.</think>")) + 1)), ids(text)) == text


def test_thoughts_that_the_answer_begins_are_counted_from_there() -> None:
    thought = ids("abcdef")
    begin = " \n<think>"

    text = write(limited(limit(2, is_open=False)), [*ids(begin), *thought])

    assert text == f"{begin}{TOKENIZER.decode(thought[:2])}{CLOSING}{TOKENIZER.decode(thought[2:])}"


def test_a_tag_in_the_answer_is_no_thought_but_a_message_of_thoughts_is_one_anywhere() -> None:
    text = "So: <think>xyz"

    assert write(limited(limit(1, is_open=False)), ids(text)) == text
    anywhere = write(limited(limit(1, is_open=False, is_first=False)), ids(text))
    assert anywhere == f"So: <think>x{CLOSING}yz"


def test_messages_of_thoughts_have_one_limit_together() -> None:
    given = limited(limit(14, is_open=False, is_first=False))

    text = write(given, ids("<think>ab</think> <think>cdefghij"))

    assert text.startswith("<think>ab</think> <think>")
    assert text.count("</think>") == 2
    assert not text.startswith("<think>ab</think> <think>cdefghij")


def test_nothing_ends_while_thoughts_are_being_closed() -> None:
    given = limited(limit(0))
    accepting = []
    for _ in ids(CLOSING):
        accepting.append(given.is_accepting)
        (token_id,) = open_ids(given)
        given.accept(token_id)

    assert not any(accepting)
    assert given.is_accepting
    assert not given.is_finished


def test_a_fork_goes_its_own_way() -> None:
    first = limited(limit(2))
    first.accept(ids("a")[0])
    second = first.fork()
    first.accept(ids("b")[0])

    assert len(open_ids(first)) == 1
    assert len(open_ids(second)) > 1


# --- in an engine

FRAME = Frame(
    text='start: thoughts SPACE @answer\nthoughts[lazy]: TEXT "</think>"\n'
    "TEXT: /(?s:.*)/\nSPACE: /\\n{0,2}/\n",
    field="response_format",
)
YES = Grammar(kind=GrammarKind.CHOICE, text='["yes", "no"]')


@pytest.fixture(scope="module")
def engine() -> Engine:
    engine = tiny_engine(max_model_len=256, max_num_seqs=16)
    engine.eos_token_ids = frozenset([engine.tokenizer.eos_token_id])
    return engine


def answers(engine: Engine, num_seeds: int, request: dict[str, Any], **sampling: Any) -> Transcript:
    for seed in range(num_seeds):
        add(engine, str(seed), [5, 6, 7], request=request, seed=seed, **HOT, **sampling)
    return run_to_end(engine)


def test_after_its_thoughts_an_answer_keeps_to_its_grammar(engine: Engine) -> None:
    transcript = answers(engine, 12, {"frame": FRAME, "thinking": limit(9)}, grammar=YES)

    for name, text in transcript.texts.items():
        end = transcript.ends[name]
        assert isinstance(end, Finished)
        assert end.reason is FinishReason.STOP
        thoughts, _, answer = text.partition("</think>")
        assert answer.strip("\n") in ("yes", "no")
        assert len(thoughts) > 0


def test_half_a_character_is_finished_before_thoughts_are_closed(engine: Engine) -> None:
    for num_tokens in range(6):
        request = {"frame": FRAME, "thinking": limit(num_tokens)}
        transcript = answers(engine, 16, request, grammar=YES)
        for text in transcript.texts.values():
            assert "\N{REPLACEMENT CHARACTER}" not in text
            assert text.endswith(("</think>\n\nyes", "</think>\n\nno"))


def test_without_a_grammar_only_the_thoughts_are_held(engine: Engine) -> None:
    transcript = answers(engine, 8, {"thinking": limit(6)}, max_tokens=40)

    closed = ids(CLOSING)
    for told in transcript.token_ids.values():
        if len(told) >= 6 + 3 + len(closed):
            # Up to three tokens make half a character a whole one.
            begins = [told[at : at + len(closed)] for at in range(6, 10)]
            assert closed in begins
    assert any(len(told) == 40 for told in transcript.token_ids.values())


@pytest.mark.parametrize("num_bytes", [1, 2, 3, 4])
def test_a_character_is_written_to_its_end_before_thoughts_are_closed(num_bytes: int) -> None:
    character = "\N{MUSICAL SYMBOL G CLEF}"
    pieces = ids(character)
    assert len(pieces) == 4
    given = limited(limit(num_bytes))

    text = write(given, [*pieces, *ids("so")])

    assert text == f"{character}{CLOSING}so"


def test_a_preempted_sequence_goes_on_thinking_where_it_was() -> None:
    asked = {"frame": FRAME, "thinking": limit(30)}
    roomy = answers(tiny_engine(), 6, asked, grammar=YES).texts
    tight_engine = tiny_engine(num_blocks=9, max_num_batched_tokens=16)

    assert answers(tight_engine, 6, asked, grammar=YES).texts == roomy
    assert tight_engine.counters.num_preemptions > 0
