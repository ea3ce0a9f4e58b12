# SPDX-License-Identifier: Apache-2.0
"""The thread that steps the engine, and the door to it from every other thread.

`submit` and `abort` check and leave word; the thread reads it before each step, so both take
effect within one. Events come out through `sink`, once per step, in the engine's thread.
"""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from xinference.errors import (
    DuplicateRequest,
    InternalError,
    ModelNotReady,
    ModelOverloaded,
)
from xinference.identifiers import RequestId
from xinference.protocol.generation import Accepted, Failed, Finished, GenerationEvent

from .engine import Engine, Event
from .pace import EndRate
from .requests import EngineRequest, ValidRequest

logger = logging.getLogger(__name__)

Sink = Callable[[list[tuple[RequestId, GenerationEvent]]], None]
RETRY_AFTER_SECONDS = 1
IDLE_SECONDS = 0.2
"""Without work, until an engine counts as idle: longer than it takes callers to ask again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineStats:
    """A snapshot of what the engine has done and has to do."""

    progress: int = 0
    """Grows with every step that ends, prompt chunks and failures included, and never shrinks. An
    engine with work whose progress stands still is stuck."""
    num_steps: int = 0
    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_generated_tokens: int = 0
    num_admissions: int = 0
    num_preemptions: int = 0
    num_aborts: int = 0
    num_failed_steps: int = 0
    num_cache_hits: int = 0
    num_cached_tokens: int = 0
    num_running: int = 0
    num_waiting: int = 0
    num_blocks_used: int = 0
    num_blocks_kept: int = 0
    num_blocks: int = 0
    last_step_seconds: float = 0.0
    busy_seconds: float = 0.0


class EngineLoop:
    """Runs one engine in a thread of its own.

    Every accepted request gets exactly one terminal event, also when the loop is stopped or dies.
    `sink` and `when_idle` must not block and must not raise; if one does, the loop dies. All
    methods may be called from any thread. Ends with `stop`, and does not start again.
    """

    def __init__(
        self, engine: Engine, sink: Sink, *, when_idle: Callable[[], None] | None = None
    ) -> None:
        """Nothing runs before `start`.

        Args:
            sink: is given the events, in the engine's thread.
            when_idle: is called there once each time that the engine has had nothing to do for a
                while.
        """
        self._engine = engine
        self._sink = sink
        self._when_idle = when_idle
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._wakened = threading.Condition()
        # Guarded by the condition's lock:
        self._live: dict[RequestId, int] = {}
        """With how many answers each wants."""
        self._submitted: list[ValidRequest] = []
        self._to_abort: list[tuple[RequestId, int | None]] = []
        self._is_stopping = False
        self._death: str | None = None
        self._stats = EngineStats(num_blocks=engine.config.num_blocks)
        self._end_rate = EndRate()

    @property
    def alive(self) -> bool:
        """Whether the thread runs and takes requests."""
        return self._thread.is_alive() and self._death is None and not self._is_stopping

    def start(self) -> None:
        """Start the thread. Call once."""
        self._thread.start()

    def submit(self, request: EngineRequest) -> Accepted:
        """Check a request and enqueue it. Its events may come before this returns.

        Raises:
            InvalidRequest, ContextLengthExceeded: as `Engine.validate`.
            DuplicateRequest: a live request has this id.
            ModelOverloaded: as many requests wait as may.
            ModelNotReady: the loop was not started, or is stopping.
            InternalError: the loop has died.
            In every case nothing was enqueued.
        """
        valid = self._engine.validate(request)
        config = self._engine.config
        with self._wakened:
            if self._death is not None:
                raise InternalError(where="the engine's loop", problem=self._death)
            if self._is_stopping or not self._thread.is_alive():
                raise ModelNotReady(
                    model=config.model_name,
                    state="stopping" if self._is_stopping else "not started",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            if valid.request_id in self._live:
                raise DuplicateRequest(request_id=valid.request_id)
            num_after = sum(self._live.values()) + valid.num_answers
            # Why any into an empty one: its answers take turns.
            if self._live and num_after > config.max_num_seqs + config.max_queue_size:
                raise ModelOverloaded(
                    model=config.model_name,
                    num_waiting=self._num_waiting(),
                    retry_after_seconds=self._end_rate.retry_after_seconds(
                        self._num_waiting(), now=time.monotonic()
                    ),
                )
            self._live[valid.request_id] = valid.num_answers
            self._submitted.append(valid)
            self._wakened.notify()
        return Accepted(num_prompt_tokens=sum(valid.prompt_lens))

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a request; it happens within one step.

        Returns:
            Whether it was live. Its terminal event is then `Finished(reason=ABORT)`, unless it
            comes to its own end in the step that is running.
        """
        with self._wakened:
            if request_id not in self._live:
                return False
            self._to_abort.append((request_id, None))
            self._wakened.notify()
            return True

    def end_choice(self, request_id: RequestId, choice_index: int) -> None:
        """Ask for the end of one of a request's answers; as `abort`, if it is the only one."""
        with self._wakened:
            if request_id in self._live:
                self._to_abort.append((request_id, choice_index))
                self._wakened.notify()

    def stats(self) -> EngineStats:
        """Return the counters as of the last step that ended."""
        with self._wakened:
            return replace(self._stats, num_waiting=self._num_waiting())

    def histograms(self) -> dict[str, float]:
        """Return how long requests waited and took, and how full steps were, as counters travel."""
        return self._engine.counters.histograms()

    def stop(self, timeout_seconds: float) -> None:
        """Abort every live request and end the thread; wait for it so long.

        Raises:
            TimeoutError: a step did not end in time. The thread ends after that step.
        """
        with self._wakened:
            self._is_stopping = True
            self._wakened.notify()
        if self._thread.ident is None:
            return
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's step did not end within {timeout_seconds} s")

    def _num_waiting(self) -> int:
        return max(0, sum(self._live.values()) - self._stats.num_running)

    def _run(self) -> None:
        try:
            while self._turn():
                pass
        except BaseException as error:  # noqa: BLE001  # boundary: the end of the thread
            self._die(error)

    def _turn(self) -> bool:
        """Take word, step once, tell. Return False when the loop is to end."""
        if self._when_idle is not None and not self._wait(IDLE_SECONDS):
            self._when_idle()
        with self._wakened:
            self._wait(None)
            submitted, self._submitted = self._submitted, []
            to_abort, self._to_abort = self._to_abort, []
            is_stopping = self._is_stopping
            if is_stopping:
                to_abort = [(request_id, None) for request_id in self._live]
        events = [event for request in submitted for event in self._engine.add(request)]
        for request_id, index in to_abort:
            if index is None:
                events += self._engine.abort(request_id)
            else:
                events += self._engine.end_choice(request_id, index)
        if not is_stopping and self._engine.has_work:
            # Why two calls of the sink: an abort need not wait for a long step to be told.
            self._deliver(events)
            events = self._engine.step()
        self._deliver(events)
        return not is_stopping

    def _wait(self, seconds: float | None) -> bool:
        """Wait for something to do; return whether there is, after so long."""
        with self._wakened:
            return self._wakened.wait_for(
                lambda: bool(
                    self._submitted or self._to_abort or self._is_stopping or self._engine.has_work
                ),
                seconds,
            )

    def _deliver(self, events: list[Event]) -> None:
        engine, counters = self._engine, self._engine.counters
        ended = [request_id for request_id, event in events if isinstance(event, Finished | Failed)]
        with self._wakened:
            # Why before the sink: who hears of an end may use the id again at once.
            for request_id in ended:
                self._live.pop(request_id, None)
            self._end_rate.note(len(ended), now=time.monotonic())
            self._stats = EngineStats(
                progress=counters.num_steps,
                num_steps=counters.num_steps,
                num_prefill_tokens=counters.num_prefill_tokens,
                num_decode_tokens=counters.num_decode_tokens,
                num_generated_tokens=counters.num_generated_tokens,
                num_admissions=counters.num_admissions,
                num_preemptions=counters.num_preemptions,
                num_aborts=counters.num_aborts,
                num_failed_steps=counters.num_failed_steps,
                num_cache_hits=counters.num_cache_hits,
                num_cached_tokens=counters.num_cached_tokens,
                num_running=engine.num_running,
                num_blocks_used=engine.num_blocks_used,
                num_blocks_kept=engine.num_blocks_kept,
                num_blocks=engine.config.num_blocks,
                last_step_seconds=counters.last_step_seconds,
                busy_seconds=counters.busy_seconds,
            )
        if events:
            self._sink(events)

    def _die(self, error: BaseException) -> None:
        """Tell every live request that the engine is gone; nobody may wait for nothing."""
        logger.critical("the engine's loop died", exc_info=error)
        problem = f"{type(error).__name__}: {error}"
        with self._wakened:
            self._death = problem
            failed = Failed(error=InternalError(where="the engine's loop", problem=problem))
            orphans: list[Event] = [(request_id, failed) for request_id in sorted(self._live)]
            self._live.clear()
            self._submitted.clear()
            self._to_abort.clear()
        if orphans:
            try:
                self._sink(orphans)
            except Exception:
                # Boundary: most likely the sink is what killed the loop.
                logger.exception("nobody hears of the end of %d requests", len(orphans))
