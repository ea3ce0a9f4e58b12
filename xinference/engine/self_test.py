# SPDX-License-Identifier: Apache-2.0
"""Does this model, over blocks, compute what it computes on its own?

Run once at load: two random texts go through the stock model, one at a time with transformers'
own attention, and through the engine's path, both at once, in chunks that mix and cross blocks.
A model whose class does something that our hooks cannot see is found here, and goes another way or
is refused, instead of answering wrongly.
"""

import itertools
import logging
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .batch import Batch, IntArray
from .execution import CacheSize, Execution

logger = logging.getLogger(__name__)

STOCK_IMPLEMENTATION = "eager"
_MIN_TEST_TOKENS = 24
_MAX_TEST_TOKENS = 320
_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 1e-1, torch.float16: 3e-2}
# Why not all rows in half precision: a router near a tie picks other experts for a few of them.
_MAX_WRONG_SHARE = {torch.float32: 0.0, torch.bfloat16: 0.2, torch.float16: 0.2}


@dataclass(frozen=True, slots=True, kw_only=True)
class StockAnswer:
    """What the stock model says to the texts of the self-test."""

    texts: tuple[IntArray, ...]
    logits: tuple[Tensor, ...]
    """For each text (its length, V) float32 on the host."""


def ask_stock(
    model: PreTrainedModel,
    *,
    vocab_size: int,
    max_len: int | None,
    block_size: int,
    window: int | None,
) -> StockAnswer:
    """Run the self-test's texts through the model as transformers would. Sets its attention.

    Args:
        model: with its weights in place.
        vocab_size: token ids are drawn below it.
        max_len: texts are at most this long, if it is not None.
        block_size: texts cross a block if that keeps them short.
        window: the smallest sliding window; texts are longer if that keeps them short.
    """
    reach = max(_MIN_TEST_TOKENS, block_size + 9, 0 if window is None else window + 9)
    if reach > _MAX_TEST_TOKENS:
        reach = max(_MIN_TEST_TOKENS, min(block_size + 9, _MAX_TEST_TOKENS))
    longest = reach if max_len is None else min(reach, max_len)
    random = np.random.default_rng(0)
    texts = tuple(random.integers(0, vocab_size, size) for size in (longest, max(1, longest // 3)))
    model.set_attn_implementation(STOCK_IMPLEMENTATION)
    with torch.inference_mode():
        logits = tuple(
            model(input_ids=torch.from_numpy(text).to(model.device).unsqueeze(0), use_cache=False)
            .logits[0]
            .float()
            .cpu()
            for text in texts
        )
    return StockAnswer(texts=texts, logits=logits)


def compare(
    execution: Execution, stock: StockAnswer, *, dtype: torch.dtype, block_size: int
) -> str | None:
    """Run the same texts through blocks made for it; return what is wrong, None if nothing is.

    The blocks are gone when this returns.
    """
    lens = np.array([len(text) for text in stock.texts])
    num_text_blocks = -(-lens // block_size)
    num_blocks = int(num_text_blocks.sum())
    runner = execution.make_runner(
        CacheSize(
            num_blocks=num_blocks,
            block_size=block_size,
            max_num_seqs=len(lens),
            max_model_len=int(lens.max()),
        )
    )
    # Why shuffled: a path that takes a text's blocks for consecutive shows.
    shuffled = np.random.default_rng(1).permutation(num_blocks)
    tables = np.zeros((len(lens), int(num_text_blocks.max())), np.int64)
    for row, count in enumerate(num_text_blocks):
        tables[row, :count], shuffled = shuffled[:count], shuffled[count:]
    errors: list[float] = []
    done = np.zeros_like(lens)
    for step in itertools.count():
        new = np.minimum(_wanted(step, lens), lens - done)
        rows = np.flatnonzero(new)
        if not rows.size:
            break
        # Single tokens go first, as the scheduler has it.
        rows = rows[np.argsort(new[rows] != 1, kind="stable")]
        logits = runner.forward(_batch_of(stock.texts, rows, done, new, tables, block_size))
        expected = torch.cat([stock.logits[row][done[row] : done[row] + new[row]] for row in rows])
        errors += ((logits.float().cpu() - expected).norm(dim=1) / expected.norm(dim=1)).tolist()
        done += new
    tolerance = _TOLERANCE[dtype]
    # Why `not <=` and not `>`: a NaN is wrong.
    share = float(np.mean([not error <= tolerance for error in errors]))
    logger.info("self-test: worst error %.2g of the logits' norm", max(errors))
    if share > _MAX_WRONG_SHARE[dtype]:
        return (
            f"its forward over blocks differs from the stock one: {share:.0%} of {len(errors)} "
            f"tokens by more than {tolerance:g} of the logits' norm, the worst by {max(errors):.3g}"
        )
    return None


def _wanted(step: int, lens: IntArray) -> IntArray:
    """Return how many tokens each text takes in a step: chunks, single tokens, and both at once;
    the second text starts late."""
    chunks = np.maximum(lens // 3, 1)
    patterns = ([1, 0], [1, 1], [0, 0], [0, 1])  # 1: a chunk; 0: a single token
    wanted = np.where(patterns[step % 4], chunks, 1)
    if step == 0:
        wanted[1] = 0
    return wanted


def _batch_of(
    texts: tuple[IntArray, ...],
    rows: IntArray,
    done: IntArray,
    new: IntArray,
    tables: IntArray,
    block_size: int,
) -> Batch:
    pieces = [np.arange(done[row], done[row] + new[row]) for row in rows]
    positions = np.concatenate(pieces)
    return Batch(
        token_ids=np.concatenate(
            [texts[row][piece] for row, piece in zip(rows, pieces, strict=True)]
        ),
        positions=positions,
        query_starts=np.concatenate(([0], np.cumsum(new[rows]))),
        context_lens=(done + new)[rows],
        block_tables=tables[rows],
        block_size=block_size,
        sample_tokens=np.arange(len(positions)),
    )
