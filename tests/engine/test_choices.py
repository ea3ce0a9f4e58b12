# SPDX-License-Identifier: Apache-2.0
"""Several answers of one request: each is the answer of its own seed, and the stream ends once."""

import random
import re
from typing import Any

import pytest

from tests.engine.tiny_engines import Event, add, tiny_engine
from xinference.engine import Engine
from xinference.errors import InternalError
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    Grammar,
    GrammarKind,
    TextDelta,
    TokenLogprob,
)

PROMPT = list(range(60, 90))


class Answers:
    """What one request was told, by answer."""

    def __init__(self) -> None:
        self.texts: dict[int, str] = {}
        self.token_ids: dict[int, list[int]] = {}
        self.logprobs: dict[int, list[TokenLogprob]] = {}
        self.reasons: dict[int, FinishReason] = {}
        self.ends: list[Finished | Failed] = []

    def take(self, events: list[Event], request_id: str) -> None:
        for told, event in events:
            if told != request_id:
                continue
            assert not self.ends, event
            if not isinstance(event, TextDelta):
                self.ends.append(event)
                continue
            assert event.choice_index not in self.reasons, "an answer that has ended goes on"
            self.texts[event.choice_index] = self.texts.get(event.choice_index, "") + event.text
            self.token_ids.setdefault(event.choice_index, []).extend(event.token_ids)
            self.logprobs.setdefault(event.choice_index, []).extend(event.logprobs)
            if event.reason is not None:
                self.reasons[event.choice_index] = event.reason


def answers_of(engine: Engine, **sampling: Any) -> Answers:
    add(engine, "r", PROMPT, **{"temperature": 1.0, "max_tokens": 12, **sampling})
    answers = Answers()
    while engine.has_work:
        answers.take(engine.step(), "r")
        engine.check_invariants()
    assert len(answers.ends) == 1
    assert engine.num_blocks_used == 0
    return answers


def single(seed: int, **sampling: Any) -> Answers:
    return answers_of(tiny_engine(), seed=seed, **sampling)


@pytest.mark.parametrize("num_blocks", [None, 8])
def test_each_answer_is_that_of_its_own_seed(num_blocks: int | None) -> None:
    engine = tiny_engine(num_blocks=num_blocks, max_num_seqs=4)

    answers = answers_of(engine, n=6, seed=40)

    assert [answers.token_ids[i] for i in range(6)] == [
        single(40 + i).token_ids[0] for i in range(6)
    ]
    assert answers.reasons == dict.fromkeys(range(6), FinishReason.LENGTH)
    (end,) = answers.ends
    assert isinstance(end, Finished)
    assert (end.usage.num_prompt_tokens, end.usage.num_completion_tokens) == (30, 72)


def test_the_best_are_those_with_the_highest_mean_logprob() -> None:
    made = [single(5 + i, logprobs=0) for i in range(5)]
    means = [
        sum(one.logprob or 0.0 for one in answers.logprobs[0]) / len(answers.logprobs[0])
        for answers in made
    ]
    best = sorted(range(5), key=lambda i: -means[i])

    two = answers_of(tiny_engine(), n=2, best_of=5, seed=5)
    one = answers_of(tiny_engine(), best_of=5, seed=5)

    assert [two.token_ids[i] for i in range(2)] == [made[i].token_ids[0] for i in best[:2]]
    assert one.token_ids == {0: made[best[0]].token_ids[0]}
    assert not two.logprobs[0], "nobody asked for them"
    (end,) = two.ends
    assert isinstance(end, Finished)
    assert end.usage.num_completion_tokens == 60


def test_the_best_of_long_answers_are_told_in_small_steps() -> None:
    engine = tiny_engine(max_model_len=512)
    add(engine, "r", PROMPT, temperature=1.0, max_tokens=400, seed=1, n=3, best_of=4)
    answers, most = Answers(), 0
    while engine.has_work:
        events = engine.step()
        most = max(most, len(events))
        answers.take(events, "r")

    assert [len(answers.token_ids[i]) for i in range(3)] == [400] * 3
    assert most <= 256
    assert len(answers.ends) == 1


@pytest.mark.parametrize("num_steps", [0, 1, 2, 5])
@pytest.mark.parametrize("best_of", [4, 6])
def test_an_abort_ends_every_answer_at_once(num_steps: int, best_of: int) -> None:
    engine = tiny_engine(max_num_seqs=2)
    add(engine, "r", PROMPT, temperature=1.0, max_tokens=30, n=4, best_of=best_of)
    for _ in range(num_steps):
        engine.step()

    events = engine.abort(RequestId("r"))

    assert [type(event) for _, event in events] == [Finished]
    assert not engine.has_work
    assert engine.num_blocks_used == 0
    assert engine.step() == []
    assert engine.abort(RequestId("r")) == []
    engine.check_invariants()


def test_random_aborts_among_random_requests_leave_nothing_behind() -> None:
    draw = random.Random(0)
    engine = tiny_engine(max_num_seqs=4, num_blocks=14)
    live: dict[str, Answers] = {}
    num_ended = 0
    for number in range(120):
        request_id = f"r{number}"
        n = draw.choice([1, 1, 2, 3])
        add(
            engine,
            request_id,
            PROMPT[: draw.randint(1, 30)],
            temperature=1.0,
            max_tokens=draw.randint(1, 10),
            n=n,
            best_of=n + draw.choice([0, 0, 2]),
            logprobs=draw.choice([None, 1]),
            echo=draw.random() < 0.3,
        )
        live[request_id] = Answers()
        events = engine.step() if draw.random() < 0.8 else []
        if draw.random() < 0.5:
            events = [*events, *engine.abort(RequestId(draw.choice(sorted(live))))]
        for request_id in list(live):
            live[request_id].take(events, request_id)
            if live[request_id].ends:
                num_ended += 1
                del live[request_id]
        engine.check_invariants()
    while engine.has_work:
        events = engine.step()
        for request_id, answers in live.items():
            answers.take(events, request_id)
    assert all(len(answers.ends) == 1 for answers in live.values())
    assert num_ended > 50
    assert engine.num_blocks_used == 0


def test_when_all_is_lost_a_request_hears_of_it_once() -> None:
    engine = tiny_engine()
    add(engine, "many", PROMPT, n=3, max_tokens=30)
    add(engine, "one", PROMPT, max_tokens=30)
    engine.step()
    engine.step()

    events = engine.fail_all(InternalError(where="a test", problem="the end"))

    assert sorted(request_id for request_id, _ in events) == ["many", "one"]
    assert engine.num_blocks_used == 0
    engine.check_invariants()


def test_a_step_that_fails_fails_each_of_its_requests_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = tiny_engine()
    add(engine, "many", PROMPT, n=3, max_tokens=30)
    engine.step()
    engine.step()

    def broken(batch: object) -> object:
        raise RuntimeError("no")

    monkeypatch.setattr(type(engine._runner), "forward", lambda self, batch: broken(batch))
    events = engine.step()

    assert [(request_id, type(event)) for request_id, event in events] == [("many", Failed)]
    assert not engine.has_work
    engine.check_invariants()


def test_each_answer_keeps_to_the_grammar_by_itself() -> None:
    grammar = Grammar(kind=GrammarKind.REGEX, text="(ab|cde){3,6}")

    answers = answers_of(tiny_engine(), n=5, seed=1, max_tokens=60, grammar=grammar)

    assert len(set(answers.texts.values())) > 1
    for index in range(5):
        assert re.fullmatch("(ab|cde){3,6}", answers.texts[index]), answers.texts
        assert answers.reasons[index] is FinishReason.STOP


def test_an_answer_is_ended_alone_and_once() -> None:
    engine = tiny_engine(max_num_seqs=4)
    add(engine, "r", PROMPT, temperature=1.0, max_tokens=12, n=3, seed=1)
    answers = Answers()
    for _ in range(4):
        answers.take(engine.step(), "r")

    answers.take(engine.end_choice(RequestId("r"), 1), "r")
    assert engine.end_choice(RequestId("r"), 1) == []
    while engine.has_work:
        answers.take(engine.step(), "r")
        engine.check_invariants()

    assert answers.reasons == {
        0: FinishReason.LENGTH,
        1: FinishReason.ABORT,
        2: FinishReason.LENGTH,
    }
    assert [len(answers.token_ids[index]) for index in (0, 2)] == [12, 12]
    assert len(answers.token_ids[1]) < 12
    (end,) = answers.ends
    assert isinstance(end, Finished)
    assert end.usage.num_completion_tokens == sum(map(len, answers.token_ids.values()))
    assert engine.num_blocks_used == 0


def test_the_prompt_of_several_answers_is_computed_once() -> None:
    engine = tiny_engine(max_num_seqs=8, block_size=4)

    answers = answers_of(engine, n=6, seed=1)

    (end,) = answers.ends
    assert isinstance(end, Finished)
    assert end.usage.num_cached_tokens == 0
    assert engine.counters.num_cached_tokens == 5 * 28, "seven whole blocks of four"
