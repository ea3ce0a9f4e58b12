# SPDX-License-Identifier: Apache-2.0
"""A replica without a model: it counts. Passes `tests/contracts/test_data_plane.py`.

The answer to any prompt is " 1", " 2", " 3", … up to `max_tokens`, one token a step, for at most
`max_num_seqs` requests at once. In a test's own loop: `serve_fake_replica`. As a process that is
started just like the real one: `python -m tests.fakes.replica`.
"""

import asyncio
import contextlib
import ctypes
import os
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, replace
from pathlib import Path

from xinference.cluster.dataplane.address import listening_socket
from xinference.cluster.dataplane.server import DataPlaneServer
from xinference.cluster.dataplane.service import Deliver, OnProgress, ReplicaReport, ServiceEvent
from xinference.cluster.dataplane.tls import new_server_tls
from xinference.cluster.replica import main
from xinference.errors import (
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    LoadFailed,
    ModelOverloaded,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, RequestId
from xinference.protocol.deployment import ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    Accepted,
    ChatPrompt,
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Prompt,
    TextDelta,
    TextPrompt,
    Usage,
)
from xinference.protocol.vectors import ModelRequest

from .vectors import pieces_of, tokens_of

COUNTING = ModelUid("counting")
FAILS = "fake:fails"
"""As the path of a source: loading ends with LoadFailed."""
HANGS = "fake:hangs"
"""As the path of a source: loading never ends."""
DIES = "fake:dies"
"""As the path of a source: loading ends the process with exit code 1."""
DIES_IF = "fake:dies-if:"
"""Before the path of a file, as the path of a source: so it does while there is the file."""
SLOW = "fake:slow:"
"""Before a number of seconds, as the path of a source: loading takes so long."""
HAS_CHILD = "fake:has-a-child"
"""As the path of a source: a child process is its engine. When the child dies, so does it."""

POISON = "poison"
"""As a prompt: the replica crashes."""
BLOCKS = "block"
"""As a prompt: for `BLOCK_SECONDS`, no thread of the process runs Python."""
BLOCK_SECONDS = 15
STICKS = "stick"
"""As a prompt: the engine finishes no step any more, though the process answers."""
PREFILLS = "prefill"
"""As a prompt: no token comes for `PREFILL_SECONDS`, though chunk after chunk is done."""
PREFILL_SECONDS = 40.0
"""Longer than an engine may have work and finish no step."""
FORKS = "fork"
"""As a prompt: the process starts another one, in a session of its own, and forgets it."""


@dataclass(slots=True)
class _Live:
    request: GenerationRequest
    num_prompt_tokens: int
    max_tokens: int
    num_completion_tokens: int = 0


class FakeReplica:
    """Implements `ProcessService`. All of it runs on one event loop."""

    def __init__(
        self,
        model: ModelUid,
        loop: asyncio.AbstractEventLoop,
        *,
        context_length: int = 1_000_000,
        max_num_seqs: int = 16,
        max_queue_size: int = 64,
        step_seconds: float = 0.002,
        tokens_per_step: int = 1,
        vector_pieces: int | None = None,
    ) -> None:
        self._model = model
        self._loop = loop
        self._state = ReplicaState.STARTING
        self._context_length = context_length
        self._max_num_seqs = max_num_seqs
        self._max_queue_size = max_queue_size
        self._step_seconds = step_seconds
        self._tokens_per_step = tokens_per_step
        self._num_vector_events = None if vector_pieces is None else 1 + vector_pieces
        """Of an answer of vectors, the rest of which never comes."""
        self._live: dict[RequestId, _Live] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._ended: asyncio.Future[int] = loop.create_future()
        self._prefilled_at = 0.0
        self._num_steps = 0
        self._num_generated_tokens = 0
        self._num_aborts = 0
        self.specs: list[ReplicaSpec] = []
        """What it was told to load."""
        self.address = ""
        """Set by `serve_fake_replica`."""
        self.crash: Callable[[], None] = lambda: os._exit(1)
        """End as a process does that is killed: no goodbye. In a test's loop, a socket does."""
        self.is_hung = False
        """Whether it does nothing any more, though its connections stand."""
        self._deliver: Deliver = lambda events: None

    @property
    def model(self) -> ModelUid:
        return self._model

    @property
    def state(self) -> ReplicaState:
        return self._state

    def counters(self) -> dict[str, float]:
        if not self.specs:
            return {}
        num_running = min(len(self._live), self._max_num_seqs)
        return {
            "progress": float(self._num_steps),
            "num_steps": float(self._num_steps),
            "num_generated_tokens": float(self._num_generated_tokens),
            "num_aborts": float(self._num_aborts),
            "num_running": float(num_running),
            "num_waiting": float(len(self._live) - num_running),
            "num_blocks_used": float(num_running),
            "num_blocks": float(self._max_num_seqs),
        }

    def start(self, deliver: Deliver) -> None:
        self._deliver = deliver

    async def load(self, spec: ReplicaSpec, on_progress: OnProgress) -> ReplicaReport:
        self.specs.append(spec)
        self._state = ReplicaState.LOADING
        on_progress(0.5, "loading", "counting to one")
        await asyncio.sleep(0)
        match spec.source.path:
            case path if path == FAILS:
                self._state = ReplicaState.FAILED
                raise LoadFailed(model=self._model, problem="it was told to fail")
            case path if path == HANGS:
                await self._loop.create_future()
            case str(path) if _is_deadly(path):
                os._exit(1)
            case str(path) if path.startswith(SLOW):
                await asyncio.sleep(float(path.removeprefix(SLOW)))
            case path if path == HAS_CHILD:
                child = _start_sleeper()
                # It outlives neither: whoever kills one of them ends both.
                threading.Thread(target=lambda: os._exit(child.wait() or 1), daemon=True).start()
        self._state = ReplicaState.READY
        return ReplicaReport(
            context_length=self._context_length, max_num_seqs=self._max_num_seqs, config={}
        )

    def submit(self, request: ModelRequest) -> None:
        if not isinstance(request, GenerationRequest):
            num_tokens = tokens_of(request)
            usage = Usage(num_prompt_tokens=num_tokens, num_completion_tokens=0)
            events = (
                Accepted(num_prompt_tokens=num_tokens),
                *pieces_of(request),
                Finished(reason=FinishReason.STOP, usage=usage),
            )
            told = [(request.request_id, one) for one in events[: self._num_vector_events]]
            self._loop.call_soon(self._deliver, told)
            return
        match request.prompt:
            case TextPrompt(text=text) if text == POISON:
                self._loop.call_soon(self.crash)
                return
            case TextPrompt(text=text) if text == BLOCKS:
                # What is called by way of PyDLL keeps the lock of the interpreter. Its caller has
                # been told by then that it is taken.
                self._loop.call_later(self._step_seconds, ctypes.PyDLL(None).sleep, BLOCK_SECONDS)
            case TextPrompt(text=text) if text == STICKS:
                self.is_hung = True
            case TextPrompt(text=text) if text == FORKS:
                _start_sleeper()
            case TextPrompt(text=text) if text == PREFILLS:
                self._prefilled_at = self._loop.time() + PREFILL_SECONDS
        try:
            live = self._validate(request)
        except XinferenceError as error:
            self._loop.call_soon(self._deliver, [(request.request_id, Failed(error=error))])
            return
        accepted = Accepted(num_prompt_tokens=live.num_prompt_tokens)
        if request.count_only:
            finished = Finished(reason=FinishReason.STOP, usage=_usage(live))
            told = [(request.request_id, accepted), (request.request_id, finished)]
            self._loop.call_soon(self._deliver, told)
            return
        self._live[request.request_id] = live
        events: list[tuple[RequestId, ServiceEvent]] = [(request.request_id, accepted)]
        if request.resume_token_ids:
            said = "".join(f" {number}" for number in request.resume_token_ids)
            delta = TextDelta(text=said, token_ids=request.resume_token_ids)
            events.append((request.request_id, delta))
            live.num_completion_tokens = len(request.resume_token_ids)
        if live.num_completion_tokens == live.max_tokens:
            del self._live[request.request_id]
            finished = Finished(reason=FinishReason.LENGTH, usage=_usage(live))
            events.append((request.request_id, finished))
        self._deliver(events)
        if self._timer is None:
            self._timer = self._loop.call_later(self._step_seconds, self._step)

    def abort(self, request_id: RequestId) -> None:
        live = self._live.pop(request_id, None)
        if live is not None:
            self._num_aborts += 1
            finished = Finished(reason=FinishReason.ABORT, usage=_usage(live))
            self._loop.call_soon(self._deliver, [(request_id, finished)])

    def drain(self) -> None:
        self._state = ReplicaState.STOPPING

    def stop(self) -> None:
        self._end(0)

    async def wait_ended(self) -> int:
        return await asyncio.shield(self._ended)

    async def aclose(self, timeout_seconds: float) -> None:
        self.drain()
        for request_id in tuple(self._live):
            self.abort(request_id)
        await asyncio.sleep(0)

    def fail_all(self) -> None:
        """End every live request as an engine does that has lost its mind."""
        error = InternalError(where="the fake", problem="it was told to fail")
        ids, self._live = list(self._live), {}
        self._deliver([(request_id, Failed(error=error)) for request_id in ids])

    def _validate(self, request: GenerationRequest) -> _Live:
        num_prompt_tokens = sum(map(_num_tokens, (request.prompt, *request.more_prompts)))
        max_tokens = request.sampling.max_tokens or self._context_length - num_prompt_tokens
        if num_prompt_tokens == 0:
            raise InvalidRequest(field="prompt", problem="must not be empty")
        if num_prompt_tokens + max_tokens > self._context_length or max_tokens < 1:
            raise ContextLengthExceeded(
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens,
                max_model_len=self._context_length,
            )
        if len(self._live) >= self._max_num_seqs + self._max_queue_size:
            raise ModelOverloaded(
                model=self._model, num_waiting=self._max_queue_size, retry_after_seconds=1
            )
        return _Live(request, num_prompt_tokens, max_tokens)

    def _step(self) -> None:
        self._timer = None
        if self.is_hung:
            return
        if not self._live:
            return
        self._num_steps += 1
        if self._loop.time() < self._prefilled_at:
            self._timer = self._loop.call_later(self._step_seconds, self._step)
            return
        events: list[tuple[RequestId, ServiceEvent]] = []
        for request_id, live in list(self._live.items())[: self._max_num_seqs]:
            n = live.request.num_choices
            for _ in range(self._tokens_per_step):
                live.num_completion_tokens += n
                self._num_generated_tokens += n
                number = live.num_completion_tokens // n
                for index in range(n):
                    is_last = n > 1 and number == live.max_tokens
                    delta = TextDelta(
                        text=f" {number}",
                        token_ids=(number,),
                        choice_index=index,
                        reason=FinishReason.LENGTH if is_last else None,
                    )
                    events.append((request_id, delta))
                if number == live.max_tokens:
                    finished = Finished(reason=FinishReason.LENGTH, usage=_usage(live))
                    events.append((request_id, finished))
                    del self._live[request_id]
                    break
        self._deliver(events)
        if self._live:
            self._timer = self._loop.call_later(self._step_seconds, self._step)

    def _end(self, exit_code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(exit_code)


def _is_deadly(path: str) -> bool:
    is_conditional = path.startswith(DIES_IF)
    return path == DIES or (is_conditional and Path(path.removeprefix(DIES_IF)).exists())


def _start_sleeper() -> "subprocess.Popen[bytes]":
    """Start a process in a session of its own that does nothing."""
    argv = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]
    return subprocess.Popen(argv, stdin=subprocess.DEVNULL, start_new_session=True)


def _usage(live: _Live) -> Usage:
    return Usage(
        num_prompt_tokens=live.num_prompt_tokens,
        num_completion_tokens=live.num_completion_tokens,
    )


def _num_tokens(prompt: Prompt) -> int:
    if isinstance(prompt, ChatPrompt):
        return sum(len((message.content or "").split()) + 1 for message in prompt.messages)
    return len(prompt.text.split()) if isinstance(prompt, TextPrompt) else len(prompt.token_ids)


@contextlib.asynccontextmanager
async def serve_fake_replica(
    listen: str,
    *,
    instance: InstanceId,
    key: bytes,
    model: ModelUid = COUNTING,
    spec: ReplicaSpec | None = None,
    silence_seconds: float = 60.0,
    handshake_seconds: float = 5.0,
    **options: float,
) -> AsyncIterator[FakeReplica]:
    """Run a fake replica in this loop; with a `spec` it is loaded already.

    Args:
        listen: "unix:<path>" or "tcp:host:first-last"; the fake's `address` is what came of it.
        options: of `FakeReplica`.
    """
    fake = FakeReplica(model, asyncio.get_running_loop(), **options)  # type: ignore[arg-type]
    listener, fake.address = listening_socket(listen)
    tls = new_server_tls() if listen.startswith("tls:") else None
    server = DataPlaneServer(
        fake,
        instance=instance,
        key=key,
        tls=tls,
        silence_seconds=silence_seconds,
        handshake_seconds=handshake_seconds,
    )
    await server.start(listener)

    def crash() -> None:
        fake.is_hung = True
        server.stop_listening()
        for peer in tuple(server._peers):
            peer.writer.transport.abort()

    fake.crash = crash
    try:
        if spec is not None:
            await fake.load(replace(spec, instance=instance), lambda *_: None)
        yield fake
    finally:
        await fake.aclose(1.0)
        await server.close()


if __name__ == "__main__":
    sys.exit(main(FakeReplica))
