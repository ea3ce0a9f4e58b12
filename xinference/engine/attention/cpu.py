# SPDX-License-Identifier: Apache-2.0
"""Paged attention for CPUs: decoding reads pages where they lie, chunks go through SDPA.

Layout: (num_blocks, Hkv, P, D), so that one head's keys of a block are one matrix.

Decoding. Every (row, block) pair is a small attention of its own, all of them in one batched
matrix product over blocks; the query heads that share a key head are folded into its query axis.
Partial results of a row are merged by the log-sum-exp of their scores, as in FlashDecoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The block ids are sorted first, and
ids with small gaps are read as one range *in place*, holes included: reading a few blocks in vain
is cheaper than copying all the others. The pool hands out low ids first, which keeps holes rare
while it is young; where blocks lie so far apart that there would be many ranges, they are copied.

Chunks. One call of the fused kernel per sequence: over its own new keys if it has no past, else
over a copy of its blocks with a mask; a chunk is bound by arithmetic, the copy does not show. Soft
caps and unequal key and value sizes are not for that kernel; their softmax is written out.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from xinference.engine.batch import Batch, IntArray, padded_groups

from .interface import LayerShape, Pages, Scoring

# Why: a range costs three kernel calls, some 60 us on one thread; a hole costs its products, and
# copying costs reading and writing (doc/experiments/engine-cpu.md).
_MAX_HOLE_BYTES = 256 * 1024
_COPIED_BYTES_PER_RANGE = 2 * 1024 * 1024
_MAX_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rows:
    """Some decoding rows, and which parts are theirs."""

    num_rows: int
    parts: Tensor
    """(rows × most parts of a row,) indices into N. Where a row has fewer, its first again.

    Invariant: a row is given its own parts only, so that a NaN in one stays with its row.
    """
    repeats: Tensor | None
    """(rows, most parts of a row, 1) bool, which of them are such repetitions; None if none is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodePlan:
    """The (row, block) pairs of the decoding rows, in ranges of block ids."""

    ranges: tuple[tuple[int, int], ...]
    """Half-open ranges of block ids; their lengths add up to N."""
    copied: Tensor | None
    """(N,) block ids that are copied, and then are the one range; None: all are read in place."""
    row_of_block: Tensor
    """(N,) the row each block is read for; 0 for a hole."""
    mask: Tensor
    """(N × Hkv, 1, P) float32, 0 where the row sees the token, -inf where not, 0 in a hole."""
    rows: tuple[_Rows, ...]
    """All rows in order, in groups whose numbers of parts are not too different."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Chunk:
    """One sequence's new tokens [first, last) of T."""

    first: int
    last: int
    num_past: int
    block_ids: Tensor
    """All blocks of its context."""


@dataclass(slots=True, kw_only=True)
class CpuPlan:
    """One step. What depends on a window or on a number of heads is made once, on first use."""

    batch: Batch
    dtype: torch.dtype
    num_decode_rows: int
    chunks: tuple[_Chunk, ...]
    fresh_blocks: Tensor | None
    """Those whose first token this step stores; None if there are none."""
    decode_plans: dict[tuple[int | None, int, int], _DecodePlan] = field(default_factory=dict)
    store_indices: dict[int, Tensor] = field(default_factory=dict)
    chunk_masks: dict[tuple[int, int | None], tuple[int, Tensor]] = field(default_factory=dict)


class CpuAttention:
    """See the module's text. Holds no state."""

    plan_type: ClassVar[type[CpuPlan]] = CpuPlan

    def allocate(
        self,
        shape: LayerShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pages:
        lead = (num_blocks, shape.num_kv_heads, block_size)
        return Pages(
            torch.zeros(*lead, shape.key_dim, dtype=dtype, device=device),
            torch.zeros(*lead, shape.value_dim, dtype=dtype, device=device),
        )

    def plan(self, batch: Batch, *, dtype: torch.dtype, device: torch.device) -> CpuPlan:
        num_decode = batch.num_decode_rows
        chunks = []
        for row in range(num_decode, len(batch.context_lens)):
            first, last = int(batch.query_starts[row]), int(batch.query_starts[row + 1])
            context_len = int(batch.context_lens[row])
            blocks = batch.block_tables[row, : -(-context_len // batch.block_size)]
            chunks.append(
                _Chunk(
                    first=first,
                    last=last,
                    num_past=context_len - (last - first),
                    block_ids=torch.from_numpy(blocks),
                )
            )
        fresh = batch.cache_slots[batch.positions % batch.block_size == 0] // batch.block_size
        return self.plan_type(
            batch=batch,
            dtype=dtype,
            num_decode_rows=num_decode,
            chunks=tuple(chunks),
            fresh_blocks=torch.from_numpy(fresh) if fresh.size else None,
        )

    def store(self, pages: Pages, plan: CpuPlan, key: Tensor, value: Tensor) -> None:
        num_kv_heads = key.shape[1]
        index = plan.store_indices.get(num_kv_heads)
        if index is None:
            index = _store_index(plan.batch, num_kv_heads)
            plan.store_indices[num_kv_heads] = index
        self._clear_fresh(pages, plan)
        for stored, new in ((pages.key, key), (pages.value, value)):
            stored.view(-1, new.shape[-1]).index_copy_(0, index, new.reshape(-1, new.shape[-1]))

    def _clear_fresh(self, pages: Pages, plan: CpuPlan) -> None:
        # Why: blocks are read whole, and what somebody left at the end of one may be NaN, which
        # stays NaN with weight 0.
        if plan.fresh_blocks is not None:
            pages.key.index_fill_(0, plan.fresh_blocks, 0)
            pages.value.index_fill_(0, plan.fresh_blocks, 0)

    def attend(
        self,
        pages: Pages,
        plan: CpuPlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        _, num_heads, num_tokens, _ = query.shape
        parts: list[Tensor] = []
        if plan.num_decode_rows:
            parts.append(self._decode(pages, plan, query[0, :, : plan.num_decode_rows], scoring))
        for index, chunk in enumerate(plan.chunks):
            parts.append(_prefill(pages, plan, index, chunk, query[0], key[0], value[0], scoring))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(1, num_tokens, num_heads, -1)

    def _decode(self, pages: Pages, plan: CpuPlan, query: Tensor, scoring: Scoring) -> Tensor:
        """Return (R, H × Dv) for the decoding rows' queries (H, R, Dk)."""
        num_heads = query.shape[0]
        _, num_kv_heads, block_size, _ = pages.key.shape
        block_bytes = (
            num_kv_heads * block_size * (pages.key.shape[3] + pages.value.shape[3])
        ) * pages.key.element_size()
        which = (scoring.window, num_kv_heads, block_bytes)
        paged = plan.decode_plans.get(which)
        if paged is None:
            paged = _plan_decode(plan, *which)
            plan.decode_plans[which] = paged
        folded = query.transpose(0, 1).index_select(0, paged.row_of_block)
        folded = folded.unflatten(1, (num_kv_heads, -1)).flatten(0, 1)
        mixed, lse = _attend_blocks(folded, list(_reads(pages, paged)), paged.mask, scoring)
        lse, mixed = lse.view(-1, num_heads), mixed.view(-1, num_heads, mixed.shape[-1])
        merged = [_merge(mixed, lse, rows, scoring) for rows in paged.rows]
        out = merged[0] if len(merged) == 1 else torch.cat(merged)
        return out.to(query.dtype).flatten(1)


def _store_index(batch: Batch, num_kv_heads: int) -> Tensor:
    """Return (Hkv × T,): where each head's tokens lie in pages seen as rows of D numbers."""
    block_ids, places = np.divmod(batch.cache_slots, batch.block_size)
    heads = np.arange(num_kv_heads)[:, None]
    index = (block_ids * num_kv_heads + heads) * batch.block_size + places
    return torch.from_numpy(index.reshape(-1))


def _attend_dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scoring: Scoring,
    *,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor]:
    """Attend within each of B batches; return the mix (B, h, q, Dv) and log-sum-exp (B, h, q).

    `query` is (B, h, q, Dk), `key` (B, h or 1 expanded to it, k, Dk); `mask` broadcasts to
    (B, h, q, k) in the dtype of `query`.
    """
    if scoring.softcap is None and key.shape[-1] == value.shape[-1]:
        # Why the inner operator: the public one does not return the log-sum-exp.
        mixed, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=mask, scale=scoring.scaling
        )
        return mixed, lse
    scores = torch.matmul(query, key.transpose(-1, -2)).float().mul_(scoring.scaling)
    if scoring.softcap is not None:
        scores = scores.div_(scoring.softcap).tanh_().mul_(scoring.softcap)
    if mask is not None:
        scores += mask
    lse = scores.logsumexp(-1)
    weights = scores.sub_(lse.unsqueeze(-1)).exp_().to(value.dtype)
    return torch.matmul(weights, value), lse


def _reads(pages: Pages, paged: _DecodePlan) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield each range's place among all blocks × key heads, and its keys and values."""
    key, value = pages.key, pages.value
    if paged.copied is not None:
        key, value = key.index_select(0, paged.copied), value.index_select(0, paged.copied)
    num_kv_heads, done = key.shape[1], 0
    for start, stop in paged.ranges:
        first, done = done, done + (stop - start) * num_kv_heads
        here = slice(first, done)
        yield here, key[start:stop].flatten(0, 1), value[start:stop].flatten(0, 1)


def _attend_blocks(
    query: Tensor,
    reads: Sequence[tuple[slice, Tensor, Tensor]],
    mask: Tensor,
    scoring: Scoring,
) -> tuple[Tensor, Tensor]:
    """Attend within each block by itself, for B blocks × key heads.

    Only the products are a call for each range. A cache that has been in use for a while is read
    in many, and the small operations between the products would cost more than reading it.

    Args:
        query: (B, G, Dk).
        reads: which of the B, with their keys (b, P, Dk) and values (b, P, Dv).
        mask: (B, 1, P) float32, 0 or -inf.
        scoring: the layer's.

    Returns:
        The mix (B, G, Dv), model dtype, and the log-sum-exp of the scores (B, G), float32.
    """
    num_queries, block_size, value_dim = query.shape[1], mask.shape[2], reads[0][2].shape[2]
    product = query.new_empty(len(query), num_queries, block_size)
    for here, key, _ in reads:
        torch.bmm(query[here], key.transpose(1, 2), out=product[here])
    scores = product.float()
    if product.dtype != torch.float32:
        # Why twice: the product is accumulated in float32 but rounded to the model's type, and
        # scores in the hundreds would lose what tells them apart. The second one is what the
        # first has lost by that, and nearly exact.
        for here, key, _ in reads:
            product[here].baddbmm_(query[here], key.transpose(1, 2), beta=-1)
        scores = scores.add_(product)
    if scoring.softcap is None:
        scores = torch.add(mask, scores, alpha=scoring.scaling)
    else:
        scores = scores.mul_(scoring.scaling / scoring.softcap).tanh_()
        scores = scores.mul_(scoring.softcap).add_(mask)
    weights = scores.softmax(-1)
    # Why not `logsumexp`: it takes as long as all the rest, and the best token's weight tells it.
    lse = scores.amax(-1) - weights.amax(-1).log_()
    weights = weights.to(query.dtype)
    mixed = query.new_empty(len(query), num_queries, value_dim)
    for here, _, value in reads:
        torch.bmm(weights[here], value, out=mixed[here])
    return mixed, lse


def _merge(mixed: Tensor, lse: Tensor, rows: _Rows, scoring: Scoring) -> Tensor:
    """Return (rows, H, Dv) float32, of each row its parts by what they weigh.

    Args:
        mixed: (N, H, Dv), each part's mix.
        lse: (N, H) float32, the log-sum-exp of each part's scores.
        rows: which rows, and which parts are theirs.
        scoring: the layer's.
    """
    by_row = (rows.num_rows, -1, lse.shape[1])
    scores = lse.index_select(0, rows.parts).view(by_row)
    num_parts = scores.shape[1]
    if rows.repeats is not None:
        scores = scores.masked_fill_(rows.repeats, -torch.inf)
    if scoring.sinks is not None:
        sinks = scoring.sinks.float().expand(rows.num_rows, 1, -1)
        scores = torch.cat((scores, sinks), dim=1)
    shares = scores.softmax(1)[:, :num_parts].unsqueeze(-1)
    return (mixed.index_select(0, rows.parts).view(*by_row, mixed.shape[2]) * shares).sum(1)


def _plan_decode(
    plan: CpuPlan, window: int | None, num_kv_heads: int, block_bytes: int
) -> _DecodePlan:
    batch, block_size = plan.batch, plan.batch.block_size
    num_rows = plan.num_decode_rows
    context_lens = batch.context_lens[:num_rows]
    starts = np.zeros_like(context_lens)
    if window is not None:
        starts = np.maximum(context_lens - window, 0)
    first_blocks, end_blocks = starts // block_size, -(-context_lens // block_size)
    counts = end_blocks - first_blocks
    rows = np.repeat(np.arange(num_rows), counts)
    nth = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    nth += first_blocks[rows]  # which block of its row
    block_ids = batch.block_tables[rows, nth]

    # A block that several rows read (a shared prefix) is read once per row, in ranges of its own:
    # `layer` counts the rows that come before.
    order = np.lexsort((rows, block_ids))
    rows, nth, block_ids = rows[order], nth[order], block_ids[order]
    is_first = np.concatenate(([True], block_ids[1:] != block_ids[:-1]))
    layer = np.arange(len(rows)) - np.maximum.accumulate(
        np.where(is_first, np.arange(len(rows)), 0)
    )
    if layer.any():
        order = np.lexsort((block_ids, layer))
        rows, nth, block_ids, layer = rows[order], nth[order], block_ids[order], layer[order]

    gaps = np.diff(block_ids)
    max_hole = _MAX_HOLE_BYTES // block_bytes
    breaks = np.flatnonzero((np.diff(layer) != 0) | (gaps > max_hole + 1)) + 1
    must_copy = len(block_ids) * block_bytes < len(breaks) * _COPIED_BYTES_PER_RANGE
    if must_copy:
        ranges, place = [(0, len(block_ids))], np.arange(len(block_ids))
    else:
        ranges, place = _ranges(block_ids, breaks)
    num_read = sum(stop - start for start, stop in ranges)

    row_of_block = np.zeros(num_read, np.int64)
    row_of_block[place] = rows
    keys = nth[:, None] * block_size + np.arange(block_size)
    visible = (keys < context_lens[rows, None]) & (keys >= starts[rows, None])
    mask = np.zeros((num_read, block_size), np.float32)
    mask[place] = np.where(visible, 0.0, -np.inf)
    return _DecodePlan(
        ranges=tuple(ranges),
        copied=torch.from_numpy(block_ids) if must_copy else None,
        row_of_block=torch.from_numpy(row_of_block),
        mask=torch.from_numpy(mask.repeat(num_kv_heads, axis=0)).unsqueeze(1),
        rows=tuple(_group_rows(rows, place, counts)),
    )


def _ranges(block_ids: IntArray, breaks: IntArray) -> tuple[list[tuple[int, int]], IntArray]:
    """Return the half-open ranges of ids between the breaks, and each block's place in them all."""
    ranges: list[tuple[int, int]] = []
    places: list[IntArray] = []
    num_read = 0
    for part in np.split(block_ids, breaks):
        start, stop = int(part[0]), int(part[-1]) + 1
        ranges.append((start, stop))
        places.append(part - start + num_read)
        num_read += stop - start
    return ranges, np.concatenate(places)


def _group_rows(rows: IntArray, places: IntArray, counts: IntArray) -> Iterator[_Rows]:
    """Yield all rows, given the row and the place among N of each part, and each row's number.

    Why groups: padded to the longest row, many short ones beside it would be mostly repetitions.
    """
    places = places[np.argsort(rows, kind="stable")]
    starts = np.cumsum(counts) - counts
    for group in padded_groups(counts, 2 * len(places)):
        nth = np.arange(counts[group].max())
        is_repeat = nth >= counts[group, None]
        parts = places[starts[group, None] + np.where(is_repeat, 0, nth)]
        yield _Rows(
            num_rows=len(group),
            parts=torch.from_numpy(parts.reshape(-1)),
            repeats=torch.from_numpy(is_repeat).unsqueeze(-1) if is_repeat.any() else None,
        )


def _prefill(
    pages: Pages,
    plan: CpuPlan,
    index: int,
    chunk: _Chunk,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scoring: Scoring,
) -> Tensor:
    """Return (tokens of the chunk, H × Dv) from query (H, T, Dk) and new key, value (Hkv, T, D)."""
    tokens = slice(chunk.first, chunk.last)
    num_new = chunk.last - chunk.first
    num_kv_heads = key.shape[0]
    # (Hkv, G, new, Dk): a key head is a batch, the query heads that share it are its heads.
    folded = query[:, tokens].unflatten(0, (num_kv_heads, -1))
    window = scoring.window
    is_plain = chunk.num_past == 0 and (window is None or num_new <= window)
    if is_plain and scoring.softcap is None and key.shape[2] == value.shape[2]:
        mixed, lse = _attend_dense(
            folded,
            _expand(key[:, tokens], folded),
            _expand(value[:, tokens], folded),
            None,
            scoring,
            is_causal=True,
        )
    else:
        cached = plan.chunk_masks.get((index, window))
        if cached is None:
            cached = _chunk_mask(chunk, plan, window)
            plan.chunk_masks[index, window] = cached
        first_block, mask = cached
        block_ids = chunk.block_ids[first_block:]
        keys, values = (
            _expand(stored[block_ids].transpose(0, 1).flatten(1, 2), folded)
            for stored in (pages.key, pages.value)
        )
        results = [
            _attend_dense(
                folded[:, :, start : start + _MAX_QUERIES_AT_ONCE],
                keys,
                values,
                mask[start : start + _MAX_QUERIES_AT_ONCE],
                scoring,
            )
            for start in range(0, num_new, _MAX_QUERIES_AT_ONCE)
        ]
        mixed = torch.cat([result[0] for result in results], dim=2)
        lse = torch.cat([result[1] for result in results], dim=2)
    if scoring.sinks is not None:
        # A sink only adds exp(sink) to the denominator: out × exp(lse) / (exp(lse) + exp(sink)).
        sinks = scoring.sinks.float().view(num_kv_heads, -1, 1)
        mixed = mixed * torch.sigmoid(lse - sinks).unsqueeze(-1).to(mixed.dtype)
    return mixed.permute(2, 0, 1, 3).reshape(num_new, -1)


def _expand(stored: Tensor, folded: Tensor) -> Tensor:
    """Show (Hkv, k, D) as (Hkv, G, k, D) without copying."""
    return stored.unsqueeze(1).expand(-1, folded.shape[1], -1, -1)


def _chunk_mask(chunk: _Chunk, plan: CpuPlan, window: int | None) -> tuple[int, Tensor]:
    """Return the first block that any query of the chunk sees, and the mask from there on.

    The mask is (new, tokens of the blocks read): 0 where a query sees a key, -inf where not.
    """
    block_size = plan.batch.block_size
    first_block = 0 if window is None else max(chunk.num_past + 1 - window, 0) // block_size
    at = np.arange(chunk.num_past, chunk.num_past + chunk.last - chunk.first)[:, None]
    keys = np.arange(first_block * block_size, len(chunk.block_ids) * block_size)
    visible = keys <= at
    if window is not None:
        visible &= keys > at - window
    mask = np.where(visible, np.float32(0.0), np.float32(-np.inf))
    return first_block, torch.from_numpy(mask).to(plan.dtype)
