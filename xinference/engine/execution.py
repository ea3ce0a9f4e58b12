# SPDX-License-Identifier: Apache-2.0
"""The two ways to run a model over blocks, and which of them a model can take.

`RaggedExecution` is the first: all tokens of a step in one forward, without padding, attention over
pages. `PaddedExecution` is the second, for models whose attention cannot be ours. Each asks the
model by running it once, before the KV cache is made; whether it then computes what the model does
is the self-test's question.
"""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from transformers import PreTrainedModel

from .attention.interface import IMPLEMENTATION, AttentionBackend
from .kv_cache import PagedCache, ProbeCache
from .model_runner import ModelRunner, Runner, refusal_of, run_model
from .padded import PaddedCache, PaddedRunner, probe_padded
from .recorded import CudaGraphs, RecordableBackend, RecordedRunner

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheSize:
    """A KV cache, and what a step may have of it."""

    num_blocks: int
    block_size: int
    max_num_seqs: int
    max_model_len: int


class Execution(Protocol):
    """One way to run one model. Making one raises `ValueError` if the model cannot go that way,
    or whatever the model's own code raises."""

    @property
    def num_elements_per_token(self) -> int:
        """What the KV cache stores of a token, all layers together."""
        ...

    def make_runner(self, size: CacheSize) -> Runner:
        """Return the model with a KV cache of this size. Sets the model's attention."""
        ...


class RaggedExecution:
    """Concatenated tokens, attention by one of our backends."""

    def __init__(self, model: PreTrainedModel, backend: AttentionBackend) -> None:
        refusal = refusal_of(model)
        if refusal is not None:
            raise ValueError(refusal)
        self._model = model
        self._backend = backend
        model.set_attn_implementation(IMPLEMENTATION)
        probe = ProbeCache()
        tokens = torch.arange(3)
        run_model(model, probe, tokens, tokens, tokens[:1])
        self._shapes = probe.shapes()

    @property
    def num_elements_per_token(self) -> int:
        return sum(shape.num_elements for shape in self._shapes)

    def make_runner(self, size: CacheSize) -> Runner:
        self._model.set_attn_implementation(IMPLEMENTATION)
        cache = PagedCache(
            self._backend,
            self._shapes,
            num_blocks=size.num_blocks,
            block_size=size.block_size,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        runner = ModelRunner(self._model, cache)
        if self._model.device.type != "cuda" or not isinstance(self._backend, RecordableBackend):
            return runner
        try:
            return RecordedRunner(
                runner,
                self._backend,
                CudaGraphs(),
                max_num_rows=size.max_num_seqs,
                max_blocks=-(-size.max_model_len // size.block_size),
                block_size=size.block_size,
            )
        except RuntimeError as error:
            # Some models look at a number on the way, a router at its counts, which no graph can.
            logger.warning("steps are not recorded: %s", error)
            return runner


class PaddedExecution:
    """Padded batches, attention by the model itself."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._model = model
        self._shapes = probe_padded(model)

    @property
    def num_elements_per_token(self) -> int:
        return sum(shape.num_elements for shape in self._shapes)

    def make_runner(self, size: CacheSize) -> PaddedRunner:
        cache = PaddedCache(
            self._shapes,
            num_blocks=size.num_blocks,
            block_size=size.block_size,
            dtype=self._model.dtype,
            device=self._model.device,
        )
        return PaddedRunner(self._model, cache)
