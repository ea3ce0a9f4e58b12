# SPDX-License-Identifier: Apache-2.0
"""Greedy tokens are what `transformers.generate` says of each request alone, whatever happens."""

import itertools
import random
from collections import Counter
from functools import cache
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from tests.architectures import PADDED, PAGED
from tests.engine.tiny_engines import BLOCK_SIZE, Transcript, add, run_to_end, tiny_engine
from tests.long_runs import RecordLongRun
from tests.models_tiny import VOCAB_SIZE, WINDOW, make_model
from xinference.engine import Engine
from xinference.engine.attention.reference import ReferenceAttention
from xinference.identifiers import RequestId
from xinference.protocol.generation import Finished, FinishReason

ARCHITECTURES = (
    "llama",
    "qwen2",
    "qwen3",
    "mistral",
    "gemma2",
    "phi3",
    "gpt2",
    "mixtral",
    "gpt_oss",
    "bloom",
    "deepseek_v3",
    "gptj",
)
"""What is put through everything; the others are in `test_architectures.py`."""
NUM_REQUESTS = 8
NEW_TOKENS = 18
SMALLEST_SAFE_MARGIN = 1e-3
"""Between the best and the second best logit; float32 noise is a thousandth of it."""


@cache
def prompts() -> tuple[tuple[int, ...], ...]:
    """From one token to three blocks; most are longer than the sliding window."""
    source = random.Random(2)
    lens = (1, WINDOW + 1, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, 25, 37, 3 * BLOCK_SIZE)
    return tuple(tuple(source.randrange(VOCAB_SIZE) for _ in range(size)) for size in lens)


def stock_model(architecture: str) -> PreTrainedModel:
    """Return the model as `transformers` would run it."""
    model = make_model(architecture, config=(PAGED | PADDED)[architecture]())
    if model._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    return model


def engine_of(architecture: str, **options: Any) -> Engine:
    """Return a tiny engine of any architecture."""
    return tiny_engine(architecture, make_config=(PAGED | PADDED)[architecture], **options)


@cache
def oracle(architecture: str) -> tuple[tuple[int, ...], ...]:
    """What the stock model generates for each prompt alone."""
    model = stock_model(architecture)
    answers = []
    for prompt in prompts():
        given = torch.tensor([prompt])
        output = model.generate(
            given,
            attention_mask=torch.ones_like(given),
            do_sample=False,
            max_new_tokens=NEW_TOKENS,
            eos_token_id=None,
            pad_token_id=0,
        )
        answers.append(tuple(output[0, len(prompt) :].tolist()))
    return tuple(answers)


def assert_equals_oracle(architecture: str, transcript: Transcript) -> None:
    expected = {str(index): list(answer) for index, answer in enumerate(oracle(architecture))}
    assert transcript.token_ids == expected
    assert {end.reason for end in transcript.ends.values() if isinstance(end, Finished)} == {
        FinishReason.LENGTH
    }


@cache
def smallest_margin(architecture: str) -> float:
    """Between the best and the second best logit, at any token of the oracle's answers."""
    model = stock_model(architecture)
    margins = []
    for prompt, answer in zip(prompts(), oracle(architecture), strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        best = logits.topk(2, dim=1).values
        margins.append(float((best[:, 0] - best[:, 1]).min()))
    return min(margins)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_oracle_has_no_near_ties(architecture: str) -> None:
    assert smallest_margin(architecture) > SMALLEST_SAFE_MARGIN
    assert len({token for answer in oracle(architecture) for token in answer}) > 10


@pytest.mark.parametrize("budget", [1, 3, BLOCK_SIZE, BLOCK_SIZE + 1, 1000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_chunk_size_gives_the_stock_tokens(architecture: str, budget: int) -> None:
    engine = engine_of(architecture, max_num_batched_tokens=budget)
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)

    transcript = run_to_end(engine)

    assert_equals_oracle(architecture, transcript)
    assert engine.num_blocks_used == 0


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_reference_attention_gives_the_stock_tokens(architecture: str) -> None:
    engine = engine_of(architecture, max_num_batched_tokens=21, backend=ReferenceAttention())
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)

    assert_equals_oracle(architecture, run_to_end(engine))


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_pool_so_small_that_it_preempts_gives_the_stock_tokens(architecture: str) -> None:
    engine = engine_of(architecture, num_blocks=7, max_num_batched_tokens=30)
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)

    transcript = run_to_end(engine)

    assert engine.counters.num_preemptions > 0
    assert_equals_oracle(architecture, transcript)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_any_history_gives_the_stock_tokens(
    architecture: str, seed: int, is_long: bool, record_long_run: RecordLongRun
) -> None:
    counted: Counter[str] = Counter()
    for history in range(8 if is_long else 1):
        source = random.Random(f"{architecture} {seed} {history}")
        engine = engine_of(
            architecture,
            num_blocks=source.choice([6, 8, 12, 40]),
            max_num_batched_tokens=source.choice([2, 5, 17, 33, 200]),
            max_num_seqs=source.choice([1, 3, 8]),
        )
        transcript = Transcript()
        arrivals = source.sample(range(NUM_REQUESTS), NUM_REQUESTS)
        strangers: list[str] = []
        numbers = itertools.count()
        while arrivals or engine.has_work:
            if arrivals and source.random() < 0.4:
                index = arrivals.pop()
                add(engine, str(index), prompts()[index], max_tokens=NEW_TOKENS)
            if source.random() < 0.2:
                # Somebody comes, and goes without waiting for the end.
                strangers.append(f"stranger {next(numbers)}")
                length = source.randrange(1, 50)
                prompt = [source.randrange(VOCAB_SIZE) for _ in range(length)]
                add(engine, strangers[-1], prompt, max_tokens=30, temperature=1.0)
            if strangers and source.random() < 0.25:
                engine.abort(RequestId(strangers.pop(source.randrange(len(strangers)))))
            events = engine.step() if engine.has_work else []
            transcript.take(event for event in events if not event[0].startswith("stranger"))
            engine.check_invariants()
            if not arrivals:
                for stranger in strangers:
                    engine.abort(RequestId(stranger))
                strangers.clear()

        assert_equals_oracle(architecture, transcript)
        assert engine.num_blocks_used == 0
        counted += counts_of(engine, num_requests=NUM_REQUESTS + next(numbers))
    record_long_run(
        "Tiny models, random histories", **counted, smallest_margin=smallest_margin(architecture)
    )


def counts_of(engine: Engine, *, num_requests: int) -> Counter[str]:
    """Return what an engine has done, for the table of long runs."""
    counters = engine.counters
    return Counter(
        histories=1,
        steps=counters.num_steps,
        requests=num_requests,
        aborts=counters.num_aborts,
        preemptions=counters.num_preemptions,
        cache_hits=counters.num_cache_hits,
    )


@cache
def alike() -> tuple[tuple[int, ...], ...]:
    """Prompts that begin alike: to the middle of a block, to its end, whole, and not at all."""
    source = random.Random(10)
    stem = tuple(source.randrange(VOCAB_SIZE) for _ in range(3 * BLOCK_SIZE))
    lens = (BLOCK_SIZE, BLOCK_SIZE + 3, 2 * BLOCK_SIZE - 1, 2 * BLOCK_SIZE, 3 * BLOCK_SIZE)
    tails = (0, 1, 5, 0, 0)
    begun = tuple(
        stem[:size] + tuple(source.randrange(VOCAB_SIZE) for _ in range(tail))
        for size, tail in zip(lens, tails, strict=True)
    )
    stranger = tuple(source.randrange(VOCAB_SIZE) for _ in range(2 * BLOCK_SIZE + 1))
    return (*begun, stranger, stem[1:])


@cache
def alike_oracle(architecture: str) -> tuple[tuple[tuple[int, ...], ...], float]:
    """What the stock model generates for each of `alike` alone, and its smallest top-2 margin."""
    model = stock_model(architecture)
    answers, margins = [], []
    for prompt in alike():
        tokens = list(prompt)
        with torch.inference_mode():
            for _ in range(NEW_TOKENS):
                logits = model(torch.tensor([tokens])).logits[0, -1]
                best = logits.topk(2)
                margins.append(float(best.values[0] - best.values[1]))
                tokens.append(int(best.indices[0]))
        answers.append(tuple(tokens[len(prompt) :]))
    return tuple(answers), min(margins)


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prefixes_give_the_stock_tokens_through_any_history(
    architecture: str, seed: int, is_long: bool, record_long_run: RecordLongRun
) -> None:
    answers, margin = alike_oracle(architecture)
    assert margin > SMALLEST_SAFE_MARGIN
    counted: Counter[str] = Counter()
    for history in range(8 if is_long else 2):
        source = random.Random(f"alike {architecture} {seed} {history}")
        engine = engine_of(
            architecture,
            num_blocks=source.choice([6, 9, 14, 60]),
            max_num_batched_tokens=source.choice([5, 17, 33, 200]),
            max_num_seqs=source.choice([1, 3, 8]),
            scheduler_policy=source.choice(["fifo", "prefill_first"]),
        )
        transcript = Transcript()
        expected: dict[str, list[int]] = {}
        arrivals = [index for index in range(len(alike())) for _ in range(3)]
        source.shuffle(arrivals)
        while arrivals or engine.has_work:
            while arrivals and source.random() < 0.5:
                index, name = arrivals.pop(), str(len(arrivals))
                add(
                    engine,
                    name,
                    alike()[index],
                    max_tokens=NEW_TOKENS,
                    request={
                        "cache_salt": source.choice(["", "", "", "other"]),
                        "priority": source.choice([0, 0, 1]),
                        "fairness_key": source.choice("ab"),
                    },
                )
                if source.random() < 0.15:
                    transcript.take(engine.step())
                    engine.abort(RequestId(name))
                    transcript.token_ids.pop(name, None)
                else:
                    expected[name] = list(answers[index])
            transcript.take(engine.step() if engine.has_work else [])
            engine.check_invariants()
        counted += counts_of(engine, num_requests=3 * len(alike()))

        assert {name: transcript.token_ids[name] for name in expected} == expected
        assert engine.num_blocks_used == 0
    assert counted["cache_hits"] > 0
    record_long_run("Tiny models, shared prefixes", **counted, smallest_margin=margin)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_with_and_without_a_cache_the_tokens_are_the_same(architecture: str) -> None:
    answers, _ = alike_oracle(architecture)
    told = []
    for is_kept in (True, False):
        engine = engine_of(architecture, enable_prefix_caching=is_kept)
        transcripts = []
        for _ in range(2):
            for index, prompt in enumerate(alike()):
                add(engine, str(index), prompt, max_tokens=NEW_TOKENS)
            transcripts.append(run_to_end(engine).token_ids)
        told.append((transcripts, engine.counters.num_cache_hits > 0))

    expected = {str(index): list(answer) for index, answer in enumerate(answers)}
    assert told == [([expected, expected], True), ([expected, expected], False)]
