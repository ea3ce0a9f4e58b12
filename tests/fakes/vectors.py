# SPDX-License-Identifier: Apache-2.0
"""Vectors and scores without a model: numbers that a test can tell from the texts.

A text's vector is its length in characters (of token ids: their number), its index, and 0.5; it
weighs its tokens by their place. A document scores the share of the query's words that it has.
"""

import struct
from collections.abc import Sequence

from xinference.protocol.vectors import (
    DenseVectors,
    EmbeddingRequest,
    Scores,
    SparseVector,
    TokenVectors,
    VectorKind,
    VectorPiece,
    VectorRequest,
)

DIMENSIONS = 3


def floats(*numbers: float) -> bytes:
    """Return numbers as they travel."""
    return struct.pack(f"<{len(numbers)}f", *numbers)


def tokens_of(request: VectorRequest) -> int:
    """Return how many tokens a request has: words, or token ids."""
    if isinstance(request, EmbeddingRequest):
        return sum(len(_words(given)) for given in request.inputs)
    return sum(len((request.query + " " + one).split()) for one in request.documents)


def pieces_of(request: VectorRequest) -> list[VectorPiece]:
    """Return the whole answer; inputs come last first, one piece for each."""
    if not isinstance(request, EmbeddingRequest):
        return [Scores(scores=tuple(_score(request.query, one) for one in request.documents))]
    pieces: list[VectorPiece] = []
    for index, given in reversed(list(enumerate(request.inputs))):
        words = _words(given)
        if VectorKind.DENSE in request.kinds:
            row = (float(len(given)), float(index), 0.5)[: request.dimensions]
            pieces.append(DenseVectors(indices=(index,), data=floats(*row)))
        if VectorKind.SPARSE in request.kinds:
            weights = floats(*(1 / (place + 1) for place in range(len(words))))
            pieces.append(
                SparseVector(index=index, token_ids=tuple(range(len(words))), weights=weights)
            )
        if VectorKind.MULTI_VECTOR in request.kinds:
            pieces += [
                TokenVectors(index=index, dimensions=2, data=floats(float(place), 1.0))
                for place in range(len(words))
            ]
    return pieces


def _words(given: str | tuple[int, ...]) -> Sequence[object]:
    return given.split() if isinstance(given, str) else given


def _score(query: str, document: str) -> float:
    words = query.split()
    return sum(word in document.split() for word in words) / len(words)
