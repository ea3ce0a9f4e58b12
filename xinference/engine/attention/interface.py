# SPDX-License-Identifier: Apache-2.0
"""How transformers' attention layers reach our pages.

A model calls two hooks in each layer: `past_key_values.update(...)` with the new keys and values,
then the attention function of its `AttentionInterface`. The first stores, the second reads. Both
lead to the `AttendingCache` of the current forward, which is found through a context variable:
it works for models that do not pass extra arguments down, and for several engines in a process.

Because no mask function is registered under our name, transformers builds no mask at all;
windows and causality are ours. Any argument that would change the result and is not understood
here is refused: ignoring it would be a silently wrong answer.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.cache_utils import Cache

from xinference.engine.batch import Batch

IMPLEMENTATION = "xinference_paged"
"""The name under which the attention function is registered."""

# What models hand down that does not change what attention computes.
_HARMLESS = frozenset(
    {
        "cache_position",
        "output_attentions",
        "output_hidden_states",
        "output_router_logits",
        "position_embeddings",
        "position_ids",
        "return_dict",
        "use_cache",
    }
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerShape:
    """What one layer stores of a token."""

    num_kv_heads: int
    key_dim: int
    value_dim: int

    @property
    def num_elements(self) -> int:
        return self.num_kv_heads * (self.key_dim + self.value_dim)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scoring:
    """How a layer turns queries and keys into weights."""

    scaling: float
    window: int | None = None
    """A query at position p sees keys at positions above p - window; None sees all before it."""
    softcap: float | None = None
    """Scores s become softcap × tanh(s / softcap)."""
    sinks: Tensor | None = None
    """(H,) one score per head that takes part in the softmax and has no value."""


@dataclass(frozen=True, slots=True)
class Pages:
    """Keys and values of one layer; the layout is the backend's."""

    key: Tensor
    value: Tensor


def pages_by_token(
    shape: LayerShape, num_tokens: int, *, dtype: torch.dtype, device: torch.device
) -> Pages:
    """Return zeroed pages in which tokens lie one after the other, (num_tokens, Hkv, D)."""
    lead = (num_tokens, shape.num_kv_heads)
    return Pages(
        torch.zeros(*lead, shape.key_dim, dtype=dtype, device=device),
        torch.zeros(*lead, shape.value_dim, dtype=dtype, device=device),
    )


class AttentionBackend(Protocol):
    """Stores to pages and reads from them. `Plan` is the backend's own: what all layers of one
    step share, computed once."""

    def allocate(
        self,
        shape: LayerShape,
        *,
        num_blocks: int,
        block_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Pages:
        """Return zeroed pages of one layer.

        Hazard: they must be finite from the start; a block's unused end is multiplied by weight 0.
        """
        ...

    def plan(self, batch: Batch, *, dtype: torch.dtype, device: torch.device) -> Any:
        """Prepare what is the same for every layer of this step."""
        ...

    def store(self, pages: Pages, plan: Any, key: Tensor, value: Tensor) -> None:
        """Put the new tokens' key (1, Hkv, T, Dk) and value (1, Hkv, T, Dv) into their blocks."""
        ...

    def attend(
        self, pages: Pages, plan: Any, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        """Return (1, T, H, Dv) for `query` (1, H, T, Dk), each row over its own context.

        `key` and `value` are the new tokens' own, already stored.
        """
        ...


STATE_PROBLEM = "it keeps a state of the past that is not keys and values of tokens"


class BlockCache(Cache):
    """A transformers cache over blocks: keys and values, none of the other things models keep."""

    def __init__(self) -> None:
        super().__init__(layers=[])

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise ValueError(STATE_PROBLEM)

    has_previous_state = _refuse
    get_conv_state = update_conv_state = _refuse
    get_recurrent_state = update_recurrent_state = _refuse
    update_indexer = _refuse


class AttendingCache(BlockCache):
    """One whose `update` stores, and that also answers for the reading."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scoring: Scoring,
    ) -> Tensor:
        """Return (1, T, H, Dv) for a layer's query (1, H, T, Dk)."""
        raise NotImplementedError


_current: ContextVar[AttendingCache] = ContextVar("xinference_attending_cache")


@contextmanager
def attending(cache: AttendingCache) -> Iterator[None]:
    """Let this cache answer the attention of the forward inside the block, in this thread."""
    token = _current.set(cache)
    try:
        yield
    finally:
        _current.reset(token)


def paged_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Answer transformers' call for one layer; see the module's text.

    Raises:
        ValueError: an argument asks for something that is not done here.
    """
    if attention_mask is not None:
        raise ValueError("the model passes an attention mask of its own")
    if dropout:
        raise ValueError(f"the model asks for attention dropout {dropout}")
    if is_causal is False or getattr(module, "is_causal", True) is False:
        raise ValueError("the model's attention is not causal")
    for name, argument in others.items():
        if argument is not None and name not in _HARMLESS:
            raise ValueError(f"the model's attention takes {name!r}, which is not supported")
    scoring = Scoring(
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        window=sliding_window,
        softcap=softcap,
        sinks=s_aux,
    )
    return _current.get().attend(module, query, key, value, scoring), None


def register() -> None:
    """Make the name known to transformers. May be called again."""
    AttentionInterface.register(IMPLEMENTATION, paged_attention)
