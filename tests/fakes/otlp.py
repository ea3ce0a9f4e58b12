# SPDX-License-Identifier: Apache-2.0
"""A receiver of traces: OTLP over HTTP, on loopback, which keeps the spans that it gets."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReceivedSpan:
    """A span as it arrived."""

    name: str
    service: str
    trace_id: str
    span_id: str
    parent_id: str
    start: int
    end: int
    attributes: dict[str, Any]
    events: tuple[str, ...]
    is_error: bool


class OtlpReceiver:
    """What has arrived."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self._arrived = threading.Condition()
        self._spans: list[ReceivedSpan] = []

    def take(self, body: bytes) -> None:
        """Add the spans of a request."""
        asked = ExportTraceServiceRequest.FromString(body)
        with self._arrived:
            for of_resource in asked.resource_spans:
                resource = _plain(of_resource.resource.attributes)
                for scope in of_resource.scope_spans:
                    self._spans += [_received(span, resource) for span in scope.spans]
            self._arrived.notify_all()

    def trace(self, trace_id: str, *, num_spans: int, seconds: float = 30.0) -> list[ReceivedSpan]:
        """Wait until a trace has so many spans; return them, earliest first."""

        def found() -> list[ReceivedSpan]:
            return [span for span in self._spans if span.trace_id == trace_id]

        with self._arrived:
            has_come = self._arrived.wait_for(lambda: len(found()) >= num_spans, seconds)
            assert has_come, self._spans
            return sorted(found(), key=lambda span: (span.start, -span.end))

    @property
    def spans(self) -> list[ReceivedSpan]:
        """All that has arrived."""
        with self._arrived:
            return list(self._spans)


@contextmanager
def otlp_receiver() -> Iterator[OtlpReceiver]:
    """Run one on a free port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            assert self.path == "/v1/traces"
            receiver.take(self.rfile.read(int(self.headers["content-length"])))
            body = ExportTraceServiceResponse().SerializeToString()
            self.send_response(200)
            self.send_header("content-type", "application/x-protobuf")
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *words: Any) -> None:  # noqa: A002  # its name
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver = OtlpReceiver(f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield receiver
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _received(span: Any, resource: dict[str, Any]) -> ReceivedSpan:
    return ReceivedSpan(
        name=span.name,
        service=resource["service.name"],
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_id=span.parent_span_id.hex(),
        start=span.start_time_unix_nano,
        end=span.end_time_unix_nano,
        attributes=_plain(span.attributes),
        events=tuple(event.name for event in span.events),
        is_error=span.status.code == 2,
    )


def _plain(attributes: Any) -> dict[str, Any]:
    plain = {}
    for one in attributes:
        kind = one.value.WhichOneof("value")
        value = getattr(one.value, kind)
        if kind == "array_value":
            value = [each.string_value for each in value.values]
        plain[one.key] = value
    return plain
