# SPDX-License-Identifier: Apache-2.0
"""A worker's own page for Prometheus, on a port of its own.

In: a way to read the worker. Out: `GET /metrics`, which tells of its host and its replicas while
gateway and supervisor are away, too. Every series has the label `worker_address`, which those of a
gateway's page about requests and engines do not have: that tells them apart where both are scraped.
The names and the labels of a replica's are those that Xinference's dashboards know.
"""

import logging
import platform
import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prometheus_client import CollectorRegistry, MetricsHandler
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    Metric,
    UnknownMetricFamily,
)
from prometheus_client.registry import Collector

from xinference import __version__
from xinference.protocol.histograms import split
from xinference.protocol.worker_reading import ReplicaReading, WorkerReading

from .engine_metrics import engine_families, histogram_family
from .host_metrics import host_families

logger = logging.getLogger(__name__)

LABELS = (
    *("model_type", "model_uid", "replica_index", "model_name", "engine"),
    *("worker_address", "format", "quantization", "gpu_index"),
)
"""Of a replica."""
STREAM = "unknown"
"""A replica is not told whether its answers are streamed."""
REQUEST_SECONDS = 10.0
"""For a scraper to say what it wants, and to take it."""

COUNTERS: Mapping[str, tuple[str, str]] = {
    "request_errors": (
        "xinference:model_request_errors",
        "Requests that the replica refused or failed.",
    ),
    "request_input_tokens": ("xinference:input_tokens", "Prompt tokens of ended requests."),
    "request_output_tokens": (
        "xinference:generate_tokens",
        "Tokens generated for ended requests.",
    ),
}
"""What a replica counts of requests, and its name and documentation on the page."""
HISTOGRAMS: Mapping[str, tuple[str, str]] = {
    "request_seconds": (
        "xinference:model_request_duration_seconds",
        "From the replica's taking a request to the end of its answer.",
    ),
    "request_token_seconds": (
        "xinference:time_per_output_token_seconds",
        "From a request's first token to its end, by the tokens between.",
    ),
}
"""The same of its histograms."""
OLD_NAMES: Mapping[str, str] = {
    "request_input_tokens": "xinference:input_tokens_total_counter",
    "request_output_tokens": "xinference:output_tokens_total_counter",
}
"""The same, by the names that Xinference has for it, which are none for a counter."""

Read = Callable[[], WorkerReading]
"""Returns how a worker is; any thread may call it, and it may raise TimeoutError."""


class WorkerExporter:
    """Serves the page in threads of its own, until `close`."""

    def __init__(self, host: str, port: int, read: Read) -> None:
        """Listen and serve.

        Raises:
            OSError: the port is taken, or `host` is not of this machine; says which.
        """
        registry = CollectorRegistry()
        registry.register(_Page(read))
        family, _, _, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        try:
            where = (str(address[0]), int(address[1]))
            self._server = _server_of(family)(where, _handler_of(registry))
        except OSError as error:
            problem = f"the metrics exporter cannot listen on {host}:{port}: {error.strerror}"
            raise OSError(error.errno, problem) from error
        self.port: int = self._server.server_address[1]
        """Where it listens."""
        self._thread = threading.Thread(
            target=self._server.serve_forever, name="metrics exporter", daemon=True
        )
        self._thread.start()
        logger.info("Metrics of this worker at http://%s:%d/metrics", host, self.port)

    def close(self) -> None:
        """Listen no longer."""
        self._server.shutdown()
        self._server.server_close()


def _server_of(family: int) -> type[socketserver.ThreadingTCPServer]:
    class Server(socketserver.ThreadingTCPServer):
        """Not the library's: that one looks its own name up, which may take many seconds."""

        address_family = family
        allow_reuse_address = True
        daemon_threads = True

        def handle_error(self, request: object, client_address: object) -> None:
            logger.warning("the page for %s could not be made", client_address, exc_info=True)

    return Server


def _handler_of(registry: CollectorRegistry) -> type[MetricsHandler]:
    class Handler(MetricsHandler.factory(registry)):  # type: ignore[misc]  # a class all the same
        """Waits for nobody for ever."""

        timeout = REQUEST_SECONDS

        def do_GET(self) -> None:  # noqa: N802  # the library's name
            try:
                super().do_GET()
            except _Unread as error:
                self.send_error(503, str(error))

    return Handler


class _Unread(Exception):
    """Not a TimeoutError: the library takes those for a client that says nothing."""


class _Page(Collector):
    def __init__(self, read: Read) -> None:
        self._read = read

    def collect(self) -> Iterable[Metric]:
        try:
            return worker_families(self._read())
        except TimeoutError as error:
            raise _Unread("the worker does not answer") from error

    def describe(self) -> Iterable[Metric]:
        """Return nothing: the registry need not read a worker to know of its page."""
        return []


def worker_families(worker: WorkerReading) -> Iterator[Metric]:
    """Yield what is known of a worker, its host and its replicas."""
    here = (worker.node,)
    build = GaugeMetricFamily(
        "xinference:build_info",
        "Always 1.",
        labels=("version", "python_version", "role", "worker_address"),
    )
    build.add_metric((__version__, platform.python_version(), "worker", worker.node), 1)
    yield build
    joined = GaugeMetricFamily(
        "xinference:worker_has_joined",
        "Whether a supervisor knows of this worker now.",
        labels=("worker_address",),
    )
    joined.add_metric(here, float(worker.has_joined))
    yield joined
    yield from host_families([(worker.node, worker.resources)])
    replicas = [(_labels(worker, replica), replica) for replica in worker.replicas]
    yield from _replica_families(replicas)
    counters = [(labels, replica.counters) for labels, replica in replicas if replica.counters]
    yield from _request_families(counters)
    yield from engine_families(counters, labels=LABELS)


def _labels(worker: WorkerReading, replica: ReplicaReading) -> tuple[str, ...]:
    return (
        *(replica.model_type, replica.replica.model, str(replica.replica.index)),
        *(replica.model_name, replica.model_engine, worker.node),
        *(replica.model_format, replica.quantization),
        ",".join(map(str, replica.gpu_idx)),
    )


def _replica_families(
    replicas: Sequence[tuple[Sequence[str], ReplicaReading]],
) -> Iterator[Metric]:
    state = GaugeMetricFamily("xinference:replica_status", "Always 1.", labels=(*LABELS, "status"))
    limit = GaugeMetricFamily(
        "xinference:model_request_limit", "Requests at once; -1: no limit.", labels=LABELS
    )
    loading = GaugeMetricFamily(
        "xinference:model_last_load_duration_seconds", "What its load took.", labels=LABELS
    )
    for labels, replica in replicas:
        state.add_metric((*labels, replica.state), 1)
        limits = replica.request_limits
        limit.add_metric(labels, -1 if limits is None else limits)
        if replica.load_seconds is not None:
            loading.add_metric(labels, replica.load_seconds)
    yield from (state, limit, loading)


def _request_families(
    readings: Sequence[tuple[Sequence[str], Mapping[str, float]]],
) -> Iterator[Metric]:
    requests = CounterMetricFamily(
        "xinference:model_request", "Requests that have ended.", labels=(*LABELS, "stream")
    )
    serving = GaugeMetricFamily(
        "xinference:model_serve_count", "Requests in flight.", labels=LABELS
    )
    for labels, counters in readings:
        requests.add_metric((*labels, STREAM), counters.get("requests", 0.0))
        live = counters.get("num_running", 0.0) + counters.get("num_waiting", 0.0)
        serving.add_metric(labels, live)
    yield from (requests, serving)
    for ours, (name, documentation) in COUNTERS.items():
        counter = CounterMetricFamily(name, documentation, labels=LABELS)
        for labels, counters in readings:
            counter.add_metric(labels, counters.get(ours, 0.0))
        yield counter
    for ours, name in OLD_NAMES.items():
        unknown = UnknownMetricFamily(name, f"As {COUNTERS[ours][0]}_total.", labels=LABELS)
        for labels, counters in readings:
            unknown.add_metric(labels, counters.get(ours, 0.0))
        yield unknown
    histograms = [(labels, split(counters)[1]) for labels, counters in readings]
    for ours, (name, documentation) in HISTOGRAMS.items():
        of_replicas = ((labels, found[ours]) for labels, found in histograms if ours in found)
        yield histogram_family(name, documentation, of_replicas, labels=LABELS)
    yield histogram_family(
        "xinference:time_to_first_token_seconds",
        "From the replica's taking a request to its first token.",
        (
            ((*labels, STREAM), found["request_first_token_seconds"])
            for labels, found in histograms
            if "request_first_token_seconds" in found
        ),
        labels=(*LABELS, "stream"),
    )
