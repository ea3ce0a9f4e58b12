# SPDX-License-Identifier: Apache-2.0
"""The Triton backend in an engine, and steps that are replayed, against the stock tokens.

Without a GPU the kernels run in Triton's interpreter, and a recording is run again in place of
being replayed: paddings, fixed plans and the choice of a recording are what is tested then.
"""

from typing import Any

import numpy as np
import pytest
import torch

from tests.engine.test_attention import SCORINGS, attend, make_scene
from tests.engine.test_oracle import engine_of, oracle, prompts, stock_model
from tests.engine.tiny_engines import add, run_to_end
from xinference.engine import Engine
from xinference.engine.attention.interface import LayerShape
from xinference.engine.attention.triton import TritonAttention
from xinference.engine.config import Placement, backend_names
from xinference.engine.execution import CacheSize, RaggedExecution
from xinference.engine.recorded import CudaGraphs, RecordableBackend, RecordedRunner, row_counts
from xinference.engine.self_test import ask_stock, compare

SHORT = 5
"""Tokens of an answer: the interpreter is slow."""
CONTEXTS = [200, 3, 77]
ASKED = (1, 6)
"""Of the oracle's prompts."""
CPU = torch.device("cpu")
CUDA = Placement(device=torch.device("cuda"), dtype=torch.float32)


@pytest.fixture
def few_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let fewer programs share a row, so that there are fewer to interpret."""
    monkeypatch.setattr("xinference.engine.attention.triton._NUM_SPLITS", 2)


class Recorder:
    """Runs again what it is to record, and counts how often."""

    def __init__(self) -> None:
        self.num_recorded = 0
        self.num_replayed = 0

    def __call__(self, run: Any) -> Any:
        self.num_recorded += 1
        run()

        def replay() -> torch.Tensor:
            self.num_replayed += 1
            logits: torch.Tensor = run()
            return logits

        return replay


def record_steps(engine: Engine, record: Any) -> None:
    """Let an engine over Triton's attention replay its steps of single tokens."""
    config = engine.config
    runner: Any = engine._runner
    engine._runner = RecordedRunner(
        runner,
        TritonAttention(),
        record,
        max_num_rows=config.max_num_seqs,
        max_blocks=-(-config.max_model_len // config.block_size),
        block_size=config.block_size,
    )


def ask_a_few(engine: Engine) -> dict[str, list[int]]:
    for index in ASKED:
        add(engine, str(index), prompts()[index], max_tokens=SHORT)
    return run_to_end(engine).token_ids


@pytest.mark.usefixtures("few_splits")
@pytest.mark.parametrize("architecture", ["gpt_oss"])
def test_tritons_attention_gives_the_stock_tokens_replayed_or_not(architecture: str) -> None:
    expected = {str(i): list(oracle(architecture)[i][:SHORT]) for i in ASKED}
    engine = engine_of(
        architecture, backend=TritonAttention(), max_num_batched_tokens=30, max_num_seqs=2
    )
    recorder = Recorder()

    eager = ask_a_few(engine)
    record_steps(engine, recorder)
    replayed = ask_a_few(engine)

    assert eager == expected
    assert replayed == expected
    assert recorder.num_recorded == len(row_counts(2))
    assert recorder.num_replayed >= SHORT - 1


def test_rows_are_padded_to_a_few_counts() -> None:
    assert row_counts(1) == [1]
    assert row_counts(3) == [1, 2, 3]
    assert row_counts(16) == [1, 2, 4, 8, 16]
    assert row_counts(20) == [1, 2, 4, 8, 16, 20]
    counts = row_counts(1000)
    assert counts == sorted(set(counts))
    assert counts[-1] == 1000
    assert len(counts) < 64


@pytest.mark.usefixtures("few_splits")
def test_a_recorded_runner_says_the_same_for_every_number_of_rows() -> None:
    engine = engine_of("llama", backend=TritonAttention(), max_num_seqs=4)
    runner: Any = engine._runner
    for index in range(3):
        add(engine, str(index), [20 + index] * (index + 1), max_tokens=4)
    engine.step()
    record_steps(engine, Recorder())
    slots = engine._slots
    schedule = engine._scheduler.schedule()
    for num_rows in range(1, 4):
        batch = slots.build(schedule.rows[:num_rows])

        torch.testing.assert_close(
            engine._runner.forward(batch), runner.forward(batch), atol=1e-6, rtol=1e-6
        )


def test_rows_that_fill_up_store_nothing_and_are_numbers() -> None:
    backend = TritonAttention()
    scene = make_scene([5, 9], [1, 1], block_size=4)
    pages = backend.allocate(
        LayerShape(num_kv_heads=2, key_dim=8, value_dim=8),
        num_blocks=scene.num_blocks,
        block_size=4,
        dtype=torch.float32,
        device=CPU,
    )
    plan = backend.fixed_plan(4, max_blocks=3, block_size=4, device=CPU)
    backend.refill(plan, scene.batch)
    key, query = torch.ones(1, 2, 4, 8), torch.ones(1, 6, 4, 8)

    backend.store(pages, plan, key, key)
    out = backend.attend(pages, plan, query, key, key, SCORINGS["plain"])

    assert np.flatnonzero(pages.key.any(-1).any(-1).numpy()).tolist() == sorted(
        scene.batch.cache_slots.tolist()
    )
    assert out.isfinite().all()
    assert not out[0, 2:].any()
    assert isinstance(backend, RecordableBackend)


def test_a_rows_result_is_the_same_bit_by_bit_in_any_batch() -> None:
    backend = TritonAttention()
    scene = make_scene(CONTEXTS, [1, 1, 1], block_size=4)
    together = attend(backend, scene, SCORINGS["plain"])

    for row in range(3):
        alone = make_scene(CONTEXTS, [1, 1, 1], block_size=4)
        alone.batch = _only(alone.batch, row)
        alone.past = _only(alone.past, row)
        alone.query = alone.query[:, :, row : row + 1]
        alone.keys, alone.values = [alone.keys[row]], [alone.values[row]]

        assert torch.equal(attend(backend, alone, SCORINGS["plain"])[0], together[row])


def _only(batch: Any, row: int) -> Any:
    tokens = slice(batch.query_starts[row], batch.query_starts[row + 1])
    return type(batch)(
        token_ids=batch.token_ids[tokens],
        positions=batch.positions[tokens],
        query_starts=batch.query_starts[row : row + 2] - batch.query_starts[row],
        context_lens=batch.context_lens[row : row + 1],
        block_tables=batch.block_tables[row : row + 1],
        block_size=batch.block_size,
        sample_tokens=np.array([0]),
    )


needs_gpu = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA GPU, which no installation brings"
)


@needs_gpu
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "gpt_oss", "mistral"])
def test_on_a_gpu_the_kernels_and_the_graphs_pass_the_self_test(
    architecture: str, dtype: str
) -> None:
    model = stock_model(architecture).to("cuda", getattr(torch, dtype))
    stock = ask_stock(model, vocab_size=200, max_len=None, block_size=16, window=7)
    execution = RaggedExecution(model, TritonAttention())

    assert compare(execution, stock, dtype=model.dtype, block_size=16) is None
    size = CacheSize(num_blocks=64, block_size=16, max_num_seqs=8, max_model_len=96)
    assert isinstance(execution.make_runner(size), RecordedRunner)


@needs_gpu
def test_on_a_gpu_an_engine_replays_the_stock_tokens() -> None:
    engine = engine_of("llama", device="cuda")

    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=SHORT)
    told = run_to_end(engine).token_ids

    assert engine.config.attention == backend_names(CUDA)[0] == "triton"
    assert told == {str(i): list(answer[:SHORT]) for i, answer in enumerate(oracle("llama"))}


@needs_gpu
def test_on_a_gpu_a_graph_computes_anew_from_what_its_inputs_hold() -> None:
    given = torch.zeros(3, device="cuda")
    replay = CudaGraphs()(lambda: given * 2)

    given += 4

    assert replay().tolist() == [8, 8, 8]
