# SPDX-License-Identifier: Apache-2.0
"""Paged attention in plain PyTorch: what is right, on any device, not what is fast.

Keys and values lie token after token, (num_blocks × P, Hkv, D). Each group of rows gathers its
whole context and is computed in float32 with an explicit mask. The other backends are tested
against this one, and CUDA runs on it until it has one of its own.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from xinference.engine.batch import Batch, IntArray, padded_groups

from .interface import LayerShape, Pages, Scoring, pages_by_token

# Why: bounds the float32 copies of keys and of scores, whatever the batch.
_MAX_GATHERED_TOKENS = 65536
_MAX_QUERIES_AT_ONCE = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Rows that are computed together: either single tokens, or one chunk of one sequence."""

    tokens: Tensor
    """(rows, queries) indices into T."""
    positions: Tensor
    """(rows, queries) of each query in its sequence."""
    cache_slots: Tensor
    """(rows, longest context) where the keys lie; beyond a row's own context its last again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferencePlan:
    cache_slots: Tensor
    """(T,) where the new tokens go."""
    groups: tuple[_Group, ...]


class ReferenceAttention:
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

    def plan(self, batch: Batch, *, dtype: torch.dtype, device: torch.device) -> ReferencePlan:
        num_decode = batch.num_decode_rows
        context_lens = batch.context_lens[:num_decode]
        rows_of_groups = list(padded_groups(context_lens, _MAX_GATHERED_TOKENS))
        rows_of_groups += [np.array([row]) for row in range(num_decode, len(batch.context_lens))]
        groups = tuple(
            group for rows in rows_of_groups for group in self._groups(batch, rows, device)
        )
        return ReferencePlan(
            cache_slots=torch.from_numpy(batch.cache_slots).to(device), groups=groups
        )

    def store(self, pages: Pages, plan: ReferencePlan, key: Tensor, value: Tensor) -> None:
        pages.key.index_copy_(0, plan.cache_slots, key[0].transpose(0, 1))
        pages.value.index_copy_(0, plan.cache_slots, value[0].transpose(0, 1))

    def attend(
        self,
        pages: Pages,
        plan: ReferencePlan,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        _, num_heads, num_tokens, _ = query.shape
        out = query.new_empty(num_tokens, num_heads, value.shape[-1])
        for group in plan.groups:
            q = query[0].transpose(0, 1)[group.tokens].float()  # (rows, queries, H, Dk)
            k = pages.key[group.cache_slots].float()  # (rows, context, Hkv, Dk)
            v = pages.value[group.cache_slots].float()
            q = q.unflatten(2, (k.shape[2], -1))
            scores = torch.einsum("rqkgd,rckd->rkgqc", q, k) * scoring.scaling
            if scoring.softcap is not None:
                scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
            keys = torch.arange(k.shape[1], device=query.device)
            at = group.positions.unsqueeze(-1)
            visible = keys <= at
            if scoring.window is not None:
                visible &= keys > at - scoring.window
            scores = scores.masked_fill(~visible[:, None, None], -torch.inf)
            if scoring.sinks is not None:
                sinks = scoring.sinks.float().view(1, k.shape[2], -1, 1, 1)
                scores = torch.cat((scores, sinks.expand(*scores.shape[:-1], 1)), dim=-1)
            weights = scores.softmax(-1)[..., : k.shape[1]]
            mixed = torch.einsum("rkgqc,rckd->rqkgd", weights, v).flatten(2, 3)
            out[group.tokens] = mixed.to(out.dtype)
        return out.unsqueeze(0)

    def _groups(self, batch: Batch, rows: IntArray, device: torch.device) -> list[_Group]:
        context_lens = batch.context_lens[rows, None]
        # Why not beyond a row's own: what is there may be NaN, which stays NaN with weight 0.
        keys = np.minimum(np.arange(context_lens.max()), context_lens - 1)
        blocks = batch.block_tables[rows[:, None], keys // batch.block_size]
        cache_slots = torch.from_numpy(blocks * batch.block_size + keys % batch.block_size)
        first, last = batch.query_starts[rows], batch.query_starts[rows + 1]
        groups = []
        for start in range(0, int((last - first).max()), _MAX_QUERIES_AT_ONCE):
            # Why one length for all rows: a group of several rows has one query in each.
            stop = min(start + _MAX_QUERIES_AT_ONCE, int((last - first).max()))
            tokens = first[:, None] + np.arange(start, stop)
            groups.append(
                _Group(
                    tokens=torch.from_numpy(tokens).to(device),
                    positions=torch.from_numpy(batch.positions[tokens]).to(device),
                    cache_slots=cache_slots.to(device),
                )
            )
        return groups
