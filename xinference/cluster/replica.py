# SPDX-License-Identifier: Apache-2.0
"""The process of one replica: `python -m xinference.cluster.replica`.

In: one line of JSON on stdin, a `Bootstrap`; then LOAD and requests over the data plane. Out: one
line of JSON on stdout, {"address", "pid"}, as soon as it listens, before torch is imported; logs on
stderr. It ends when it is told to stop, on SIGTERM, when its engine dies, and when its
lifeline does: then all that could want it is gone.

Its threads: the event loop, which only carries; the engine's, inside `xinference.models`; one
that imports, loads and then turns prompts into tokens; and those that do so with long prompts and
with grammars, which take seconds and would keep the others waiting. It knows no actors and no
cluster key.
"""

import asyncio
import contextlib
import faulthandler
import gc
import importlib.metadata
import json
import logging
import os
import signal
import socket
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, Self

import uvloop

from xinference.errors import (
    InternalError,
    InvalidSetting,
    ModelOverloaded,
    RequestAborted,
    XinferenceError,
)
from xinference.identifiers import InstanceId, ModelUid, RequestId, model_uid
from xinference.protocol.deployment import ReplicaSpec, ReplicaState
from xinference.protocol.generation import (
    Accepted,
    ChatPrompt,
    Failed,
    Finished,
    GenerationRequest,
    TextPrompt,
)
from xinference.protocol.logs import set_up_logging
from xinference.protocol.vectors import (
    AnswerEvent,
    EmbeddingRequest,
    ModelRequest,
    RerankRequest,
)
from xinference.settings import Settings
from xinference.tracing import open_tracer

from .dataplane.address import TcpAddress, UnixAddress, listening_socket, parse_address
from .dataplane.server import DataPlaneServer
from .dataplane.service import Deliver, OnProgress, ReplicaReport, ReplicaService, ServiceEvent
from .dataplane.tls import new_server_tls
from .log_rotation import keep_small
from .request_counters import RequestCounters
from .request_trace import RequestTracer, Traced

if TYPE_CHECKING:
    from xinference.models.base import Model

logger = logging.getLogger(__name__)

EXIT_ENGINE_DIED = 70
EXIT_BAD_START = 78
BOOTSTRAP_SECONDS = 30.0
STOP_SECONDS = 2.0
"""How long a step that is under way may take to end when the process is to end."""
WATCH_SECONDS = 0.5
MAX_PREPARING = 256
"""Requests whose prompts are not tokens yet."""
MAX_PREPARING_CHARS = 64 * 1024 * 1024
LONG_PROMPT_CHARS = 64 * 1024
"""From here on a prompt becomes tokens in the thread for long ones."""
GRAMMAR_THREADS = 2
RETRY_AFTER_SECONDS = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Bootstrap:
    """What whoever starts the process writes to its stdin."""

    instance: InstanceId
    key: bytes = field(repr=False)
    """Of this instance, by `instance_key`."""
    listen: str
    """unix:<path>, or tcp:host:first-last, or tls:host:first-last."""
    model_uid: ModelUid
    lifeline: int | None = None
    """A file descriptor at whose end the process ends; None: its stdin."""
    log_path: str | None = None
    """The file that its stderr goes to, which it keeps small; None: that is somebody else's."""
    log_level: str = "INFO"
    log_format: str = "text"

    def to_line(self) -> bytes:
        """Return it as the line that `from_line` reads."""
        named = {
            "instance": self.instance,
            "key": self.key.hex(),
            "listen": self.listen,
            "model_uid": self.model_uid,
            "lifeline": self.lifeline,
            "log_path": self.log_path,
            "log_level": self.log_level,
            "log_format": self.log_format,
        }
        return json.dumps(named).encode() + b"\n"

    @classmethod
    def from_line(cls, line: bytes) -> Self:
        """Read a line of JSON.

        Raises:
            InvalidSetting: it is not one, or lacks a field. Its message does not show the key.
        """
        try:
            named = json.loads(line)
            return cls(
                instance=InstanceId(named["instance"]),
                key=bytes.fromhex(named["key"]),
                listen=str(named["listen"]),
                model_uid=model_uid(named["model_uid"]),
                lifeline=None if named.get("lifeline") is None else int(named["lifeline"]),
                log_path=named.get("log_path"),
                log_level=str(named.get("log_level", "INFO")),
                log_format=str(named.get("log_format", "text")),
            )
        except (ValueError, KeyError, TypeError, XinferenceError) as error:
            raise InvalidSetting(
                name="stdin",
                value=f"{len(line)} bytes",
                expected="one line of JSON with instance, key (hex), listen and model_uid "
                f"({type(error).__name__})",
            ) from error


class ProcessService(ReplicaService, Protocol):
    """A replica that is a process's only purpose."""

    async def wait_ended(self) -> int:
        """Return the exit code once the process is to end."""
        ...

    async def aclose(self, timeout_seconds: float) -> None:
        """End all requests with their last events and the engine with them."""
        ...


@dataclass(eq=False, slots=True)
class _Record:
    """A submitted request until its last event.

    `early` holds events that came before the thread that submitted it had told of its success;
    None once it has been told.
    """

    num_chars: int
    submitted_at: float
    traced: Traced | None = None
    future: "Future[Accepted] | None" = None
    early: list[ServiceEvent] | None = field(default_factory=list)
    is_aborted: bool = False


class Replica:
    """A `ProcessService` around a loaded model. Its methods belong to the event loop's thread.

    Invariant: every record gets exactly one Finished or Failed: by the engine if it was submitted
    there, else by `_on_submitted`.
    """

    def __init__(self, model: ModelUid, loop: asyncio.AbstractEventLoop) -> None:
        self._model_uid = model
        self._loop = loop
        self._state = ReplicaState.STARTING
        self._model: Model | None = None
        self._deliver: Deliver = _nobody_listens
        self._request_limits: int | None = None
        self._records: dict[RequestId, _Record] = {}
        self._num_preparing = 0
        self._num_preparing_chars = 0
        self._worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare")
        self._long_worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="prepare-long")
        self._grammar_worker = ThreadPoolExecutor(
            max_workers=GRAMMAR_THREADS, thread_name_prefix="prepare-grammar"
        )
        self._request_counters = RequestCounters()
        self._tracer: RequestTracer | None = None
        self._ended: asyncio.Future[int] = loop.create_future()
        self._watching: asyncio.Task[None] | None = None

    @property
    def model(self) -> ModelUid:
        """The model it is a copy of."""
        return self._model_uid

    @property
    def state(self) -> ReplicaState:
        """STARTING, LOADING, READY or FAILED; STOPPING once it is drained or ends."""
        return self._state

    def counters(self) -> dict[str, float]:
        """Return what engine and replica have counted; empty before it is loaded."""
        if self._model is None:
            return {}
        return {**self._model.counters(), **self._request_counters.counters()}

    def start(self, deliver: Deliver) -> None:
        """Take the function that every event goes to."""
        self._deliver = deliver

    async def load(self, spec: ReplicaSpec, on_progress: OnProgress) -> ReplicaReport:
        """Import what the model needs and load it, in a thread.

        Raises:
            XinferenceError: it does not load; the state is FAILED.
        """
        self._state = ReplicaState.LOADING
        self._request_limits = spec.request_limits

        def tell(progress: float, stage: str, info: str) -> None:
            self._post(on_progress, progress, stage, info)

        def load_in_thread() -> "Model":
            tracer = open_tracer("replica")
            if tracer is not None:
                self._tracer = RequestTracer(
                    tracer=tracer, replica=spec.replica, instance=spec.instance
                )
            tell(0.02, "loading", "importing what the model needs")
            completed = with_process_defaults(spec, os.environ)
            with _quick_imports(without_scipy=spec.model_type == "LLM"):
                # Why here: the socket must answer while these imports take their seconds.
                from xinference.models.loading import load_model

                return load_model(completed, on_progress=tell)

        # Why a thread that ends: its OpenMP team ends with it. Two teams are more threads than
        # cores; then the runtime no longer spins at barriers, and a step takes half as long again.
        loader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="load")
        try:
            model = await self._loop.run_in_executor(loader, load_in_thread)
        except BaseException:
            self._state = ReplicaState.FAILED
            raise
        finally:
            loader.shutdown(wait=False)
        model.start(self._on_step_in_engine_thread)
        self._model = model
        self._watching = asyncio.create_task(self._watch(model), name="watch the engine")
        if self._state is ReplicaState.LOADING:  # and not drained meanwhile
            self._state = ReplicaState.READY
        return ReplicaReport(
            context_length=model.context_length,
            max_num_seqs=model.max_num_seqs,
            config=dict(model.description()),
            virtual_env_packages=None if spec.virtual_env is None else own_packages(),
        )

    def submit(self, request: ModelRequest) -> None:
        """Turn the prompt into tokens in another thread, and enqueue it from there.

        Raises:
            ModelOverloaded: too many prompts wait for that, or the launch's limit is reached.
        """
        model = self._model
        assert model is not None, "the server submits to a READY replica only"
        num_chars = _num_chars(request)
        if self._request_limits is not None and len(self._records) >= self._request_limits:
            raise ModelOverloaded(
                model=self._model_uid,
                num_waiting=len(self._records),
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        if (
            self._num_preparing >= MAX_PREPARING
            or self._num_preparing_chars + num_chars > MAX_PREPARING_CHARS
        ):
            raise ModelOverloaded(
                model=self._model_uid,
                num_waiting=self._num_preparing,
                retry_after_seconds=RETRY_AFTER_SECONDS,
            )
        record = _Record(num_chars, time.monotonic(), Traced.of(request))
        self._records[request.request_id] = record
        self._num_preparing += 1
        self._num_preparing_chars += num_chars
        worker = self._worker if num_chars < LONG_PROMPT_CHARS else self._long_worker
        if isinstance(request, GenerationRequest) and request.sampling.grammar is not None:
            worker = self._grammar_worker
        record.future = worker.submit(model.submit, request)
        record.future.add_done_callback(
            lambda future: self._post(self._on_submitted, request.request_id, future)
        )

    def abort(self, request_id: RequestId) -> None:
        """End a submitted request within one step, or before it gets to the engine."""
        record = self._records.get(request_id)
        if record is None:
            return
        record.is_aborted = True
        if record.early is None:
            assert self._model is not None, "it accepted this request"
            self._model.abort(request_id)
        elif record.future is not None:
            record.future.cancel()  # if it has begun, `_on_submitted` sees to it

    def drain(self) -> None:
        """Take no new requests."""
        if self._state is not ReplicaState.FAILED:
            self._state = ReplicaState.STOPPING

    def stop(self) -> None:
        """End the process soon, with exit code 0."""
        self._end(0)

    async def wait_ended(self) -> int:
        """Return the exit code once the process is to end."""
        return await asyncio.shield(self._ended)

    async def aclose(self, timeout_seconds: float) -> None:
        """End all requests with their last events and the engine with them."""
        self.drain()
        if self._watching is not None:
            self._watching.cancel()
        for request_id in tuple(self._records):
            self.abort(request_id)
        if self._model is not None:
            stopping = asyncio.to_thread(self._model.stop, timeout_seconds)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping, timeout_seconds + 1.0)
        for worker in (self._worker, self._long_worker, self._grammar_worker):
            worker.shutdown(wait=False, cancel_futures=True)
        # Invariant: what the engine's thread posted is ahead of this in the loop's queue.
        await asyncio.sleep(0)
        if self._tracer is not None:
            await asyncio.to_thread(self._tracer.tracer.close, timeout_seconds)

    # --- from the other threads

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        """Call a function in the event loop's thread. Any thread may call this."""
        with contextlib.suppress(RuntimeError):  # the loop is closed: the process is ending
            self._loop.call_soon_threadsafe(function, *arguments)

    def _on_step_in_engine_thread(self, events: Sequence[tuple[RequestId, AnswerEvent]]) -> None:
        self._post(self._on_step, events)

    def _on_step(self, events: Sequence[tuple[RequestId, AnswerEvent]]) -> None:
        """Pass on the events of one step, but those of requests that are not yet told of."""
        told: list[tuple[RequestId, ServiceEvent]] = []
        for request_id, event in events:
            record = self._records.get(request_id)
            if record is None:
                logger.error("an event for request %s, which has ended", request_id)
                continue
            if record.early is not None:
                record.early.append(event)
                continue
            if isinstance(event, Finished | Failed):
                self._forget(request_id, event)
            told.append((request_id, event))
        if told:
            self._deliver(told)

    def _on_submitted(self, request_id: RequestId, future: "Future[Accepted]") -> None:
        record = self._records[request_id]
        self._num_preparing -= 1
        self._num_preparing_chars -= record.num_chars
        error = RequestAborted(request_id=request_id) if future.cancelled() else future.exception()
        if error is not None:
            failed = Failed(error=_refusal(error, request_id))
            self._forget(request_id, failed)
            self._deliver([(request_id, failed)])
            return
        early, record.early = record.early or [], None
        self._deliver([(request_id, future.result())])
        self._on_step([(request_id, event) for event in early])  # type: ignore[misc]  # from a step
        if record.is_aborted:
            self.abort(request_id)

    def _forget(self, request_id: RequestId, end: Finished | Failed) -> None:
        record = self._records.pop(request_id)
        self._request_counters.note_end(end, submitted_at=record.submitted_at, now=time.monotonic())
        if record.traced is not None and self._tracer is not None:
            self._tracer.tell(record.traced, end, submitted_at=record.submitted_at)

    # --- the end

    async def _watch(self, model: "Model") -> None:
        """End the process when the engine has died. Its requests were failed by then."""
        while model.is_alive:  # noqa: ASYNC110  # a thread that dies sets no event
            await asyncio.sleep(WATCH_SECONDS)
        logger.critical("the engine of model %s died; this process ends", self._model_uid)
        self._state = ReplicaState.FAILED
        self._end(EXIT_ENGINE_DIED)

    def _end(self, exit_code: int) -> None:
        if not self._ended.done():
            self._ended.set_result(exit_code)


def with_process_defaults(spec: ReplicaSpec, environ: Mapping[str, str]) -> ReplicaSpec:
    """Return the specification with the settings of this process where its launch is silent.

    Raises:
        InvalidSetting: a variable has a malformed value.
    """
    settings, _ = Settings.from_environ(environ)
    options = spec.encoder_options.completed(
        batch_size=settings.batch_size, batch_interval=settings.batch_interval_seconds
    )
    return replace(spec, encoder_options=options)


@contextlib.contextmanager
def _quick_imports(*, without_scipy: bool) -> Iterator[None]:
    """Spare the imports and the load of a model what it will not need.

    Args:
        without_scipy: as if it were not installed; `sentence_transformers` needs it.

    Measured on the imports, of 3.5 s and 369 MB: without collections, which find nothing there,
    0.65 s less; without scipy, of which `transformers` wants losses for object detection, 0.2 s
    and 36 MB. What is there in the end stays: collections need not look at it ever again.
    """
    gc.disable()
    hides_scipy = without_scipy and "scipy" not in sys.modules
    if hides_scipy:
        sys.modules["scipy"] = None  # type: ignore[assignment]  # "not installed", to importers
    try:
        yield
    finally:
        if hides_scipy:
            del sys.modules["scipy"]
        gc.freeze()
        gc.enable()


def own_packages() -> dict[str, str]:
    """Return the versions of what is installed in this interpreter's own directory, by name."""
    found = importlib.metadata.distributions(path=[sysconfig.get_path("purelib")])
    return {str(one.metadata["Name"]): one.version for one in found}


def _nobody_listens(events: Sequence[tuple[RequestId, ServiceEvent]]) -> None:
    raise AssertionError(f"{len(events)} events before start()")


def _refusal(error: BaseException, request_id: RequestId) -> XinferenceError:
    if isinstance(error, XinferenceError):
        return error
    logger.error("request %s could not be submitted", request_id, exc_info=error)
    return InternalError(where="the replica", problem=f"{type(error).__name__}: {error}")


def _num_chars(request: ModelRequest) -> int:
    match request:
        case EmbeddingRequest(inputs=inputs):
            return sum(map(len, inputs))
        case RerankRequest(query=query, documents=documents):
            return len(query) + sum(map(len, documents))
    prompt, grammar = request.prompt, request.sampling.grammar
    of_grammar = 0 if grammar is None else len(grammar.text)
    if isinstance(prompt, ChatPrompt):
        return of_grammar + sum(
            len(message.content or "") + sum(len(call.arguments) for call in message.tool_calls)
            for message in prompt.messages
        )
    return of_grammar + sum(
        len(one.text if isinstance(one, TextPrompt) else one.token_ids)
        for one in (prompt, *request.more_prompts)
    )


async def serve(service: ProcessService, bootstrap: Bootstrap, parent: asyncio.StreamReader) -> int:
    """Listen, say so on stdout, and serve until the end; return the exit code.

    Args:
        service: not yet started.
        bootstrap: whom to be and where to listen.
        parent: ends when this process is to end with it.

    Raises:
        InvalidSetting, InsufficientResources, OSError: it cannot listen there.
    """
    loop = asyncio.get_running_loop()
    listener, address = listening_socket(bootstrap.listen)
    try:
        where = parse_address(address)
        is_encrypted = isinstance(where, TcpAddress) and where.is_encrypted
        server = DataPlaneServer(
            service,
            instance=bootstrap.instance,
            key=bootstrap.key,
            tls=new_server_tls() if is_encrypted else None,
        )
        await server.start(listener)
        loop.add_signal_handler(signal.SIGTERM, service.stop)
        # Why: Ctrl-C in a terminal reaches every process of it; who started this one decides.
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        print(json.dumps({"address": address, "pid": os.getpid()}), flush=True)  # noqa: T201  # the protocol of this process
        # Why: who reads stdout may go before this process does, and writing would then fail.
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        ended = asyncio.create_task(service.wait_ended(), name="wait for the end")
        orphaned = asyncio.create_task(parent.read(), name="wait for the end of stdin")
        tasks = [ended, orphaned]
        if bootstrap.log_path is not None:
            keeping = keep_small(Path(bootstrap.log_path))
            tasks.append(asyncio.create_task(keeping, name="keep the log small"))
        await asyncio.wait({ended, orphaned}, return_when=asyncio.FIRST_COMPLETED)
        exit_code = ended.result() if ended.done() else 0
        logger.info("model %s: ending with exit code %d", bootstrap.model_uid, exit_code)
        for task in tasks:
            task.cancel()
        # Why first: a request that is aborted is over, one that is given up may go on elsewhere.
        server.give_up()
        await service.aclose(STOP_SECONDS)
        await server.close()
        return exit_code
    finally:
        _forget_socket(listener, address)


def _forget_socket(listener: socket.socket, address: str) -> None:
    listener.close()
    where = parse_address(address)
    if isinstance(where, UnixAddress):
        with contextlib.suppress(OSError):
            where.path.unlink()


MakeService = Callable[[ModelUid, asyncio.AbstractEventLoop], ProcessService]


async def _main(make_service: MakeService) -> int:
    loop = asyncio.get_running_loop()
    parent = asyncio.StreamReader()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), sys.stdin)
    async with asyncio.timeout(BOOTSTRAP_SECONDS):
        bootstrap = Bootstrap.from_line(await parent.readline())
    _log_as(level=bootstrap.log_level, log_format=bootstrap.log_format)
    if bootstrap.lifeline is not None:
        # Why not stdin: a worker may be replaced by another one, and this process goes on.
        parent = asyncio.StreamReader()
        lifeline = os.fdopen(bootstrap.lifeline, "rb", buffering=0)
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(parent), lifeline)
    return await serve(make_service(bootstrap.model_uid, loop), bootstrap, parent)


def _log_as(*, level: str, log_format: str) -> None:
    handlers = (logging.StreamHandler(sys.stderr),)
    set_up_logging(handlers, role="replica", level=level, log_format=log_format)


def main(make_service: MakeService = Replica) -> int:
    """Run the process; return its exit code."""
    _log_as(level="INFO", log_format="text")
    # Who finds this process stuck sends SIGABRT; then the log says where its threads were.
    faulthandler.enable()
    try:
        return uvloop.run(_main(make_service))
    except (XinferenceError, OSError, TimeoutError) as error:
        logger.error("the replica cannot start: %s", error)
        return EXIT_BAD_START


if __name__ == "__main__":
    exit_code = main()
    logging.shutdown()
    # Why not sys.exit: it waits for threads, and one of them may be loading a model or stuck in
    # a step. Everything that needs an orderly end has had it.
    os._exit(exit_code)
