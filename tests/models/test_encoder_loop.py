# SPDX-License-Identifier: Apache-2.0
"""The thread that computes batches, with a model that only counts."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from xinference.errors import DuplicateRequest, InternalError, ModelNotReady, ModelOverloaded
from xinference.identifiers import RequestId
from xinference.models.batching import BatchLimits
from xinference.models.encoder_loop import EncoderLoop, Texts, TokenIds
from xinference.protocol.generation import Failed, Finished, FinishReason
from xinference.protocol.vectors import AnswerEvent, Scores, VectorPiece

SECONDS = 10.0
BAD = 666
LIMITS = BatchLimits(
    max_items=4, max_tokens=1000, max_bytes=10**9, bytes_per_token=1, bytes_per_pair=0
)


@dataclass(eq=False)
class CountingJob:
    """Its answer is the length of each text as that is computed."""

    request_id: RequestId
    texts: list[TokenIds]

    def num_answer_bytes(self, index: int) -> int:
        return 8

    def read(self, indices: Sequence[int], results: Sequence[Any]) -> list[VectorPiece]:
        return [Scores(scores=tuple(results))]


def job(name: str, *lengths: int, token: int = 1) -> CountingJob:
    texts = [np.full(length, token, dtype=np.int32) for length in lengths]
    return CountingJob(RequestId(name), texts)


class Subject:
    """A loop, the events that came of it, and a gate before each batch."""

    def __init__(self) -> None:
        self.events: queue.Queue[tuple[RequestId, AnswerEvent]] = queue.Queue()
        self.batches: list[list[RequestId]] = []
        self.gate = threading.Event()
        self.gate.set()
        self.entered = threading.Event()
        self.raises: Callable[[], None] = lambda: None
        self.loop = EncoderLoop(
            self.compute,
            limits=LIMITS,
            interval_seconds=0.001,
            max_queue_size=8,
            model_name="counting",
            sink=self.sink,
        )

    def compute(self, texts: Texts) -> list[float]:
        self.entered.set()
        assert self.gate.wait(SECONDS)
        self.batches.append([job.request_id for job, _ in texts])
        if any(job.texts[index][0] == BAD for job, index in texts):
            raise ValueError("a text that nobody can read")
        return [float(len(job.texts[index])) for job, index in texts]

    def sink(self, events: Sequence[tuple[RequestId, AnswerEvent]]) -> None:
        self.raises()
        for event in events:
            self.events.put(event)

    def end_of(self, name: str) -> tuple[list[float], Finished | Failed]:
        """Return what came of a request, and its one end."""
        scores: list[float] = []
        while True:
            request_id, event = self.events.get(timeout=SECONDS)
            if request_id != name:
                self.events.put((request_id, event))
                continue
            if isinstance(event, Scores):
                scores += event.scores
            elif isinstance(event, Finished | Failed):
                return scores, event


@pytest.fixture
def subject() -> Iterator[Subject]:
    subject = Subject()
    subject.loop.start()
    yield subject
    subject.gate.set()
    subject.loop.stop(SECONDS)
    assert not subject.loop.alive


def test_a_job_of_many_texts_is_computed_in_batches_and_ends_once(subject: Subject) -> None:
    accepted = subject.loop.submit(job("a", 5, 6, 7, 8, 9, 10))

    scores, end = subject.end_of("a")

    assert accepted.num_prompt_tokens == 45
    assert sorted(scores) == [5, 6, 7, 8, 9, 10]
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.STOP
    assert end.usage.num_prompt_tokens == 45
    assert len(subject.batches) == 2
    assert subject.loop.counters()["num_texts"] == 6


def test_jobs_that_wait_together_are_computed_together(subject: Subject) -> None:
    subject.gate.clear()
    subject.loop.submit(job("first", 5))
    assert subject.entered.wait(SECONDS)
    for name in ("b", "c", "d"):
        subject.loop.submit(job(name, 5))

    subject.gate.set()
    for name in ("first", "b", "c", "d"):
        subject.end_of(name)

    assert [sorted(batch) for batch in subject.batches] == [["first"], ["b", "c", "d"]]


def test_a_text_that_raises_fails_its_own_job_alone(subject: Subject) -> None:
    subject.gate.clear()
    subject.loop.submit(job("first", 5))
    assert subject.entered.wait(SECONDS)
    subject.loop.submit(job("good", 5, 6))
    subject.loop.submit(job("bad", 5, 6, token=BAD))

    subject.gate.set()

    assert sorted(subject.end_of("good")[0]) == [5, 6]
    _, end = subject.end_of("bad")
    assert isinstance(end, Failed)
    assert "a text that nobody can read" in str(end.error)
    assert subject.loop.alive


def test_a_job_that_is_aborted_while_it_waits_is_never_computed(subject: Subject) -> None:
    subject.gate.clear()
    subject.loop.submit(job("first", 5))
    assert subject.entered.wait(SECONDS)
    subject.loop.submit(job("gone", 5))

    assert subject.loop.abort(RequestId("gone"))
    subject.gate.set()
    scores, end = subject.end_of("gone")
    subject.end_of("first")

    assert (scores, isinstance(end, Finished) and end.reason) == ([], FinishReason.ABORT)
    assert subject.batches == [["first"]]


def test_a_job_that_is_aborted_while_it_is_computed_ends_as_aborted(subject: Subject) -> None:
    subject.gate.clear()
    subject.loop.submit(job("gone", 5, 300))
    assert subject.entered.wait(SECONDS)

    subject.loop.abort(RequestId("gone"))
    subject.gate.set()
    _, end = subject.end_of("gone")

    assert isinstance(end, Finished)
    assert end.reason is FinishReason.ABORT
    assert not subject.loop.abort(RequestId("gone"))


def test_a_live_id_is_refused_and_a_full_queue_says_when_to_come_again(subject: Subject) -> None:
    subject.gate.clear()
    for number in range(8):
        subject.loop.submit(job(str(number), 5))

    with pytest.raises(DuplicateRequest):
        subject.loop.submit(job("3", 5))
    with pytest.raises(ModelOverloaded) as caught:
        subject.loop.submit(job("one more", 5))

    assert caught.value.retry_after_seconds >= 1


def test_stopping_ends_every_job(subject: Subject) -> None:
    subject.gate.clear()
    subject.loop.submit(job("first", 5))
    assert subject.entered.wait(SECONDS)
    subject.loop.submit(job("second", 5))

    stopping = threading.Thread(target=subject.loop.stop, args=(SECONDS,))
    stopping.start()
    subject.gate.set()
    stopping.join(SECONDS)

    _, end = subject.end_of("second")
    assert isinstance(end, Finished)
    assert end.reason is FinishReason.ABORT
    with pytest.raises(ModelNotReady):
        subject.loop.submit(job("late", 5))


def test_a_loop_that_dies_fails_its_jobs_and_takes_no_more() -> None:
    subject = Subject()

    def raise_once() -> None:
        subject.raises = lambda: None
        raise RuntimeError("the sink is broken")

    subject.raises = raise_once
    subject.loop.start()
    subject.gate.clear()
    subject.loop.submit(job("a", 5))
    assert subject.entered.wait(SECONDS)
    subject.loop.submit(job("b", 5))
    subject.gate.set()

    _, end = subject.end_of("b")

    assert isinstance(end, Failed)
    assert not subject.loop.alive
    with pytest.raises(InternalError, match="the sink is broken"):
        subject.loop.submit(job("c", 5))
