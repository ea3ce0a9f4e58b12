# SPDX-License-Identifier: Apache-2.0
"""Traces of a whole platform: one request is one trace, through gateway, replica and engine."""

import itertools
import secrets
from collections.abc import Iterator

import httpx
import pytest

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started, wait_until
from tests.fakes.otlp import OtlpReceiver, ReceivedSpan, otlp_receiver

PARTS = ["prepare", "queued", "prefill", "decode"]


@pytest.fixture(scope="module")
def receiver() -> Iterator[OtlpReceiver]:
    with otlp_receiver() as running:
        yield running


@pytest.fixture(scope="module")
def platform(
    tmp_path_factory: pytest.TempPathFactory, receiver: OtlpReceiver
) -> Iterator[Platform]:
    variables = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": receiver.endpoint,
        "OTEL_BSP_SCHEDULE_DELAY": "100",
    }
    with started(tmp_path_factory.mktemp("home"), variables=variables) as running:
        launch_guide(running)
        yield running


class Caller:
    """Somebody whose own span a request is part of."""

    def __init__(self, *, is_sampled: bool = True) -> None:
        self.trace_id, self.span_id = secrets.token_hex(16), secrets.token_hex(8)
        flags = "01" if is_sampled else "00"
        self.headers = {"traceparent": f"00-{self.trace_id}-{self.span_id}-{flags}"}


def chat(**fields: object) -> dict[str, object]:
    messages = [{"role": "user", "content": "What is Xinference?"}]
    return {"model": GUIDE, "messages": messages, "max_tokens": 8, "ignore_eos": True, **fields}


@pytest.mark.parametrize("stream", [False, True])
def test_one_request_is_one_trace(platform: Platform, receiver: OtlpReceiver, stream: bool) -> None:
    caller = Caller()
    request_id = f"traced-{stream}"
    body = chat(stream=stream, request_id=request_id)

    answer = httpx.post(
        f"{platform.endpoint}/v1/chat/completions", json=body, headers=caller.headers, timeout=60
    )

    assert answer.status_code == 200
    spans = receiver.trace(caller.trace_id, num_spans=2 + len(PARTS))
    by_name = {span.name: span for span in spans}
    http, replica = by_name["POST /v1/chat/completions"], by_name[f"chat {GUIDE}"]
    assert [span.name for span in spans] == [http.name, replica.name, *PARTS]
    assert {span.attributes["xinference.request_id"] for span in spans} == {request_id}
    assert (http.service, replica.service) == ("xinference-gateway", "xinference-replica")
    assert http.parent_id == caller.span_id
    assert replica.parent_id == http.span_id
    assert {by_name[name].parent_id for name in PARTS} == {replica.span_id}
    assert http.attributes["http.response.status_code"] == 200
    assert http.attributes["xinference.model_uid"] == GUIDE
    assert replica.attributes["xinference.replica"] == f"{GUIDE}-rep0"
    assert replica.attributes["gen_ai.usage.output_tokens"] == 8
    assert replica.attributes["gen_ai.usage.input_tokens"] > 0
    assert replica.attributes["gen_ai.response.finish_reasons"] == ["length"]
    in_order(http, [replica])
    in_order(replica, [by_name[name] for name in PARTS])


def in_order(whole: ReceivedSpan, parts: list[ReceivedSpan]) -> None:
    """Check that parts follow one another within the whole."""
    times = [whole.start, *(time for part in parts for time in (part.start, part.end)), whole.end]
    # Two processes tell the time of one clock by way of another one, each to a microsecond or so.
    slack = 1_000_000
    assert all(later >= earlier - slack for earlier, later in itertools.pairwise(times))


def test_a_request_without_a_caller_of_its_own_begins_a_trace(
    platform: Platform, receiver: OtlpReceiver
) -> None:
    asked = {"model": GUIDE, "prompt": "x", "max_tokens": 2, "request_id": "alone"}
    httpx.post(f"{platform.endpoint}/v1/completions", json=asked, timeout=60).raise_for_status()

    def found() -> list[ReceivedSpan]:
        name = "xinference.request_id"
        spans = [span for span in receiver.spans if span.attributes[name] == "alone"]
        return spans if len(spans) == 2 + len(PARTS) else []

    spans = wait_until("its spans are there", found, timeout_seconds=30)
    assert len({span.trace_id for span in spans}) == 1
    assert [span.name for span in spans if not span.parent_id] == ["POST /v1/completions"]


def test_what_the_caller_does_not_want_to_see_and_what_only_looks_is_not_traced(
    platform: Platform, receiver: OtlpReceiver
) -> None:
    unsampled, looks, sampled = Caller(is_sampled=False), Caller(), Caller()
    url = f"{platform.endpoint}/v1/chat/completions"

    httpx.post(url, json=chat(), headers=unsampled.headers, timeout=60).raise_for_status()
    httpx.get(f"{platform.endpoint}/v1/models", headers=looks.headers).raise_for_status()
    httpx.post(url, json=chat(), headers=sampled.headers, timeout=60).raise_for_status()

    receiver.trace(sampled.trace_id, num_spans=2 + len(PARTS))
    traced = {span.trace_id for span in receiver.spans}
    assert sampled.trace_id in traced
    assert not traced & {unsampled.trace_id, looks.trace_id}


def test_a_refused_request_says_why(platform: Platform, receiver: OtlpReceiver) -> None:
    caller = Caller()
    body = chat(messages=[{"role": "user", "content": "word " * 50_000}])

    answer = httpx.post(
        f"{platform.endpoint}/v1/chat/completions", json=body, headers=caller.headers, timeout=60
    )

    assert answer.status_code == 400
    http, replica = receiver.trace(caller.trace_id, num_spans=2)
    assert http.attributes["error.type"] == replica.attributes["error.type"]
    assert http.attributes["http.response.status_code"] == 400
    assert (http.is_error, replica.is_error) == (False, True)
