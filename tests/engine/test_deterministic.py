# SPDX-License-Identifier: Apache-2.0
"""With `deterministic`, a request's tokens and chunks are its own, whatever runs beside it."""

import random
from collections import defaultdict
from typing import Any

import pytest

from tests.engine.test_oracle import (
    ARCHITECTURES,
    NEW_TOKENS,
    NUM_REQUESTS,
    assert_equals_oracle,
    engine_of,
    oracle,
    prompts,
)
from tests.engine.tiny_engines import BLOCK_SIZE, Transcript, add, run_to_end
from tests.models_tiny import VOCAB_SIZE
from xinference.engine import Engine
from xinference.engine.batch import Batch
from xinference.identifiers import RequestId

Chunks = dict[tuple[int, ...], list[tuple[int, int]]]


def deterministic_engine(architecture: str = "llama", **options: Any) -> Engine:
    return engine_of(architecture, deterministic=True, **options)


def record_chunks(engine: Engine) -> Chunks:
    """Return what will hold, of each prompt by its first tokens, where its chunks begin and end."""
    chunks: Chunks = defaultdict(list)
    begun: dict[int, tuple[int, ...]] = {}
    forward = engine._runner.forward

    def watch(batch: Batch) -> Any:
        for row, (first, last) in enumerate(
            zip(batch.query_starts, batch.query_starts[1:], strict=False)
        ):
            start, end = int(batch.positions[first]), int(batch.positions[last - 1]) + 1
            first_block = int(batch.block_tables[row, 0])
            if start == 0:
                begun[first_block] = tuple(batch.token_ids[first:last].tolist())
            chunks[begun[first_block]].append((start, end))
        return forward(batch)

    class Watched:
        forward = staticmethod(watch)

    engine._runner = Watched()  # type: ignore[assignment]
    return chunks


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_alone_and_in_any_company_the_tokens_are_the_stock_ones(
    architecture: str, is_long: bool
) -> None:
    for history in range(10 if is_long else 1):
        source = random.Random(f"{architecture} {history}")
        seqs = source.choice([1, 3, 8])
        engine = deterministic_engine(
            architecture,
            num_blocks=source.choice([6, 12, 40]),
            max_num_seqs=seqs,
            max_num_batched_tokens=seqs + BLOCK_SIZE * source.choice([1, 2, 5]),
        )
        transcript = Transcript()
        arrivals = source.sample(range(NUM_REQUESTS), NUM_REQUESTS)
        strangers: list[str] = []
        while arrivals or engine.has_work:
            if arrivals and source.random() < 0.4:
                index = arrivals.pop()
                add(engine, str(index), prompts()[index], max_tokens=NEW_TOKENS)
                strangers.append(f"stranger {index}")
                stranger = [source.randrange(VOCAB_SIZE) for _ in range(source.randrange(1, 50))]
                add(engine, strangers[-1], stranger, max_tokens=30, temperature=1.0)
            events = engine.step() if engine.has_work else []
            transcript.take(event for event in events if not event[0].startswith("stranger"))
            if strangers and (not arrivals or source.random() < 0.1):
                engine.abort(RequestId(strangers.pop()))

        assert_equals_oracle(architecture, transcript)


def test_each_alone_gives_what_all_together_give() -> None:
    alone = {}
    for index, prompt in enumerate(prompts()):
        engine = deterministic_engine()
        add(engine, "r", prompt, max_tokens=NEW_TOKENS)
        alone[index] = tuple(run_to_end(engine).token_ids["r"])

    assert tuple(alone.values()) == oracle("llama")


def test_seeded_answers_are_the_same_in_any_company() -> None:
    def ask(names: range) -> dict[str, list[int]]:
        engine = deterministic_engine(max_num_batched_tokens=8 + BLOCK_SIZE)
        for index in names:
            add(engine, str(index), prompts()[index], max_tokens=30, temperature=1.0, seed=index)
        return run_to_end(engine).token_ids

    together = ask(range(NUM_REQUESTS))

    for index in range(NUM_REQUESTS):
        assert ask(range(index, index + 1)) == {str(index): together[str(index)]}


def test_a_prompt_is_cut_at_the_same_places_in_any_company() -> None:
    def ask(names: range) -> Chunks:
        engine = deterministic_engine(
            max_num_batched_tokens=8 + BLOCK_SIZE, enable_prefix_caching=False
        )
        chunks = record_chunks(engine)
        for index in names:
            add(engine, str(index), prompts()[index], max_tokens=NEW_TOKENS)
        run_to_end(engine)
        return chunks

    together = ask(range(NUM_REQUESTS))

    assert len(together) == NUM_REQUESTS
    for index in range(NUM_REQUESTS):
        for begun, chunks in ask(range(index, index + 1)).items():
            assert together[begun] == chunks


def test_a_deterministic_engine_that_runs_out_of_memory_still_answers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    engine = deterministic_engine(max_num_batched_tokens=8 + BLOCK_SIZE)
    forward = type(engine._runner).forward

    def fails(runner: Any, batch: Batch) -> Any:
        if len(batch.token_ids) > 10:
            raise MemoryError
        return forward(runner, batch)

    monkeypatch.setattr(type(engine._runner), "forward", fails)
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)

    assert_equals_oracle("llama", run_to_end(engine))
