# SPDX-License-Identifier: Apache-2.0
"""What a loaded model can do, whatever it is made of.

`cluster/replica.py` holds one of these and puts it on the data plane. No heavy imports here.
"""

from collections.abc import Callable, Mapping, Sequence
from enum import StrEnum
from typing import Protocol, TypeVar

from xinference.errors import AbilityMissing
from xinference.identifiers import RequestId
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import Accepted, GenerationRequest
from xinference.protocol.vectors import AnswerEvent, EmbeddingRequest, ModelRequest, RerankRequest

Sink = Callable[[Sequence[tuple[RequestId, AnswerEvent]]], None]
"""Takes the events of one step, in the model's own thread. Must not block or raise."""

OnProgress = Callable[[float, str, str], None]
"""Takes how far loading is, from 0 to 1, its stage, and a line about it; in any thread."""


class ModelKind(StrEnum):
    """What a model is for, in the words of the catalogue."""

    LANGUAGE = "LLM"
    EMBEDDING = "embedding"
    RERANK = "rerank"


class Model(Protocol):
    """A model that answers requests of its kind, with text, vectors or scores.

    Every accepted request gets exactly one Finished or Failed through the sink, after `abort`,
    `stop` or the death of its thread too. Any thread may call any method.
    """

    @property
    def context_length(self) -> int:
        """Of a language model, prompt and answer in tokens; of others, one input."""
        ...

    @property
    def max_num_seqs(self) -> int:
        """Requests, or of other models inputs, that run at once."""
        ...

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs; False for ever once it has died or was stopped."""
        ...

    def description(self) -> Mapping[str, str | int | float | bool | None]:
        """Return what was chosen at load, by name, for people to read."""
        ...

    def counters(self) -> dict[str, float]:
        """Return what it has done and has to do. "progress" grows while it gets anywhere."""
        ...

    def start(self, sink: Sink) -> None:
        """Begin to answer. Call once."""
        ...

    def submit(self, request: ModelRequest) -> Accepted:
        """Turn the text into tokens and enqueue it. Events may come before this returns.

        Raises:
            AbilityMissing: the request is for another kind of model.
            XinferenceError: it was refused; nothing was enqueued.
        """
        ...

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a request, within one step; return whether it was live."""
        ...

    def stop(self, timeout_seconds: float) -> None:
        """End every request and the thread.

        Raises:
            TimeoutError: a step did not end in time.
        """
        ...


class Loader(Protocol):
    """Makes a model of one kind. Blocks; called in a thread of its own."""

    def __call__(self, spec: ReplicaSpec, *, on_progress: OnProgress) -> Model:
        """Load it.

        Raises:
            LoadFailed: its files do not load.
            InvalidRequest: an option asks for what this model or machine cannot do.
        """
        ...


SomeRequest = TypeVar("SomeRequest", GenerationRequest, EmbeddingRequest, RerankRequest)

_ABILITIES = {
    GenerationRequest: "generate text",
    EmbeddingRequest: "embed",
    RerankRequest: "rerank",
}


def expect(request: ModelRequest, kind: type[SomeRequest], *, model_name: str) -> SomeRequest:
    """Return the request, which must be of this kind.

    Raises:
        AbilityMissing: it is for another kind of model.
    """
    if not isinstance(request, kind):
        raise AbilityMissing(model=model_name, ability=_ABILITIES[type(request)])
    return request
