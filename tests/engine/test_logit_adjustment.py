# SPDX-License-Identifier: Apache-2.0
"""Biases, bans and penalties do what transformers' processors do, and touch seen tokens only."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    NoBadWordsLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from tests.engine.tiny_engines import add, run_to_end, tiny_engine
from tests.models_tiny import VOCAB_SIZE, make_model, make_tokenizer
from xinference.engine.logit_adjustment import LogitAdjustment, adjust, needs_adjustment
from xinference.engine.sampling_defaults import resolve_sampling
from xinference.protocol.generation import SamplingParams

PROMPT = [40, 41, 42, 43, 40, 41, 50]
END = 7


def adjustment_of(prompt: list[int], bad_words: Any = (), **given: Any) -> LogitAdjustment:
    return LogitAdjustment(
        resolve_sampling(SamplingParams(**given), SamplingParams()),
        prompt=np.array(prompt, np.int32),
        end_token_ids=frozenset({END}),
        bad_words=bad_words,
    )


def stock_processors(
    num_prompt_tokens: int, *, bad_words: Any = (), **given: Any
) -> list[LogitsProcessor]:
    """Return the processors that `generate` would make of the same parameters."""
    processors: list[LogitsProcessor] = []
    if bias := given.get("logit_bias"):
        processors.append(SequenceBiasLogitsProcessor([[[i], b] for i, b in bias.items()]))
    if bad_words:
        processors.append(NoBadWordsLogitsProcessor([list(w) for w in bad_words], eos_token_id=[]))
    if given.get("min_tokens"):
        processors.append(
            MinNewTokensLengthLogitsProcessor(num_prompt_tokens, given["min_tokens"], [END], "cpu")
        )
    if given.get("repetition_penalty"):
        processors.append(RepetitionPenaltyLogitsProcessor(given["repetition_penalty"]))
    return processors


def openai_penalties(
    logits: torch.Tensor, generated: list[int], *, presence: float, frequency: float
) -> None:
    for token_id in set(generated):
        logits[token_id] -= presence + frequency * generated.count(token_id)


CASES: list[dict[str, Any]] = [
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7},
    {"frequency_penalty": -0.7, "presence_penalty": 0.2},
    {"logit_bias": {40: 5.0, 3: -100.0}},
    {"min_tokens": 6},
    {"bad_words": [(60,), (61, 62), (61, 63, 64)]},
    {
        "logit_bias": {40: 5.0, 3: -2.0, 60: 3.0},
        "bad_words": [(60,), (61, 62)],
        "min_tokens": 4,
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": 0.25,
    },
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_logits_become_what_transformers_makes_of_them(case: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    generated: list[int] = []
    given = {name: value for name, value in case.items() if name != "bad_words"}
    ours = adjustment_of(PROMPT, case.get("bad_words", ()), **given)
    stock = stock_processors(len(PROMPT), **case)
    for token_id in [61, 62, 61, 63, 64, 40, 40, 3, 60, 61]:
        logits = torch.randn(1, 100, generator=generator) * 4
        expected = logits.clone()
        # Why the answer alone for bad words: a word that began in the prompt is not the answer's.
        for processor in stock:
            ids = generated if isinstance(processor, NoBadWordsLogitsProcessor) else None
            context = torch.tensor([PROMPT + generated if ids is None else ids], dtype=torch.long)
            expected = processor(context, expected)
        openai_penalties(
            expected[0],
            generated,
            presence=case.get("presence_penalty", 0.0),
            frequency=case.get("frequency_penalty", 0.0),
        )

        adjusted = adjust(logits, [(0, ours)])

        torch.testing.assert_close(adjusted, expected)
        ours.note(token_id)
        generated.append(token_id)


def test_rows_without_parameters_stay_as_they_are_and_so_do_the_logits() -> None:
    logits = torch.randn(3, 50).bfloat16()
    before = logits.clone()
    ours = adjustment_of([1, 2, 3], repetition_penalty=1.5)

    adjusted = adjust(logits, [(1, ours)])

    assert torch.equal(logits, before)
    assert torch.equal(adjusted[[0, 2]], before[[0, 2]].float())
    changed = torch.nonzero(adjusted[1] != before[1].float()).squeeze(1).tolist()
    assert changed == [1, 2, 3]


def test_many_tokens_are_counted_beyond_the_first_capacity() -> None:
    ours = adjustment_of([], frequency_penalty=1.0)
    for token_id in range(500):
        ours.note(token_id % 250)

    adjusted = adjust(torch.zeros(1, 300), [(0, ours)])

    assert adjusted[0].tolist() == [-2.0] * 250 + [0.0] * 50


def test_plain_parameters_need_nothing() -> None:
    plain = resolve_sampling(SamplingParams(top_k=3, min_p=0.1, n=3), SamplingParams())

    assert not needs_adjustment(plain)


# --- through the engine


def greedy_oracle(prompt: list[int], num_tokens: int, **given: Any) -> list[int]:
    """Return what the stock model says when its logits go through transformers' processors."""
    model = make_model("llama")
    ids = list(prompt)
    penalties = {
        "presence": given.pop("presence_penalty", 0.0),
        "frequency": given.pop("frequency_penalty", 0.0),
    }
    processors = stock_processors(len(prompt), **given)
    for _ in range(num_tokens):
        with torch.inference_mode():
            logits = model(torch.tensor([ids])).logits[:, -1]
        logits = logits.clone()
        for processor in processors:
            logits = processor(torch.tensor([ids]), logits)
        openai_penalties(logits[0], ids[len(prompt) :], **penalties)
        ids.append(int(logits.argmax()))
    return ids[len(prompt) :]


@pytest.mark.parametrize(
    "given",
    [
        {"repetition_penalty": 1.8},
        {"presence_penalty": 2.0, "frequency_penalty": 1.0},
        {"logit_bias": {10: 4.0, 11: 4.0}, "repetition_penalty": 1.4, "frequency_penalty": 0.5},
    ],
    ids=str,
)
@pytest.mark.parametrize("num_blocks", [None, 7])
def test_greedy_answers_follow_the_processed_logits_through_preemption(
    given: dict[str, Any], num_blocks: int | None
) -> None:
    engine = tiny_engine(num_blocks=num_blocks)
    prompts = [[*PROMPT, extra] for extra in (60, 70, 80)]
    for number, prompt in enumerate(prompts):
        add(engine, str(number), prompt, max_tokens=35, **given)

    told = run_to_end(engine)

    assert (engine.counters.num_preemptions > 0) == (num_blocks is not None)
    for number, prompt in enumerate(prompts):
        assert told.token_ids[str(number)] == greedy_oracle(prompt, 35, **given)


def test_bad_words_do_not_come_up() -> None:
    engine = tiny_engine()
    tokenizer = make_tokenizer()
    add(engine, "free", PROMPT, max_tokens=20)
    free = run_to_end(engine).token_ids["free"]
    # Only what the tokenizer writes the same way again is a word.
    singles = [one for one in free if tokenizer(tokenizer.decode([one]))["input_ids"] == [one]]
    pairs = [list(pair) for pair in itertools.pairwise(free)]
    pairs = [one for one in pairs if tokenizer(tokenizer.decode(one))["input_ids"] == one]
    assert singles
    assert pairs

    words = (tokenizer.decode(singles[:1]), tokenizer.decode(pairs[-1]))
    add(engine, "bound", PROMPT, max_tokens=20, bad_words=words)
    bound = run_to_end(engine).token_ids["bound"]

    assert singles[0] not in bound
    assert pairs[-1] not in [bound[i : i + 2] for i in range(len(bound))]


def test_nothing_ends_an_answer_before_its_min_tokens() -> None:
    engine = tiny_engine()
    add(engine, "free", PROMPT, max_tokens=12)
    free = run_to_end(engine)
    token_ids, text = free.token_ids["free"], free.texts["free"]

    add(engine, "token", PROMPT, max_tokens=12, stop_token_ids=(token_ids[2],), min_tokens=8)
    add(engine, "text", PROMPT, max_tokens=12, stop=(text[1],), min_tokens=8)
    told = run_to_end(engine)

    assert token_ids[2] not in told.token_ids["token"][:8]
    assert len(told.token_ids["text"]) >= 8


def test_end_tokens_can_be_ignored_and_stop_strings_kept() -> None:
    engine = tiny_engine()
    add(engine, "free", PROMPT, max_tokens=12)
    free = run_to_end(engine)
    engine.eos_token_ids = frozenset({free.token_ids["free"][3]})
    stop = free.texts["free"][4:6]

    add(engine, "ended", PROMPT, max_tokens=12)
    add(engine, "ignoring", PROMPT, max_tokens=12, ignore_eos=True)
    add(
        engine,
        "kept",
        PROMPT,
        max_tokens=12,
        ignore_eos=True,
        stop=(stop,),
        include_stop_str_in_output=True,
    )
    told = run_to_end(engine)

    assert len(told.token_ids["ended"]) == 4
    assert told.token_ids["ignoring"] == free.token_ids["free"]
    assert told.texts["kept"].endswith(stop)
    assert max(free.token_ids["free"]) < VOCAB_SIZE
