# SPDX-License-Identifier: Apache-2.0
"""A worker's own page for Prometheus."""

from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from xinference.api.worker_exporter import WorkerExporter
from xinference.identifiers import ModelUid, NodeId, ReplicaUid
from xinference.protocol.histograms import SECONDS, Histogram
from xinference.protocol.nodes import Device, NodeResources
from xinference.protocol.worker_reading import ReplicaReading, WorkerReading

NODE = "10.0.0.7:5001"


def replica(index: int, state: str = "ready", **counters: float) -> ReplicaReading:
    return ReplicaReading(
        replica=ReplicaUid(ModelUid("guide"), index),
        state=state,
        model_name="xinference-guide",
        model_type="LLM",
        model_engine="transformers",
        model_format="pytorch",
        quantization="none",
        gpu_idx=(0, 2),
        load_seconds=1.5,
        counters=counters,
    )


def worker(*replicas: ReplicaReading) -> WorkerReading:
    gpu = Device(index=0, name="Fake", total_bytes=100, used_bytes=25, utilization=0.5)
    return WorkerReading(
        node=NodeId(NODE),
        has_joined=True,
        resources=NodeResources(
            cpu_count=2,
            cpu_utilization=0.25,
            memory_total_bytes=1000,
            memory_used_bytes=400,
            memory_available_bytes=600,
            devices=(gpu,),
        ),
        replicas=replicas,
    )


@contextmanager
def exporting(reading: WorkerReading) -> Iterator[WorkerExporter]:
    exporter = WorkerExporter("127.0.0.1", 0, lambda: reading)
    try:
        yield exporter
    finally:
        exporter.close()


def scraped(exporter: WorkerExporter) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
    answer = httpx.get(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30)
    assert answer.status_code == 200
    return {
        (sample.name.removeprefix("xinference:"), frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(answer.text)
        for sample in family.samples
    }


def labels(index: int = 0, **more: str) -> frozenset[tuple[str, str]]:
    of_replica = {
        "model_type": "LLM",
        "model_uid": "guide",
        "replica_index": str(index),
        "model_name": "xinference-guide",
        "engine": "transformers",
        "worker_address": NODE,
        "format": "pytorch",
        "quantization": "none",
        "gpu_index": "0,2",
    }
    return frozenset((of_replica | more).items())


def test_the_host_and_its_gpus_are_on_the_page() -> None:
    with exporting(worker()) as exporter:
        page = scraped(exporter)

    here = frozenset({("worker_address", NODE)})
    gpu = here | {("gpu_index", "0"), ("gpu_name", "Fake")}
    assert page["worker_has_joined", here] == 1
    assert page["worker_cpu_utilization", here] == 0.25
    assert page["worker_memory_used_bytes", here] == 400
    assert page["worker_gpu_memory_used_bytes", gpu] == 25
    assert page["worker_gpu_utilization_percent", gpu] == 50


def test_each_replica_is_on_the_page_by_the_names_that_dashboards_know() -> None:
    took = Histogram(SECONDS)
    for seconds in (0.2, 3.0):
        took.observe(seconds)
    first = replica(
        0,
        requests=3,
        request_errors=1,
        request_input_tokens=30,
        request_output_tokens=12,
        num_steps=7,
        num_running=2,
        num_waiting=1,
        **took.counters("request_seconds"),
        **took.counters("request_first_token_seconds"),
        **took.counters("request_token_seconds"),
        **took.counters("queue_seconds"),
    )
    with exporting(worker(first, replica(1, num_steps=5), replica(2, "loading"))) as exporter:
        page = scraped(exporter)

    unknown = labels(stream="unknown")
    assert page["model_request_total", unknown] == 3
    assert page["model_request_errors_total", labels()] == 1
    assert (
        page["input_tokens_total_counter", labels()] == page["input_tokens_total", labels()] == 30
    )
    assert page["output_tokens_total_counter", labels()] == 12
    assert page["generate_tokens_total", labels()] == 12
    assert page["model_serve_count", labels()] == 3
    assert page["model_request_limit", labels()] == -1
    assert page["model_last_load_duration_seconds", labels()] == 1.5
    assert page["model_request_duration_seconds_sum", labels()] == pytest.approx(3.2)
    assert page["model_request_duration_seconds_bucket", labels(le="0.25")] == 1
    assert page["time_to_first_token_seconds_count", unknown] == 2
    assert page["time_per_output_token_seconds_count", labels()] == 2
    assert page["engine_queue_seconds_count", labels()] == 2
    assert page["engine_steps_total", labels()] == 7
    assert page["engine_steps_total", labels(1)] == 5
    assert page["replica_status", labels(2, status="loading")] == 1
    assert ("engine_steps_total", labels(2)) not in page


def test_a_port_that_is_taken_is_named() -> None:
    with (
        exporting(worker()) as exporter,
        pytest.raises(OSError, match=f"exporter cannot listen on 127.0.0.1:{exporter.port}: "),
    ):
        WorkerExporter("127.0.0.1", exporter.port, worker)


def test_a_worker_that_does_not_answer_is_a_503() -> None:
    def read() -> WorkerReading:
        raise TimeoutError

    exporter = WorkerExporter("127.0.0.1", 0, read)
    try:
        answer = httpx.get(f"http://127.0.0.1:{exporter.port}/metrics", timeout=30)
    finally:
        exporter.close()

    assert answer.status_code == 503
    assert "the worker does not answer" in answer.text
