# SPDX-License-Identifier: Apache-2.0
"""Requests for vectors and for scores, and what comes back of them.

In: an `EmbeddingRequest` or a `RerankRequest`. Out: any number of pieces, in any order of the
inputs, then exactly one `Finished` or `Failed` of `protocol.generation`. Numbers travel as
little-endian float32.
"""

from dataclasses import dataclass
from enum import StrEnum

from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId

from .generation import GenerationEvent, GenerationRequest
from .tracing import TraceContext

MAX_INPUTS = 65536
"""Of one request."""
CUT_TO_MODEL = -1
"""As `truncate_to`: as many tokens as the model takes."""
BYTES_PER_NUMBER = 4

Input = str | tuple[int, ...]
"""A text, or token ids of the model's own vocabulary, taken as they stand."""


class VectorKind(StrEnum):
    """What a model can make of a text."""

    DENSE = "dense"
    """One vector."""
    SPARSE = "sparse"
    """A weight for each token of the vocabulary that matters."""
    MULTI_VECTOR = "multi_vector"
    """A vector for each token of the text."""


class InputType(StrEnum):
    """What texts are for: models that tell the two apart have a prompt for each."""

    QUERY = "query"
    DOCUMENT = "document"


@dataclass(frozen=True, slots=True, kw_only=True)
class EmbeddingRequest:
    """Texts whose vectors are wanted."""

    request_id: RequestId
    inputs: tuple[Input, ...]
    kinds: tuple[VectorKind, ...] = (VectorKind.DENSE,)
    dimensions: int | None = None
    """The first so many numbers of each dense vector, of unit length again. None: all."""
    prompt: str | None = None
    """Put before each text."""
    prompt_name: str | None = None
    """Of a prompt that the model brings."""
    input_type: InputType | None = None
    """Takes the prompt that the model has for it, if it has one."""
    truncate_to: int | None = None
    """Longer inputs are cut to so many tokens, or `CUT_TO_MODEL`. None: they are refused."""
    trace: TraceContext | None = None
    """None: nobody wants a trace; the same below."""

    def __post_init__(self) -> None:
        _check_num_inputs("input", len(self.inputs))
        for index, given in enumerate(self.inputs):
            if not given:
                raise InvalidRequest(field=f"input.{index}", problem="must not be empty")
        if not self.kinds:
            raise InvalidRequest(field="return_dense", problem="nothing is left to return")
        if self.dimensions is not None and self.dimensions < 1:
            raise InvalidRequest(
                field="dimensions", problem=f"must be at least 1, got {self.dimensions}"
            )
        named = [
            name
            for name in ("prompt", "prompt_name", "input_type")
            if getattr(self, name) is not None
        ]
        if len(named) > 1:
            raise InvalidRequest(
                field=named[1], problem=f"says the same as {named[0]}; give one of them"
            )
        if named and not all(isinstance(given, str) for given in self.inputs):
            raise InvalidRequest(
                field=named[0], problem="is for texts; token ids are taken as they stand"
            )
        _check_truncate_to("truncate_prompt_tokens", self.truncate_to)


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankRequest:
    """Documents whose relevance to a query is wanted."""

    request_id: RequestId
    query: str
    documents: tuple[str, ...]
    instruction: str | None = None
    """Of models that take one: what makes a document relevant."""
    max_chunks_per_doc: int | None = None
    """A longer document is scored by so many of its first chunks. None: by all of them."""
    max_tokens_per_doc: int | None = None
    """Longer documents are cut to so many tokens first."""
    trace: TraceContext | None = None

    def __post_init__(self) -> None:
        if not self.query:
            raise InvalidRequest(field="query", problem="must not be empty")
        _check_num_inputs("documents", len(self.documents))
        for name in ("max_chunks_per_doc", "max_tokens_per_doc"):
            limit = getattr(self, name)
            if limit is not None and limit < 1:
                raise InvalidRequest(field=name, problem=f"must be at least 1, got {limit}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseVectors:
    """The vectors of some inputs."""

    indices: tuple[int, ...]
    """Which inputs, from 0."""
    data: bytes
    """One row for each of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SparseVector:
    """The weights of the tokens of one input."""

    index: int
    token_ids: tuple[int, ...]
    weights: bytes
    """One number for each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenVectors:
    """The vectors of the next tokens of one input; its pieces come in order."""

    index: int
    dimensions: int
    data: bytes
    """Any number of whole rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scores:
    """The relevance of every document, in their order; higher is better."""

    scores: tuple[float, ...]


VectorPiece = DenseVectors | SparseVector | TokenVectors | Scores
"""A piece of the answer to a request for vectors or scores."""

VectorRequest = EmbeddingRequest | RerankRequest

ModelRequest = GenerationRequest | VectorRequest
"""Whatever a replica can be asked."""

AnswerEvent = GenerationEvent | VectorPiece
"""Whatever a replica answers: pieces, then one Finished or Failed."""


def _check_num_inputs(field: str, num_inputs: int) -> None:
    if not 1 <= num_inputs <= MAX_INPUTS:
        raise InvalidRequest(
            field=field, problem=f"must have from 1 to {MAX_INPUTS} entries, got {num_inputs}"
        )


def _check_truncate_to(field: str, truncate_to: int | None) -> None:
    if truncate_to is not None and truncate_to < 1 and truncate_to != CUT_TO_MODEL:
        raise InvalidRequest(
            field=field,
            problem=f"must be at least 1, or {CUT_TO_MODEL} for as many as the model takes, "
            f"got {truncate_to}",
        )
