# SPDX-License-Identifier: Apache-2.0
"""The thread that computes vectors and scores, and the door to it from every other thread.

In: jobs, each the token ids of one request's texts. Out: what the job makes of the numbers, once
per batch, through `sink`, in this thread. `batching.py` decides what is computed together; what
computing means is a function of the model. It knows no tokenizer and no torch.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from xinference.engine.isolation import run_apart
from xinference.engine.pace import EndRate
from xinference.errors import (
    DuplicateRequest,
    InternalError,
    ModelNotReady,
    ModelOverloaded,
)
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    Phases,
    Usage,
)
from xinference.protocol.histograms import COUNTS, SECONDS, Histogram
from xinference.protocol.vectors import AnswerEvent, VectorPiece

from .base import Sink
from .batching import BatchLimits, BatchPace, BatchQueue
from .heap import KEPT_BYTES, Heap

logger = logging.getLogger(__name__)

TokenIds = npt.NDArray[np.int32]
RETRY_AFTER_SECONDS = 1
KEPT_SHARE = 4
"""Of the memory that a batch may take, a quarter may stay with the process for the next one."""
MAX_QUEUE_TOKENS = 32 * 2**20
"""That wait; one request is taken whatever it has, for a frame bounds it."""


class Job(Protocol):
    """One request: texts to compute, and what becomes of the results."""

    @property
    def request_id(self) -> RequestId:
        """Of the request."""
        ...

    @property
    def texts(self) -> Sequence[TokenIds]:
        """What is to be computed; never empty."""
        ...

    def num_answer_bytes(self, index: int) -> int:
        """Return how large the answer to one text will be."""
        ...

    def read(self, indices: Sequence[int], results: Sequence[Any]) -> list[VectorPiece]:
        """Return what can be said now that these texts have been computed."""
        ...


Texts = Sequence[tuple[Job, int]]
"""Jobs, and which of their texts."""
Compute = Callable[[Texts], Sequence[Any]]
"""Returns one result for each text; may raise."""


@dataclass(slots=True, eq=False)
class _Live:
    job: Job
    num_tokens: int
    num_left: int
    """Texts that have not been computed."""
    arrived_at: float
    admitted_at: float | None = None
    """When its first text was taken into a batch."""

    def phases(self) -> Phases:
        """Return when it came how far; it ends now."""
        return Phases(
            arrived_at=self.arrived_at,
            admitted_at=self.admitted_at,
            ended_at=time.monotonic(),
        )


@dataclass(slots=True)
class _Counts:
    num_batches: int = 0
    num_texts: int = 0
    num_tokens: int = 0
    num_padding_tokens: int = 0
    num_aborts: int = 0
    num_failed_batches: int = 0
    last_batch_seconds: float = 0.0
    busy_seconds: float = 0.0
    batch_size: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    """Texts of a batch."""
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """From a request's arrival to the first batch with a text of it."""
    running: Texts = field(default_factory=tuple)


class EncoderLoop:
    """Computes jobs in a thread of its own.

    Every accepted job gets exactly one terminal event, also when the loop is stopped or dies.
    `sink` must not block and must not raise. All methods may be called from any thread. Ends with
    `stop`, and does not start again.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        limits: BatchLimits,
        interval_seconds: float,
        max_queue_size: int,
        model_name: str,
        sink: Sink,
    ) -> None:
        self._compute = compute
        self._limits = limits
        self._max_queue_size = max_queue_size
        self._model_name = model_name
        self._sink = sink
        self._thread = threading.Thread(target=self._run, name="encoder", daemon=True)
        self._wakened = threading.Condition()
        # Guarded by the condition's lock:
        self._queue: BatchQueue[RequestId] = BatchQueue(limits, interval_seconds=interval_seconds)
        self._live: dict[RequestId, _Live] = {}
        self._to_abort: list[RequestId] = []
        self._is_stopping = False
        self._death: str | None = None
        self._counts = _Counts()
        self._end_rate = EndRate()
        self._pace = BatchPace()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes jobs."""
        return self._thread.is_alive() and self._death is None and not self._is_stopping

    def counters(self) -> dict[str, float]:
        """Return what has been done and has to be done, by name."""
        with self._wakened:
            counts = self._counts
            num_running = len({job.request_id for job, _ in counts.running})
            return {
                "progress": float(counts.num_batches + counts.num_failed_batches),
                "num_steps": float(counts.num_batches),
                "num_texts": float(counts.num_texts),
                "num_prefill_tokens": float(counts.num_tokens),
                "num_padding_tokens": float(counts.num_padding_tokens),
                "num_aborts": float(counts.num_aborts),
                "num_failed_steps": float(counts.num_failed_batches),
                "num_running": float(num_running),
                "num_waiting": float(len(self._live) - num_running),
                "num_waiting_texts": float(len(self._queue)),
                "last_step_seconds": counts.last_batch_seconds,
                "busy_seconds": counts.busy_seconds,
                **counts.batch_size.counters("batch_size"),
                **counts.queue_seconds.counters("queue_seconds"),
            }

    def start(self) -> None:
        """Start the thread. Call once."""
        self._thread.start()

    def submit(self, job: Job) -> Accepted:
        """Enqueue a job. Its events may come before this returns.

        Raises:
            DuplicateRequest: a live request has this id.
            ModelOverloaded: as many requests or tokens wait as may.
            ModelNotReady: the loop was not started, or is stopping.
            InternalError: the loop has died.
            In every case nothing was enqueued.
        """
        lengths = [len(text) for text in job.texts]
        answers = [job.num_answer_bytes(index) for index in range(len(lengths))]
        num_tokens = sum(lengths)
        now = time.monotonic()
        with self._wakened:
            self._check_takes(job.request_id, num_tokens, now=now)
            self._queue.add(
                job.request_id,
                lengths,
                answer_bytes=answers,
                now=now,
                is_crowd=bool(self._live),
            )
            self._live[job.request_id] = _Live(job, num_tokens, len(lengths), arrived_at=now)
            self._wakened.notify()
        return Accepted(num_prompt_tokens=num_tokens)

    def _check_takes(self, request_id: RequestId, num_tokens: int, *, now: float) -> None:
        if self._death is not None:
            raise InternalError(where="the encoder's loop", problem=self._death)
        if self._is_stopping or not self._thread.is_alive():
            raise ModelNotReady(
                model=self._model_name,
                state="stopping" if self._is_stopping else "not started",
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if request_id in self._live:
            raise DuplicateRequest(request_id=request_id)
        has_too_much = self._queue.num_tokens and (
            self._queue.num_tokens + num_tokens > MAX_QUEUE_TOKENS
        )
        if len(self._live) >= self._max_queue_size or has_too_much:
            num_waiting = len(self._live)
            raise ModelOverloaded(
                model=self._model_name,
                num_waiting=num_waiting,
                retry_after_seconds=self._end_rate.retry_after_seconds(num_waiting, now=now),
            )

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a job, within one batch; return whether it was live."""
        with self._wakened:
            if request_id not in self._live:
                return False
            self._to_abort.append(request_id)
            self._wakened.notify()
            return True

    def stop(self, timeout_seconds: float) -> None:
        """End every job and the thread.

        Raises:
            TimeoutError: a batch did not end in time.
        """
        with self._wakened:
            self._is_stopping = True
            self._wakened.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)
            if self._thread.is_alive():
                raise TimeoutError(f"a batch did not end within {timeout_seconds:g} s")

    # --- in the thread

    def _run(self) -> None:
        reason = FinishReason.ABORT
        heap = Heap(kept_bytes=max(KEPT_BYTES, self._limits.max_bytes // KEPT_SHARE))
        try:
            while (texts := self._next_batch()) is not None:
                self._run_batch(texts)
                heap.give_back()
        except Exception as error:  # boundary: the last of this thread
            logger.exception("the encoder's loop of %s died", self._model_name)
            self._end_all_with(f"{type(error).__name__}: {error}")
            return
        with self._wakened:
            events = [(one, self._ended(one, reason)) for one in tuple(self._live)]
        if events:
            self._sink(events)

    def _end_all_with(self, problem: str) -> None:
        with self._wakened:
            self._death = problem
            ids, self._live = list(self._live), {}
        error = InternalError(where="the encoder's loop", problem=problem)
        self._sink([(one, Failed(error=error)) for one in ids])

    def _next_batch(self) -> Texts | None:
        """Wait for the next batch; None: the loop is to stop. Ends what was aborted meanwhile."""
        while True:
            with self._wakened:
                if self._is_stopping:
                    return None
                events = self._end_aborted()
                now = time.monotonic()
                seconds = self._queue.seconds_to_wait(now)
                if not events and seconds == 0.0:
                    batch = self._queue.take(now=now, max_tokens=self._pace.max_tokens())
                    texts = [(self._live[one].job, index) for one, index in batch]
                    self._counts.running = texts
                    self._note_admitted({one for one, _ in batch}, now=now)
                    return texts
                if not events:
                    self._wakened.wait(seconds)
            if events:
                self._sink(events)

    def _note_admitted(self, ids: set[RequestId], *, now: float) -> None:
        for one in ids:
            live = self._live[one]
            if live.admitted_at is None:
                live.admitted_at = now
                self._counts.queue_seconds.observe(now - live.arrived_at)

    def _end_aborted(self) -> list[tuple[RequestId, AnswerEvent]]:
        asked, self._to_abort = self._to_abort, []
        aborted = [one for one in dict.fromkeys(asked) if one in self._live]
        for one in aborted:
            self._queue.remove(one)
        self._counts.num_aborts += len(aborted)
        return [(one, self._ended(one, FinishReason.ABORT)) for one in aborted]

    def _ended(self, request_id: RequestId, reason: FinishReason) -> Finished:
        live = self._live.pop(request_id)
        usage = Usage(num_prompt_tokens=live.num_tokens, num_completion_tokens=0)
        return Finished(reason=reason, usage=usage, phases=live.phases())

    def _run_batch(self, texts: Texts) -> None:
        started = time.monotonic()
        groups, culprits = run_apart(texts, self._compute, fatal=())
        ended = time.monotonic()
        results = {
            (job.request_id, index): result
            for group, of_group in groups
            for (job, index), result in zip(group, of_group, strict=True)
        }
        errors = {job.request_id: error for (job, _), error in culprits}
        events: list[tuple[RequestId, AnswerEvent]] = []
        num_ended = 0
        with self._wakened:
            self._counts.running = ()
            self._count(texts, seconds=ended - started, has_failed=bool(culprits))
            aborted = set(self._to_abort)
            for job in dict.fromkeys(job for job, _ in texts):
                one = job.request_id
                if one in aborted:
                    continue  # its end comes before the next batch
                if one in errors:
                    self._queue.remove(one)
                    phases = self._live.pop(one).phases()
                    events.append((one, Failed(error=_internal(errors[one]), phases=phases)))
                    continue
                live = self._live[one]
                indices = [index for other, index in texts if other is job]
                pieces = job.read(indices, [results[one, index] for index in indices])
                events += [(one, piece) for piece in pieces]
                live.num_left -= len(indices)
                if live.num_left == 0:
                    events.append((one, self._ended(one, FinishReason.STOP)))
                    num_ended += 1
            self._end_rate.note(num_ended, now=ended)
        if events:
            self._sink(events)
        with self._wakened:
            self._queue.note_answers(now=time.monotonic())

    def _count(self, texts: Texts, *, seconds: float, has_failed: bool) -> None:
        lengths = [len(job.texts[index]) for job, index in texts]
        counts = self._counts
        counts.num_failed_batches += has_failed
        counts.num_batches += 1
        counts.num_texts += len(texts)
        counts.num_tokens += sum(lengths)
        num_padded = max(lengths) * len(lengths)
        self._pace.observe(num_tokens=num_padded, seconds=seconds)
        counts.num_padding_tokens += num_padded - sum(lengths)
        counts.last_batch_seconds = seconds
        counts.busy_seconds += seconds
        counts.batch_size.observe(len(texts))


def _internal(error: Exception) -> InternalError:
    return InternalError(where="the model", problem=f"{type(error).__name__}: {error}")
