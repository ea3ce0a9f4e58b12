# SPDX-License-Identifier: Apache-2.0
"""llama.cpp: its server, from the wheel `xllamacpp`, and the form of its own `/completion`.

Why not its OpenAI route: this one tells token ids, how many there are, and which text ended an
answer. The file of a model is one GGUF, or the first of a model in several.
"""

import json
import os
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx

from xinference.catalog.gguf_head import gguf_file
from xinference.errors import InvalidRequest, LoadFailed
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import (
    FinishReason,
    Grammar,
    GrammarKind,
    TokenCandidate,
    TokenLogprob,
)
from xinference.protocol.servers import LLAMA_CPP_CONTEXT, ServerEngine

from .availability import what_is_missing
from .dialect import Ask, Facts, Json, Piece, Started
from .tokens import ServerTokens, Tokens

BATCH_TOKENS = 128
"""Of a step on CPU. Why so few: a step is the shortest sign of life there is of a long prompt."""
MAX_DEFAULT_SLOTS = 8
MAX_SEED = 2**32 - 1
"""The number after the last seed, which means a random one."""
KEY_VARIABLE = "XINFERENCE_LLAMA_CPP_KEY"
_REASONS = {
    "eos": FinishReason.STOP,
    "word": FinishReason.STOP,
    "limit": FinishReason.LENGTH,
}


class LlamaCpp:
    """A `Dialect`."""

    metrics_prefix = "llamacpp:"
    path = "/completion"
    takes_stop_tokens = False
    counters: Mapping[str, str] = MappingProxyType(
        {
            "llamacpp:n_decode_total": "num_steps",
            "llamacpp:prompt_tokens_total": "num_prefill_tokens",
            "llamacpp:prompt_tokens_cached_total": "num_cached_tokens",
            "llamacpp:tokens_predicted_total": "num_generated_tokens",
        }
    )

    @property
    def name(self) -> str:
        """Of the engine, as users write it."""
        return str(ServerEngine.LLAMA_CPP)

    def missing(self, spec: ReplicaSpec) -> str | None:
        """Say what it lacks here; see `Dialect.missing`."""
        return what_is_missing(ServerEngine.LLAMA_CPP)

    def start(self, spec: ReplicaSpec, path: Path, *, port: int, key: str) -> Started:
        """Return how to start it; see `Dialect.start`."""
        options = spec.engine_options
        assert spec.server_options is not None, "it is launched as a server"
        given = spec.server_options.given
        num_slots = options.max_num_seqs if "max_num_seqs" in given else num_default_slots()
        params: dict[str, Any] = {
            "model.path": str(path),
            "hostnames": ["127.0.0.1"],
            "port": port,
            "n_parallel": num_slots,
            # Its context is that of all slots together.
            "n_ctx": num_slots * (options.max_model_len or LLAMA_CPP_CONTEXT),
            # A thread is taken by every connection, also by those that ask how it is.
            "n_threads_http": num_slots + 8,
            "endpoint_metrics": True,
            "ui": False,
            "verbosity": 1,
        }
        if options.device != "auto" and options.device != "cpu":
            raise InvalidRequest(
                field="device",
                problem=f"of llama.cpp is auto or cpu; gpu_idx names GPUs, got {options.device!r}",
            )
        on_cpu = options.device == "cpu"
        if on_cpu:
            params["n_gpu_layers"] = 0
        if "max_num_batched_tokens" in given:
            params["n_batch"] = options.max_num_batched_tokens
        else:
            params["n_batch"] = BATCH_TOKENS
        # Its own default is every core, also where this process may have one of them.
        num_threads = options.num_threads or int(os.environ.get("OMP_NUM_THREADS", "0"))
        if num_threads:
            params["cpuparams.n_threads"] = num_threads
        if "enable_prefix_caching" in given:
            params["cache_prompt"] = options.enable_prefix_caching
        program = Path(__file__).with_name("llama_cpp_server.py")
        return Started(
            command=[
                sys.executable,
                "-P",  # or the modules beside the program would hide others
                str(program),
                json.dumps({"params": params, "flags": spec.server_options.flags}),
            ],
            environment={KEY_VARIABLE: key},
        )

    def files(self, path: str, *, model_name: str) -> Path:
        """Return the GGUF file; see `Dialect.files`."""
        try:
            return gguf_file(Path(path).expanduser())
        except (OSError, ValueError) as error:
            raise LoadFailed(model=model_name, problem=str(error)) from error

    def open(self, client: httpx.Client, spec: ReplicaSpec, path: Path) -> tuple[Facts, Tokens]:
        """Return what its server says; see `Dialect.open`."""
        facts = client.get("/props").raise_for_status().json()
        (model,) = client.get("/v1/models").raise_for_status().json()["data"]
        return Facts(
            context_length=facts["default_generation_settings"]["n_ctx"],
            max_num_seqs=facts["total_slots"],
            vocab_size=model["meta"]["n_vocab"],
        ), ServerTokens(client, facts, model_name=str(spec.replica.model))

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return what to ask; see `Dialect.body`."""
        sampling = ask.sampling
        for name in ("min_tokens", "bad_words", "stop_token_ids"):
            if getattr(sampling, name):
                raise InvalidRequest(field=name, problem="is not what llama.cpp can do")
        assert sampling.seed is not None, "it was set for the request"
        body: dict[str, Any] = {
            "prompt": ask.token_ids,
            "n_predict": sampling.max_tokens,
            "seed": sampling.seed % MAX_SEED,
            "stop": sampling.stop,
            "ignore_eos": sampling.ignore_eos,
            "preserved_tokens": ask.kept,
            "return_tokens": True,
            "stream": True,
        }
        optional = {
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            "min_p": sampling.min_p,
            "typical_p": sampling.typical_p,
            "repeat_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
        }
        body |= {name: value for name, value in optional.items() if value is not None}
        if any(name.endswith("_penalty") for name in body):
            body["repeat_last_n"] = -1  # all of the context
        if sampling.logit_bias:
            body["logit_bias"] = [[one, bias] for one, bias in sampling.logit_bias.items()]
        if sampling.logprobs is not None:
            body["n_probs"] = max(1, sampling.logprobs)
        if ask.cache_salt:
            # Why: its cache has no salts, so nothing is shared.
            body["cache_prompt"] = False
        if sampling.grammar is not None:
            body |= _constraint(sampling.grammar)
        return body

    def read(self, chunk: Json) -> Piece:
        """Return what a chunk says."""
        reason, stop_string, num_cached = None, None, None
        if chunk["stop"]:
            reason = _REASONS.get(chunk.get("stop_type", ""), FinishReason.STOP)
            stop_string = chunk.get("stopping_word") or None
            num_cached = chunk.get("timings", {}).get("cache_n")
        return Piece(
            text=chunk["content"],
            token_ids=tuple(chunk.get("tokens", ())),
            num_generated=chunk["tokens_predicted"],
            logprobs=_logprobs(chunk.get("completion_probabilities", ())),
            num_cached=num_cached,
            reason=reason,
            stop_string=stop_string,
        )


def _constraint(grammar: Grammar) -> dict[str, Any]:
    match grammar.kind:
        case GrammarKind.JSON_SCHEMA:
            return {"json_schema": json.loads(grammar.text)}
        case GrammarKind.CHOICE:
            choices = " | ".join(_literal(one) for one in json.loads(grammar.text))
            return {"grammar": f"root ::= {choices}"}
        case GrammarKind.GRAMMAR if "::=" in grammar.text:
            return {"grammar": grammar.text}
        case GrammarKind.GRAMMAR:
            problem = "llama.cpp follows grammars in its own notation (GBNF) only"
            raise InvalidRequest(field=grammar.field, problem=problem)
        case GrammarKind.REGEX:
            problem = "llama.cpp follows no regular expressions; give a grammar or a schema"
            raise InvalidRequest(field=grammar.field, problem=problem)


def _literal(text: str) -> str:
    """Return what stands for exactly this text in GBNF."""
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + quoted.replace("\n", "\\n").replace("\r", "\\r").replace("\t", "\\t") + '"'


def _logprobs(entries: Iterable[Json]) -> tuple[TokenLogprob, ...]:
    """Return the tokens of a piece; their offsets are from its beginning."""
    told: list[TokenLogprob] = []
    text = b""
    for entry in entries:
        token = bytes(entry["bytes"])
        if not token:
            continue  # the token that ends a turn is not text
        top = tuple(
            TokenCandidate(
                token_id=one["id"], token=bytes(one["bytes"]), logprob=float(one["logprob"])
            )
            for one in entry["top_logprobs"]
        )
        told.append(
            TokenLogprob(
                token_id=entry["id"],
                token=token,
                logprob=float(entry["logprob"]),
                text_offset=len(text.decode(errors="ignore")),
                top=top,
            )
        )
        text += token
    return tuple(told)


def num_default_slots() -> int:
    """Return how many answers are computed at once where a launch does not say."""
    return min(MAX_DEFAULT_SLOTS, os.cpu_count() or 1)
