# SPDX-License-Identifier: Apache-2.0
"""Optional traces of requests, and the only home of OpenTelemetry.

In: spans that the gateway begins for HTTP requests, and that a replica tells of once a request has
ended. Out: OTLP over HTTP, sent by a thread of the library's, to where its own variables say.
Nothing of the library is imported while nobody asks for traces.
"""

import contextlib
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from contextvars import ContextVar
from typing import TYPE_CHECKING

from xinference import __version__
from xinference.protocol.tracing import TraceContext

if TYPE_CHECKING:
    from opentelemetry import trace as otel
    from opentelemetry.context import Context
    from opentelemetry.sdk.trace import TracerProvider

logger = logging.getLogger(__name__)

ENDPOINTS = ("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", "OTEL_EXPORTER_OTLP_ENDPOINT")
PROTOCOLS = ("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "OTEL_EXPORTER_OTLP_PROTOCOL")
PROTOCOL = "http/protobuf"
PACKAGES = "opentelemetry-sdk opentelemetry-exporter-otlp-proto-http"

REQUEST_ID = "xinference.request_id"
MODEL_UID = "xinference.model_uid"

AttributeValue = str | bool | int | float | list[str]
Attributes = Mapping[str, AttributeValue]


class Span:
    """Something that takes time, within a trace. `end` it."""

    def __init__(self, tracer: "otel.Tracer", span: "otel.Span") -> None:
        self._tracer = tracer
        self._span = span
        self.request_id = ""
        """Of what it is about, as its caller knows it."""

    @property
    def is_sampled(self) -> bool:
        """Whether it goes anywhere: a sampler may have decided that it does not."""
        return self._span.get_span_context().trace_flags.sampled

    @property
    def context(self) -> TraceContext:
        """What lets another process tell of a part of it."""
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        carrier: dict[str, str] = {}
        TraceContextTextMapPropagator().inject(carrier, _as_parent(self._span))
        return TraceContext(traceparent=carrier["traceparent"], request_id=self.request_id)

    def name_request(self, request_id: str) -> None:
        """Note the id of the request that it is about."""
        self.request_id = request_id
        self._span.set_attribute(REQUEST_ID, request_id)

    def rename(self, name: str) -> None:
        """Give it a better name."""
        self._span.update_name(name)

    def set(self, attributes: Attributes) -> None:
        """Add attributes; nothing happens if it has ended."""
        if self._span.is_recording():
            self._span.set_attributes(attributes)

    def fail(self, problem: str) -> None:
        """Say that it is about something that has failed; nothing happens if it has ended."""
        from opentelemetry.trace import Status, StatusCode

        if self._span.is_recording():
            self._span.set_status(Status(StatusCode.ERROR, problem))

    def note(self, event: str, attributes: Attributes) -> None:
        """Note that something happened now; nothing happens if it has ended."""
        if self._span.is_recording():
            self._span.add_event(event, attributes)

    def child(self, name: str, start: float, end: float) -> None:
        """Tell of a part of it that has passed, in seconds since 1970."""
        span = self._tracer.start_span(name, context=_as_parent(self._span), start_time=_ns(start))
        span.set_attribute(REQUEST_ID, self.request_id)
        span.end(_ns(end))

    def end(self, *, at: float | None = None) -> None:
        """End it, now or at a time in seconds since 1970."""
        self._span.end(None if at is None else _ns(at))


class Tracer:
    """Makes the spans of one process, and sends them. Its methods may be called by any thread."""

    def __init__(self, provider: "TracerProvider") -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("xinference", __version__)

    def begin(
        self,
        name: str,
        carrier: Mapping[str, str],
        attributes: Attributes,
        *,
        at: float | None = None,
    ) -> Span:
        """Begin a span of what another process, or a client, has asked for.

        Args:
            carrier: may have "traceparent" and "tracestate", which say what it is part of.
            at: when it began, in seconds since 1970; None: now.
        """
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        span = self._tracer.start_span(
            name,
            context=TraceContextTextMapPropagator().extract(carrier),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=None if at is None else _ns(at),
        )
        return Span(self._tracer, span)

    def close(self, timeout_seconds: float) -> None:
        """Send what is left, but take no longer than this."""
        # Why a thread: a receiver that is gone is asked again and again.
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        closing.join(timeout_seconds)


def open_tracer(role: str, environ: Mapping[str, str] = os.environ) -> Tracer | None:
    """Return what makes this process's spans; None if nobody asked for traces.

    Args:
        role: what this process is; names the service where the environment does not.
    """
    if not is_wanted(environ):
        return None
    protocol = next((environ[one] for one in PROTOCOLS if environ.get(one)), PROTOCOL)
    if protocol != PROTOCOL:
        logger.warning("No traces: %s is not spoken here, only %s", protocol, PROTOCOL)
        return None
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        logger.warning("No traces: %s; run pip install %s", error, PACKAGES)
        return None
    named = "OTEL_SERVICE_NAME" in environ or "service.name=" in environ.get(
        "OTEL_RESOURCE_ATTRIBUTES", ""
    )
    own = {"service.version": __version__}
    if not named:
        own["service.name"] = f"xinference-{role}"
    provider = TracerProvider(resource=Resource.create(own))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    return Tracer(provider)


def is_wanted(environ: Mapping[str, str]) -> bool:
    """Return whether OpenTelemetry's own variables ask for traces."""
    if environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return False
    if environ.get("OTEL_TRACES_EXPORTER", "otlp") != "otlp":
        return False
    return any(environ.get(name) for name in ENDPOINTS)


_current: ContextVar[Span | None] = ContextVar("span of the HTTP request", default=None)


def current_span() -> Span | None:
    """Return the span of the HTTP request that this task works for; None without traces."""
    return _current.get()


def current_context() -> TraceContext | None:
    """Return what a replica needs to tell of its part of that; None if it need not."""
    span = _current.get()
    return span.context if span is not None and span.is_sampled else None


@contextlib.contextmanager
def working_for(span: Span) -> Iterator[None]:
    """Let this task, and those that it makes within, work for an HTTP request."""
    token = _current.set(span)
    try:
        yield
    finally:
        _current.reset(token)


def _as_parent(span: "otel.Span") -> "Context":
    from opentelemetry.trace import set_span_in_context

    return set_span_in_context(span)


def _ns(seconds: float) -> int:
    return int(seconds * 1e9)
