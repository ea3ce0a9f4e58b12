# SPDX-License-Identifier: Apache-2.0
"""What the engine draws follows the law that its parameters name, from prompt to token.

The reference is plain: a stock model's logits, changed by the book, and a law made by sorting.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_choices import Answers
from tests.engine.test_sampler import chi_square_fits, law
from tests.engine.tiny_engines import add, tiny_engine
from tests.models_tiny import make_model, make_tokenizer
from xinference.engine import Engine
from xinference.engine.token_bytes import word_tokens
from xinference.identifiers import RequestId

PROMPT = [*range(60, 90), 60, 61]
NUM_ANSWERS = 128
NUM_ROUNDS = 8
SHAPES = ("temperature", "top_k", "top_p", "min_p", "typical_p")
BAD_WORD = make_tokenizer().decode([70])

LAWS: list[dict[str, Any]] = [
    {"repetition_penalty": 1.6},
    {"repetition_penalty": 0.6, "temperature": 0.7},
    {"logit_bias": {5: 3.0, 61: -4.0, 9: 2.5}},
    {"bad_words": (BAD_WORD,)},
    {"min_tokens": 2, "stop_token_ids": (64, 65, 90)},
    {"presence_penalty": 2.0, "frequency_penalty": 1.0},
    {"repetition_penalty": 1.4, "logit_bias": {12: 2.0}, "temperature": 1.3, "top_k": 40},
    {"logit_bias": {8: 2.0, 9: 2.0}, "top_p": 0.7, "min_p": 0.02, "temperature": 0.8},
    {
        "repetition_penalty": 1.2,
        "presence_penalty": 1.0,
        "frequency_penalty": 0.5,
        "logit_bias": {8: 3.0, 99: 2.0},
        "bad_words": (BAD_WORD,),
        "min_tokens": 2,
        "stop_token_ids": (99,),
        "temperature": 1.2,
        "top_k": 90,
        "top_p": 0.95,
        "min_p": 0.01,
        "typical_p": 0.95,
    },
]


def reference(sampling: dict[str, Any], generated: list[int]) -> np.ndarray:
    """Return the probabilities of the token after the prompt and what was generated."""
    with torch.inference_mode():
        stock = make_model("llama")(torch.tensor([PROMPT + generated])).logits[0, -1]
    logits = stock.double().clone()
    for token_id, bias in sampling.get("logit_bias", {}).items():
        logits[token_id] += bias
    for word in sampling.get("bad_words", ()):
        for way in word_tokens(make_tokenizer(), word):
            if len(way) == 1:
                logits[way[0]] = -torch.inf
    if len(generated) < sampling.get("min_tokens", 0):
        ends = [*sampling.get("stop_token_ids", ()), *sorted(tiny_engine().eos_token_ids)]
        logits[ends] = -torch.inf
    repetition = sampling.get("repetition_penalty", 1.0)
    for token_id in {*PROMPT, *generated}:
        value = logits[token_id]
        logits[token_id] = value * repetition if value < 0 else value / repetition
    for token_id in {*generated}:
        logits[token_id] -= sampling.get("presence_penalty", 0.0)
        logits[token_id] -= sampling.get("frequency_penalty", 0.0) * generated.count(token_id)
    return law(logits, **{name: sampling[name] for name in SHAPES if name in sampling})


def answers_of(engine: Engine, sampling: dict[str, Any], *, seed: int, max_tokens: int) -> Answers:
    given = {"temperature": 1.0, **sampling, "seed": seed, "max_tokens": max_tokens}
    add(engine, "r", PROMPT, n=NUM_ANSWERS, **given)
    answers = Answers()
    while engine.has_work:
        answers.take(engine.step(), "r")
    return answers


@pytest.mark.parametrize("sampling", LAWS, ids=str)
def test_first_tokens_follow_the_law(sampling: dict[str, Any]) -> None:
    engine = tiny_engine(max_num_seqs=NUM_ANSWERS)
    drawn: list[int] = []
    for index in range(NUM_ROUNDS):
        answers = answers_of(engine, sampling, seed=index * NUM_ANSWERS, max_tokens=2)
        drawn += [token_ids[0] for token_ids in answers.token_ids.values()]

    assert len(drawn) == NUM_ANSWERS * NUM_ROUNDS
    assert chi_square_fits(drawn, reference(sampling, []))


@pytest.mark.parametrize("sampling", LAWS[5:], ids=str)
def test_later_tokens_follow_the_law_of_what_came_before(sampling: dict[str, Any]) -> None:
    """Every answer has a law of its own; that of each drawn token is uniform under it."""
    engine = tiny_engine(max_num_seqs=NUM_ANSWERS)
    answers = answers_of(engine, sampling, seed=7, max_tokens=6)

    source = np.random.default_rng(0)
    numbers = []
    for token_ids in list(answers.token_ids.values())[:60]:
        for place in range(1, len(token_ids)):
            probabilities = reference(sampling, token_ids[:place])
            share = probabilities[token_ids[place]]
            assert share > 0
            below = probabilities[: token_ids[place]].sum()
            numbers.append(below + share * source.random())

    counts = np.histogram(numbers, bins=10, range=(0.0, 1.0 + 1e-9))[0]
    assert chi_square_fits(np.repeat(np.arange(10), counts).tolist(), np.full(10, 0.1))


def test_a_seed_draws_the_same_alone_in_a_batch_and_after_preemption() -> None:
    sampling = {**LAWS[-1], "stop_token_ids": (), "max_tokens": 40, "ignore_eos": True}
    prompts = {f"r{index}": PROMPT[: 5 + 3 * index] for index in range(6)}
    alone = {}
    for index, (name, prompt) in enumerate(prompts.items()):
        engine = tiny_engine()
        add(engine, name, prompt, **{**sampling, "seed": index})
        alone |= tokens_of(engine)

    for options in ({"max_num_seqs": 8}, {"max_num_seqs": 8, "num_blocks": 8}):
        engine = tiny_engine(**options)
        for index, (name, prompt) in enumerate(prompts.items()):
            add(engine, name, prompt, **{**sampling, "seed": index})
        assert tokens_of(engine) == alone
        assert (engine.counters.num_preemptions > 0) == ("num_blocks" in options)


def tokens_of(engine: Engine) -> dict[RequestId, list[int]]:
    found: dict[RequestId, list[int]] = {}
    while engine.has_work:
        for name, event in engine.step():
            found.setdefault(name, []).extend(getattr(event, "token_ids", ()))
    return found
