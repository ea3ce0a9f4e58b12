# SPDX-License-Identifier: Apache-2.0
"""What the servers of vLLM, SGLang and TensorRT-LLM have in common: OpenAI's completion route.

All of them take token ids as a prompt, tell the tokens so far in each chunk
(`continuous_usage_stats`), and have more parameters than OpenAI does, under names of their own.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import httpx

from xinference.errors import InvalidRequest
from xinference.models.files import model_directory
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import LEAST_TOP_P, FinishReason, Grammar
from xinference.protocol.servers import ServerEngine

from .availability import what_is_missing
from .dialect import Ask, Facts, Json, Piece, Started
from .tokens import FileTokens, Tokens

SERVED_NAME = "model"
DEFAULT_NUM_SEQS = 256
"""Answers asked for at once where a launch does not say; the server computes as many as fit."""
_REASONS = {
    "stop": FinishReason.STOP,
    "length": FinishReason.LENGTH,
    "abort": FinishReason.ABORT,
}


class OpenAiServer(ABC):
    """A `Dialect`; subclasses say how their server is started and what it adds."""

    engine: ClassVar[ServerEngine]
    metrics_prefix: str = ""
    counters: Mapping[str, str] = {}
    takes_stop_tokens = True
    path = "/v1/completions"
    missing_parameters: ClassVar[tuple[str, ...]] = ("bad_words", "typical_p", "logprobs")
    """That the server has not."""
    takes_cache_salt: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Of the engine, as users write it."""
        return str(self.engine)

    def missing(self, spec: ReplicaSpec) -> str | None:
        """Say what it lacks here; see `Dialect.missing`."""
        return what_is_missing(self.engine, on_cpu=spec.engine_options.device == "cpu")

    def files(self, path: str, *, model_name: str) -> Path:
        """Return the directory; see `Dialect.files`."""
        return model_directory(path, model_name=model_name)

    @abstractmethod
    def start(self, spec: ReplicaSpec, path: Path, *, port: int, key: str) -> Started:
        """Return how to start it; see `Dialect.start`."""

    @abstractmethod
    def constraint(self, grammar: Grammar) -> dict[str, Any]:
        """Return what to add to a body for a grammar.

        Raises:
            InvalidRequest: it follows no such grammar.
        """

    def open(self, client: httpx.Client, spec: ReplicaSpec, path: Path) -> tuple[Facts, Tokens]:
        """Return what its server and the files say; see `Dialect.open`."""
        (model, *_) = client.get("/v1/models").raise_for_status().json()["data"]
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        options = spec.engine_options
        context = model.get("max_model_len") or options.max_model_len
        context = context or config.get("max_position_embeddings")
        if not context:
            raise ValueError("nobody says how long its context is; give context_length")
        is_given = spec.server_options is not None and "max_num_seqs" in spec.server_options.given
        return Facts(
            context_length=context,
            max_num_seqs=options.max_num_seqs if is_given else DEFAULT_NUM_SEQS,
            vocab_size=config.get("vocab_size"),
        ), FileTokens(path, trust_remote_code=options.trust_remote_code)

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return what to ask; see `Dialect.body`."""
        sampling = ask.sampling
        for name in self.missing_parameters:
            if getattr(sampling, name) not in (None, (), 0):
                raise InvalidRequest(field=name, problem=f"is not passed on to {self.name}")
        if sampling.logprobs is not None:
            raise InvalidRequest(field="logprobs", problem=f"is not passed on to {self.name}")
        if ask.cache_salt and not self.takes_cache_salt:
            raise InvalidRequest(
                field="cache_salt", problem=f"cannot keep callers apart on {self.name}"
            )
        body: dict[str, Any] = {
            "model": SERVED_NAME,
            "prompt": ask.token_ids,
            "max_tokens": sampling.max_tokens,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
            "skip_special_tokens": not ask.kept,
        }
        optional = {
            "seed": None if sampling.seed is None else sampling.seed % 2**31,
            "stop": [*sampling.stop],
            "stop_token_ids": [*sampling.stop_token_ids],
            "temperature": sampling.temperature,
            "top_p": None if sampling.top_p is None else max(sampling.top_p, LEAST_TOP_P),
            "top_k": -1 if sampling.top_k == 0 else sampling.top_k,
            "min_p": sampling.min_p,
            "repetition_penalty": sampling.repetition_penalty,
            "presence_penalty": sampling.presence_penalty or None,
            "frequency_penalty": sampling.frequency_penalty or None,
            "logit_bias": {str(one): bias for one, bias in sampling.logit_bias.items()},
            "min_tokens": sampling.min_tokens or None,
            "ignore_eos": sampling.ignore_eos or None,
            "cache_salt": ask.cache_salt or None,
        }
        body |= {name: value for name, value in optional.items() if value not in (None, [], {})}
        if sampling.grammar is not None:
            body |= self.constraint(sampling.grammar)
        return body

    def read(self, chunk: Json) -> Piece:
        """Return what a chunk says."""
        usage = chunk.get("usage") or {}
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")
        num_generated = usage.get("completion_tokens")
        if not chunk["choices"]:
            return Piece(num_generated=num_generated, num_cached=cached)
        (choice,) = chunk["choices"]
        reason = choice.get("finish_reason")
        stopped_by = choice.get("stop_reason", choice.get("matched_stop"))
        return Piece(
            text=choice.get("text") or "",
            token_ids=tuple(choice.get("token_ids") or ()),
            num_generated=num_generated,
            num_cached=cached,
            reason=None if reason is None else _REASONS.get(reason, FinishReason.STOP),
            stop_string=stopped_by if isinstance(stopped_by, str) else None,
        )
