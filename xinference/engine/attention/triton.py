# SPDX-License-Identifier: Apache-2.0
"""Paged attention for CUDA, as Triton kernels; imported only where Triton is installed.

Layout: (num_blocks × P, Hkv, D), token after token, like the reference, which it is tested against.

One kernel for single tokens and chunks. A program takes a *tile* of consecutive queries of one row,
all query heads that share one key head, folded into one matrix of queries, and goes through the
keys with an online softmax, as FlashAttention does (https://arxiv.org/abs/2205.14135). Where a key
lies, the row's block table says, token by token, so blocks may have any size. For single tokens
the keys of a row are split among `_NUM_SPLITS` programs, whose results a second kernel merges, as
in FlashDecoding (https://crfm.stanford.edu/2023/10/12/flashdecoding.html).

How a row's keys are split depends on its own length only, so that its result is the same, bit by
bit, whatever else is in the batch, and in a recorded graph.
"""

from dataclasses import dataclass

import numpy as np
import torch
import triton
import triton.language as tl
from torch import Tensor

from xinference.engine.batch import Batch, IntArray

from .interface import LayerShape, Pages, Scoring, pages_by_token

_NUM_SPLITS = 8
_KEYS_AT_ONCE = {2: 64, 4: 32}
"""By the bytes of a number; what is loaded at once must fit a processor's shared memory."""
_MIN_MATRIX = 16
"""Rows and columns of the smallest matrix product."""
_MAX_CHUNK_MATRIX = 64
"""Queries × heads of a program of a chunk."""
_NOTHING = -1
"""A cache slot that is not written to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TritonPlan:
    """One step, int32 on the device."""

    cache_slots: Tensor
    """(T,) where the new tokens go; `_NOTHING` for those that go nowhere."""
    query_starts: Tensor
    """(R + 1,)"""
    context_lens: Tensor
    """(R,)"""
    block_tables: Tensor
    """(R, most blocks of a row)"""
    chunk_rows: Tensor
    """(chunks,) the rows that are chunks."""
    num_decode_rows: int
    longest_chunk: int
    block_size: int


class TritonAttention:
    """See the module's text. Holds no state."""

    def allocate(
        self,
        shape: LayerShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pages:
        return pages_by_token(shape, num_blocks * block_size, dtype=dtype, device=device)

    def plan(self, batch: Batch, *, dtype: torch.dtype, device: torch.device) -> TritonPlan:
        num_decode, num_rows = batch.num_decode_rows, len(batch.context_lens)
        chunk_rows = np.arange(num_decode, num_rows)
        arrays = (
            batch.cache_slots,
            batch.query_starts,
            batch.context_lens,
            batch.block_tables,
            chunk_rows,
        )
        slots, starts, lens, tables, chunks = _to_device(arrays, device)
        return TritonPlan(
            cache_slots=slots,
            query_starts=starts,
            context_lens=lens,
            block_tables=tables,
            chunk_rows=chunks,
            num_decode_rows=num_decode,
            longest_chunk=int(batch.query_lens[num_decode:].max(initial=0)),
            block_size=batch.block_size,
        )

    def fixed_plan(
        self, num_rows: int, *, max_blocks: int, block_size: int, device: torch.device
    ) -> TritonPlan:
        """Return the plan of a step of single tokens that stays where it is; `refill` says which.

        Until then, nothing is stored and nobody sees anything.
        """

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return TritonPlan(
            cache_slots=ints(num_rows) + _NOTHING,
            query_starts=torch.arange(num_rows + 1, dtype=torch.int32, device=device),
            context_lens=ints(num_rows),
            block_tables=ints(num_rows, max_blocks),
            chunk_rows=ints(0),
            num_decode_rows=num_rows,
            longest_chunk=0,
            block_size=block_size,
        )

    def refill(self, plan: TritonPlan, batch: Batch) -> None:
        """Put a step of single tokens into a fixed plan that has at least as many rows."""
        num_rows, num_blocks = batch.block_tables.shape
        arrays = (batch.cache_slots, batch.context_lens, batch.block_tables)
        slots, lens, tables = _to_device(arrays, plan.cache_slots.device)
        plan.cache_slots[:num_rows] = slots
        plan.cache_slots[num_rows:] = _NOTHING
        plan.context_lens[:num_rows] = lens
        plan.context_lens[num_rows:] = 0
        plan.block_tables[:num_rows, :num_blocks] = tables

    def store(self, pages: Pages, plan: TritonPlan, key: Tensor, value: Tensor) -> None:
        _, num_kv_heads, num_tokens, key_dim = key.shape
        value_dim = value.shape[3]
        _store_kernel[(num_tokens, num_kv_heads)](
            key,
            value,
            pages.key,
            pages.value,
            plan.cache_slots,
            key.stride(1),
            key.stride(2),
            key.stride(3),
            value.stride(1),
            value.stride(2),
            value.stride(3),
            num_kv_heads=num_kv_heads,
            key_dim=key_dim,
            value_dim=value_dim,
            width=triton.next_power_of_2(max(key_dim, value_dim)),
        )

    def attend(
        self,
        pages: Pages,
        plan: TritonPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        _, num_heads, num_tokens, _ = query.shape
        query = query[0].transpose(0, 1).contiguous()  # (T, H, Dk)
        out = query.new_empty(num_tokens, num_heads, pages.value.shape[2])
        if plan.num_decode_rows:
            _attend_single_tokens(pages, plan, query, out, scoring)
        if plan.longest_chunk:
            _attend_chunks(pages, plan, query, out, scoring)
        return out.unsqueeze(0)


def _to_device(arrays: tuple[IntArray, ...], device: torch.device) -> list[Tensor]:
    """Return the arrays as int32 on the device, in one transfer."""
    flat = np.concatenate([array.ravel() for array in arrays]).astype(np.int32)
    pieces = torch.from_numpy(flat).to(device).split([array.size for array in arrays])
    return [piece.view(array.shape) for piece, array in zip(pieces, arrays, strict=True)]


def _attend_single_tokens(
    pages: Pages, plan: TritonPlan, query: Tensor, out: Tensor, scoring: Scoring
) -> None:
    num_rows, (_, num_heads, value_dim) = plan.num_decode_rows, out.shape
    num_kv_heads = pages.key.shape[1]
    group = num_heads // num_kv_heads
    mixed = query.new_empty(num_rows, num_heads, _NUM_SPLITS, value_dim, dtype=torch.float32)
    highest = query.new_empty(num_rows, num_heads, _NUM_SPLITS, dtype=torch.float32)
    total = torch.empty_like(highest)
    _attend_kernel[(num_rows, num_kv_heads, _NUM_SPLITS)](
        query,
        pages.key,
        pages.value,
        mixed,
        highest,
        total,
        # Why: it is not read; a kernel's argument must be something.
        plan.context_lens if scoring.sinks is None else scoring.sinks,
        plan.query_starts,
        plan.query_starts,
        plan.context_lens,
        plan.block_tables,
        plan.block_tables.stride(0),
        scoring.scaling,
        **_constants(pages, plan, scoring, group),
        has_sinks=False,
        rows_are_listed=False,
        num_splits=_NUM_SPLITS,
        matrix=max(_MIN_MATRIX, triton.next_power_of_2(group)),
    )
    _merge_kernel[(num_rows, num_heads)](
        mixed,
        highest,
        total,
        plan.context_lens if scoring.sinks is None else scoring.sinks,
        out,
        num_heads=num_heads,
        value_dim=value_dim,
        has_sinks=scoring.sinks is not None,
        num_splits=_NUM_SPLITS,
        width=triton.next_power_of_2(value_dim),
    )


def _attend_chunks(
    pages: Pages, plan: TritonPlan, query: Tensor, out: Tensor, scoring: Scoring
) -> None:
    num_kv_heads = pages.key.shape[1]
    group = out.shape[1] // num_kv_heads
    matrix = max(_MAX_CHUNK_MATRIX, triton.next_power_of_2(group))
    num_tiles = triton.cdiv(plan.longest_chunk, matrix // group)
    _attend_kernel[(len(plan.chunk_rows) * num_tiles, num_kv_heads, 1)](
        query,
        pages.key,
        pages.value,
        out,
        plan.context_lens,
        plan.context_lens,
        plan.context_lens if scoring.sinks is None else scoring.sinks,
        plan.chunk_rows,
        plan.query_starts,
        plan.context_lens,
        plan.block_tables,
        plan.block_tables.stride(0),
        scoring.scaling,
        **_constants(pages, plan, scoring, group),
        has_sinks=scoring.sinks is not None,
        rows_are_listed=True,
        num_splits=1,
        matrix=matrix,
        num_tiles=num_tiles,
    )


def _constants(pages: Pages, plan: TritonPlan, scoring: Scoring, group: int) -> dict[str, object]:
    """Return what a kernel is compiled for, of a layer."""
    _, num_kv_heads, key_dim = pages.key.shape
    value_dim = pages.value.shape[2]
    return {
        "num_kv_heads": num_kv_heads,
        "group": group,
        "key_dim": key_dim,
        "value_dim": value_dim,
        "key_width": max(_MIN_MATRIX, triton.next_power_of_2(key_dim)),
        "value_width": max(_MIN_MATRIX, triton.next_power_of_2(value_dim)),
        "block_size": plan.block_size,
        "window": scoring.window or 0,
        "softcap": scoring.softcap or 0.0,
        "keys_at_once": _KEYS_AT_ONCE[pages.key.element_size()],
    }


@triton.jit  # type: ignore[untyped-decorator]
def _store_kernel(  # type: ignore[no-untyped-def]
    key,
    value,
    key_pages,
    value_pages,
    cache_slots,
    key_head_stride,
    key_token_stride,
    key_stride,
    value_head_stride,
    value_token_stride,
    value_stride,
    num_kv_heads: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    width: tl.constexpr,
):
    """Copy one head of one token to its place."""
    token, head = tl.program_id(0), tl.program_id(1)
    slot = tl.load(cache_slots + token).to(tl.int64)
    if slot < 0:
        return
    numbers = tl.arange(0, width)
    place = slot * num_kv_heads + head
    is_key = numbers < key_dim
    new_key = tl.load(
        key + head * key_head_stride + token * key_token_stride + numbers * key_stride, mask=is_key
    )
    tl.store(key_pages + place * key_dim + numbers, new_key, mask=is_key)
    is_value = numbers < value_dim
    new_value = tl.load(
        value + head * value_head_stride + token * value_token_stride + numbers * value_stride,
        mask=is_value,
    )
    tl.store(value_pages + place * value_dim + numbers, new_value, mask=is_value)


@triton.jit  # type: ignore[untyped-decorator]
def _attend_kernel(  # type: ignore[no-untyped-def]
    query,
    key_pages,
    value_pages,
    out,
    highest_out,
    total_out,
    sinks,
    rows,
    query_starts,
    context_lens,
    block_tables,
    table_stride,
    scaling,
    num_kv_heads: tl.constexpr,
    group: tl.constexpr,
    key_dim: tl.constexpr,
    value_dim: tl.constexpr,
    key_width: tl.constexpr,
    value_width: tl.constexpr,
    block_size: tl.constexpr,
    window: tl.constexpr,
    softcap: tl.constexpr,
    keys_at_once: tl.constexpr,
    has_sinks: tl.constexpr,
    rows_are_listed: tl.constexpr,
    num_splits: tl.constexpr,
    matrix: tl.constexpr,
    num_tiles: tl.constexpr = 1,
):
    """Attend with one tile of queries of one row and key head, over one split of its keys.

    With one split, `out` is (T, H, Dv) and finished. With several, it is (R, H, splits, Dv) float32
    with weights exp(score - highest), and `highest_out` and `total_out` say what is missing.
    """
    head, split = tl.program_id(1), tl.program_id(2)
    if rows_are_listed:
        row = tl.load(rows + tl.program_id(0) // num_tiles)
        tile = tl.program_id(0) % num_tiles
    else:
        row = tl.program_id(0)
        tile = 0
    first_token = tl.load(query_starts + row)
    num_queries = tl.load(query_starts + row + 1) - first_token
    context_len = tl.load(context_lens + row)
    queries_of_tile: tl.constexpr = matrix // group
    if tile * queries_of_tile >= num_queries:
        return

    lines = tl.arange(0, matrix)
    nth = tile * queries_of_tile + lines // group
    is_line = (lines // group < queries_of_tile) & (nth < num_queries)
    heads = head * group + lines % group
    at = context_len - num_queries + nth
    lines_of_out = ((first_token + nth) * (num_kv_heads * group) + heads).to(tl.int64)
    key_numbers, value_numbers = tl.arange(0, key_width), tl.arange(0, value_width)
    queries = tl.load(
        query + lines_of_out[:, None] * key_dim + key_numbers[None, :],
        mask=is_line[:, None] & (key_numbers[None, :] < key_dim),
        other=0.0,
    )

    # The keys that any query of the tile sees, and of them those of this split.
    last_nth = tl.minimum((tile + 1) * queries_of_tile, num_queries) - 1
    end = context_len - num_queries + last_nth + 1
    begin = 0
    if window > 0:
        begin = tl.maximum(context_len - num_queries + tile * queries_of_tile + 1 - window, 0)
    begin = begin // keys_at_once * keys_at_once
    if num_splits > 1:
        steps = tl.cdiv(end - begin, keys_at_once)
        length = tl.cdiv(steps, num_splits) * keys_at_once
        begin += split * length
        end = tl.minimum(begin + length, end)

    # Why finite: the difference of two infinities is not a number.
    highest = tl.full([matrix], -1e30, tl.float32)
    total = tl.zeros([matrix], tl.float32)
    if has_sinks:
        highest = tl.load(sinks + heads, mask=is_line, other=0.0).to(tl.float32)
        total += 1.0
    mixed = tl.zeros([matrix, value_width], tl.float32)
    for start in range(begin, end, keys_at_once):
        places = start + tl.arange(0, keys_at_once)
        is_key = places < end
        blocks = tl.load(
            block_tables + row * table_stride + places // block_size, mask=is_key, other=0
        ).to(tl.int64)
        lines_of_pages = (blocks * block_size + places % block_size) * num_kv_heads + head
        # Why masked: what lies behind the end is somebody else's, or not a number.
        keys = tl.load(
            key_pages + lines_of_pages[None, :] * key_dim + key_numbers[:, None],
            mask=is_key[None, :] & (key_numbers[:, None] < key_dim),
            other=0.0,
        )
        scores = tl.dot(queries, keys, input_precision="ieee") * scaling
        if softcap > 0:
            scores = softcap * (2 * tl.sigmoid(2 * scores / softcap) - 1)
        is_seen = (places[None, :] <= at[:, None]) & is_key[None, :]
        if window > 0:
            is_seen = is_seen & (places[None, :] > at[:, None] - window)
        scores = tl.where(is_seen, scores, -1e30)
        higher = tl.maximum(highest, tl.max(scores, 1))
        fading = tl.exp(highest - higher)
        weights = tl.where(is_seen, tl.exp(scores - higher[:, None]), 0.0)
        values = tl.load(
            value_pages + lines_of_pages[:, None] * value_dim + value_numbers[None, :],
            mask=is_key[:, None] & (value_numbers[None, :] < value_dim),
            other=0.0,
        )
        mixed = mixed * fading[:, None] + tl.dot(
            weights.to(values.dtype), values, input_precision="ieee"
        )
        total = total * fading + tl.sum(weights, 1)
        highest = higher

    is_number = is_line[:, None] & (value_numbers[None, :] < value_dim)
    if num_splits > 1:
        parts = lines_of_out * num_splits + split
        tl.store(highest_out + parts, highest, mask=is_line)
        tl.store(total_out + parts, total, mask=is_line)
        tl.store(out + parts[:, None] * value_dim + value_numbers[None, :], mixed, mask=is_number)
    else:
        # Why: lines that are no queries see nothing.
        finished = mixed / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(
            out + lines_of_out[:, None] * value_dim + value_numbers[None, :],
            finished.to(out.dtype.element_ty),
            mask=is_number,
        )


@triton.jit  # type: ignore[untyped-decorator]
def _merge_kernel(  # type: ignore[no-untyped-def]
    mixed,
    highest,
    total,
    sinks,
    out,
    num_heads: tl.constexpr,
    value_dim: tl.constexpr,
    has_sinks: tl.constexpr,
    num_splits: tl.constexpr,
    width: tl.constexpr,
):
    """Merge the splits of one head of one row."""
    head = tl.program_id(1)
    line = (tl.program_id(0) * num_heads + head).to(tl.int64)
    parts = line * num_splits + tl.arange(0, num_splits)
    numbers = tl.arange(0, width)
    scores = tl.load(highest + parts)
    best = tl.max(scores, 0)
    if has_sinks:
        sink = tl.load(sinks + head).to(tl.float32)
        best = tl.maximum(best, sink)
    weights = tl.exp(scores - best)
    sum_of_weights = tl.sum(weights * tl.load(total + parts), 0)
    if has_sinks:
        sum_of_weights += tl.exp(sink - best)
    of_parts = tl.load(
        mixed + parts[:, None] * value_dim + numbers[None, :],
        mask=numbers[None, :] < value_dim,
        other=0.0,
    )
    merged = tl.sum(of_parts * weights[:, None], 0)
    # Why: the rows that fill up a recorded graph see nothing.
    merged = merged / tl.where(sum_of_weights > 0, sum_of_weights, 1.0)
    tl.store(
        out + line * value_dim + numbers, merged.to(out.dtype.element_ty), mask=numbers < value_dim
    )
