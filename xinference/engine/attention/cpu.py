# SPDX-License-Identifier: Apache-2.0
"""Paged attention for CPUs: decoding reads pages where they lie, chunks go through SDPA.

Layout: (num_blocks, Hkv, P, D), so that one head's keys of a block are one matrix.

Decoding. Every (row, block) pair is a small attention of its own, all of them in one batched
matrix product over blocks; the query heads that share a key head are folded into its query axis.
Partial results of a row are merged by their highest scores and sums, as in FlashDecoding
(https://crfm.stanford.edu/2023/10/12/flashdecoding.html). The block ids are sorted first, and
ids with small gaps are read as one range *in place*, holes included: reading a few blocks in vain
is cheaper than copying all the others. The pool hands out low ids first, which keeps holes rare.

Chunks. One call of the fused kernel per sequence: over its own new keys if it has no past, else
over a copy of its blocks with a mask; a chunk is bound by arithmetic, the copy does not show. Soft
caps and unequal key and value sizes are not for that kernel; their softmax is written out.
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from xinference.engine.batch import Batch, IntArray

from .interface import LayerShape, Pages, Scoring

# Why: a range costs two kernel calls, tens of microseconds; a hole costs reading its bytes.
_MAX_HOLE_BYTES = 256 * 1024
_MAX_QUERIES_AT_ONCE = 256


@dataclass(frozen=True, slots=True, kw_only=True)
class _DecodePlan:
    """The (row, block) pairs of the decoding rows, in ranges of block ids."""

    ranges: tuple[tuple[int, int], ...]
    """Half-open ranges of block ids; their lengths add up to N."""
    row_of_block: Tensor
    """(N,) the row each block is read for; 0 for a hole."""
    mask: Tensor
    """(N × Hkv, 1, P) 0 where the row sees the token, -inf where not, 0 in a hole."""
    holes: Tensor | None
    """(N, 1) bool, which are holes; None if there are none."""
    row_matrix: Tensor
    """(R, N) float32, 1 where the block belongs to the row: adds up the parts of each row."""

    def add_up(self, parts: Tensor) -> Tensor:
        """Do what a product with `row_matrix` does, slowly, where parts (N, n) may be NaN.

        In the product, 0 times the NaN of one row, or of a hole, would reach every other row.
        """
        own = self.row_matrix.any(0).nonzero().squeeze(1)
        added = parts.new_zeros(self.row_matrix.shape[0], parts.shape[1])
        return added.index_add_(0, self.row_of_block[own], parts[own])


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
        return CpuPlan(
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
        for stored, new in ((pages.key, key), (pages.value, value)):
            if plan.fresh_blocks is not None:
                # Why: blocks are read whole, and what somebody left at the end of one may be NaN,
                # which stays NaN with weight 0.
                stored.index_fill_(0, plan.fresh_blocks, 0)
            stored.view(-1, new.shape[-1]).index_copy_(0, index, new.reshape(-1, new.shape[-1]))

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
            parts.append(_decode(pages, plan, query[0, :, : plan.num_decode_rows], scoring))
        for index, chunk in enumerate(plan.chunks):
            parts.append(_prefill(pages, plan, index, chunk, query[0], key[0], value[0], scoring))
        out = parts[0] if len(parts) == 1 else torch.cat(parts)
        return out.view(1, num_tokens, num_heads, -1)


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


def _decode(pages: Pages, plan: CpuPlan, query: Tensor, scoring: Scoring) -> Tensor:
    """Return (R, H × Dv) for the decoding rows' queries (H, R, Dk)."""
    num_heads, num_rows, _ = query.shape
    _, num_kv_heads, block_size, _ = pages.key.shape
    block_bytes = (
        num_kv_heads * block_size * (pages.key.shape[3] + pages.value.shape[3])
    ) * pages.key.element_size()
    which = (scoring.window, num_kv_heads, _MAX_HOLE_BYTES // block_bytes)
    paged = plan.decode_plans.get(which)
    if paged is None:
        paged = _plan_decode(plan, *which)
        plan.decode_plans[which] = paged
    folded = query.transpose(0, 1).index_select(0, paged.row_of_block)
    folded = folded.unflatten(1, (num_kv_heads, -1))
    parts = []
    done = 0
    for start, stop in paged.ranges:
        here = slice(done, done + stop - start)
        done = here.stop
        parts.append(
            _attend_blocks(
                folded[here].flatten(0, 1),
                pages.key[start:stop].flatten(0, 1),
                pages.value[start:stop].flatten(0, 1),
                paged.mask[here.start * num_kv_heads : here.stop * num_kv_heads],
                scoring,
            )
        )
    mixed, total, highest = (
        part[0] if len(part) == 1 else torch.cat(part) for part in zip(*parts, strict=True)
    )
    highest = highest.view(-1, num_heads)
    if paged.holes is not None:
        highest = highest.masked_fill(paged.holes, -torch.inf)
    highest_of_row = highest.new_full((num_rows, num_heads), -torch.inf).scatter_reduce_(
        0, paged.row_of_block.unsqueeze(1).expand_as(highest), highest, "amax"
    )
    if scoring.sinks is not None:
        highest_of_row = torch.maximum(highest_of_row, scoring.sinks.float())
    weights = highest.sub_(highest_of_row.index_select(0, paged.row_of_block)).exp_()
    totals = weights * total.view(-1, num_heads)
    weighted = (mixed.view(*weights.shape, -1) * weights.unsqueeze(-1)).flatten(1)
    total_of_row, summed = paged.row_matrix @ totals, paged.row_matrix @ weighted
    # Why afterwards: it is rare, and to look at two sums is cheaper than a product that minds NaN.
    if not (total_of_row.sum() + summed.sum()).isfinite():
        total_of_row, summed = paged.add_up(totals), paged.add_up(weighted)
    if scoring.sinks is not None:
        total_of_row += (scoring.sinks.float() - highest_of_row).exp_()
    summed = summed.view(num_rows, num_heads, -1)
    out: Tensor = summed.div_(total_of_row.unsqueeze(-1)).to(query.dtype)
    return out.flatten(1)


def _attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scoring: Scoring
) -> tuple[Tensor, Tensor, Tensor]:
    """Attend within each block by itself, for B blocks × key heads.

    Args:
        query: (B, G, Dk).
        key: (B, P, Dk), in place in the cache; value (B, P, Dv) likewise.
        mask: (B, 1, P) 0 or -inf, model dtype.
        scoring: the layer's.

    Returns:
        The mix (B, G, Dv) with weights exp(score - highest); their sum, and the highest score,
        (B, G) float32.
    """
    transposed = key.transpose(1, 2)
    scores = torch.baddbmm(mask, query, transposed)
    if scoring.softcap is not None:
        scores = scores.float().mul_(scoring.scaling / scoring.softcap).tanh_()
        scores = scores.mul_(scoring.softcap).add_(mask)
        highest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(highest).exp_()
    else:
        highest = scores.amax(-1, keepdim=True)
        if scores.dtype == torch.float32:
            weights = scores.sub_(highest)
        else:
            # Why twice: the product is accumulated in float32 but rounded to the model's type, and
            # scores in the hundreds would lose what tells them apart. The first round only finds
            # the highest; the second subtracts it before it rounds, so what weighs most is exact.
            weights = torch.baddbmm(mask - highest, query, transposed).float()
        weights = weights.mul_(scoring.scaling).exp_()
        highest = highest.float().mul_(scoring.scaling)
    mixed = torch.bmm(weights.to(value.dtype), value)
    return mixed, weights.sum(-1), highest.squeeze(-1)


def _plan_decode(plan: CpuPlan, window: int | None, num_kv_heads: int, max_gap: int) -> _DecodePlan:
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
    breaks = np.flatnonzero((np.diff(layer) != 0) | (gaps > max_gap + 1)) + 1
    ranges: list[tuple[int, int]] = []
    places: list[IntArray] = []
    num_read = 0
    for part in np.split(np.arange(len(block_ids)), breaks):
        start, stop = int(block_ids[part[0]]), int(block_ids[part[-1]]) + 1
        ranges.append((start, stop))
        places.append(block_ids[part] - start + num_read)
        num_read += stop - start
    place = np.concatenate(places)

    row_of_block = np.zeros(num_read, np.int64)
    row_of_block[place] = rows
    keys = nth[:, None] * block_size + np.arange(block_size)
    visible = (keys < context_lens[rows, None]) & (keys >= starts[rows, None])
    mask = np.zeros((num_read, block_size), np.float32)
    mask[place] = np.where(visible, 0.0, -np.inf)
    holes = None
    if num_read > len(rows):
        holes = torch.ones((num_read, 1), dtype=torch.bool)
        holes[torch.from_numpy(place)] = False
    row_matrix = np.zeros((num_rows, num_read), np.float32)
    row_matrix[rows, place] = 1.0
    return _DecodePlan(
        ranges=tuple(ranges),
        row_of_block=torch.from_numpy(row_of_block),
        mask=torch.from_numpy(mask.repeat(num_kv_heads, axis=0)).to(plan.dtype).unsqueeze(1),
        holes=holes,
        row_matrix=torch.from_numpy(row_matrix),
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
