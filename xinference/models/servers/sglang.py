# SPDX-License-Identifier: Apache-2.0
"""SGLang: its server, from the wheel `sglang`."""

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import Grammar, GrammarKind
from xinference.protocol.servers import ServerEngine

from .dialect import Started
from .flags import own_flags, shared_flags
from .openai_server import SERVED_NAME, OpenAiServer

_FLAGS = {
    "max_num_seqs": "--max-running-requests",
    "max_model_len": "--context-length",
    "max_num_batched_tokens": "--chunked-prefill-size",
    "dtype": "--dtype",
    "block_size": "--page-size",
    "trust_remote_code": "--trust-remote-code",
}


class SgLang(OpenAiServer):
    """A `Dialect`."""

    engine = ServerEngine.SGLANG
    metrics_prefix = "sglang:"
    counters: Mapping[str, str] = MappingProxyType(
        {
            "sglang:prompt_tokens_total": "num_prefill_tokens",
            "sglang:generation_tokens_total": "num_generated_tokens",
            "sglang:cached_tokens_total": "num_cached_tokens",
        }
    )

    def start(self, spec: ReplicaSpec, path: Path, *, port: int, key: str) -> Started:
        """Return how to start it; see `Dialect.start`."""
        assert spec.server_options is not None, "it is launched as a server"
        options, given = spec.engine_options, spec.server_options.given
        words = shared_flags(options, given, _FLAGS)
        if "enable_prefix_caching" in given and not options.enable_prefix_caching:
            words.append("--disable-radix-cache")
        if options.device == "cpu":
            words += ["--device", "cpu"]
        return Started(
            command=[
                *(sys.executable, "-m", "sglang.launch_server"),
                *("--model-path", str(path), "--served-model-name", SERVED_NAME),
                *("--host", "127.0.0.1", "--port", str(port), "--api-key", key),
                *("--log-level", "warning", "--enable-metrics", "--enable-cache-report"),
                *words,
                *own_flags(spec.server_options, dash="-", denial=None),
            ]
        )

    def constraint(self, grammar: Grammar) -> dict[str, Any]:
        """Return what to add to a body for a grammar."""
        match grammar.kind:
            case GrammarKind.JSON_SCHEMA:
                return {"json_schema": grammar.text}
            case GrammarKind.CHOICE:
                return {
                    "regex": "|".join(f"({re.escape(one)})" for one in json.loads(grammar.text))
                }
            case GrammarKind.REGEX:
                return {"regex": grammar.text}
            case GrammarKind.GRAMMAR:
                return {"ebnf": grammar.text}
