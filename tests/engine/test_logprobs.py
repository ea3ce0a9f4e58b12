# SPDX-License-Identifier: Apache-2.0
"""Logprobs are those of a stock forward, whatever the request does to the distribution."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_choices import Answers
from tests.engine.tiny_engines import add, tiny_engine
from tests.models_tiny import make_model, make_tokenizer
from xinference.engine import Engine
from xinference.engine.logprobs import row_logprobs
from xinference.engine.sampler import highest
from xinference.engine.token_bytes import TokenBytes
from xinference.protocol.generation import Grammar, GrammarKind

PROMPT = list(make_tokenizer()("Wörld, hello 世界! and more of it")["input_ids"])


def generate(engine: Engine, prompt: list[int] = PROMPT, **sampling: Any) -> Answers:
    add(engine, "r", prompt, **{"max_tokens": 10, "logprobs": 3, **sampling})
    answers = Answers()
    while engine.has_work:
        answers.take(engine.step(), "r")
    return answers


def stock_logprobs(token_ids: list[int]) -> torch.Tensor:
    """Return (tokens, V) what the stock model says of the token after each."""
    with torch.inference_mode():
        return make_model("llama")(torch.tensor([token_ids])).logits[0].log_softmax(-1)


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.5, "seed": 3, "top_k": 5, "top_p": 0.7},
        {"repetition_penalty": 1.7, "logit_bias": {9: 3.0}, "frequency_penalty": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 5}, {"num_blocks": 6}], ids=str)
@pytest.mark.parametrize("echo", [False, True])
def test_logprobs_are_those_of_a_stock_forward(
    sampling: dict[str, Any], options: dict[str, Any], echo: bool
) -> None:
    answers = generate(tiny_engine(**options), echo=echo, **sampling)

    token_ids = answers.token_ids[0]
    expected = stock_logprobs(PROMPT + token_ids)
    told = answers.logprobs[0]
    if echo:
        assert told[0].logprob is None
        assert [one.token_id for one in told] == PROMPT + token_ids
        told, first = told[1:], 0
    else:
        assert [one.token_id for one in told] == token_ids
        first = len(PROMPT) - 1
    for position, one in enumerate(told, first):
        assert one.logprob == pytest.approx(float(expected[position, one.token_id]), abs=1e-4)
        best = expected[position].topk(3)
        assert [each.logprob for each in one.top] == pytest.approx(best.values.tolist(), abs=1e-4)
        assert [each.token_id for each in one.top] == best.indices.tolist()


def test_offsets_say_where_the_tokens_stand_in_the_text() -> None:
    tokenizer = make_tokenizer()
    answers = generate(tiny_engine(), echo=True, temperature=1.0, seed=4)

    told, text = answers.logprobs[0], answers.texts[0]
    written = b"".join(one.token for one in told)
    assert text.startswith(tokenizer.decode(PROMPT))
    assert [one.text_offset for one in told] == sorted(one.text_offset for one in told)
    for number, one in enumerate(told[: len(PROMPT)]):
        before = b"".join(each.token for each in told[:number]).decode(errors="ignore")
        assert one.text_offset == len(before)
    assert written[: len(tokenizer.decode(PROMPT).encode())].decode() == tokenizer.decode(PROMPT)


def test_a_prompt_of_one_token_is_echoed_without_a_logprob() -> None:
    answers = generate(tiny_engine(), PROMPT[:1], echo=True)

    assert answers.logprobs[0][0].logprob is None
    assert len(answers.logprobs[0]) == 11


def test_several_answers_each_echo_the_prompt() -> None:
    answers = generate(tiny_engine(), echo=True, n=3, temperature=1.0, seed=2)

    starts = [[one.logprob for one in answers.logprobs[i][: len(PROMPT)]] for i in range(3)]
    assert starts[0][1:] == pytest.approx(starts[1][1:], abs=1e-4)
    assert starts[0][1:] == pytest.approx(starts[2][1:], abs=1e-4)
    assert all(len(answers.logprobs[i]) == len(PROMPT) + 10 for i in range(3))


@pytest.mark.parametrize("vocab_size", [30, 513, 6000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_what_log_softmax_says(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = (torch.randn(37, vocab_size, generator=generator) * 3).to(dtype)
    tokens = np.random.default_rng(0).integers(0, vocab_size, 37)

    found = row_logprobs(logits, tokens, 20)

    expected = logits.float().log_softmax(-1)
    best = expected.topk(20)
    assert found.token == pytest.approx(expected[np.arange(37), tokens].numpy(), abs=1e-4)
    assert found.top == pytest.approx(best.values.numpy(), abs=1e-4)
    assert expected.gather(1, torch.from_numpy(found.top_ids)).numpy() == pytest.approx(
        found.top, abs=1e-4
    )


@pytest.mark.parametrize("vocab_size", [256, 300, 4096, 5000])
@pytest.mark.parametrize("count", [1, 5, 20])
def test_the_highest_are_the_highest(vocab_size: int, count: int) -> None:
    scores = torch.randn(20, vocab_size, generator=torch.Generator().manual_seed(count))

    best, ids = highest(scores, count)

    assert torch.equal(best, scores.topk(count).values)
    assert torch.equal(scores.gather(1, ids), best)


def test_the_bytes_of_tokens_add_up_to_the_text() -> None:
    tokenizer = make_tokenizer()
    token_bytes = TokenBytes(tokenizer)
    text = "naïve 世界 🙂 <|im_end|> x"

    token_ids = tokenizer(text)["input_ids"]

    assert b"".join(token_bytes.of(one) for one in token_ids).decode() == text
    assert token_bytes.of(10**6) == b""


def test_a_grammar_leaves_the_models_own_logprobs_as_they_are() -> None:
    grammar = Grammar(kind=GrammarKind.REGEX, text="[a-c]{12}")
    constrained = generate(tiny_engine(), grammar=grammar, temperature=0.0, logprobs=3)
    token_ids = constrained.token_ids[0]
    told = constrained.logprobs[0]

    echoed = generate(tiny_engine(), [*PROMPT, *token_ids], echo=True, max_tokens=1, logprobs=3)

    again = echoed.logprobs[0][len(PROMPT) : len(PROMPT) + len(told)]
    assert [one.token_id for one in again] == [one.token_id for one in told]
    assert [one.logprob for one in again] == pytest.approx([one.logprob for one in told], abs=1e-3)
    assert any(one.top[0].token_id != one.token_id for one in told)


def test_a_prompt_that_is_in_the_cache_is_told_of_all_the_same() -> None:
    engine = tiny_engine(block_size=4)
    first = generate(engine, echo=True)

    second = generate(engine, echo=True)

    told = [[one.logprob for one in answers.logprobs[0]][1:] for answers in (first, second)]
    assert told[0] == pytest.approx(told[1], abs=1e-4)
    assert len(told[1]) == len(PROMPT) - 1 + 10
