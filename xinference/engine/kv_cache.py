# SPDX-License-Identifier: Apache-2.0
"""The memory that block ids point into, behind the face of a transformers cache.

`PagedCache.update` stores the new keys and values of a layer and `attend` reads them back; which
blocks, the current step's `Batch` says. `ProbeCache` finds out what each layer stores, by running
the model once. Neither knows who owns a block.
"""

from typing import Any

import torch
from torch import Tensor, nn

from .attention.interface import (
    AttendingCache,
    AttentionBackend,
    LayerShape,
    Scoring,
)
from .batch import Batch

_KNOWN_LAYER_TYPES = ("full_attention", "sliding_attention")


class PagedCache(AttendingCache):
    """Pages of all layers. `begin` must be called before each forward. Engine thread only."""

    def __init__(
        self,
        backend: AttentionBackend,
        shapes: list[LayerShape],
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._backend = backend
        self._dtype = dtype
        self._device = device
        self._plan: Any = None
        self._pages = [
            backend.allocate(
                shape, num_blocks=num_blocks, block_size=block_size, dtype=dtype, device=device
            )
            for shape in shapes
        ]

    def begin(self, batch: Batch) -> None:
        """Say which tokens the next forward computes and where theirs and older ones lie."""
        self._plan = self._backend.plan(batch, dtype=self._dtype, device=self._device)

    def begin_with(self, plan: Any) -> None:
        """As `begin`, by a plan that the backend has made."""
        self._plan = plan

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store key (1, Hkv, T, Dk) and value (1, Hkv, T, Dv); return the same, new tokens only."""
        self._backend.store(self._pages[layer_idx], self._plan, key_states, value_states)
        return key_states, value_states

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        layer_idx: int = module.layer_idx  # type: ignore[assignment]  # every attention layer has one
        return self._backend.attend(self._pages[layer_idx], self._plan, query, key, value, scoring)


class ProbeCache(AttendingCache):
    """Watches one forward and notes what each layer would store. Its answers are zeros."""

    def __init__(self) -> None:
        super().__init__()
        self._stored: dict[int, LayerShape] = {}

    def shapes(self) -> list[LayerShape]:
        """Return what each layer stores, by layer index.

        Raises:
            ValueError: nothing was stored, or not by every layer.
        """
        if sorted(self._stored) != list(range(len(self._stored))) or not self._stored:
            raise ValueError(f"only the layers {sorted(self._stored)} store keys and values")
        return [self._stored[layer] for layer in range(len(self._stored))]

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self._stored[layer_idx] = LayerShape(
            num_kv_heads=key_states.shape[1],
            key_dim=key_states.shape[3],
            value_dim=value_states.shape[3],
        )
        return key_states, value_states

    def attend(
        self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        layer_idx = getattr(module, "layer_idx", None)
        stored = None if layer_idx is None else self._stored.get(layer_idx)
        if stored is None:
            raise ValueError(f"attention layer {layer_idx} reads keys that it does not store")
        if (key.shape[1], key.shape[3], value.shape[3]) != (
            stored.num_kv_heads,
            stored.key_dim,
            stored.value_dim,
        ):
            raise ValueError(f"attention layer {layer_idx} reads other keys than it stores")
        layer_types = getattr(getattr(module, "config", None), "layer_types", None)
        if layer_types is not None:
            layer_type = layer_types[layer_idx]
            if layer_type not in _KNOWN_LAYER_TYPES:
                raise ValueError(f"layers of type {layer_type!r} are not supported")
            if layer_type == "sliding_attention" and scoring.window is None:
                raise ValueError(f"layer {layer_idx} slides, but does not say its window")
        _, num_heads, num_tokens, _ = query.shape
        return query.new_zeros(1, num_tokens, num_heads, value.shape[-1])
