# SPDX-License-Identifier: Apache-2.0
"""A running model that embeds or reranks, asked from a test's threads."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

from xinference.identifiers import RequestId
from xinference.models.base import Model
from xinference.protocol.generation import Failed, Finished
from xinference.protocol.vectors import (
    AnswerEvent,
    DenseVectors,
    Scores,
    VectorPiece,
    VectorRequest,
)

SECONDS = 30.0


class Calls:
    """Asks a started model, and sorts what comes back by request."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._lock = threading.Lock()
        self._inboxes: dict[RequestId, queue.Queue[AnswerEvent]] = {}

    def sink(self, events: Sequence[tuple[RequestId, AnswerEvent]]) -> None:
        """Take the events of a batch."""
        for request_id, event in events:
            with self._lock:
                inbox = self._inboxes[request_id]
            inbox.put(event)

    def ask(self, request: VectorRequest) -> tuple[list[VectorPiece], Finished]:
        """Return the whole answer.

        Raises:
            XinferenceError: it was refused, or failed.
        """
        inbox: queue.Queue[AnswerEvent] = queue.Queue()
        with self._lock:
            self._inboxes[request.request_id] = inbox
        self.model.submit(request)
        pieces: list[VectorPiece] = []
        while True:
            event = inbox.get(timeout=SECONDS)
            match event:
                case Finished():
                    return pieces, event
                case Failed(error=error):
                    raise error
            pieces.append(event)  # type: ignore[arg-type]


@contextmanager
def started(model: Model) -> Iterator[Calls]:
    """Run a model until the block ends."""
    calls = Calls(model)
    model.start(calls.sink)
    try:
        yield calls
    finally:
        model.stop(SECONDS)


def rows_of(pieces: Sequence[VectorPiece]) -> npt.NDArray[np.float32]:
    """Return the dense vectors of an answer, in the order of its inputs."""
    rows: dict[int, npt.NDArray[np.float32]] = {}
    for piece in pieces:
        if isinstance(piece, DenseVectors):
            found = np.frombuffer(piece.data, dtype="<f4").reshape(len(piece.indices), -1)
            rows |= dict(zip(piece.indices, found, strict=True))
    return np.stack([rows[index] for index in range(len(rows))])


def scores_of(pieces: Sequence[VectorPiece]) -> list[float]:
    """Return the scores of an answer."""
    (piece,) = pieces
    assert isinstance(piece, Scores)
    return list(piece.scores)
