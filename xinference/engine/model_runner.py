# SPDX-License-Identifier: Apache-2.0
"""A model on its device and the cache it attends to: `Batch` in, logits out.

Knows torch and transformers; knows no requests, sampling or text.
"""

import inspect
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from .attention.interface import AttendingCache, attending
from .batch import Batch
from .kv_cache import PagedCache


class Runner(Protocol):
    """A model with its cache, whichever way it runs. Engine thread only."""

    def forward(self, batch: Batch) -> Tensor:
        """Compute a step: keys and values of its tokens go to the cache.

        Returns:
            (rows that sample, V) logits in model dtype on the model's device.
        """
        ...


@dataclass(frozen=True, slots=True)
class ModelRunner:
    """The first way: one forward of concatenated tokens, whose attention reads pages."""

    model: PreTrainedModel
    cache: PagedCache

    def forward(self, batch: Batch) -> Tensor:
        """As `Runner.forward`."""
        self.cache.begin(batch)
        return run_model(
            self.model,
            self.cache,
            torch.from_numpy(batch.token_ids),
            torch.from_numpy(batch.positions),
            torch.from_numpy(batch.sample_tokens),
        )


def run_model(
    model: PreTrainedModel,
    cache: AttendingCache,
    token_ids: Tensor,
    positions: Tensor,
    sample_tokens: Tensor,
) -> Tensor:
    """Call an unmodified transformers model on concatenated tokens, three (T,) int64 tensors.

    Returns:
        (rows that sample, V).
    """
    device = model.device
    with torch.inference_mode(), attending(cache):
        output = model(
            input_ids=token_ids.to(device).unsqueeze(0),
            position_ids=positions.to(device).unsqueeze(0),
            past_key_values=cache,
            use_cache=True,
            # Why: the head is the largest matrix of a small model; only these rows are wanted.
            logits_to_keep=sample_tokens.to(device),
        )
    logits: Tensor = output.logits[0]
    return logits


def refusal_of(model: PreTrainedModel) -> str | None:
    """Return why this class of model cannot run here, as far as its code says; None if it can."""
    if not model._can_set_attn_implementation():
        return f"{type(model).__name__} does not dispatch through transformers' AttentionInterface"
    parameters = inspect.signature(model.forward).parameters
    for name in ("position_ids", "past_key_values", "logits_to_keep"):
        if name not in parameters:
            return f"{type(model).__name__} does not take {name}"
    return None
