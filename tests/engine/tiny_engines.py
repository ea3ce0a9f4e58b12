# SPDX-License-Identifier: Apache-2.0
"""Engines over tiny models, driven step by step, and what the stock model says beside them."""

from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

import torch
from transformers import PreTrainedConfig

from tests.models_tiny import make_model, make_tokenizer
from xinference.engine import Engine, EngineRequest
from xinference.engine.attention.interface import AttentionBackend
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

BLOCK_SIZE = 16
MAX_MODEL_LEN = 96

Event = tuple[RequestId, GenerationEvent]


def tiny_engine(
    name: str = "llama",
    *,
    num_blocks: int | None = None,
    backend: AttentionBackend | None = None,
    make_config: Callable[[], PreTrainedConfig] | None = None,
    **options: Any,
) -> Engine:
    """Return an engine over `tests.models_tiny`'s model of this name.

    Args:
        name: of the architecture.
        num_blocks: of the KV cache; None is enough for everything.
        backend: of attention; None is the CPU's.
        make_config: of an architecture that `tests.models_tiny` does not have.
        options: of `EngineOptions`.
    """
    given = {
        "block_size": BLOCK_SIZE,
        "max_model_len": MAX_MODEL_LEN,
        "max_num_seqs": 8,
        "device": "cpu",
        **options,
    }
    if num_blocks is not None:
        given["kv_cache_bytes"] = num_blocks * _block_bytes(name, given["block_size"], make_config)
    device = torch.device(given["device"])
    model = make_model(name, config=make_config and make_config()).to(device)
    # Answers run to their max_tokens, whatever the tokenizer ends a turn with.
    model.generation_config.eos_token_id = []
    return make_engine(
        model,
        make_tokenizer(),
        EngineOptions(**given),
        placement=Placement(device=device, dtype=torch.float32),
        name=name,
        report=lambda _: None,
        backend=backend,
    )


@cache
def _block_bytes(
    name: str, block_size: int, make_config: Callable[[], PreTrainedConfig] | None
) -> int:
    config = tiny_engine(name, block_size=block_size, make_config=make_config).config
    return config.kv_cache_bytes // config.num_blocks


def add(
    engine: Engine,
    request_id: str,
    prompt: Iterable[int],
    *,
    request: dict[str, Any] | None = None,
    **sampling: Any,
) -> None:
    """Submit a greedy request, unless `sampling` says otherwise; `request` has other fields."""
    given = {"temperature": 0.0, **sampling}
    engine.add(
        engine.validate(
            EngineRequest(
                request_id=RequestId(request_id),
                prompt_token_ids=list(prompt),
                sampling=SamplingParams(**given),
                **(request or {}),
            )
        )
    )


class Transcript:
    """What each request has been told."""

    def __init__(self) -> None:
        self.token_ids: dict[str, list[int]] = {}
        self.texts: dict[str, str] = {}
        self.ends: dict[str, Finished | Failed] = {}

    def take(self, events: Iterable[Event]) -> None:
        """Note events; nothing may come after an end."""
        for request_id, event in events:
            assert request_id not in self.ends, (request_id, event)
            if isinstance(event, TextDelta):
                self.token_ids.setdefault(request_id, []).extend(event.token_ids)
                self.texts[request_id] = self.texts.get(request_id, "") + event.text
            else:
                self.ends[request_id] = event


def run_to_end(engine: Engine, transcript: Transcript | None = None) -> Transcript:
    """Step until nothing is left to do, checking the invariants after each step."""
    transcript = transcript or Transcript()
    while engine.has_work:
        transcript.take(engine.step())
        engine.check_invariants()
    return transcript
