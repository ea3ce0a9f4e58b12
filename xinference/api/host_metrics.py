# SPDX-License-Identifier: Apache-2.0
"""Hosts and their devices, as Prometheus has them; pages of gateways and of workers share it."""

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import GaugeMetricFamily, Metric

from xinference.protocol.nodes import Device, NodeResources

Hosts = Sequence[tuple[str, NodeResources]]
"""The addresses of workers, and what their hosts have."""

READINGS: tuple[tuple[str, Callable[[NodeResources], float]], ...] = (
    ("cpu_utilization", lambda host: host.cpu_utilization),
    ("memory_used_bytes", lambda host: host.memory_used_bytes),
    ("memory_total_bytes", lambda host: host.memory_total_bytes),
)
DEVICE_READINGS: tuple[tuple[str, str, Callable[[Device], float]], ...] = (
    ("utilization_percent", "As last reported.", lambda gpu: 100.0 * gpu.utilization),
    ("memory_used_bytes", "As last reported.", lambda gpu: gpu.used_bytes),
    ("memory_total_bytes", "As last reported.", lambda gpu: gpu.total_bytes),
    (
        "quarantined",
        "1: an ended replica still holds it, and nothing is placed there.",
        lambda gpu: float(bool(gpu.quarantine)),
    ),
)


def host_families(hosts: Hosts) -> Iterator[Metric]:
    """Yield what is known of hosts, their GPUs included."""
    for name, reading in READINGS:
        family = GaugeMetricFamily(
            f"xinference:worker_{name}",
            "As the worker last reported.",
            labels=("worker_address",),
        )
        for address, resources in hosts:
            family.add_metric((address,), reading(resources))
        yield family
    for name, documentation, of_device in DEVICE_READINGS:
        family = GaugeMetricFamily(
            f"xinference:worker_gpu_{name}",
            documentation,
            labels=("worker_address", "gpu_index", "gpu_name"),
        )
        for address, resources in hosts:
            for gpu in resources.devices:
                family.add_metric((address, str(gpu.index), gpu.name), of_device(gpu))
        yield family
