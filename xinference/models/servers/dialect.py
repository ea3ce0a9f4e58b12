# SPDX-License-Identifier: Apache-2.0
"""What is asked of the server of any engine, what it says, and what each engine has to define.

A prompt always goes to a server as token ids, and text comes back: chat templates, parsers of
thoughts and calls, and usage are this platform's own, the same for every engine. Pure.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import httpx

from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import FinishReason, SamplingParams, TokenLogprob

from .tokens import Tokens

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One answer that is wanted."""

    token_ids: tuple[int, ...]
    """What it goes on from."""
    sampling: SamplingParams
    """`max_tokens` and `seed` are set. What else is None is for the server to choose."""
    kept: tuple[str, ...] = ()
    """Special tokens that are to be part of the text."""
    cache_salt: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """What a server says of one answer at a time."""

    text: str = ""
    token_ids: tuple[int, ...] = ()
    """Of the text; fewer than there are, where the server does not tell all."""
    num_generated: int | None = None
    """Tokens of the answer so far."""
    logprobs: tuple[TokenLogprob, ...] = ()
    num_cached: int | None = None
    """Tokens of the prompt that were in the cache."""
    reason: FinishReason | None = None
    """Set in the last one."""
    stop_string: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Started:
    """How to start a server."""

    command: Sequence[str]
    environment: Mapping[str, str] = field(default_factory=dict)
    """Set in addition."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What is known of a model once its server is healthy."""

    context_length: int
    """Prompt and answer of one request, in tokens."""
    max_num_seqs: int
    vocab_size: int | None
    """None: unknown; the server itself refuses what is no token."""


class Dialect(Protocol):
    """An engine's server: how it is started, asked and understood. Holds no state."""

    @property
    def name(self) -> str:
        """Of the engine, as users write it."""
        ...

    metrics_prefix: str
    """Of the lines of its metrics page that grow when it gets anywhere."""
    counters: Mapping[str, str]
    """Our names of what that page counts, by the page's."""
    takes_stop_tokens: bool
    """Whether it stops at what a family names beside what its files do."""

    def missing(self, spec: ReplicaSpec) -> str | None:
        """Say what it lacks here for a launch, and what to do about it; None if nothing."""
        ...

    def start(self, spec: ReplicaSpec, path: Path, *, port: int, key: str) -> Started:
        """Return how to start it on a loopback port.

        Args:
            spec: the launch.
            path: of the model's files.
            port: to listen on.
            key: to ask of its callers, where it can.

        Raises:
            InvalidRequest: an option has a value that the engine does not have.
        """
        ...

    def files(self, path: str, *, model_name: str) -> Path:
        """Return what of a model's files it is given.

        Raises:
            LoadFailed: it is not there.
        """
        ...

    def open(self, client: httpx.Client, spec: ReplicaSpec, path: Path) -> tuple[Facts, Tokens]:
        """Return what a healthy server says of its model.

        Raises:
            httpx.HTTPError, OSError, ValueError, KeyError: it does not, or has no tokenizer.
        """
        ...

    path: str
    """Where answers are asked for."""

    def body(self, ask: Ask) -> dict[str, Any]:
        """Return what to ask.

        Raises:
            InvalidRequest: a parameter is one that the engine does not have.
        """
        ...

    def read(self, chunk: Json) -> Piece:
        """Return what a chunk of its answer says."""
        ...
