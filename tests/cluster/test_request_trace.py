# SPDX-License-Identifier: Apache-2.0
"""What a replica tells of a request that has ended, from the times that it took."""

import time
from collections.abc import Iterator

import pytest

from tests.fakes.otlp import OtlpReceiver, ReceivedSpan, otlp_receiver
from xinference.cluster.request_trace import RequestTracer, Traced
from xinference.errors import InternalError
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, RequestId
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerationRequest,
    Phases,
    TextPrompt,
    Usage,
)
from xinference.protocol.tracing import TraceContext
from xinference.protocol.vectors import EmbeddingRequest, ModelRequest, RerankRequest
from xinference.tracing import open_tracer

TRACE_ID, SPAN_ID = "0123456789abcdef" * 2, "0123456789abcdef"
CONTEXT = TraceContext(traceparent=f"00-{TRACE_ID}-{SPAN_ID}-01", request_id="mine")
USAGE = Usage(num_prompt_tokens=3, num_completion_tokens=0)
ID = RequestId("of the key/mine")


@pytest.fixture
def receiver(monkeypatch: pytest.MonkeyPatch) -> Iterator[OtlpReceiver]:
    with otlp_receiver() as running:
        monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", running.endpoint)
        yield running


def told(
    receiver: OtlpReceiver, request: ModelRequest, end: Finished | Failed
) -> list[ReceivedSpan]:
    """Return what arrives of a request that came a minute ago, earliest first."""
    tracer, traced = open_tracer("replica"), Traced.of(request)
    assert tracer is not None
    assert traced is not None
    replica = ReplicaUid(ModelUid("guide"), 1)
    telling = RequestTracer(tracer=tracer, replica=replica, instance=InstanceId("i"))
    telling.tell(traced, end, submitted_at=time.monotonic() - 60)
    tracer.close(30)
    return sorted(receiver.spans, key=lambda span: (span.start, -span.end))


def seconds_of(span: ReceivedSpan) -> float:
    return (span.end - span.start) / 1e9


def test_vectors_are_computed_and_not_decoded(receiver: OtlpReceiver) -> None:
    now = time.monotonic()
    phases = Phases(arrived_at=now - 50, admitted_at=now - 30, ended_at=now)
    asked = EmbeddingRequest(request_id=ID, inputs=("x",), trace=CONTEXT)

    end = Finished(reason=FinishReason.STOP, usage=USAGE, phases=phases)
    whole, prepare, queued, compute = told(receiver, asked, end)

    assert whole.name == "embeddings guide"
    assert (whole.trace_id, whole.parent_id) == (TRACE_ID, SPAN_ID)
    assert whole.attributes["xinference.replica"] == "guide-rep1"
    assert [span.name for span in (prepare, queued, compute)] == ["prepare", "queued", "compute"]
    lengths = [seconds_of(span) for span in (whole, prepare, queued, compute)]
    assert lengths == pytest.approx([60, 10, 20, 30], abs=2)
    ids = {span.attributes["xinference.request_id"] for span in (whole, prepare, queued, compute)}
    assert ids == {"mine"}, "as its caller knows it"


def test_what_is_aborted_in_the_queue_was_only_queued(receiver: OtlpReceiver) -> None:
    now = time.monotonic()
    end = Finished(
        reason=FinishReason.ABORT, usage=USAGE, phases=Phases(arrived_at=now - 50, ended_at=now)
    )
    asked = RerankRequest(request_id=ID, query="q", documents=("d",), trace=CONTEXT)

    whole, *parts = told(receiver, asked, end)

    assert whole.name == "rerank guide"
    assert whole.attributes["gen_ai.response.finish_reasons"] == ["abort"]
    assert [span.name for span in parts] == ["prepare", "queued"]


def test_what_fails_before_it_is_known_how_far_it_came_is_one_span(receiver: OtlpReceiver) -> None:
    asked = GenerationRequest(request_id=ID, prompt=TextPrompt(text="x"), trace=CONTEXT)

    (whole,) = told(receiver, asked, Failed(error=InternalError(where="here", problem="broken")))

    assert whole.name == "text_completion guide"
    assert whole.is_error
    assert whole.attributes["error.type"] == "internal_error"


def test_nobody_wants_a_trace_of_most_requests() -> None:
    assert Traced.of(GenerationRequest(request_id=ID, prompt=TextPrompt(text="x"))) is None
