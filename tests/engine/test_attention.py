# SPDX-License-Identifier: Apache-2.0
"""The backends against each other, and the reference against attention written out by hand."""

import random
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.engine.tiny_engines import tiny_engine
from xinference.engine.attention import native
from xinference.engine.attention.cpu import CpuAttention, _group_rows
from xinference.engine.attention.interface import (
    AttendingCache,
    AttentionBackend,
    LayerShape,
    Scoring,
    attending,
    paged_attention,
)
from xinference.engine.attention.native import NativeAttention
from xinference.engine.attention.reference import ReferenceAttention
from xinference.engine.attention.triton import TritonAttention
from xinference.engine.batch import Batch
from xinference.engine.native.compiled import compiled

NUM_KV_HEADS = 2
KEY_DIM = 8


@dataclass
class Scene:
    """Some sequences with random keys and values, and a step that computes the end of each."""

    batch: Batch
    past: Batch
    """The tokens before, to be stored first; a batch of rows without decoding."""
    query: Tensor
    keys: list[Tensor]
    values: list[Tensor]
    """Of each sequence, (Hkv, context, D), new tokens last."""
    num_blocks: int


def make_scene(
    contexts: list[int],
    news: list[int],
    *,
    block_size: int,
    group: int = 3,
    value_dim: int = KEY_DIM,
    spread: int = 1,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Scene:
    """Lay out sequences over shuffled blocks, every `spread`-th of them, with holes between."""
    source = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    counts = [-(-context // block_size) for context in contexts]
    ids = [spread * index + spread - 1 for index in range(sum(counts))]
    source.shuffle(ids)
    tables = np.zeros((len(contexts), max(counts)), np.int64)
    for row, count in enumerate(counts):
        tables[row, :count] = [ids.pop() for _ in range(count)]

    def batch_of(starts: list[int], ends: list[int]) -> Batch:
        lens = [end - start for start, end in zip(starts, ends, strict=True)]
        ranges = [np.arange(start, end) for start, end in zip(starts, ends, strict=True)]
        positions = np.concatenate(ranges)
        return Batch(
            token_ids=np.zeros_like(positions),
            positions=positions,
            query_starts=np.concatenate(([0], np.cumsum(lens))),
            context_lens=np.array(ends),
            block_tables=tables,
            block_size=block_size,
            sample_tokens=np.array([0]),
        )

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(dtype)

    starts = [context - new for context, new in zip(contexts, news, strict=True)]
    return Scene(
        batch=batch_of(starts, contexts),
        past=batch_of([0] * len(contexts), starts),
        query=draw(1, NUM_KV_HEADS * group, sum(news), KEY_DIM),
        keys=[draw(NUM_KV_HEADS, context, KEY_DIM) for context in contexts],
        values=[draw(NUM_KV_HEADS, context, value_dim) for context in contexts],
        num_blocks=spread * sum(counts),
    )


def attend(backend: AttentionBackend, scene: Scene, scoring: Scoring) -> Tensor:
    """Store the past, then the new tokens, and return what the backend says, (T, H, Dv)."""
    dtype = scene.query.dtype
    pages = backend.allocate(
        LayerShape(num_kv_heads=NUM_KV_HEADS, key_dim=KEY_DIM, value_dim=scene.values[0].shape[-1]),
        num_blocks=scene.num_blocks,
        block_size=scene.batch.block_size,
        dtype=dtype,
        device=torch.device("cpu"),
    )
    for batch in (scene.past, scene.batch):
        lens = batch.query_lens.tolist()
        ends = batch.context_lens.tolist()
        key, value = (
            torch.cat(
                [
                    part[:, end - new : end]
                    for part, end, new in zip(parts, ends, lens, strict=True)
                ],
                dim=1,
            ).unsqueeze(0)
            for parts in (scene.keys, scene.values)
        )
        plan = backend.plan(batch, dtype=dtype, device=torch.device("cpu"))
        backend.store(pages, plan, key, value)
    out = backend.attend(pages, plan, scene.query, key, value, scoring)
    assert out.shape == (1, *scene.query.shape[1:3][::-1], scene.values[0].shape[-1])
    assert out.dtype == dtype
    return out[0]


def by_hand(scene: Scene, scoring: Scoring) -> Tensor:
    """One query at a time, one head at a time, over a plain list of keys."""
    num_heads = scene.query.shape[1]
    group = num_heads // NUM_KV_HEADS
    rows = []
    for row, (first, last) in enumerate(
        zip(scene.batch.query_starts, scene.batch.query_starts[1:], strict=False)
    ):
        for token in range(first, last):
            at = int(scene.batch.positions[token])
            start = 0 if scoring.window is None else max(0, at - scoring.window + 1)
            heads = []
            for head in range(num_heads):
                keys = scene.keys[row][head // group, start : at + 1].float()
                scores = keys @ scene.query[0, head, token].float() * scoring.scaling
                if scoring.softcap is not None:
                    scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
                sink = [] if scoring.sinks is None else [scoring.sinks[head : head + 1]]
                weights = (scores - torch.cat([scores, *sink]).logsumexp(0)).exp()
                heads.append(weights @ scene.values[row][head // group, start : at + 1].float())
            rows.append(torch.stack(heads))
    return torch.stack(rows)


SINKS = torch.linspace(-1, 1, 6)
SCORINGS = {
    "plain": Scoring(scaling=0.4),
    "window": Scoring(scaling=0.4, window=5),
    "wide window": Scoring(scaling=0.4, window=1000),
    "softcap": Scoring(scaling=0.4, softcap=0.7),
    "sinks": Scoring(scaling=0.4, sinks=SINKS),
    "all": Scoring(scaling=0.4, window=6, softcap=0.7, sinks=SINKS),
}
STEPS = {
    "decode": ([1, 4, 5, 23, 9], [1, 1, 1, 1, 1]),
    "fresh prompts": ([1, 7, 12], [1, 7, 12]),
    "chunks": ([9, 14, 30], [4, 1, 13]),
    "mixed": ([3, 17, 8, 5, 21], [1, 1, 1, 5, 6]),
    "one": ([6], [1]),
}
BACKENDS = {
    "reference": ReferenceAttention,
    "cpu": CpuAttention,
    "native": NativeAttention,
    "triton": TritonAttention,
}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("scoring", SCORINGS)
def test_every_backend_computes_attention_as_written_by_hand(
    backend: str, step: str, scoring: str
) -> None:
    scene = make_scene(*STEPS[step], block_size=4)

    out = attend(BACKENDS[backend](), scene, SCORINGS[scoring])

    torch.testing.assert_close(out, by_hand(scene, SCORINGS[scoring]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("seed", range(6))
def test_the_backends_agree_on_random_batches(seed: int) -> None:
    source = random.Random(seed)
    decode = [source.randint(1, 60) for _ in range(source.randint(0, 6))]
    chunks = [source.randint(2, 60) for _ in range(source.randint(1, 3))]
    news = [1] * len(decode) + [source.randint(2, context) for context in chunks]
    scene = make_scene(
        decode + chunks,
        news,
        block_size=source.choice([1, 4, 16]),
        group=source.choice([1, 2, 7]),
        spread=source.choice([1, 2, 5]),
        seed=seed,
    )
    scoring = Scoring(scaling=0.3, window=source.choice([None, 3, 17]))

    expected = attend(ReferenceAttention(), scene, scoring)

    for backend in (CpuAttention(), NativeAttention()):
        out = attend(backend, scene, scoring)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("group", [1, 2, 3, 7, 8, 11, 16, 20])
@pytest.mark.parametrize("value_dim", [8, 12, 3, 64])
def test_native_attention_of_contexts_in_parts(group: int, value_dim: int) -> None:
    contexts = [700, 256, 257, 1, 15, 16, 17, 512]
    scene = make_scene(contexts, [1] * 8, block_size=16, group=group, value_dim=value_dim)
    for scoring in (
        Scoring(scaling=0.3),
        Scoring(scaling=0.3, window=300),
        Scoring(scaling=0.3, sinks=torch.linspace(-1, 3, NUM_KV_HEADS * group)),
    ):
        expected = attend(ReferenceAttention(), scene, scoring)
        out = attend(NativeAttention(), scene, scoring)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


def test_native_attention_gives_a_row_the_same_bits_in_any_batch() -> None:
    contexts = [700, 40, 300]
    scene = make_scene(contexts, [1, 1, 1], block_size=16, dtype=torch.bfloat16)
    together = attend(NativeAttention(), scene, SCORINGS["plain"])

    for row, context in enumerate(contexts):
        alone = make_scene([context], [1], block_size=16, dtype=torch.bfloat16)
        alone.query = scene.query[:, :, row : row + 1]
        alone.keys, alone.values = [scene.keys[row]], [scene.values[row]]
        assert torch.equal(attend(NativeAttention(), alone, SCORINGS["plain"])[0], together[row])


def test_without_a_compiler_an_engine_has_the_other_way(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    native._kernel.cache_clear()
    compiled.cache_clear()

    engine = tiny_engine()

    assert engine.config.attention == "cpu"
    assert "with native attention: there is no C compiler" in caplog.text


@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("copied_bytes_per_range", [0, 2**21], ids=["ranges", "copied"])
def test_far_apart_blocks_are_read_in_several_ranges_or_copied(
    copied_bytes_per_range: int, scoring: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = "xinference.engine.attention.cpu"
    monkeypatch.setattr(f"{cpu}._MAX_HOLE_BYTES", 0)
    monkeypatch.setattr(f"{cpu}._COPIED_BYTES_PER_RANGE", copied_bytes_per_range)
    scene = make_scene([9, 30, 2], [1, 1, 1], block_size=4, spread=3)

    out = attend(CpuAttention(), scene, SCORINGS[scoring])

    torch.testing.assert_close(out, by_hand(scene, SCORINGS[scoring]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["plain", "sinks"])
def test_short_rows_beside_a_long_one_are_not_padded_to_it(scoring: str) -> None:
    scene = make_scene([3, 9, 4, 90, 2, 7, 1], [1] * 7, block_size=4)
    context_lens = scene.batch.context_lens
    counts = -(-context_lens // 4)
    rows = np.repeat(np.arange(7), counts)

    groups = list(_group_rows(rows, np.arange(len(rows)), counts))
    out = attend(CpuAttention(), scene, SCORINGS[scoring])

    assert len(groups) > 1
    assert all(len(group.parts) <= 2 * len(rows) for group in groups)
    assert sum(group.num_rows for group in groups) == 7
    torch.testing.assert_close(out, by_hand(scene, SCORINGS[scoring]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", ["cpu", "native"])
def test_a_row_that_is_no_number_leaves_the_others_alone(backend: str) -> None:
    scene = make_scene([9, 30, 2], [1, 1, 1], block_size=4)
    expected = by_hand(scene, SCORINGS["plain"])
    scene.keys[1][:, 5] = scene.values[1][:, 5] = torch.nan

    out = attend(BACKENDS[backend](), scene, SCORINGS["plain"])

    assert out[1].isnan().all()
    torch.testing.assert_close(out[[0, 2]], expected[[0, 2]], atol=1e-5, rtol=1e-5)


def test_rows_that_share_blocks_each_read_them() -> None:
    scene = make_scene([9, 9], [1, 1], block_size=4)
    scene.batch.block_tables[1] = scene.batch.block_tables[0]
    scene.past.block_tables[1] = scene.past.block_tables[0]
    scene.keys[1], scene.values[1] = scene.keys[0], scene.values[0]

    out = attend(CpuAttention(), scene, SCORINGS["plain"])

    torch.testing.assert_close(out, by_hand(scene, SCORINGS["plain"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_values_may_be_of_another_size_than_keys(backend: str) -> None:
    scene = make_scene([9, 17, 6], [1, 1, 6], block_size=4, value_dim=12)

    out = attend(BACKENDS[backend](), scene, SCORINGS["plain"])

    torch.testing.assert_close(out, by_hand(scene, SCORINGS["plain"]), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_large_scores_in_half_precision_lose_no_more_than_the_inputs_do(backend: str) -> None:
    # Why: Triton's interpreter cannot multiply bfloat16.
    dtype = torch.float16 if backend == "triton" else torch.bfloat16
    scene = make_scene([40, 33, 30], [1, 1, 20], block_size=16, dtype=dtype)
    # Why: some models have scores in the hundreds, all about equal; rounding those would be noise.
    common = torch.full((KEY_DIM,), 4.0, dtype=dtype)
    scene.query += common
    for keys in scene.keys:
        keys += common
    scoring = Scoring(scaling=1.0)

    out = attend(BACKENDS[backend](), scene, scoring)

    torch.testing.assert_close(out.float(), by_hand(scene, scoring), atol=3e-2, rtol=3e-2)


class Echo(AttendingCache):
    """Answers with the query and notes the scoring."""

    def __init__(self) -> None:
        super().__init__()
        self.scoring: Scoring | None = None

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        self.scoring = scoring
        return query.transpose(1, 2)


def test_what_models_pass_reaches_the_backend() -> None:
    query = torch.zeros(1, 2, 3, 4)
    echo = Echo()

    with attending(echo):
        out, weights = paged_attention(
            nn.Module(),
            query,
            query,
            query,
            None,
            sliding_window=7,
            softcap=50.0,
            s_aux=SINKS,
            position_ids=torch.arange(3),
            use_cache=True,
            output_attentions=None,
        )

    assert out.shape == (1, 3, 2, 4)
    assert weights is None
    assert echo.scoring == Scoring(scaling=0.5, window=7, softcap=50.0, sinks=SINKS)


@pytest.mark.parametrize(
    "argument",
    [
        {"position_bias": torch.zeros(1)},
        {"indices": torch.zeros(1)},
        {"something_new": 3},
        {"dropout": 0.1},
        {"is_causal": False},
    ],
    ids=lambda argument: next(iter(argument)),
)
def test_what_would_change_the_result_and_is_not_understood_is_refused(
    argument: dict[str, object],
) -> None:
    query = torch.zeros(1, 2, 3, 4)

    with attending(Echo()), pytest.raises(ValueError, match="attention"):
        paged_attention(nn.Module(), query, query, query, None, **argument)  # type: ignore[arg-type]


def test_a_mask_of_the_models_own_is_refused() -> None:
    query = torch.zeros(1, 2, 3, 4)

    with attending(Echo()), pytest.raises(ValueError, match="mask"):
        paged_attention(nn.Module(), query, query, query, torch.zeros(1, 1, 3, 3))
