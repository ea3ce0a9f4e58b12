# SPDX-License-Identifier: Apache-2.0
"""The thread that asks an engine's server, and the door to it from every other thread.

In: requests as answers to ask for. Out: events through `sink`, in this thread, those of one turn of
its event loop together. Every answer is a connection of its own: to close it is to abort it, which
all of these servers understand. As many are asked for at once as the server computes at once; the
others wait here, in the order of the engine's own queue. It knows no templates.
"""

import asyncio
import contextlib
import json
import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import httpx

from xinference.engine.pace import EndRate
from xinference.engine.waiting import WaitingQueue
from xinference.errors import (
    DuplicateRequest,
    InternalError,
    ModelNotReady,
    ModelOverloaded,
    ReplicaLost,
    XinferenceError,
)
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Accepted,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    Phases,
    TextDelta,
    Usage,
)
from xinference.protocol.histograms import SECONDS, Histogram

from .dialect import LIMITS, Dialect, Piece
from .process import ServerProcess
from .sse import chunks, refusal

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
CONNECT_SECONDS = 10.0
END_SECONDS = 2.0
"""A connection that breaks may be the first sign of the server's end, which is waited for."""
WATCH_SECONDS = 1.0
Event = tuple[RequestId, GenerationEvent]
Read = Callable[[RequestId, GenerationEvent, int], Sequence[GenerationEvent]]
"""Turns an event of the engine, and how many tokens it is, into what callers are told."""
Retokenize = Callable[[str], tuple[int, ...]]
"""Returns the ids of a piece of text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """One answer of a request."""

    index: int
    """`choice_index`."""
    body: Mapping[str, Any] | None
    """What the server is asked; None: nothing, for no token is wanted."""
    echo: str = ""
    """What it begins with."""
    adds_stop: bool = False
    """Whether the stop string that ends it is part of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerRequest:
    """A request, as what is asked of the server."""

    request_id: RequestId
    branches: tuple[Branch, ...]
    num_prompt_tokens: int
    priority: int = 0
    fairness_key: str = ""
    resumed: tuple[int, ...] = ()
    """Tokens of the only answer, which another replica has generated."""
    resumed_text: str = ""


@dataclass(eq=False, slots=True)
class _Live:
    request: ServerRequest
    left: dict[int, "_Waiting"]
    """The answers that have not ended, by their index."""
    num_completion_tokens: int = 0
    num_cached_tokens: int = 0
    reason: FinishReason = FinishReason.STOP
    stop_string: str | None = None
    arrived_at: float = field(default_factory=time.monotonic)
    admitted_at: float | None = None
    """When the server was first asked for an answer."""
    first_token_at: float | None = None

    @property
    def is_single(self) -> bool:
        return len(self.request.branches) == 1

    def phases(self) -> Phases:
        """Return when it came how far; it ends now."""
        return Phases(
            arrived_at=self.arrived_at,
            admitted_at=self.admitted_at,
            first_token_at=self.first_token_at,
            ended_at=time.monotonic(),
        )


@dataclass(eq=False, slots=True)
class _Waiting:
    """An answer, waiting or being asked for."""

    request_id: RequestId
    """Its own, for the queue."""
    priority: int
    fairness_key: str
    live: _Live
    branch: Branch
    task: "asyncio.Task[None] | None" = None
    num_generated: int = 0
    num_told: int = 0
    """Tokens whose text was told."""
    num_chars: int = 0
    """Of the text that was told."""
    untold_ids: list[int] = field(default_factory=list)


class ServerLoop:
    """Asks one server in a thread of its own.

    Every accepted request gets exactly one Finished or Failed, at the latest by `stop`. All methods
    may be called from any thread.
    """

    def __init__(
        self,
        dialect: Dialect,
        process: ServerProcess,
        *,
        url: str,
        headers: Mapping[str, str],
        model_name: str,
        max_num_seqs: int,
        max_queue_size: int,
        retokenize: Retokenize,
        read: Read,
        sink: Callable[[list[Event]], None],
    ) -> None:
        self._dialect = dialect
        self._process = process
        self._url = url
        self._headers = headers
        self._model_name = model_name
        self._max_num_seqs = max_num_seqs
        self._max_queue_size = max_queue_size
        self._retokenize = retokenize
        self._read = read
        self._sink = sink
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._run, name="engine server", daemon=True)
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._num_live: dict[RequestId, int] = {}
        """With how many answers each wants."""
        self._is_stopping = False
        self._end_rate = EndRate()
        # Of the thread:
        self._lives: dict[RequestId, _Live] = {}
        self._queue: WaitingQueue[_Waiting] = WaitingQueue()
        self._running: set[_Waiting] = set()
        self._events: list[Event] = []
        self._page: dict[str, float] = {}
        self._progress = 0
        self._num_aborts = 0
        self._queue_seconds = Histogram(SECONDS)
        self._prefill_seconds = Histogram(SECONDS)
        self._decode_seconds = Histogram(SECONDS)
        self._client: httpx.AsyncClient | None = None
        self._stopped = asyncio.Event()

    @property
    def alive(self) -> bool:
        """Whether the thread and the server run."""
        return self._thread.is_alive() and not self._process.has_ended and not self._is_stopping

    def start(self) -> None:
        """Start the thread. Call once."""
        self._thread.start()

    def submit(self, request: ServerRequest) -> Accepted:
        """Enqueue a request. Its events may come before this returns.

        Raises:
            DuplicateRequest: a live request has this id.
            ModelOverloaded: as many requests wait as may.
            ModelNotReady: the server has ended, or is being stopped.
            In every case nothing was enqueued.
        """
        with self._lock:
            if not self.alive:
                raise ModelNotReady(
                    model=self._model_name,
                    state="stopping",
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                )
            if request.request_id in self._num_live:
                raise DuplicateRequest(request_id=request.request_id)
            num_now = sum(self._num_live.values())
            num_after = num_now + len(request.branches)
            if self._num_live and num_after > self._max_num_seqs + self._max_queue_size:
                num_waiting = max(0, num_now - self._max_num_seqs)
                raise ModelOverloaded(
                    model=self._model_name,
                    num_waiting=num_waiting,
                    retry_after_seconds=self._end_rate.retry_after_seconds(
                        num_waiting, now=time.monotonic()
                    ),
                )
            self._num_live[request.request_id] = len(request.branches)
            # Why under the lock: after `stop` has begun nothing is added.
            self._loop.call_soon_threadsafe(self._add, request)
        return Accepted(num_prompt_tokens=request.num_prompt_tokens)

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a request; return whether it was live."""
        with self._lock:
            if request_id not in self._num_live:
                return False
        self._call(self._abort, request_id)
        return True

    def end_choice(self, request_id: RequestId, index: int) -> None:
        """Ask for the end of one of a request's answers."""
        self._call(self._abort_answer, request_id, index)

    def counters(self) -> dict[str, float]:
        """Return what was done and is to be done; what only the server knows is a second old."""
        with self._lock:
            num_live = sum(self._num_live.values())
        num_running = len(self._running)
        return {
            **self._page,
            "progress": float(self._progress),
            "num_aborts": float(self._num_aborts),
            "num_running": float(num_running),
            "num_waiting": float(max(0, num_live - num_running)),
            **self._queue_seconds.counters("queue_seconds"),
            **self._prefill_seconds.counters("prefill_seconds"),
            **self._decode_seconds.counters("decode_seconds"),
        }

    def stop(self, timeout_seconds: float) -> None:
        """Abort every live request and end the thread.

        Raises:
            TimeoutError: it did not end in time.
        """
        with self._lock:
            self._is_stopping = True
        if self._thread.ident is None:
            return
        self._call(self._stopped.set)
        self._thread.join(timeout_seconds)
        if self._thread.is_alive():
            raise TimeoutError(f"the engine's requests did not end within {timeout_seconds} s")

    # --- in the thread

    def _call(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed: all requests have ended
            self._loop.call_soon_threadsafe(function, *arguments)

    def _run(self) -> None:
        try:
            self._loop.run_until_complete(self._serve())
        finally:
            self._loop.close()

    async def _serve(self) -> None:
        async with httpx.AsyncClient(
            base_url=self._url,
            headers=self._headers,
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=LIMITS,
            trust_env=False,
        ) as self._client:
            watching = asyncio.create_task(self._watch(), name="watch the server")
            self._admit()
            await self._stopped.wait()
            watching.cancel()
            tasks = [one.task for one in self._running if one.task is not None]
            for request_id in tuple(self._lives):
                self._abort(request_id)
            await asyncio.gather(watching, *tasks, return_exceptions=True)
            self._deliver()

    def _add(self, request: ServerRequest) -> None:
        live = _Live(request, {}, num_completion_tokens=len(request.resumed))
        self._lives[request.request_id] = live
        for branch in request.branches:
            waiting = _Waiting(
                request_id=RequestId(f"{request.request_id} {branch.index}"),
                priority=request.priority,
                fairness_key=request.fairness_key,
                live=live,
                branch=branch,
            )
            live.left[branch.index] = waiting
            self._queue.add(waiting)
        if request.resumed_text or request.resumed:
            delta = TextDelta(text=request.resumed_text, token_ids=request.resumed)
            self._tell(live, delta, len(request.resumed))
        self._admit()

    def _admit(self) -> None:
        # Why not before the client is there: a request may be quicker than the thread.
        while (
            self._client is not None
            and self._queue.peek() is not None
            and len(self._running) < self._max_num_seqs
        ):
            waiting = self._queue.pop()
            self._note_admitted(waiting.live)
            self._running.add(waiting)
            waiting.task = asyncio.create_task(self._answer(waiting), name="answer")

    def _note_admitted(self, live: _Live) -> None:
        if live.admitted_at is None:
            live.admitted_at = time.monotonic()
            self._queue_seconds.observe(live.admitted_at - live.arrived_at)

    def _note_first_token(self, live: _Live) -> None:
        live.first_token_at = time.monotonic()
        assert live.admitted_at is not None, "the server was asked for it"
        self._prefill_seconds.observe(live.first_token_at - live.admitted_at)

    async def _answer(self, waiting: _Waiting) -> None:
        """Ask for one answer and tell it, to its end."""
        live, branch = waiting.live, waiting.branch
        try:
            if branch.echo and not live.request.resumed:
                self._tell(live, TextDelta(text=branch.echo, choice_index=branch.index), 0)
            end = await self._ask(waiting)
            self._end(waiting, end.reason or FinishReason.STOP, end.stop_string)
        except ReplicaLost as error:
            await self._lost(live, error)
        except XinferenceError as error:
            self._fail(live, error)
        except Exception as error:  # noqa: BLE001  # `_lost` logs it
            # Boundary: whatever a server of some version writes.
            await self._lost(live, error)
        finally:
            self._running.discard(waiting)
            self._admit()

    async def _ask(self, waiting: _Waiting) -> Piece:
        """Return the last piece; the text of all has been told then.

        Raises:
            XinferenceError: the server refuses or fails it.
            httpx.HTTPError, ValueError, KeyError, TypeError: the connection ended, or what came is
                not understood.
        """
        assert self._client is not None, "requests are added while it serves"
        branch = waiting.branch
        if branch.body is None:
            return Piece(reason=FinishReason.LENGTH)
        async with self._client.stream("POST", self._dialect.path, json=branch.body) as response:
            if response.status_code != 200:
                said = await response.aread()
                raise refusal(response.status_code, _json(said), model_name=self._model_name)
            end: Piece | None = None
            async for chunk in chunks(response):
                self._progress += 1
                error = chunk if chunk.get("object") == "error" else chunk.get("error")
                if error is not None:
                    code = error.get("code") if isinstance(error, dict) else None
                    status = code if isinstance(code, int) else 500
                    raise refusal(status, error, model_name=self._model_name)
                piece = self._dialect.read(chunk)
                await self._take(waiting, piece)
                if piece.reason is not None:
                    end = piece
            if end is None:
                raise ValueError("the answer broke off")
            return end

    async def _take(self, waiting: _Waiting, piece: Piece) -> None:
        """Tell the text of a piece, with the tokens that it is made of."""
        live, branch = waiting.live, waiting.branch
        num_new = len(piece.token_ids)
        if piece.num_generated is not None:
            num_new = piece.num_generated - waiting.num_generated
        waiting.num_generated += num_new
        live.num_completion_tokens += num_new
        if live.first_token_at is None and num_new:
            self._note_first_token(live)
        if piece.num_cached is not None and branch.index == 0:
            live.num_cached_tokens = piece.num_cached
        waiting.untold_ids += piece.token_ids
        text = piece.text
        if branch.adds_stop and piece.stop_string:
            text += piece.stop_string
        if not text and not piece.logprobs:
            return
        num_untold = waiting.num_generated - waiting.num_told
        waiting.num_told = waiting.num_generated
        token_ids, waiting.untold_ids = tuple(waiting.untold_ids), []
        if live.is_single and len(token_ids) != num_untold:
            # Why: whoever goes on from these tokens has to go on from this very text.
            token_ids = await asyncio.to_thread(self._retokenize, text)
        logprobs = tuple(
            replace(one, text_offset=one.text_offset + waiting.num_chars) for one in piece.logprobs
        )
        waiting.num_chars += len(text)
        delta = TextDelta(
            text=text, token_ids=token_ids, choice_index=branch.index, logprobs=logprobs
        )
        self._tell(live, delta, num_untold)

    async def _lost(self, live: _Live, error: Exception) -> None:
        """Fail a request whose connection broke; if the server has ended, leave it to `stop`.

        Why: this process ends then, and what it has not failed may go on at another replica.
        """
        deadline = self._loop.time() + END_SECONDS
        while not self._process.has_ended and self._loop.time() < deadline:  # noqa: ASYNC110  # a thread that ends sets no event
            await asyncio.sleep(0.05)
        if self._process.has_ended:
            return
        request_id = live.request.request_id
        logger.error("request %s got no answer of the server", request_id, exc_info=error)
        problem = f"{type(error).__name__}: {error}"
        self._fail(live, InternalError(where="the engine's server", problem=problem))

    async def _watch(self) -> None:
        """Read what the server counts, while it has work and once after."""
        read_at = -1
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            if self._running or self._progress != read_at:
                read_at = self._progress
                with contextlib.suppress(httpx.HTTPError, ValueError):
                    await self._read_page()

    async def _read_page(self) -> None:
        assert self._client is not None, "it is watched while it serves"
        answer = await self._client.get("/metrics", timeout=WATCH_SECONDS)
        if answer.status_code != 200:
            return
        counted = page_counters(answer.text, self._dialect)
        if counted != self._page:
            self._page = counted
            # It computes, even if no text comes of it: a long prompt, say.
            self._progress += bool(self._running)

    # --- the end of answers

    def _end(self, waiting: _Waiting, reason: FinishReason, stop_string: str | None = None) -> None:
        live = waiting.live
        if live.left.pop(waiting.branch.index, None) is None:
            return
        live.stop_string = stop_string
        if reason is not FinishReason.ABORT or not live.left:
            live.reason = reason
        if not live.is_single:
            delta = TextDelta(text="", choice_index=waiting.branch.index, reason=reason)
            self._tell(live, delta, 0)
        if not live.left:
            self._finish(
                live,
                Finished(reason=live.reason, usage=self._usage(live), stop_string=live.stop_string),
            )

    def _usage(self, live: _Live) -> Usage:
        return Usage(
            num_prompt_tokens=live.request.num_prompt_tokens,
            num_completion_tokens=live.num_completion_tokens,
            num_cached_tokens=min(live.num_cached_tokens, live.request.num_prompt_tokens),
        )

    def _abort(self, request_id: RequestId) -> None:
        live = self._lives.get(request_id)
        if live is None:
            return
        self._num_aborts += 1
        self._cancel(live)
        self._finish(live, Finished(reason=FinishReason.ABORT, usage=self._usage(live)))

    def _abort_answer(self, request_id: RequestId, index: int) -> None:
        live = self._lives.get(request_id)
        waiting = None if live is None else live.left.get(index)
        if live is None or waiting is None:
            return
        if live.is_single:
            self._abort(request_id)
            return
        self._num_aborts += 1
        self._drop(waiting)
        self._end(waiting, FinishReason.ABORT)

    def _fail(self, live: _Live, error: XinferenceError) -> None:
        if live.request.request_id in self._lives:
            self._cancel(live)
            self._finish(live, Failed(error=error))

    def _cancel(self, live: _Live) -> None:
        for waiting in live.left.values():
            self._drop(waiting)
        live.left.clear()

    def _drop(self, waiting: _Waiting) -> None:
        self._queue.remove(waiting.request_id)
        if waiting.task is not None and waiting.task is not asyncio.current_task(self._loop):
            waiting.task.cancel()

    def _finish(self, live: _Live, end: Finished | Failed) -> None:
        request_id = live.request.request_id
        end = replace(end, phases=live.phases())
        if live.first_token_at is not None:
            self._decode_seconds.observe(time.monotonic() - live.first_token_at)
        del self._lives[request_id]
        self._progress += 1
        self._post([(request_id, one) for one in self._read(request_id, end, 0)])

    # --- telling

    def _tell(self, live: _Live, event: GenerationEvent, num_tokens: int) -> None:
        request_id = live.request.request_id
        if request_id in self._lives:
            self._post([(request_id, one) for one in self._read(request_id, event, num_tokens)])

    def _post(self, events: list[Event]) -> None:
        if not self._events:
            self._loop.call_soon(self._deliver)
        self._events += events

    def _deliver(self) -> None:
        events, self._events = self._events, []
        ended = [request_id for request_id, event in events if isinstance(event, Finished | Failed)]
        with self._lock:
            # Why before the sink: who hears of an end may use the id again at once.
            for request_id in ended:
                self._num_live.pop(request_id, None)
            self._end_rate.note(len(ended), now=time.monotonic())
        if events:
            self._sink(events)


def page_counters(page: str, dialect: Dialect) -> dict[str, float]:
    """Return what a page in Prometheus' text form counts, by our names."""
    counted: dict[str, float] = {}
    for line in page.splitlines():
        if not line.startswith(dialect.metrics_prefix):
            continue
        name, _, value = line.rpartition(" ")
        ours = dialect.counters.get(name.partition("{")[0])
        if ours is not None:
            with contextlib.suppress(ValueError):
                counted[ours] = counted.get(ours, 0.0) + float(value)
    return counted


def _json(said: bytes) -> Any:
    try:
        return json.loads(said)
    except ValueError:
        return said.decode(errors="replace")
