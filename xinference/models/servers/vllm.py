# SPDX-License-Identifier: Apache-2.0
"""vLLM: its OpenAI server, from the wheel `vllm`."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import Grammar, GrammarKind
from xinference.protocol.servers import ServerEngine

from .dialect import Ask, Started
from .flags import own_flags, shared_flags
from .openai_server import SERVED_NAME, OpenAiServer

_FLAGS = {
    "max_num_seqs": "--max-num-seqs",
    "max_model_len": "--max-model-len",
    "max_num_batched_tokens": "--max-num-batched-tokens",
    "dtype": "--dtype",
    "kv_cache_bytes": "--kv-cache-memory-bytes",
    "block_size": "--block-size",
    "trust_remote_code": "--trust-remote-code",
    "enable_prefix_caching": "--enable-prefix-caching",
}


class Vllm(OpenAiServer):
    """A `Dialect`."""

    engine = ServerEngine.VLLM
    metrics_prefix = "vllm:"
    counters: Mapping[str, str] = MappingProxyType(
        {
            "vllm:prompt_tokens_total": "num_prefill_tokens",
            "vllm:generation_tokens_total": "num_generated_tokens",
            "vllm:num_preemptions_total": "num_preemptions",
            "vllm:prefix_cache_hits_total": "num_cached_tokens",
            "vllm:iteration_tokens_total_count": "num_steps",
        }
    )
    takes_cache_salt: ClassVar[bool] = True

    def start(self, spec: ReplicaSpec, path: Path, *, port: int, key: str) -> Started:
        """Return how to start it; see `Dialect.start`."""
        assert spec.server_options is not None, "it is launched as a server"
        options, given = spec.engine_options, spec.server_options.given
        words = shared_flags(options, given, _FLAGS)
        if "enable_prefix_caching" in given and not options.enable_prefix_caching:
            words.append("--no-enable-prefix-caching")
        return Started(
            command=[
                *(sys.executable, "-m", "vllm.entrypoints.openai.api_server"),
                *("--model", str(path), "--served-model-name", SERVED_NAME),
                *("--host", "127.0.0.1", "--port", str(port)),
                *("--uvicorn-log-level", "warning", "--enable-prompt-tokens-details"),
                # Why: some versions log each request; what it asks is for no log.
                *("--max-log-len", "0"),
                *words,
                *own_flags(spec.server_options, dash="-", denial="no-"),
            ],
            environment={"VLLM_API_KEY": key},
        )

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return what to ask; see `Dialect.body`."""
        return super().body(ask) | {"return_token_ids": True}

    def constraint(self, grammar: Grammar) -> dict[str, Any]:
        """Return what to add to a body for a grammar."""
        if grammar.kind in (GrammarKind.JSON_SCHEMA, GrammarKind.CHOICE):
            name = "json" if grammar.kind is GrammarKind.JSON_SCHEMA else "choice"
            return {"structured_outputs": {name: json.loads(grammar.text)}}
        return {"structured_outputs": {str(grammar.kind): grammar.text}}
