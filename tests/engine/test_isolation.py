# SPDX-License-Identifier: Apache-2.0
"""A request that makes a step fail fails alone; the others get the tokens they would have got."""

import json
import random
from collections.abc import Callable, Sequence

import numpy as np
import pytest
import torch

from tests.engine.tiny_engines import Transcript, add, run_to_end, tiny_engine
from tests.json_schemas import BOUNDED
from xinference.engine import Engine
from xinference.engine.attention.cpu import CpuAttention
from xinference.engine.attention.interface import AttentionBackend
from xinference.engine.attention.native import NativeAttention
from xinference.engine.attention.reference import ReferenceAttention
from xinference.engine.batch import Batch
from xinference.engine.isolation import run_apart
from xinference.engine.model_runner import ModelRunner
from xinference.errors import InternalError
from xinference.identifiers import RequestId
from xinference.protocol.generation import Failed, Finished, Grammar, GrammarKind, TextDelta

POISON = 1
"""A token that no other prompt has, nor any answer: it is a special one."""
OTHERS = {f"other {index}": [20 + index] * (3 + 5 * index) for index in range(6)}


class Faulty:
    """A runner with a fault; `fault` sees each batch and the logits it would give."""

    def __init__(
        self, engine: Engine, fault: Callable[[Batch, torch.Tensor], torch.Tensor]
    ) -> None:
        self._runner: ModelRunner = engine._runner
        self._fault = fault
        engine._runner = self  # type: ignore[assignment]

    def forward(self, batch: Batch) -> torch.Tensor:
        return self._fault(batch, self._runner.forward(batch))


def rows_with_poison(batch: Batch) -> list[int]:
    """Return which rows compute the poison."""
    starts = batch.query_starts
    return [
        row
        for row in range(len(batch.context_lens))
        if POISON in batch.token_ids[starts[row] : starts[row + 1]]
    ]


def add_others(engine: Engine, **sampling: object) -> None:
    for index, (name, prompt) in enumerate(OTHERS.items()):
        add(engine, name, prompt, max_tokens=12, temperature=index % 2, seed=index, **sampling)


def ask_beside_a_culprit(engine: Engine, prompt: Sequence[int] = (5, POISON, 6)) -> Transcript:
    for index, (name, others_prompt) in enumerate(OTHERS.items()):
        if index == 3:
            add(engine, "culprit", prompt, max_tokens=10)
        add(engine, name, others_prompt, max_tokens=12, temperature=index % 2, seed=index)
    return run_to_end(engine)


@pytest.fixture(scope="module")
def alone() -> dict[str, list[int]]:
    engine = tiny_engine()
    add_others(engine)
    return run_to_end(engine).token_ids


def check(transcript: Transcript, alone: dict[str, list[int]], cause: str) -> None:
    """Only the culprit failed, with its cause, and nobody else noticed."""
    end = transcript.ends["culprit"]
    assert isinstance(end, Failed)
    assert isinstance(end.error, InternalError)
    assert cause in str(end.error)
    assert {name: transcript.token_ids[name] for name in alone} == alone
    assert all(isinstance(transcript.ends[name], Finished) for name in alone)


@pytest.mark.parametrize("max_num_batched_tokens", [9, 512])
def test_a_forward_that_raises_fails_only_the_request_that_makes_it_raise(
    alone: dict[str, list[int]], max_num_batched_tokens: int
) -> None:
    engine = tiny_engine(max_num_batched_tokens=max_num_batched_tokens)

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if rows_with_poison(batch):
            raise RuntimeError("boom")
        return logits

    Faulty(engine, fault)

    transcript = ask_beside_a_culprit(engine)

    check(transcript, alone, "RuntimeError: boom")
    assert engine.counters.num_failed_steps == 1
    assert engine.num_blocks_used == 0


def test_every_culprit_of_a_step_fails(alone: dict[str, list[int]]) -> None:
    engine = tiny_engine(max_num_seqs=16)

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if rows_with_poison(batch):
            raise ValueError("boom")
        return logits

    Faulty(engine, fault)
    for index in range(4):
        add(engine, f"culprit {index}", [POISON, index], max_tokens=10)

    transcript = ask_beside_a_culprit(engine)

    check(transcript, alone, "ValueError: boom")
    assert all(isinstance(transcript.ends[f"culprit {i}"], Failed) for i in range(4))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_fail_their_request_alone(
    alone: dict[str, list[int]], bad: float
) -> None:
    engine = tiny_engine()

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        ends = batch.query_starts[1:] - 1
        (sampled,) = np.isin(ends, batch.sample_tokens).nonzero()
        logits = logits.clone()
        for row in rows_with_poison(batch):
            logits[sampled.tolist().index(row), 7] = bad
        return logits

    Faulty(engine, fault)

    transcript = ask_beside_a_culprit(engine)

    check(transcript, alone, "NaN or infinity")
    assert engine.num_blocks_used == 0


@pytest.mark.parametrize(
    "backend",
    [CpuAttention(), NativeAttention(), ReferenceAttention()],
    ids=["cpu", "native", "reference"],
)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("prompt", [(5, POISON, 6), [7] * 60 + [POISON]])
def test_numbers_that_are_none_stay_with_their_request_and_end_with_it(
    alone: dict[str, list[int]], backend: AttentionBackend, bad: float, prompt: Sequence[int]
) -> None:
    engine = tiny_engine(backend=backend, max_num_batched_tokens=40, enable_prefix_caching=False)
    runner: ModelRunner = engine._runner  # type: ignore[assignment]
    embeddings = runner.model.get_input_embeddings()
    with torch.no_grad():
        embeddings.weight[POISON] = bad  # type: ignore[index, operator]

    transcript = ask_beside_a_culprit(engine, prompt)

    check(transcript, alone, "NaN or infinity")
    # What it stored is still in the blocks that the next ones get.
    add_others(engine)
    assert run_to_end(engine).token_ids == alone


def test_a_request_that_is_aborted_leaves_nothing_bad_behind(alone: dict[str, list[int]]) -> None:
    engine = tiny_engine(enable_prefix_caching=False)
    runner: ModelRunner = engine._runner  # type: ignore[assignment]
    add(engine, "culprit", [5] * 90, max_tokens=5)
    engine.step()
    for pages in runner.cache._pages:
        pages.key.fill_(torch.nan)
        pages.value.fill_(torch.nan)
    engine.abort(RequestId("culprit"))
    add_others(engine)

    assert run_to_end(engine).token_ids == alone


def test_a_token_that_the_model_rules_out_is_no_fault() -> None:
    engine = tiny_engine()
    Faulty(engine, lambda _, logits: logits.index_fill(1, torch.arange(100), -torch.inf))
    add(engine, "r", [5, 6], max_tokens=20, temperature=1.0)

    transcript = run_to_end(engine)

    assert isinstance(transcript.ends["r"], Finished)
    assert min(transcript.token_ids["r"]) >= 100


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError])
def test_a_step_that_runs_out_of_memory_is_halved_and_nobody_fails(
    alone: dict[str, list[int]], error: type[Exception]
) -> None:
    engine = tiny_engine()
    sizes: list[int] = []

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        sizes.append(len(batch.token_ids))
        if len(batch.token_ids) > 50:
            raise error("no memory")
        return logits

    Faulty(engine, fault)
    add_others(engine)

    transcript = run_to_end(engine)

    assert transcript.token_ids == alone
    assert sizes[0] > 50, "the first step did not fit"
    assert sizes[1] <= sizes[0] // 2
    assert max(sizes[1:]) <= 50, "and no later one was as large again"
    assert engine.counters.num_failed_steps == 1


def test_what_does_not_fit_even_alone_fails_and_the_others_go_on(
    alone: dict[str, list[int]],
) -> None:
    engine = tiny_engine()

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if rows_with_poison(batch):
            raise torch.OutOfMemoryError("no memory")
        return logits

    Faulty(engine, fault)

    check(ask_beside_a_culprit(engine), alone, "OutOfMemoryError: no memory")


def test_decoding_that_runs_out_of_memory_goes_on_with_half_of_the_rows(
    alone: dict[str, list[int]],
) -> None:
    engine = tiny_engine()

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if batch.num_decode_rows > 3:
            raise torch.OutOfMemoryError("no memory")
        return logits

    Faulty(engine, fault)
    add_others(engine)

    assert run_to_end(engine).token_ids == alone


def test_a_lost_device_is_not_blamed_on_anybody() -> None:
    engine = tiny_engine()

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        raise torch.AcceleratorError("an illegal memory access was encountered", 700)

    Faulty(engine, fault)
    add(engine, "r", [1, 2])

    with pytest.raises(torch.AcceleratorError):
        engine.step()


def test_a_constrained_request_beside_a_culprit_keeps_to_its_grammar() -> None:
    def ask(engine: Engine) -> Transcript:
        for name, schema in BOUNDED.items():
            grammar = Grammar(kind=GrammarKind.JSON_SCHEMA, text=json.dumps(schema))
            add(engine, name, [5, 6], temperature=1.0, seed=1, grammar=grammar)
        return run_to_end(engine)

    expected = ask(tiny_engine(max_num_seqs=32)).texts
    engine = tiny_engine(max_num_seqs=32)

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if rows_with_poison(batch):
            raise RuntimeError("boom")
        return logits

    Faulty(engine, fault)
    add(engine, "culprit", [POISON], max_tokens=5)

    transcript = ask(engine)

    assert isinstance(transcript.ends["culprit"], Failed)
    assert {name: transcript.texts[name] for name in BOUNDED} == expected
    assert all(isinstance(transcript.ends[name], Finished) for name in BOUNDED)


def test_prompts_that_are_told_of_beside_a_culprit_are_told_of_once() -> None:
    def ask(engine: Engine) -> list[tuple[int, float | None]]:
        for index in range(3):
            prompt = [30 + index, *range(40, 60)]
            add(engine, f"told {index}", prompt, max_tokens=4, echo=True, logprobs=1)
        told: dict[str, list[tuple[int, float | None]]] = {}
        while engine.has_work:
            for name, event in engine.step():
                if isinstance(event, TextDelta):
                    told.setdefault(name, []).extend(
                        (one.token_id, one.logprob) for one in event.logprobs
                    )
        return [one for index in range(3) for one in told[f"told {index}"]]

    expected = ask(tiny_engine(max_num_batched_tokens=20))
    engine = tiny_engine(max_num_batched_tokens=20)

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if rows_with_poison(batch):
            raise RuntimeError("boom")
        return logits

    Faulty(engine, fault)
    add(engine, "culprit", [POISON, 5], max_tokens=5, echo=True, logprobs=1)

    assert ask(engine) == [(token_id, pytest.approx(one, abs=1e-4)) for token_id, one in expected]
    assert engine.num_blocks_used == 0


def test_a_prompt_whose_logits_are_no_numbers_fails_its_request_alone(
    alone: dict[str, list[int]],
) -> None:
    engine = tiny_engine()

    def fault(batch: Batch, logits: torch.Tensor) -> torch.Tensor:
        if rows_with_poison(batch):
            logits = logits.clone()
            logits[-2] = torch.nan  # of a token of the prompt; those come behind what samples
        return logits

    Faulty(engine, fault)
    add(engine, "culprit", [POISON, 5, 6], max_tokens=10, echo=True, logprobs=0)
    add_others(engine)

    transcript = run_to_end(engine)

    check(transcript, alone, "NaN")


def test_running_apart_finds_exactly_the_culprits() -> None:
    source = random.Random(0)
    for _ in range(200):
        rows = list(range(source.randint(1, 12)))
        bad = {row for row in rows if source.random() < 0.3}
        num_calls = 0

        def run(group: Sequence[int], bad: set[int] = bad) -> list[int]:
            nonlocal num_calls
            num_calls += 1
            if bad & set(group):
                raise ValueError(sorted(bad & set(group)))
            return [10 * row for row in group]

        groups, culprits = run_apart(rows, run, fatal=())

        ran = [row for group, _ in groups for row in group]
        assert {row for row, _ in culprits} == bad
        assert ran == [row for row in rows if row not in bad]
        assert [one for _, results in groups for one in results] == [10 * row for row in ran]
        assert num_calls < 2 * len(rows)
