# SPDX-License-Identifier: Apache-2.0
"""The second way to run a model: its own attention, over contexts gathered from our blocks.

For decoders that have no hook for attention (BLOOM, Falcon, GPT-J, MPT), or whose attention reads
other keys than it stores (multi-head latent attention, layers that share keys). What such a model
still has in common with all others is its cache: it calls `update` with new keys and values and
goes on with what comes back. `PaddedCache.update` stores the new ones in the blocks of the pool,
like the first way, and returns the whole context of each row, so that blocks, prefixes, preemption
and all else stay as they are. Only the forward differs: single tokens run as one batch, [B, 1],
contexts padded on the left; each chunk runs by itself, [1, n].

It costs a copy of the context per layer and step, and chunks do not share a forward.
"""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention.interface import BlockCache, Pages
from .batch import Batch, IntArray, padded_groups

# Why: bounds what one forward of single tokens gathers, padding included.
_MAX_GATHERED_TOKENS = 65536


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredShape:
    """What one layer hands to its cache of a token: heads and numbers of each."""

    key: tuple[int, int]
    value: tuple[int, int]

    @property
    def num_elements(self) -> int:
        return self.key[0] * self.key[1] + self.value[0] * self.value[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Group:
    """Rows of a step that run in one forward; (B, q) new tokens with contexts padded to C."""

    first: int
    """The first of its tokens, which are consecutive, in the concatenation."""
    token_ids: Tensor
    """(B, q)"""
    positions: Tensor
    """(B, q)"""
    new_slots: Tensor
    """(B × q,) where the new keys and values go: block id × block size + place in the block."""
    context_slots: Tensor
    """(B, C) where the contexts lie, each at the right end."""
    mask: Tensor
    """(B, C) 1 where there is context, 0 where padding."""


class PaddedCache(BlockCache):
    """Pages of all layers, (num_blocks × P, numbers of a token). Engine thread only."""

    def __init__(
        self,
        shapes: list[StoredShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()

        def zeros(shape: tuple[int, int]) -> Tensor:
            return torch.zeros(num_blocks * block_size, *shape, dtype=dtype, device=device)

        self._pages = [Pages(zeros(shape.key), zeros(shape.value)) for shape in shapes]
        self._group: _Group | None = None

    def begin(self, group: _Group) -> None:
        """Say what the next forward computes."""
        self._group = group

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store key (B, Hk, q, Dk) and value (B, Hv, q, Dv); return all of them, (B, H, C, D)."""
        pages = self._pages[layer_idx]
        return self._exchange(pages.key, key_states), self._exchange(pages.value, value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens are there before the new ones, padding included."""
        assert self._group is not None
        return self._group.context_slots.shape[1] - self._group.token_ids.shape[1]

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return (C, 0), whatever kind the layer is: contexts are always whole."""
        assert self._group is not None
        return self._group.context_slots.shape[1], 0

    def _exchange(self, pages: Tensor, new: Tensor) -> Tensor:
        assert self._group is not None
        pages.index_copy_(0, self._group.new_slots, new.transpose(1, 2).flatten(0, 1))
        return pages[self._group.context_slots].transpose(1, 2)


class _ProbeCache(BlockCache):
    """Notes what each layer stores in a forward without a past."""

    def __init__(self) -> None:
        super().__init__()
        self.stored: dict[int, StoredShape] = {}

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.stored[layer_idx] = StoredShape(
            key=(key_states.shape[1], key_states.shape[3]),
            value=(value_states.shape[1], value_states.shape[3]),
        )
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return query_length, 0


@dataclass(frozen=True, slots=True)
class PaddedRunner:
    """Runs one model over one `PaddedCache`. Engine thread only."""

    model: PreTrainedModel
    cache: PaddedCache

    def forward(self, batch: Batch) -> Tensor:
        """Compute a step in as many forwards as it has groups; else as `ModelRunner.forward`."""
        device = self.model.device
        logits, found = [], []
        for group in _groups(batch, device):
            self.cache.begin(group)
            last = group.first + group.token_ids.numel()
            here = (batch.sample_tokens >= group.first) & (batch.sample_tokens < last)
            found.append(np.flatnonzero(here))
            wanted = batch.sample_tokens[here] - group.first
            logits.append(
                _run(
                    self.model,
                    self.cache,
                    group.token_ids,
                    group.positions,
                    group.mask,
                    torch.from_numpy(wanted).to(device),
                )
            )
        order = np.argsort(np.concatenate(found))
        return torch.cat(logits)[torch.from_numpy(order).to(device)]


def probe_padded(model: PreTrainedModel) -> list[StoredShape]:
    """Run a few tokens to see what each layer stores. Sets the model's attention to its own.

    Raises:
        ValueError: the model needs something that is not supported.
    """
    parameters = inspect.signature(model.forward).parameters
    for name in ("past_key_values", "attention_mask"):
        if name not in parameters:
            raise ValueError(f"{type(model).__name__} does not take {name}")
    if model._can_set_attn_implementation():
        model.set_attn_implementation("sdpa" if model._supports_sdpa else "eager")
    cache = _ProbeCache()
    tokens = torch.arange(3, device=model.device).unsqueeze(0)
    _run(model, cache, tokens, tokens, torch.ones_like(tokens), tokens[0, :1])
    stored = cache.stored
    if sorted(stored) != list(range(len(stored))) or not stored:
        raise ValueError(f"only the layers {sorted(stored)} store keys and values")
    return [stored[layer] for layer in range(len(stored))]


def _run(
    model: PreTrainedModel,
    cache: BlockCache,
    token_ids: Tensor,
    positions: Tensor,
    mask: Tensor,
    wanted: Tensor,
) -> Tensor:
    """Return (rows wanted, V); `wanted` are indices into the flattened (B, q) new tokens."""
    taken = inspect.signature(model.forward).parameters
    # Why not always: some know positions by their masks alone.
    given = {"position_ids": positions} if "position_ids" in taken else {}
    is_one_row = token_ids.shape[0] == 1
    if is_one_row and "logits_to_keep" in taken:
        given["logits_to_keep"] = wanted
        wanted = torch.arange(len(wanted), device=wanted.device)
    with torch.inference_mode():
        logits: Tensor = model(
            input_ids=token_ids,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            **given,
        ).logits
    return logits.flatten(0, 1)[wanted]


def _groups(batch: Batch, device: torch.device) -> Iterator[_Group]:
    """Yield the single tokens as few groups, then each chunk, in the order of the batch."""
    num_decode, num_rows = batch.num_decode_rows, len(batch.context_lens)
    for rows in padded_groups(batch.context_lens[:num_decode], _MAX_GATHERED_TOKENS):
        yield _group_of(batch, rows, device)
    for row in range(num_decode, num_rows):
        yield _group_of(batch, np.array([row]), device)


def _group_of(batch: Batch, rows: IntArray, device: torch.device) -> _Group:
    first, last = int(batch.query_starts[rows[0]]), int(batch.query_starts[rows[-1] + 1])
    context_lens = batch.context_lens[rows, None]
    longest = int(context_lens.max())
    places = np.arange(longest) - (longest - context_lens)
    # Why a row's own first token for padding: its weight is 0, but 0 times a NaN of somebody
    # else's would be a NaN.
    positions = np.maximum(places, 0)
    blocks = batch.block_tables[rows[:, None], positions // batch.block_size]
    context_slots = blocks * batch.block_size + positions % batch.block_size

    def tensor(array: IntArray) -> Tensor:
        return torch.from_numpy(array).to(device)

    return _Group(
        first=first,
        token_ids=tensor(batch.token_ids[first:last].reshape(len(rows), -1)),
        positions=tensor(batch.positions[first:last].reshape(len(rows), -1)),
        new_slots=tensor(batch.cache_slots[first:last]),
        context_slots=tensor(context_slots),
        mask=tensor((places >= 0).astype(np.int64)),
    )
