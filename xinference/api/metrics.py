# SPDX-License-Identifier: Apache-2.0
"""What the gateway counts, and the page that `GET /metrics` gives to Prometheus.

The gateway's own numbers live in one registry per application. Everything about the cluster and
the engines is asked for when the page is, so that it is as fresh as the page; when the supervisor
does not answer, `xinference:supervisor_up` is 0 and the gateway's own numbers still come.
The names are those that Xinference's dashboards know, where it has one for the thing.

A label never takes a value that a caller made up: only models that took a request have one.
"""

import asyncio
import collections
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar, cast

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from xinference import __version__
from xinference.cluster.interface import Cluster
from xinference.errors import (
    CapacityError,
    ContextLengthExceeded,
    DeadlinePassed,
    InternalError,
    ModelOverloaded,
    RateLimitReached,
    ReplicaLost,
    RequestAborted,
    RequestCrashesModel,
    XinferenceError,
)
from xinference.identifiers import ModelUid, ReplicaUid
from xinference.protocol.deployment import ModelState, ModelStatus
from xinference.protocol.generation import (
    Accepted,
    Failed,
    Finished,
    ReasoningDelta,
    TextDelta,
    ToolCallStart,
    Usage,
)
from xinference.protocol.histograms import TOKEN_SECONDS
from xinference.protocol.nodes import ClusterInfo, GatewayRouting
from xinference.tracing import current_span

from .engine_metrics import engine_families
from .host_metrics import host_families
from .http_trace import note_outcome
from .inbox import AnswerEvent
from .keys.key import ApiKey

DURATION_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
FIRST_TOKEN_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
SCRAPE_SECONDS = 5.0

ABORT_CAUSES: Mapping[type[XinferenceError], str] = {
    DeadlinePassed: "deadline",
    InternalError: "failure",
    ModelOverloaded: "shed",
    RateLimitReached: "rate_limited",
    ReplicaLost: "replica_lost",
    RequestAborted: "abort_by_id",
    RequestCrashesModel: "crashes_model",
}
"""Why a request got no whole answer, by its error; other errors are the caller's."""
CLIENT_LEFT = "client_left"


Child = TypeVar("Child", Counter, Gauge, Histogram)


class Metrics:
    """The counters of one gateway process. Used from its event loop only."""

    def __init__(self, *, directory: Path | None = None) -> None:
        """Begin at 0.

        Args:
            directory: where the library keeps the numbers of all the gateway's processes.
        """
        self.registry = CollectorRegistry()
        self._directory = directory
        self._children: dict[tuple[object, tuple[object, ...]], object] = {}
        self._accepted: dict[tuple[ModelUid, str, str], _Accepted] = {}
        if directory is not None:
            _forget_dead(directory)
        model, streamed = ("model_uid",), ("model_uid", "stream")
        self.requests = Counter(
            "xinference:model_request", "Requests to models.", streamed, registry=self.registry
        )
        self.errors = Counter(
            "xinference:model_request_errors",
            "Requests to models that failed or were refused, by error code.",
            ("model_uid", "code"),
            registry=self.registry,
        )
        self.disconnects = Counter(
            "xinference:model_request_disconnects",
            "Requests whose client left before the answer ended.",
            model,
            registry=self.registry,
        )
        self.aborts = Counter(
            "xinference:model_request_aborts",
            "Requests that got no whole answer for a reason that was not their own.",
            ("model_uid", "cause"),
            registry=self.registry,
        )
        self.serving = Gauge(
            "xinference:model_serve_count",
            "Requests in flight.",
            model,
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.duration = Histogram(
            "xinference:model_request_duration_seconds",
            "From the request to the end of its answer.",
            model,
            buckets=DURATION_BUCKETS,
            registry=self.registry,
        )
        self.first_token = Histogram(
            "xinference:time_to_first_token_seconds",
            "From the request to its first text.",
            streamed,
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.token_time = Histogram(
            "xinference:time_per_output_token_seconds",
            "Of a streamed answer: from its first text to its last, by the tokens between.",
            model,
            buckets=TOKEN_SECONDS,
            registry=self.registry,
        )
        self.input_tokens = Counter(
            "xinference:input_tokens",
            "Prompt tokens of accepted requests.",
            model,
            registry=self.registry,
        )
        self.generate_tokens = Counter(
            "xinference:generate_tokens",
            "Tokens generated for accepted requests.",
            model,
            registry=self.registry,
        )
        self.key_requests = Counter(
            "xinference:api_key_requests",
            "Requests to models by API key; the status is ok, disconnected or an error's code.",
            ("api_key_name", "model_uid", "status"),
            registry=self.registry,
        )
        self.key_tokens = Counter(
            "xinference:api_key_tokens",
            "Tokens by API key; cached ones are of the prompt, reasoning ones of the completion.",
            ("api_key_name", "model_uid", "kind"),
            registry=self.registry,
        )
        self.http_requests = Counter(
            "xinference:http_requests",
            "Answered HTTP requests, by route and status.",
            ("method", "route", "status"),
            registry=self.registry,
        )

    def child(self, family: Child, *labels: object) -> Child:
        """Return the number of a family with these labels.

        Why not `family.labels` each time: a request asks for a dozen, and that costs as much as its
        JSON.
        """
        child = self._children.get((family, labels))
        if child is None:
            child = self._children[family, labels] = family.labels(*labels)
        return cast(Child, child)

    def accepted(self, model: ModelUid, stream: str, key_name: str) -> "_Accepted":
        """Return the numbers that a request to a model takes part in once it is accepted."""
        name = (model, stream, key_name)
        numbers = self._accepted.get(name)
        if numbers is None:
            numbers = self._accepted[name] = _Accepted(self, model, stream, key_name)
            for cause in (*ABORT_CAUSES.values(), CLIENT_LEFT):
                self.child(self.aborts, model, cause)
        return numbers

    def families(self) -> Iterable[Metric]:
        """Return the numbers of all the gateway's processes."""
        if self._directory is None:
            return self.registry.collect()
        all_of_them = MultiProcessCollector(CollectorRegistry(), path=str(self._directory))
        families: Iterable[Metric] = all_of_them.collect()
        return families

    def observe(
        self,
        model: ModelUid,
        *,
        stream: bool,
        key_name: str,
        on_usage: Callable[[Usage], None],
    ) -> "Observation":
        """Return what measures one request; enter it when the request starts.

        Args:
            key_name: of the caller's API key; empty without.
            on_usage: called once, at its end, for a request that was accepted.
        """
        return Observation(self, model, stream=stream, key_name=key_name, on_usage=on_usage)


class _Accepted:
    """Numbers of the accepted requests to a model, streamed or not, by one key.

    They begin at 0, all at once: of a series that begins at 1 Prometheus sees no increase, and no
    alert would be raised.
    """

    def __init__(self, metrics: Metrics, model: ModelUid, stream: str, key_name: str) -> None:
        self.requests = metrics.child(metrics.requests, model, stream)
        self.serving = metrics.child(metrics.serving, model)
        self.duration = metrics.child(metrics.duration, model)
        self.first_token = metrics.child(metrics.first_token, model, stream)
        self.input_tokens = metrics.child(metrics.input_tokens, model)
        self.generate_tokens = metrics.child(metrics.generate_tokens, model)
        self.answered = metrics.child(metrics.key_requests, key_name, model, "ok")


class Observation:
    """Measures one request, from entering to leaving it."""

    def __init__(
        self,
        metrics: Metrics,
        model: ModelUid,
        *,
        stream: bool,
        key_name: str,
        on_usage: Callable[[Usage], None],
    ) -> None:
        self._metrics = metrics
        self._model = model
        self._stream = str(stream).lower()
        self._key_name = key_name
        self._on_usage = on_usage
        self._started = 0.0
        self._accepted: _Accepted | None = None
        self._first_text: float | None = None
        self._last_text = 0.0
        self._num_prompt_tokens = 0
        self._num_delivered = 0
        self._num_thought = 0
        self._usage: Usage | None = None
        self._error: XinferenceError | None = None

    def __enter__(self) -> Self:
        self._started = time.perf_counter()
        return self

    def note(self, batch: Sequence[AnswerEvent]) -> None:
        """Look at events that are about to be written."""
        for event in batch:
            match event:
                case TextDelta(text=text, token_ids=token_ids):
                    self._num_delivered += len(token_ids)
                    self._note_text(text)
                case ReasoningDelta(text=text, token_ids=token_ids):
                    self._num_delivered += len(token_ids)
                    self._num_thought += len(token_ids)
                    self._note_text(text)
                case ToolCallStart(name=name):
                    self._note_text(name)
                case Accepted(num_prompt_tokens=num_prompt_tokens):
                    self._num_prompt_tokens = num_prompt_tokens
                    self._accepted = self._metrics.accepted(
                        self._model, self._stream, self._key_name
                    )
                    self._accepted.serving.inc()
                case Finished(usage=usage):
                    self._usage = usage
                case Failed(error=error):
                    self._error = error

    def _note_text(self, text: str) -> None:
        if not text:
            return
        self._last_text = time.perf_counter()
        if self._first_text is None:
            self._first_text = self._last_text
            if self._accepted is not None:
                self._accepted.first_token.observe(self._first_text - self._started)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, XinferenceError):
            self._error = error
        accepted = self._accepted
        if accepted is not None:
            accepted.requests.inc()
            accepted.serving.dec()
            accepted.duration.observe(time.perf_counter() - self._started)
            self._count_tokens(accepted)
        model, cause = self._model, None
        if accepted is None or self._error is not None or self._usage is None:
            model, cause = self._count_failure(error)
        else:
            accepted.answered.inc()
        span = current_span()
        if span is not None:
            note_outcome(span, model, error=self._error, cause=cause, usage=self._usage)

    def _count_failure(self, error: BaseException | None) -> tuple[ModelUid, str | None]:
        """Count a request that got no whole answer; return its model, and whose doing that was."""
        # Invariant: only a model that exists gets a label, whatever a caller named.
        is_known = self._accepted is not None or isinstance(
            error,
            CapacityError
            | ContextLengthExceeded
            | ReplicaLost
            | RequestAborted
            | RequestCrashesModel,
        )
        metrics, model = self._metrics, self._model if is_known else ModelUid("")
        if self._accepted is None:
            metrics.child(metrics.requests, model, self._stream).inc()
        code, cause = None, None
        if self._error is not None:
            code, cause = self._error.code, ABORT_CAUSES.get(type(self._error))
            metrics.child(metrics.errors, model, code).inc()
        elif self._usage is None:
            cause = CLIENT_LEFT
            metrics.child(metrics.disconnects, model).inc()
        if cause is not None:
            metrics.child(metrics.aborts, model, cause).inc()
        status = code or ("disconnected" if self._usage is None else "ok")
        metrics.child(metrics.key_requests, self._key_name, model, status).inc()
        return model, cause

    def _count_tokens(self, accepted: _Accepted) -> None:
        # Why not only ended answers: what was generated was used, whoever did not wait for the end.
        usage = self._usage or Usage(
            num_prompt_tokens=self._num_prompt_tokens,
            num_completion_tokens=self._num_delivered,
            num_reasoning_tokens=self._num_thought,
        )
        self._on_usage(usage)
        metrics, model = self._metrics, self._model
        if self._stream == "true" and self._first_text is not None:
            num_later = usage.num_completion_tokens - 1
            if num_later > 0:
                seconds = (self._last_text - self._first_text) / num_later
                metrics.child(metrics.token_time, model).observe(seconds)
        accepted.input_tokens.inc(usage.num_prompt_tokens)
        accepted.generate_tokens.inc(usage.num_completion_tokens)
        for kind, num_tokens in (
            ("prompt", usage.num_prompt_tokens),
            ("completion", usage.num_completion_tokens),
            ("cached", usage.num_cached_tokens),
            ("reasoning", usage.num_reasoning_tokens),
        ):
            if num_tokens:
                metrics.child(metrics.key_tokens, self._key_name, model, kind).inc(num_tokens)


async def metrics_page(metrics: Metrics, cluster: Cluster, keys: Sequence[ApiKey] = ()) -> bytes:
    """Return everything as Prometheus text."""
    families = [
        *_key_families(keys),
        *_cluster_families(*await _asked(cluster)),
        *_routing_families(cluster.routing()),
    ]
    page = CollectorRegistry()
    page.register(_Families([*metrics.families(), *families]))
    return generate_latest(page)


def _forget_dead(directory: Path) -> None:
    """Take the requests in flight of processes that have died out of the sum."""
    for path in directory.glob("gauge_live*_*.db"):
        pid = path.stem.rpartition("_")[2]
        if pid.isdecimal() and not _is_alive(int(pid)):
            mark_process_dead(int(pid), path=str(directory))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


class _Families(Collector):
    """Families that are at hand, without the library's second series per counter."""

    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = list(families)
        for family in self._families:
            family.samples = [
                sample for sample in family.samples if not sample.name.endswith("_created")
            ]

    def collect(self) -> Iterable[Metric]:
        """Return them."""
        return self._families


async def _asked(
    cluster: Cluster,
) -> tuple[ClusterInfo | None, list[ModelStatus], dict[ReplicaUid, dict[str, float]]]:
    try:
        async with asyncio.timeout(SCRAPE_SECONDS):
            return await cluster.info(), await cluster.models(), await cluster.engine_stats()
    except (XinferenceError, TimeoutError):
        return None, [], {}


def _cluster_families(
    info: ClusterInfo | None,
    models: Sequence[ModelStatus],
    engine_stats: dict[ReplicaUid, dict[str, float]],
) -> Iterator[Metric]:
    build = GaugeMetricFamily(
        "xinference:build_info", "Always 1.", labels=("version", "python_version", "role")
    )
    build.add_metric((__version__, platform.python_version(), "gateway"), 1)
    yield build
    up = "Whether the supervisor answered when this page was made."
    yield GaugeMetricFamily("xinference:supervisor_up", up, value=float(info is not None))
    if info is not None:
        yield from _node_families(info)
        yield from _model_families(models)
        yield from engine_families(
            [((uid.model, str(uid.index)), stats) for uid, stats in engine_stats.items()],
            labels=("model_uid", "replica_index"),
        )


def _key_families(keys: Sequence[ApiKey]) -> Iterator[Metric]:
    states = collections.Counter(key.state(now=time.time()) for key in keys)
    for state in ("active", "expired"):
        name, documentation = f"xinference:api_keys_{state}_total", f"API keys that are {state}."
        yield GaugeMetricFamily(name, documentation, value=states[state])


def _routing_families(routing: GatewayRouting) -> Iterator[Metric]:
    """Yield what the gateway process that makes the page has done; others have their own."""
    gateway = (str(os.getpid()),)
    for name, documentation, value in (
        ("xinference:requests_retried", "Requests that were sent again.", routing.num_retried),
        (
            "xinference:streams_continued",
            "Streams that went on at another replica.",
            routing.num_continued,
        ),
        ("xinference:replica_ejections", "Ejections of replicas.", routing.num_ejections),
    ):
        counter = CounterMetricFamily(name, documentation, labels=("gateway_pid",))
        counter.add_metric(gateway, value)
        yield counter
    ejected = GaugeMetricFamily(
        "xinference:replicas_ejected",
        "Replicas that get no requests, or one at a time.",
        labels=("gateway_pid",),
    )
    ejected.add_metric(gateway, routing.num_ejected)
    yield ejected
    version = GaugeMetricFamily(
        "xinference:routes_version",
        "The routing table that requests go by; the epoch is its supervisor's.",
        labels=("gateway_pid", "supervisor_epoch"),
    )
    version.add_metric((*gateway, str(routing.routes_epoch)), routing.routes_number)
    yield version


def _node_families(info: ClusterInfo) -> Iterator[Metric]:
    uptime = "Since the supervisor started."
    yield GaugeMetricFamily(
        "xinference:supervisor_uptime_seconds", uptime, value=info.uptime_seconds
    )
    count = len(info.workers)
    yield GaugeMetricFamily("xinference:workers_total", "Workers of the cluster.", value=count)
    state = GaugeMetricFamily(
        "xinference:worker_status", "Always 1.", labels=("worker_address", "status")
    )
    for worker in info.workers:
        state.add_metric((worker.node, worker.state), 1)
    yield state
    yield from host_families([(worker.node, worker.resources) for worker in info.workers])


def _model_families(models: Sequence[ModelStatus]) -> Iterator[Metric]:
    labels = ("model_uid", "model_name", "model_type", "model_engine", "replica_total")
    about = GaugeMetricFamily("xinference:model_info", "Always 1.", labels=labels)
    state = GaugeMetricFamily(
        "xinference:model_status", "Always 1.", labels=("model_uid", "model_name", "status")
    )
    restarts = CounterMetricFamily(
        "xinference:replica_restarts",
        "Restarts of a replica's process.",
        labels=("model_uid", "replica_index"),
    )
    replica_state = GaugeMetricFamily(
        "xinference:replica_status", "Always 1.", labels=("model_uid", "replica_index", "status")
    )
    binding = GaugeMetricFamily(
        "xinference:model_gpu_binding",
        "Always 1: this GPU was given to this replica.",
        labels=(
            *("model_uid", "model_name", "model_type"),
            *("worker_address", "gpu_index", "replica_index"),
        ),
    )
    loaded = GaugeMetricFamily(
        "xinference:models_loaded_total", "Models that serve.", labels=("model_type",)
    )
    for model in models:
        what = model.description
        about.add_metric(
            (
                model.model_uid,
                what.model_name,
                what.model_type,
                what.model_engine,
                str(len(model.replicas)),
            ),
            1,
        )
        state.add_metric((model.model_uid, what.model_name, model.state), 1)
        for replica in model.replicas:
            name = (model.model_uid, str(replica.replica.index))
            restarts.add_metric(name, replica.num_restarts)
            replica_state.add_metric((*name, replica.state), 1)
            for gpu in replica.gpu_idx or ():
                place = (what.model_name, what.model_type, replica.node or "", str(gpu))
                binding.add_metric((model.model_uid, *place, str(replica.replica.index)), 1)
    ready = collections.Counter(
        model.description.model_type for model in models if model.state is ModelState.READY
    )
    for model_type, count in sorted(ready.items()):
        loaded.add_metric((model_type,), count)
    yield from (about, state, restarts, replica_state, binding, loaded)
