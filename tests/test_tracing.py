# SPDX-License-Identifier: Apache-2.0
"""When there are traces, and what they cost when there are none."""

import logging
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.fakes.otlp import otlp_receiver
from xinference.tracing import current_context, current_span, open_tracer

ROOT = Path(__file__).parents[1]
HERE = "http://127.0.0.1:4318"


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": ""},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_SDK_DISABLED": "true"},
        {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_TRACES_EXPORTER": "none"},
        {"OTEL_EXPORTER_OTLP_METRICS_ENDPOINT": HERE},
    ],
)
def test_there_are_no_traces_unless_somebody_says_where_to(environ: dict[str, str]) -> None:
    assert open_tracer("gateway", environ) is None
    assert current_span() is None
    assert current_context() is None


def test_a_protocol_that_is_not_spoken_is_named(caplog: pytest.LogCaptureFixture) -> None:
    environ = {"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "OTEL_EXPORTER_OTLP_PROTOCOL": "grpc"}

    assert open_tracer("gateway", environ) is None
    assert "grpc is not spoken here, only http/protobuf" in caplog.text


def test_packages_that_are_missing_are_named() -> None:
    program = (
        "import logging, sys; logging.basicConfig();"
        "sys.modules['opentelemetry.sdk'] = None;"
        "from xinference.tracing import open_tracer;"
        "assert open_tracer('gateway') is None"
    )

    done = subprocess.run(
        [sys.executable, "-c", program],
        env={"OTEL_EXPORTER_OTLP_ENDPOINT": HERE, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    assert "run pip install opentelemetry-sdk" in done.stderr


def test_a_receiver_that_is_gone_holds_up_nobody(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.CRITICAL)  # the library tells of it, now or later
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", receiver.endpoint)
    tracer = open_tracer("gateway")
    assert tracer is not None
    tracer.begin("POST", {}, {}).end()

    began_at = time.monotonic()
    tracer.close(0.5)

    assert time.monotonic() - began_at < 10


def test_the_service_has_the_name_that_the_environment_gives_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with otlp_receiver() as receiver:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT", f"{receiver.endpoint}/v1/traces")
        monkeypatch.setenv("OTEL_SERVICE_NAME", "mine")
        tracer = open_tracer("gateway")
        assert tracer is not None
        span = tracer.begin("POST", {}, {})
        span.name_request("r")
        context = span.context
        span.end()
        tracer.close(30)
        (received,) = receiver.spans

    assert received.service == "mine"
    assert context.request_id == "r"
    assert context.traceparent.startswith(f"00-{received.trace_id}-{received.span_id}-")
