# SPDX-License-Identifier: Apache-2.0
"""Engines that are servers of their own, and how a launch sets their options. Pure.

An option of the `transformers` engine that means something to such a server is honoured, and any
other of them is refused by name. Every key that is no option of ours is the server's own, and is
passed to it as it stands.
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, Self

from xinference.errors import InvalidRequest

MAX_FLAGS = 256
CONTEXT = "context_length"
"""Another name of `max_model_len`."""
_FLAG = re.compile(r"[A-Za-z][\w.-]{0,99}", re.ASCII)
_SECRET = re.compile(r"(.*[._-])?(token|key|password|secret)", re.ASCII | re.IGNORECASE)
HIDDEN = "***"
"""What is shown of a secret."""

LLAMA_CPP_CONTEXT = 8192
"""Tokens of a launch that does not say: a file may promise a million, and memory for all of them
would be taken at once."""


class ServerEngine(StrEnum):
    """An engine that is a server of its own, as users write it."""

    VLLM = "vLLM"
    SGLANG = "SGLang"
    LLAMA_CPP = "llama.cpp"
    TRT_LLM = "TRT-LLM"


SERVER_FORMATS: Mapping[ServerEngine, tuple[str, ...]] = {
    ServerEngine.VLLM: ("pytorch", "gptq", "awq", "fp8", "fp4", "bnb"),
    ServerEngine.SGLANG: ("pytorch", "gptq", "awq", "fp8", "bnb"),
    ServerEngine.LLAMA_CPP: ("ggufv2",),
    ServerEngine.TRT_LLM: ("pytorch", "awq", "fp8", "fp4"),
}
"""The formats of models that they read."""

_ALIASES = {
    "llamacpp": ServerEngine.LLAMA_CPP,
    "llama_cpp": ServerEngine.LLAMA_CPP,
    "tensorrt-llm": ServerEngine.TRT_LLM,
    "tensorrt_llm": ServerEngine.TRT_LLM,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class FractionFlag:
    """The option of a server that limits the memory it takes of its GPU, from 0 to 1."""

    name: str
    share_of_part: float = 1.0
    """How much of the part that a replica may take is to be said: some options leave out what
    computing takes."""
    is_of_whole: bool = True
    """It says how much of the GPU; else of what is free once the weights are there."""


MEMORY_FRACTION: Mapping[ServerEngine, FractionFlag] = {
    ServerEngine.VLLM: FractionFlag(name="gpu_memory_utilization"),
    ServerEngine.SGLANG: FractionFlag(name="mem_fraction_static", share_of_part=0.9),
    ServerEngine.TRT_LLM: FractionFlag(
        name="kv_cache_free_gpu_memory_fraction", share_of_part=0.9, is_of_whole=False
    ),
}
"""llama.cpp has none: it takes what weights and context need, and no more."""

_OURS = frozenset({"max_num_seqs", "max_model_len", "max_queue_size", "enable_thinking"})
"""Options that this process acts on, whatever the server."""

_HONOURED: Mapping[ServerEngine, frozenset[str]] = {
    ServerEngine.LLAMA_CPP: _OURS
    | {"max_num_batched_tokens", "num_threads", "device", "enable_prefix_caching"},
    ServerEngine.VLLM: _OURS
    | {
        "max_num_batched_tokens",
        "num_threads",
        "device",
        "dtype",
        "kv_cache_bytes",
        "block_size",
        "trust_remote_code",
        "enable_prefix_caching",
    },
    ServerEngine.SGLANG: _OURS
    | {
        "max_num_batched_tokens",
        "num_threads",
        "device",
        "dtype",
        "block_size",
        "trust_remote_code",
        "enable_prefix_caching",
    },
    ServerEngine.TRT_LLM: _OURS
    | {"max_num_batched_tokens", "num_threads", "device", "trust_remote_code"},
}

_RESERVED = frozenset(
    (
        *("model", "model_path", "model.path", "served_model_name", "root_path", "api_prefix"),
        *("host", "hostname", "hostnames", "port", "api_key", "api_keys"),
        *("ssl_keyfile", "ssl_certfile", "ssl_file_key", "ssl_file_cert"),
    )
)
"""What this platform decides of every server."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerOptions:
    """What a launch sets of an engine that is a server."""

    engine: ServerEngine
    given: tuple[str, ...] = ()
    """The fields of `EngineOptions` that it sets; the server's own defaults hold for the others."""
    flags: dict[str, Any] = field(default_factory=dict)
    """The server's own options: texts, numbers, true and false, lists and objects."""

    @property
    def secrets(self) -> tuple[str, ...]:
        """The texts among its flags that are nobody's to read: a token, a key, a password."""
        return tuple(
            value
            for name, value in self.flags.items()
            if _SECRET.fullmatch(name) and isinstance(value, str) and value
        )

    @property
    def shown_flags(self) -> dict[str, Any]:
        """Its flags, without what is secret."""
        return {
            name: HIDDEN if _SECRET.fullmatch(name) else value for name, value in self.flags.items()
        }

    @classmethod
    def split(
        cls, engine: ServerEngine, options: Mapping[str, Any], *, known: Collection[str]
    ) -> tuple[Self, dict[str, Any]]:
        """Return what launch keys set of a server, and those of our own options among them.

        Args:
            engine: that is launched.
            options: by name.
            known: the names of our own options.

        Raises:
            InvalidRequest: a key is an option that this engine does not have, or is not the
                caller's to set.
        """
        names = {*known, CONTEXT}
        shared = {name: value for name, value in options.items() if name in names}
        flags = {name: value for name, value in options.items() if name not in names}
        given = sorted({"max_model_len" if name == CONTEXT else name for name in shared})
        for name in given:
            if name not in _HONOURED[engine]:
                honoured = ", ".join(sorted(_HONOURED[engine]))
                raise InvalidRequest(
                    field=name,
                    problem=f"is not an option of {engine}; of ours it has {honoured}, and any "
                    "other key is passed to it as its own",
                )
        _check_flags(engine, flags)
        return cls(engine=engine, given=tuple(given), flags=flags), shared

    @property
    def limits_memory(self) -> bool:
        """Whether the launch itself says how much memory the server takes."""
        return "kv_cache_bytes" in self.given or self._given_fraction() is not None

    @property
    def memory_fraction(self) -> float | None:
        """The fraction of its GPU that the launch gives the server; None: it does not say.

        Text is read as the server reads it; what is no number is for the server to refuse.
        """
        flag = MEMORY_FRACTION.get(self.engine)
        if flag is None or not flag.is_of_whole:
            return None
        try:
            return float(str(self._given_fraction()))
        except ValueError:
            return None

    def with_flag(self, name: str, value: object) -> Self:
        """Return them with one more of the server's own options."""
        return replace(self, flags={**self.flags, name: value})

    def _given_fraction(self) -> object | None:
        flag = MEMORY_FRACTION.get(self.engine)
        named = {name.replace("-", "_"): value for name, value in self.flags.items()}
        return None if flag is None else named.get(flag.name)


def server_engine_named(name: str | None) -> ServerEngine | None:
    """Return the engine of this name, whatever its letter case; None if it is no server."""
    wanted = (name or "").strip().casefold()
    for engine in ServerEngine:
        if wanted == engine.casefold():
            return engine
    return _ALIASES.get(wanted)


def _check_flags(engine: ServerEngine, flags: Mapping[str, Any]) -> None:
    if len(flags) > MAX_FLAGS:
        raise InvalidRequest(field="", problem=f"has {len(flags)} options, more than {MAX_FLAGS}")
    for name, value in flags.items():
        if not _FLAG.fullmatch(name):
            raise InvalidRequest(field=name[:60], problem=f"cannot be an option of {engine}")
        if name.replace("-", "_") in _RESERVED:
            raise InvalidRequest(field=name, problem="is set by the platform, not by a launch")
        texts = value if isinstance(value, list) else [value]
        if any(isinstance(one, str) and "\0" in one for one in texts):
            raise InvalidRequest(field=name, problem="has a NUL character in its text")
