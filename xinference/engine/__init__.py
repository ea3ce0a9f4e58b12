# SPDX-License-Identifier: Apache-2.0
"""Token ids in, text events out: continuous batching over a paged KV cache.

One step of the engine's thread:

    commands ─▶ scheduler ─▶ slots ─▶ model runner ─────────────▶ sampler ─▶ slots ─▶ text ─▶ sink
               who runs,    Batch:   unmodified transformers      one token  append   stop
               how many     ragged   model; its attention layers  per row             strings
               tokens       arrays   store to and read from pages
                  │                         │
              block pool               KV cache (pages), attention backend

Any `transformers` decoder that dispatches through `AttentionInterface` runs as it is: its cache
is a `PagedCache` that stores, its attention function one that reads. Nothing here knows HTTP,
actors, chat templates or tools. `doc/engine.md` explains the parts.

Letters that tensor code may use:

    T  tokens of a step, all sequences concatenated      R  rows: sequences of a step
    H  query heads        Hkv  key and value heads       G  query heads per key head
    D  size of a head     P  tokens of a block           N  blocks read by a step
    V  vocabulary

The names below load on first use (PEP 562), so that the pure parts import without torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import EngineConfig
    from .engine import Engine
    from .grammar import Frame
    from .loading import load_engine
    from .loop import EngineLoop, EngineStats
    from .requests import EnginePrompt, EngineRequest
    from .sampling_defaults import generation_defaults, resolve_sampling
    from .thinking import ThinkingLimit

_HOMES = {
    "Engine": ".engine",
    "EngineConfig": ".config",
    "EngineLoop": ".loop",
    "EnginePrompt": ".requests",
    "EngineRequest": ".requests",
    "EngineStats": ".loop",
    "Frame": ".grammar",
    "ThinkingLimit": ".thinking",
    "generation_defaults": ".sampling_defaults",
    "load_engine": ".loading",
    "resolve_sampling": ".sampling_defaults",
}

__all__ = [
    "Engine",
    "EngineConfig",
    "EngineLoop",
    "EnginePrompt",
    "EngineRequest",
    "EngineStats",
    "Frame",
    "ThinkingLimit",
    "generation_defaults",
    "load_engine",
    "resolve_sampling",
]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
