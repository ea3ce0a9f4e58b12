# SPDX-License-Identifier: Apache-2.0
"""`FakeCluster`: a cluster without processes that keeps the contract of `Cluster`.

Models are ready as soon as they are launched and answer by saying the question back, one word
for a token. A test may slow it down, hold it, load it, overload it, or kill a replica under a
stream; everything that was asked of it is recorded.
"""

import asyncio
import difflib
import itertools
import json
import re
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any, Self

from xinference.cluster.placement import is_at, wishes_of
from xinference.errors import (
    CacheInUse,
    ContextLengthExceeded,
    DuplicateRequest,
    EnvironmentInUse,
    FamilyNotFound,
    InvalidRequest,
    LaunchCancelled,
    LoadFailed,
    ModelAlreadyExists,
    ModelNotFound,
    ModelNotReady,
    ModelOverloaded,
    ObjectNotFound,
    ReplicaLost,
    RequestAborted,
    UnsupportedVariant,
    XinferenceError,
)
from xinference.identifiers import (
    InstanceId,
    ModelUid,
    NodeId,
    ReplicaUid,
    RequestId,
    family_name,
    new_instance_id,
    new_model_uid,
)
from xinference.protocol.autostart import AutostartEntry, AutostartStatus
from xinference.protocol.deployment import (
    AbortOutcome,
    LaunchProgress,
    LaunchSpec,
    ModelDescription,
    ModelEvent,
    ModelState,
    ModelStatus,
    ReplicaPlacement,
    ReplicaProgress,
    ReplicaState,
    ReplicaStatus,
)
from xinference.protocol.downloads import (
    CachedModel,
    DownloadStage,
    DownloadStatus,
    KeptModels,
    Removed,
)
from xinference.protocol.environments import VirtualEnvironment, environment_of
from xinference.protocol.generation import (
    Accepted,
    ChatPrompt,
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    Prompt,
    TextDelta,
    TextPrompt,
    TokenCandidate,
    TokenLogprob,
    ToolCallStart,
    Usage,
)
from xinference.protocol.logs import (
    SUPERVISOR_NODE,
    LogBatch,
    LogLine,
    LogPosition,
    LogQuery,
    is_at_least,
)
from xinference.protocol.nodes import ClusterInfo, Device, GatewayRouting, NodeResources, NodeStatus
from xinference.protocol.vectors import VectorPiece, VectorRequest

from .vectors import pieces_of, tokens_of

NODE = NodeId("127.0.0.1:5001")
SUPERVISOR = "127.0.0.1:5000"
CONTEXT_LENGTH = 1024
MODEL_TYPES = ("LLM",)

GUIDE: dict[str, Any] = {
    "version": 2,
    "model_name": "xinference-guide",
    "model_lang": ["en"],
    "model_ability": ["chat", "generate"],
    "model_description": "Answers questions about this software.",
    "context_length": CONTEXT_LENGTH,
    "chat_template": "{{ messages }}",
    "stop": ["<|im_end|>"],
    "stop_token_ids": [2],
    "model_specs": [
        {
            "model_format": "pytorch",
            "model_size_in_billions": "0_01",
            "quantization": "none",
            "model_id": "xinference-guide",
        }
    ],
}

Words = Callable[[GenerationRequest], Iterable[str | Delta]]
"""What a model says to a request; a delta that is given goes out as it is."""


def question_of(request: GenerationRequest) -> str:
    """Return the last thing that was said to the model."""
    match request.prompt:
        case ChatPrompt(messages=messages):
            return messages[-1].content or ""
        case TextPrompt(text=text):
            return text
    return " ".join(map(str, request.prompt.token_ids))


def echo(request: GenerationRequest) -> Iterator[str | Delta]:
    """Say the question back, a word at a time, spaces kept."""
    return iter(re.findall(r"\S+\s*|\s+", f"You said: {question_of(request)}"))


def endless(request: GenerationRequest) -> Iterator[str | Delta]:
    """Count for ever."""
    return (f"{number} " for number in itertools.count())


class FakeStream:
    """An accepted request; see `GenerationStream`."""

    def __init__(
        self, cluster: "FakeCluster", model: "FakeModel", request: GenerationRequest, length: int
    ) -> None:
        self._cluster = cluster
        self._model = model
        self._request = request
        self._length = length
        self._words, self._stop_string = cluster.stopped_words(request)
        self._num_words = 0
        self._has_called = False
        self._num_chars = 0
        self._told: deque[Delta | Finished] = deque()
        self._error: XinferenceError | None = None
        self._is_over = False
        self._is_aborted = False
        self._stirred = asyncio.Event()

    @property
    def accepted(self) -> Accepted:
        return Accepted(num_prompt_tokens=self._length)

    def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        return self

    async def __anext__(self) -> Delta | Finished:
        if self._told:
            return self._told.popleft()
        if self._is_over:
            raise StopAsyncIteration
        if self._request.count_only:
            return self._finished(FinishReason.STOP)
        await self._wait_turn()
        if self._error is not None:
            self._end()
            raise self._error
        limit = self._request.sampling.max_tokens or CONTEXT_LENGTH - self._length
        word = next(self._words, None) if self._num_words < limit else None
        if self._is_aborted:
            return self._finished(FinishReason.ABORT)
        n = self._request.num_choices
        if word is None:
            is_cut = self._num_words >= limit
            end = FinishReason.TOOL_CALLS if self._has_called else FinishReason.STOP
            reason = FinishReason.LENGTH if is_cut else end
            ends = [TextDelta(text="", choice_index=index, reason=reason) for index in range(n)]
            self._told.extend(ends if n > 1 else [])
            self._told.append(self._finished(reason, None if is_cut else self._stop_string))
            return self._told.popleft()
        self._num_words += 1
        self._cluster.count_step()
        self._has_called |= isinstance(word, ToolCallStart)
        if not isinstance(word, str):
            self._told.extend(replace(word, choice_index=index) for index in range(n))
            return self._told.popleft()
        self._told.extend(
            TextDelta(
                text=word,
                token_ids=(self._num_words,),
                choice_index=index,
                logprobs=self._logprobs(word, index),
            )
            for index in range(n)
        )
        self._num_chars += len(word)
        return self._told.popleft()

    def _logprobs(self, word: str, index: int) -> tuple[TokenLogprob, ...]:
        """Say that each word was as likely as its answer's number says."""
        wanted = self._request.sampling.logprobs
        if wanted is None:
            return ()
        token, logprob = word.encode(), -1.0 - index
        top = tuple(
            TokenCandidate(token_id=rank, token=token + b"!" * rank, logprob=logprob - rank)
            for rank in range(wanted)
        )
        one = TokenLogprob(
            token_id=self._num_words,
            token=token,
            logprob=logprob,
            text_offset=self._num_chars,
            top=top,
        )
        return (one,)

    async def _wait_turn(self) -> None:
        """Wait as the cluster is told to; an abort or a loss interrupts."""
        if self._num_words % self._cluster.burst == 0:
            await asyncio.sleep(0)
        while not (self._error or self._is_aborted or self._cluster.may_step(self._num_words)):
            self._stirred.clear()
            await self._stirred.wait()

    def _finished(self, reason: FinishReason, stop_string: str | None = None) -> Finished:
        self._end()
        num_completion_tokens = self._num_words * self._request.sampling.num_made
        usage = Usage(num_prompt_tokens=self._length, num_completion_tokens=num_completion_tokens)
        return Finished(reason=reason, usage=usage, stop_string=stop_string)

    def _end(self) -> None:
        self._is_over = True
        self._model.live.pop(self._request.request_id, None)
        self._model.ended.add(self._request.request_id)

    async def aclose(self) -> None:
        if not self._is_over:
            self._cluster.aborted.append(self._request.request_id)
            self._end()
            self._cluster.stir()

    # --- what happens to it

    def abort(self) -> None:
        self._is_aborted = True
        self._stirred.set()

    def fail(self, error: XinferenceError) -> None:
        self._error = error
        self._stirred.set()

    def stir(self) -> None:
        self._stirred.set()


class QueueStream:
    """A stream of the events that somebody, such as a real model, puts into a queue."""

    def __init__(self, accepted: Accepted, events: "asyncio.Queue[GenerationEvent]") -> None:
        self.accepted = accepted
        self._events = events

    async def __aiter__(self) -> AsyncIterator[Delta | Finished]:
        while True:
            event = await self._events.get()
            assert not isinstance(event, Failed), event
            yield event
            if isinstance(event, Finished):
                return

    async def aclose(self) -> None:
        pass


class FakeVectorStream:
    """An accepted request for vectors or scores; see `VectorStream`."""

    def __init__(self, request: VectorRequest) -> None:
        self._request = request
        self.accepted = Accepted(num_prompt_tokens=tokens_of(request))

    async def __aiter__(self) -> AsyncIterator[VectorPiece | Finished]:
        for piece in pieces_of(self._request):
            yield piece
        num_tokens = self.accepted.num_prompt_tokens
        usage = Usage(num_prompt_tokens=num_tokens, num_completion_tokens=0)
        yield Finished(reason=FinishReason.STOP, usage=usage)

    async def aclose(self) -> None:
        pass


class FakeModel:
    """What is known of one model."""

    def __init__(self, description: ModelDescription, spec: LaunchSpec) -> None:
        self.description = description
        self.spec = spec
        self.state = ModelState.LOADING
        self.created_ts = int(time.time())
        self.instance: InstanceId = new_instance_id()
        self.num_restarts = 0
        self.error: XinferenceError | None = None
        self.settled = asyncio.Event()
        self.live: dict[RequestId, FakeStream] = {}
        self.replicas = list(range(spec.replica))
        self.ended: set[RequestId] = set()
        self.blocked_until: dict[RequestId, float] = {}
        self.story: list[ModelEvent] = []

    def tell(self, content: str, event_type: str = "INFO") -> None:
        event = ModelEvent(event_type=event_type, event_ts=int(time.time()), event_content=content)
        self.story = [*self.story, event][-100:]


def problem_of(error: XinferenceError | None) -> str:
    """Return what went wrong, without the sentence that a LoadFailed puts around it."""
    return error.problem if isinstance(error, LoadFailed) else str(error)


class FakeCluster:
    """Implements `Cluster`. The attributes below are a test's handles."""

    def __init__(self, *, words: Words = echo) -> None:
        self.words = words
        """What a model says to a request, a token at a time."""
        self.burst = 1
        """So many tokens come without a pause between them."""
        self.holds_launches = False
        """Launches stay LOADING until `finish_launch`."""
        self.launch_error: XinferenceError | None = None
        """How launches end that are not held."""
        self.holds_accept = False
        """Requests wait for ACCEPT until `stir` after it is False again."""
        self.num_words_allowed: int | None = None
        """Streams stop there until `allow` says otherwise."""
        self.queue_is_full = False
        self.failure: Exception | None = None
        self.more_counters: dict[str, float] = {}
        """Of every ready replica's engine."""
        """Raised by every method that a gateway calls."""

        self.launched: list[LaunchSpec] = []
        self.cached: dict[str, CachedModel] = {}
        self.log: list[LogLine] = []
        """Of models, those with a replica; of the hosts, the others."""
        self.silent: dict[NodeId, str] = {}
        """Hosts that do not say what they logged, and why."""
        self.num_log_queries = 0
        self.unanswered: tuple[NodeId, ...] = ()
        """Other workers, which do not say what they keep."""
        self.downloads: dict[str, DownloadStatus] = {}
        self.requests: list[GenerationRequest] = []
        self.computed: list[VectorRequest] = []
        self.aborted: list[RequestId] = []
        """Requests whose stream was closed before its end, or that ended waiting for ACCEPT."""
        self.num_steps = 0
        self.is_stopped = False

        self.environments: list[VirtualEnvironment] = []
        """Those there are; models that were launched with packages run in those of their name."""
        self._families: dict[str, dict[str, Any]] = {
            "xinference-guide": GUIDE | {"is_builtin": True}
        }
        self._models: dict[ModelUid, FakeModel] = {}
        self._autostart: dict[ModelUid, AutostartEntry] = {}
        self._changed = asyncio.Event()

    # --- a test's handles

    @classmethod
    async def running(cls, uid: str = "guide", **options: Any) -> Self:
        """Return a cluster that runs the guide model under `uid`."""
        cluster = cls(**options)
        spec = LaunchSpec(
            model_uid=ModelUid(uid), model_name="xinference-guide", model_engine="transformers"
        )
        await cluster.launch(spec, wait_ready=True)
        return cluster

    async def wait_until(self, condition: Callable[[], object]) -> None:
        """Wait until something that this cluster does makes `condition` true.

        Raises:
            TimeoutError: it did not within 10 s.
        """
        async with asyncio.timeout(10):
            while not condition():
                self._changed.clear()
                await self._changed.wait()

    def stir(self) -> None:
        """Let everyone who waits look again."""
        self._changed.set()
        for model in self._models.values():
            for stream in model.live.values():
                stream.stir()

    def allow(self, num_words: int | None) -> None:
        """Let streams go on to so many words; None: to their end."""
        self.num_words_allowed = num_words
        self.stir()

    def finish_launch(self, uid: str, error: XinferenceError | None = None) -> None:
        """End a held launch."""
        self._settle(self._models[ModelUid(uid)], error)

    def lose_replica(self, uid: str) -> None:
        """Kill a model's process under its streams; it is LOADING until `finish_launch`."""
        model = self._models[ModelUid(uid)]
        model.state, model.num_restarts = ModelState.LOADING, model.num_restarts + 1
        model.instance = new_instance_id()
        model.settled.clear()
        model.tell("its process was killed", "ERROR")
        for stream in list(model.live.values()):
            stream.fail(ReplicaLost(model=uid, problem="killed"))

    def live_requests(self, uid: str) -> list[RequestId]:
        """Return the ids of the requests that the model works on."""
        return list(self._models[ModelUid(uid)].live)

    def count_step(self) -> None:
        """Count a token of any stream."""
        self.num_steps += 1
        self._changed.set()

    def may_step(self, num_words: int) -> bool:
        """Return whether a stream that said so many words may go on."""
        return self.num_words_allowed is None or num_words < self.num_words_allowed

    def stopped_words(self, request: GenerationRequest) -> tuple[Iterator[str | Delta], str | None]:
        """Return what the model says, cut before the first stop string, and that string."""
        words = iter(self.words(request))
        if not request.sampling.stop:
            return words, None
        said = itertools.islice(words, CONTEXT_LENGTH)
        text = "".join([word for word in said if isinstance(word, str)])
        found = [(text.find(stop), stop) for stop in request.sampling.stop if stop in text]
        end, stop_string = min(found, default=(len(text), None))
        return iter(re.findall(r"\S+\s*|\s+", text[:end])), stop_string

    def keep(self, *models: CachedModel) -> None:
        """Have these in the cache of the one worker."""
        self.cached = {model.model_version: model for model in models}

    # --- Cluster

    async def cached_models(
        self, worker_ip: str | None, *, timeout_seconds: float = 10.0
    ) -> KeptModels:
        self._fail_if_told()
        self._check_worker(worker_ip)
        return KeptModels(models={NODE: list(self.cached.values())}, unanswered=self.unanswered)

    async def remove_cached(
        self, model_version: str, worker_ip: str | None, *, is_forced: bool
    ) -> Removed:
        self._check_worker(worker_ip)
        model = self.cached.get(model_version)
        if model is None:
            raise ObjectNotFound(kind="cached model", id=model_version)
        if model.used_by and not is_forced:
            raise CacheInUse(model_version=model_version, users=list(model.used_by))
        del self.cached[model_version]
        return Removed(
            model_version=model_version,
            freed_bytes=model.freed_bytes,
            unanswered=self.unanswered,
        )

    async def download(self, spec: LaunchSpec) -> str:
        self._check_worker(spec.worker_ip)
        family = self._family(spec.model_type, spec.model_name)
        if "model_src" not in family["model_specs"][0]:
            raise InvalidRequest(field="model_name", problem="needs no download")
        self.launched.append(spec)
        version = f"{spec.model_name}--1B--pytorch--none"
        self.downloads[version] = DownloadStatus(stage=DownloadStage.DOWNLOADING)
        return version

    async def download_status(self, model_version: str) -> dict[NodeId, DownloadStatus]:
        status = self.downloads.get(model_version)
        return {} if status is None else {NODE: status}

    async def cancel_download(self, model_version: str) -> None:
        status = self.downloads.get(model_version)
        if status is None or status.stage is not DownloadStage.DOWNLOADING:
            raise ObjectNotFound(kind="running download", id=model_version)
        self.downloads[model_version] = DownloadStatus(stage=DownloadStage.CANCELLED)

    @staticmethod
    def _check_worker(worker_ip: str | None) -> None:
        if not is_at(NODE, worker_ip):
            raise InvalidRequest(field="worker_ip", problem=f"no worker is at {worker_ip}")

    async def launch(self, spec: LaunchSpec, *, wait_ready: bool) -> ModelUid:
        self._fail_if_told()
        family = self._family(spec.model_type, spec.model_name)
        taken = {uid for uid, model in self._models.items() if model.state is not ModelState.ERROR}
        uid = spec.model_uid or new_model_uid(spec.model_name, taken=taken)
        if uid in taken:
            raise ModelAlreadyExists(name=uid)
        _check_places(wishes_of(spec))
        environment_of(
            model_name=spec.model_name,
            model_engine=spec.model_engine or "",
            family=None,
            is_wanted=spec.enable_virtual_env,
            packages=spec.virtual_env_packages,
            find_links=spec.virtual_env_find_links,
        )
        model = FakeModel(_description(uid, family, spec), spec)
        self.launched.append(spec)
        self._models[uid] = model
        model.tell("launched")
        if not self.holds_launches:
            self._settle(model, self.launch_error)
        self.stir()
        if wait_ready:
            await model.settled.wait()
            if model.error is not None:
                raise model.error
        return uid

    def _settle(self, model: FakeModel, error: XinferenceError | None) -> None:
        model.error = error
        model.state = ModelState.READY if error is None else ModelState.ERROR
        model.tell("ready" if error is None else str(error), "ERROR" if error else "INFO")
        model.settled.set()
        self.stir()

    async def terminate(self, model: ModelUid) -> None:
        gone = self._model(model)
        for stream in list(gone.live.values()):
            stream.abort()
        del self._models[model]
        gone.error = LaunchCancelled(model=model)
        gone.settled.set()
        self.stir()

    async def cancel_launch(self, model: ModelUid) -> None:
        if self._model(model).state is ModelState.READY:
            raise InvalidRequest(field="model_uid", problem="it is ready; terminate it instead")
        await self.terminate(model)

    async def models(self) -> list[ModelStatus]:
        self._fail_if_told()
        return [_status(self._models[uid]) for uid in sorted(self._models)]

    async def model(self, model: ModelUid) -> ModelStatus:
        return _status(self._model(model))

    async def launch_progress(self, model: ModelUid) -> LaunchProgress:
        self._fail_if_told()
        if model not in self._models:
            return LaunchProgress(progress=0.0, stage="pending")
        stages = {ModelState.READY: (1.0, "completed"), ModelState.ERROR: (0.8, "error")}
        progress, stage = stages.get(self._models[model].state, (0.8, "loading"))
        replicas = tuple(
            ReplicaProgress(
                replica=ReplicaUid(model, index),
                progress=progress,
                stage=stage,
                info="",
                download_files=(),
            )
            for index in self._models[model].replicas
            if stage != "error"
        )
        return LaunchProgress(progress=progress, stage=stage, replicas=replicas)

    async def events(self, model: ModelUid) -> list[ModelEvent]:
        return list(self._model(model).story)

    async def add_replicas(
        self, model: ModelUid, placements: Sequence[ReplicaPlacement]
    ) -> list[ReplicaStatus]:
        asked = self._model(model)
        if asked.state is not ModelState.READY:
            raise ModelNotReady(model=model, state="loading", retry_after_seconds=2)
        _check_places(placements)
        free = (index for index in itertools.count() if index not in asked.replicas)
        added = [next(free) for _ in placements]
        if self.launch_error is not None:
            raise self.launch_error
        asked.replicas = sorted([*asked.replicas, *added])
        return [one for one in _status(asked).replicas if one.replica.index in added]

    async def terminate_replica(self, model: ModelUid, index: int) -> int:
        asked = self._model(model)
        if index not in asked.replicas:
            raise InvalidRequest(field="replica_id", problem=f"there is no replica {index}")
        asked.replicas.remove(index)
        if not asked.replicas:
            await self.terminate(model)
        return len(asked.replicas)

    async def generate(self, model: ModelUid, request: GenerationRequest) -> FakeStream:
        asked = self._model(model)
        self.requests.append(request)
        self.stir()
        try:
            await self.wait_until(lambda: not self.holds_accept)
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            self.stir()
            raise
        if asked.state is ModelState.ERROR:
            raise LoadFailed(model=model, problem=problem_of(asked.error))
        if asked.state is not ModelState.READY:
            raise ModelNotReady(model=model, state="loading", retry_after_seconds=2)
        if self.queue_is_full:
            raise ModelOverloaded(model=model, num_waiting=1024, retry_after_seconds=7)
        if asked.blocked_until.get(request.request_id, 0.0) > time.monotonic():
            raise RequestAborted(request_id=request.request_id)
        if request.request_id in asked.live:
            raise DuplicateRequest(request_id=request.request_id)
        length = _prompt_length(request)
        if request.count_only:
            return FakeStream(self, asked, request, length)
        max_tokens = request.sampling.max_tokens or 1
        if length + max_tokens > asked.description.context_length:
            raise ContextLengthExceeded(
                num_prompt_tokens=length,
                max_tokens=max_tokens,
                max_model_len=asked.description.context_length,
            )
        stream = FakeStream(self, asked, request, length)
        asked.live[request.request_id] = stream
        self.stir()
        return stream

    async def compute(self, model: ModelUid, request: VectorRequest) -> "FakeVectorStream":
        asked = self._model(model)
        self.computed.append(request)
        self.stir()
        try:
            await self.wait_until(lambda: not self.holds_accept)
        except asyncio.CancelledError:
            self.aborted.append(request.request_id)
            self.stir()
            raise
        if asked.state is not ModelState.READY:
            raise ModelNotReady(model=model, state="loading", retry_after_seconds=2)
        if self.queue_is_full:
            raise ModelOverloaded(model=model, num_waiting=1024, retry_after_seconds=7)
        return FakeVectorStream(request)

    async def abort_request(
        self, model: ModelUid, request_id: RequestId, *, block_seconds: float
    ) -> AbortOutcome:
        asked = self._model(model)
        if block_seconds > 0:
            asked.blocked_until[request_id] = time.monotonic() + block_seconds
        if request_id in asked.live:
            asked.live[request_id].abort()
            return AbortOutcome.DONE
        return AbortOutcome.NO_OP if request_id in asked.ended else AbortOutcome.NOT_FOUND

    async def engine_stats(self) -> dict[ReplicaUid, dict[str, float]]:
        self._fail_if_told()
        return {
            ReplicaUid(uid, 0): {
                "num_steps": float(self.num_steps),
                "num_running": float(len(model.live)),
                **self.more_counters,
            }
            for uid, model in self._models.items()
            if model.state is ModelState.READY
        }

    def routing(self) -> GatewayRouting:
        ready = [model for model in self._models.values() if model.state is ModelState.READY]
        return GatewayRouting(
            num_ready_models=len(ready),
            num_retried=3,
            num_continued=2,
            num_ejected=1,
            num_ejections=4,
            routes_epoch=2,
            routes_number=5,
        )

    async def autostart(self) -> list[AutostartStatus]:
        return [AutostartStatus(entry=entry) for entry in self._autostart.values()]

    async def set_autostart(self, entry: AutostartEntry) -> None:
        self._autostart[entry.model_uid] = entry

    async def remove_autostart(self, model: ModelUid) -> None:
        if self._autostart.pop(model, None) is None:
            raise ObjectNotFound(kind="entry of the autostart list", id=model)

    async def info(self) -> ClusterInfo:
        self._fail_if_told()
        node = NodeResources(
            cpu_count=2,
            cpu_utilization=0.25,
            memory_total_bytes=8 * 2**30,
            memory_used_bytes=2 * 2**30,
            memory_available_bytes=6 * 2**30,
            devices=(
                Device(
                    index=0,
                    name="Fake",
                    total_bytes=80 * 2**30,
                    used_bytes=20 * 2**30,
                    utilization=0.5,
                ),
            ),
        )
        worker = NodeStatus(
            node=NODE, resources=node, seconds_since_report=1.0, num_replicas=len(self._models)
        )
        return ClusterInfo(
            supervisor_address=SUPERVISOR,
            supervisor_resources=node,
            uptime_seconds=42,
            workers=(worker,),
        )

    async def stop(self) -> None:
        self.is_stopped = True
        self.stir()

    async def registrations(self, model_type: str) -> list[dict[str, Any]]:
        self._fail_if_told()
        _check_type(model_type)
        return [self._families[name] for name in sorted(self._families)]

    async def registration(self, model_type: str, model_name: str) -> dict[str, Any]:
        return self._family(model_type, model_name)

    async def register(self, model_type: str, family: str, *, persist: bool) -> None:
        _check_type(model_type)
        try:
            given = json.loads(family)
            name = family_name(given["model_name"])
            specs = [spec["model_format"] for spec in given["model_specs"]]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InvalidRequest(field="model", problem=f"is not a family: {error!r}") from error
        if not specs:
            raise InvalidRequest(field="model", problem="has no model_specs")
        if name in self._families:
            raise ModelAlreadyExists(name=name)
        self._families[name] = given | {"is_builtin": False}

    async def unregister(self, model_type: str, model_name: str) -> None:
        if self._family(model_type, model_name)["is_builtin"]:
            raise InvalidRequest(field="model_name", problem="is built in")
        del self._families[model_name]

    async def engines(self, model_type: str, model_name: str) -> dict[str, Any]:
        specs = self._family(model_type, model_name)["model_specs"]
        usable = [
            {
                "model_name": model_name,
                "model_format": spec["model_format"],
                "model_size_in_billions": spec["model_size_in_billions"],
                "quantizations": [spec["quantization"]],
            }
            for spec in specs
        ]
        return {"transformers": usable, "vLLM": "not in this version"}

    async def logs(self, query: LogQuery) -> LogBatch:
        self._fail_if_told()
        self.num_log_queries += 1
        if query.node != SUPERVISOR_NODE and not is_at(NODE, query.node):
            raise InvalidRequest(field="node", problem=f"no worker is at {query.node}")
        wanted = None if query.model is None else ReplicaUid(query.model, query.replica or 0)
        ours = [line for line in self.log if line.replica == (wanted and str(wanted))]
        if wanted is not None and not ours and query.model not in self._models:
            raise ModelNotFound(model=str(query.model), running=sorted(self._models))
        (position,) = query.positions or (None,)
        first = 0 if position is None else position.offset
        lines = [line for line in ours[first:] if is_at_least(line, query.level)]
        if query.positions is None:
            lines = lines[max(0, len(lines) - query.num_lines) :]
        read = LogPosition(node=NODE, name="log", inode=1, offset=len(ours))
        return LogBatch(lines=tuple(lines), positions=(read,), silent=dict(self.silent))

    async def virtual_envs(self, worker_ip: str | None) -> list[VirtualEnvironment]:
        self._fail_if_told()
        _check_worker(worker_ip)
        return [replace(one, users=self._users_of(one)) for one in self.environments]

    async def remove_virtual_envs(
        self,
        model_name: str,
        *,
        model_engine: str | None,
        python_version: str | None,
        worker_ip: str | None,
    ) -> int:
        found = [
            one
            for one in await self.virtual_envs(worker_ip)
            if one.model_name == model_name
            and model_engine in (None, one.model_engine)
            and python_version in (None, one.python_version)
        ]
        users = [user for one in found for user in one.users]
        if users:
            raise EnvironmentInUse(model_name=model_name, users=users)
        paths = {one.path for one in found}
        self.environments = [one for one in self.environments if one.path not in paths]
        return len(found)

    def _users_of(self, environment: VirtualEnvironment) -> tuple[str, ...]:
        return tuple(
            f"{uid}-rep0"
            for uid, model in self._models.items()
            if model.spec.virtual_env_packages and model.spec.model_name == environment.model_name
        )

    def _fail_if_told(self) -> None:
        if self.failure is not None:
            raise self.failure

    def _model(self, uid: ModelUid) -> FakeModel:
        self._fail_if_told()
        if uid not in self._models:
            raise ModelNotFound(model=uid, running=sorted(self._models))
        return self._models[uid]

    def _family(self, model_type: str, name: str) -> dict[str, Any]:
        self._fail_if_told()
        _check_type(model_type)
        if name not in self._families:
            near = difflib.get_close_matches(name, self._families)
            raise FamilyNotFound(family=name, suggestions=near)
        return self._families[name]


def _check_places(placements: Sequence[ReplicaPlacement]) -> None:
    """There is one worker, and it has one GPU."""
    for one in placements:
        _check_worker(one.worker_ip)
        if any(index > 0 for index in one.gpu_idx or ()):
            raise InvalidRequest(field="gpu_idx", problem=f"there is no GPU {one.gpu_idx}")


def _check_worker(worker_ip: str | None) -> None:
    if worker_ip not in {None, NODE, NODE.partition(":")[0]}:
        raise InvalidRequest(field="worker_ip", problem=f"no worker is at {worker_ip}")


def _check_type(model_type: str) -> None:
    if model_type not in MODEL_TYPES:
        raise InvalidRequest(field="model_type", problem=f"must be one of {MODEL_TYPES}")


def _prompt_length(request: GenerationRequest) -> int:
    return sum(map(_length_of, (request.prompt, *request.more_prompts)))


def _length_of(prompt: Prompt) -> int:
    match prompt:
        case ChatPrompt(messages=messages):
            return sum(1 + len((message.content or "").split()) for message in messages)
        case TextPrompt(text=text):
            return len(text.split()) or 1
    return len(prompt.token_ids)


def _description(uid: ModelUid, family: dict[str, Any], spec: LaunchSpec) -> ModelDescription:
    name = family["model_name"]
    if (spec.model_engine or "transformers").lower() != "transformers":
        problem = f"engine {spec.model_engine} cannot run it"
        raise UnsupportedVariant(family=name, problem=problem, suggestions=["transformers"])
    wanted = (spec.model_format, spec.model_size_in_billions, spec.quantization)
    for variant in family["model_specs"]:
        has = (
            variant["model_format"],
            variant.get("model_size_in_billions", ""),
            variant.get("quantization", "none"),
        )
        if all(want in (None, have) for want, have in zip(wanted, has, strict=True)):
            break
    else:
        raise UnsupportedVariant(family=name, problem=f"has no {wanted}", suggestions=[])
    return ModelDescription(
        model_uid=uid,
        model_type=spec.model_type,
        model_name=name,
        model_engine="transformers",
        model_format=has[0],
        model_size_in_billions=str(has[1]),
        quantization=has[2],
        model_family=family.get("model_family", name),
        model_lang=tuple(family.get("model_lang", ())),
        model_ability=tuple(family.get("model_ability", ())),
        model_description=family.get("model_description", ""),
        model_hub="huggingface",
        revision=None,
        context_length=spec.engine_options.max_model_len
        or family.get("context_length", CONTEXT_LENGTH),
        replica=spec.replica,
        address="unix:/nowhere",
    )


def _status(model: FakeModel) -> ModelStatus:
    states = {ModelState.READY: ReplicaState.READY, ModelState.ERROR: ReplicaState.FAILED}
    uid = model.description.model_uid
    replicas = tuple(
        ReplicaStatus(
            replica=ReplicaUid(uid, index),
            state=states.get(model.state, ReplicaState.LOADING),
            node=NODE,
            address=model.description.address,
            instance=model.instance,
            created_ts=model.created_ts,
            num_restarts=model.num_restarts,
            error_message="" if model.error is None else str(model.error),
            gpu_idx=wishes_of(model.spec)[index].gpu_idx if index < model.spec.replica else None,
        )
        for index in model.replicas
    )
    return ModelStatus(
        model_uid=uid,
        description=replace(model.description, replica=len(replicas)),
        state=model.state,
        created_ts=model.created_ts,
        replicas=replicas,
    )
