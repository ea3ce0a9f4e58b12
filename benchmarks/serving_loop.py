# SPDX-License-Identifier: Apache-2.0
"""A random model of a known shape, and an engine loop with a clock, for benchmarks of serving."""

import threading
import time
from collections.abc import Iterable

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from xinference.engine import Engine, EngineLoop, EngineRequest
from xinference.engine.config import Placement
from xinference.engine.loading import make_engine
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.generation import (
    Failed,
    Finished,
    GenerationEvent,
    SamplingParams,
    TextDelta,
)

DEADLINE_SECONDS = 600.0


def make_random_model(num_layers: int, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """Return Qwen2-0.5B's shape with so many layers and random weights."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="sdpa")
    # Hazard: weights without gradients make `generate` six times slower: PyTorch then multiplies
    # the last positions as a batch and copies the head once for each. Users have them with.
    return model.eval()


def make_random_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with as many words as `make_random_model` has."""
    vocabulary = {f"t{token_id}": token_id for token_id in range(151_646)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def random_model(num_layers: int, dtype: torch.dtype) -> Qwen2ForCausalLM:
    """Return Qwen2-0.5B's shape, with so many layers and random weights."""
    config = Qwen2Config(
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=num_layers,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    model = Qwen2ForCausalLM._from_config(config, dtype=dtype, attn_implementation="eager")
    model.eval().requires_grad_(False)
    return model


def numbering_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of as many tokens as Qwen2's, each with its number for a text."""
    vocabulary = {f"t{token_id}": token_id for token_id in range(151_646)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_random_engine(num_layers: int, dtype: torch.dtype, options: EngineOptions) -> Engine:
    """Return an engine over such a model."""
    return make_engine(
        random_model(num_layers, dtype),
        numbering_tokenizer(),
        options,
        placement=Placement(device=torch.device("cpu"), dtype=dtype),
        name="qwen2-0.5b-shape",
        report=lambda _: None,
    )


class TimedLoop:
    """An engine loop that notes when each token of each request came, in seconds."""

    def __init__(self, engine: Engine) -> None:
        self.loop = EngineLoop(engine, self._take)
        self._changed = threading.Condition()
        self._times: dict[str, list[float]] = {}
        self._ends: dict[str, Finished] = {}
        self.loop.start()

    def submit(self, name: str, prompt: Iterable[int], *, max_tokens: int) -> float:
        """Enqueue a greedy request; return the time just before."""
        now = time.perf_counter()
        with self._changed:
            self._times[name] = []
            self._ends.pop(name, None)
        self.loop.submit(
            EngineRequest(
                request_id=RequestId(name),
                prompt_token_ids=list(prompt),
                sampling=SamplingParams(temperature=0.0, max_tokens=max_tokens),
            )
        )
        return now

    def wait_tokens(self, name: str, count: int) -> list[float]:
        """Wait until a request has had so many tokens, and return when each of them came."""
        with self._changed:
            if not self._changed.wait_for(
                lambda: len(self._times[name]) >= count, DEADLINE_SECONDS
            ):
                raise TimeoutError(f"{name}: no {count} tokens in {DEADLINE_SECONDS} s")
            return list(self._times[name])

    def wait_end(self, name: str) -> Finished:
        """Wait for the end of a request."""
        with self._changed:
            if not self._changed.wait_for(lambda: name in self._ends, DEADLINE_SECONDS):
                raise TimeoutError(f"{name}: no end in {DEADLINE_SECONDS} s")
            return self._ends[name]

    def abort(self, name: str) -> None:
        """Abort a request and wait for its end."""
        self.loop.abort(RequestId(name))
        self.wait_end(name)

    def _take(self, events: list[tuple[RequestId, GenerationEvent]]) -> None:
        now = time.perf_counter()
        with self._changed:
            for name, event in events:
                match event:
                    case TextDelta(token_ids=token_ids):
                        self._times[name] += [now] * len(token_ids)
                    case Finished():
                        self._ends[name] = event
                    case Failed(error=error):
                        raise error
            self._changed.notify_all()
