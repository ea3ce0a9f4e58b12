# SPDX-License-Identifier: Apache-2.0
"""The engine's thread: from submission to exactly one end, whatever comes between."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from tests.engine.tiny_engines import tiny_engine
from xinference.engine import Engine, EngineLoop, EngineRequest
from xinference.engine.batch import Batch
from xinference.engine.loop import IDLE_SECONDS
from xinference.engine.model_runner import ModelRunner
from xinference.errors import (
    ContextLengthExceeded,
    DuplicateRequest,
    InternalError,
    InvalidRequest,
    ModelNotReady,
    ModelOverloaded,
)
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    SamplingParams,
    TextDelta,
)

DEADLINE_SECONDS = 30


class Ears:
    """A sink that can be waited on."""

    def __init__(self) -> None:
        self._heard = threading.Condition()
        self.events: dict[str, list[GenerationEvent]] = {}

    def __call__(self, events: list[tuple[RequestId, GenerationEvent]]) -> None:
        with self._heard:
            for request_id, event in events:
                self.events.setdefault(request_id, []).append(event)
            self._heard.notify_all()

    def wait_end(self, request_id: str) -> Finished | Failed:
        """Wait for the end of a request and return it."""
        with self._heard:
            assert self._heard.wait_for(
                lambda: bool(self._ends(request_id)), timeout=DEADLINE_SECONDS
            ), self.events
            (end,) = self._ends(request_id)
            return end

    def wait_tokens(self, request_id: str, count: int) -> None:
        """Wait until a request has had that many tokens."""
        with self._heard:
            assert self._heard.wait_for(
                lambda: len(self.events.get(request_id, [])) >= count, timeout=DEADLINE_SECONDS
            ), self.events

    def _ends(self, request_id: str) -> list[Finished | Failed]:
        events = self.events.get(request_id, [])
        return [event for event in events if isinstance(event, Finished | Failed)]


class Gate:
    """A runner whose forwards wait to be let through."""

    def __init__(self, runner: ModelRunner) -> None:
        self._runner = runner
        self.entered = threading.Semaphore(0)
        self.permits = threading.Semaphore(0)
        self.error: Exception | None = None

    def forward(self, batch: Batch) -> torch.Tensor:
        self.entered.release()
        assert self.permits.acquire(timeout=DEADLINE_SECONDS)
        if self.error is not None:
            raise self.error
        return self._runner.forward(batch)

    def wait_entered(self) -> None:
        """Wait until a forward has begun."""
        assert self.entered.acquire(timeout=DEADLINE_SECONDS)


@contextmanager
def running(engine: Engine) -> Iterator[tuple[EngineLoop, Ears]]:
    ears = Ears()
    loop = EngineLoop(engine, ears)
    loop.start()
    try:
        yield loop, ears
    finally:
        loop.stop(DEADLINE_SECONDS)


@contextmanager
def gated(engine: Engine) -> Iterator[tuple[EngineLoop, Ears, Gate]]:
    gate = Gate(engine._runner)
    engine._runner = gate  # type: ignore[assignment]
    ears = Ears()
    loop = EngineLoop(engine, ears)
    loop.start()
    try:
        yield loop, ears, gate
    finally:
        gate.permits.release(10_000)
        loop.stop(DEADLINE_SECONDS)


def request(name: str, *, max_tokens: int | None = 5, prompt_len: int = 6) -> EngineRequest:
    return EngineRequest(
        request_id=RequestId(name),
        prompt_token_ids=tuple(range(10, 10 + prompt_len)),
        sampling=SamplingParams(max_tokens=max_tokens, temperature=0.0),
    )


def test_requests_of_many_threads_each_get_their_answer_and_one_end() -> None:
    with running(tiny_engine(num_blocks=10)) as (loop, ears):
        threads = [
            threading.Thread(target=lambda i=i: loop.submit(request(str(i), prompt_len=1 + i)))
            for i in range(12)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        ends = [ears.wait_end(str(i)) for i in range(12)]

        assert all(isinstance(end, Finished) for end in ends)
        for i in range(12):
            *deltas, _ = ears.events[str(i)]
            assert all(isinstance(delta, TextDelta) for delta in deltas)
            assert len(deltas) == 5
        assert loop.stats().num_blocks_used == 0
        assert loop.stats().num_waiting == 0


def test_acceptance_says_how_long_the_prompt_is() -> None:
    with running(tiny_engine()) as (loop, ears):
        assert loop.submit(request("r", prompt_len=9)).num_prompt_tokens == 9
        ears.wait_end("r")


def test_an_abort_takes_effect_within_the_step_that_runs() -> None:
    with gated(tiny_engine()) as (loop, ears, gate):
        loop.submit(request("r", max_tokens=50))
        gate.wait_entered()

        assert loop.abort(RequestId("r"))
        gate.permits.release()
        end = ears.wait_end("r")

        assert isinstance(end, Finished)
        assert end.reason == FinishReason.ABORT
        stats = loop.stats()
        assert (stats.num_steps, stats.num_aborts) == (1, 1)
        assert (stats.num_running, stats.num_blocks_used) == (0, 0)
        assert not loop.abort(RequestId("r"))


def test_a_waiting_request_can_be_aborted_while_a_step_runs() -> None:
    with gated(tiny_engine(max_num_seqs=1)) as (loop, ears, gate):
        loop.submit(request("runs", max_tokens=2))
        loop.submit(request("waits"))
        gate.wait_entered()
        assert loop.stats().num_waiting >= 1

        loop.abort(RequestId("waits"))
        gate.permits.release(2)

        assert ears.wait_end("waits") == Finished(
            reason=FinishReason.ABORT,
            usage=ears.wait_end("waits").usage,  # type: ignore[union-attr]
        )
        assert len(ears.events["waits"]) == 1


def test_an_id_that_is_live_is_refused_and_free_again_after_its_end() -> None:
    with gated(tiny_engine()) as (loop, ears, gate):
        loop.submit(request("r", max_tokens=1))

        with pytest.raises(DuplicateRequest):
            loop.submit(request("r"))
        gate.permits.release(100)
        ears.wait_end("r")
        ears.events.clear()
        loop.submit(request("r"))

        assert isinstance(ears.wait_end("r"), Finished)


def test_a_full_queue_refuses_and_takes_again_when_it_has_room() -> None:
    with gated(tiny_engine(max_num_seqs=1, max_queue_size=2)) as (loop, ears, gate):
        for name in "abc":
            loop.submit(request(name, max_tokens=1))

        with pytest.raises(ModelOverloaded) as refused:
            loop.submit(request("d"))
        gate.permits.release(100)
        for name in "abc":
            ears.wait_end(name)
        loop.submit(request("d"))

        assert refused.value.num_waiting >= 2
        assert 1 <= refused.value.retry_after_seconds <= 60
        assert isinstance(ears.wait_end("d"), Finished)


def test_who_is_refused_hears_of_the_rate_at_which_requests_end() -> None:
    with gated(tiny_engine(max_num_seqs=1, max_queue_size=3)) as (loop, ears, gate):
        for name in ("x", "y"):
            loop.submit(request(name, max_tokens=1))
            gate.permits.release()
            ears.wait_end(name)
        for name in "abcd":
            loop.submit(request(name, max_tokens=1))

        with pytest.raises(ModelOverloaded) as refused:
            loop.submit(request("e"))

        assert refused.value.retry_after_seconds == 1, "these took no second each"


def test_a_refused_request_leaves_no_trace() -> None:
    with running(tiny_engine()) as (loop, ears):
        with pytest.raises(ContextLengthExceeded):
            loop.submit(request("r", max_tokens=10_000))
        with pytest.raises(InvalidRequest):
            loop.submit(request("r", prompt_len=0))
        loop.submit(request("r"))

        assert isinstance(ears.wait_end("r"), Finished)


def test_a_failing_forward_fails_its_requests_and_the_loop_goes_on() -> None:
    with gated(tiny_engine()) as (loop, ears, gate):
        gate.error = ValueError("bad weights")
        loop.submit(request("r"))
        gate.permits.release()
        failed = ears.wait_end("r")
        gate.error = None
        gate.permits.release(100)
        loop.submit(request("next"))

        assert isinstance(failed, Failed)
        assert "bad weights" in str(failed.error)
        assert isinstance(ears.wait_end("next"), Finished)
        assert loop.alive
        assert loop.stats().num_failed_steps == 1


def test_stop_ends_every_request_and_the_thread() -> None:
    engine = tiny_engine(max_num_seqs=1)
    ears = Ears()
    loop = EngineLoop(engine, ears)
    loop.start()
    for name in "abc":
        loop.submit(request(name, max_tokens=None))
    ears.wait_tokens("a", 2)

    loop.stop(DEADLINE_SECONDS)

    for name in "abc":
        end = ears.wait_end(name)
        assert isinstance(end, Finished)
        assert end.reason == FinishReason.ABORT
    assert not loop.alive
    assert engine.num_blocks_used == 0
    with pytest.raises(ModelNotReady):
        loop.submit(request("late"))


def test_stop_says_when_a_step_does_not_end_in_time() -> None:
    with gated(tiny_engine()) as (loop, ears, gate):
        loop.submit(request("r"))
        gate.wait_entered()

        with pytest.raises(TimeoutError):
            loop.stop(0.01)
        gate.permits.release(100)

        assert isinstance(ears.wait_end("r"), Finished)


def test_an_engine_with_nothing_to_do_is_told_so_once_and_never_beside_work() -> None:
    idle = threading.Semaphore(0)
    engine, ears = tiny_engine(), Ears()

    def note_idle() -> None:
        assert not engine.has_work
        idle.release()

    loop = EngineLoop(engine, ears, when_idle=note_idle)
    loop.start()
    try:
        assert idle.acquire(timeout=DEADLINE_SECONDS)
        loop.submit(request("r"))
        assert isinstance(ears.wait_end("r"), Finished)
        assert idle.acquire(timeout=DEADLINE_SECONDS)

        assert not idle.acquire(timeout=2 * IDLE_SECONDS)
        assert loop.alive
    finally:
        loop.stop(DEADLINE_SECONDS)


def test_a_loop_that_was_not_started_refuses_and_stops() -> None:
    loop = EngineLoop(tiny_engine(), Ears())

    with pytest.raises(ModelNotReady):
        loop.submit(request("r"))
    loop.stop(DEADLINE_SECONDS)

    assert not loop.alive


class Dying(Exception):
    """What kills the loop in a test."""


def test_when_the_loop_dies_every_request_hears_of_it(caplog: pytest.LogCaptureFixture) -> None:
    engine = tiny_engine(max_num_seqs=1)
    with gated(engine) as (loop, ears, gate):
        for name in "abc":
            loop.submit(request(name))
        gate.wait_entered()

        def schedule() -> None:
            raise Dying("a bug of ours")

        engine._scheduler.schedule = schedule  # type: ignore[method-assign, assignment]
        gate.permits.release()
        ends = [ears.wait_end(name) for name in "abc"]

        assert all(isinstance(end, Failed) for end in ends)
        assert all("a bug of ours" in str(end.error) for end in ends if isinstance(end, Failed))
        with pytest.raises(InternalError, match="a bug of ours"):
            loop.submit(request("late"))
        assert not loop.alive
    assert "the engine's loop died" in caplog.text


def test_progress_moves_with_every_chunk_of_a_long_prompt() -> None:
    with gated(tiny_engine(max_num_batched_tokens=4)) as (loop, ears, gate):
        loop.submit(request("r", prompt_len=17, max_tokens=1))
        seen = []
        for _ in range(5):
            gate.wait_entered()
            seen.append(loop.stats().progress)
            gate.permits.release()
        ears.wait_end("r")

        assert seen == [0, 1, 2, 3, 4]
        assert loop.stats().progress == 5
        assert loop.stats().num_prefill_tokens == 16
