# SPDX-License-Identifier: Apache-2.0
"""The counters of engines, as Prometheus has them: a gateway's page and a worker's page share it.

In: what replicas report, by the names that the engines give it. Out: one family for each name.
"""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    Metric,
)

from xinference.protocol.histograms import HistogramReading, split

COUNTERS = frozenset(
    {
        "busy_seconds",
        "num_aborts",
        "num_admissions",
        "num_cache_hits",
        "num_cached_tokens",
        "num_decode_tokens",
        "num_failed_steps",
        "num_generated_tokens",
        "num_padding_tokens",
        "num_preemptions",
        "num_prefill_tokens",
        "num_steps",
        "num_texts",
    }
)
"""What an engine counts; its other numbers go up and down."""

OF_REQUESTS = "request"
"""What a replica counts of whole requests begins with it; a gateway counts those itself."""

DOCUMENTATION: Mapping[str, str] = {
    "batch_size": "Sequences of a step, or texts of a batch.",
    "busy_seconds": "Of all steps together.",
    "decode_seconds": "From the first token of a request to its end.",
    "prefill_seconds": "From a request's admission to its first token.",
    "queue_seconds": "From a request's arrival in the engine's queue to its admission.",
}

Reading = tuple[Sequence[str], Mapping[str, float]]
"""The values of the labels of a replica, and its counters."""


def engine_families(readings: Iterable[Reading], *, labels: Sequence[str]) -> Iterator[Metric]:
    """Yield one family per number of any engine: num_steps → xinference:engine_steps_total."""
    split_up = [(values, *split(counters)) for values, counters in readings]
    plain = {name for _, numbers, _ in split_up for name in numbers}
    for name in sorted(one for one in plain if not one.startswith(OF_REQUESTS)):
        grows = name in COUNTERS
        kind = CounterMetricFamily if grows else GaugeMetricFamily
        shown = name.removeprefix("num_") if grows else re.sub(r"[^a-zA-Z0-9_]", "_", name)
        family = kind(f"xinference:engine_{shown}", _documentation(name), labels=labels)
        for values, numbers, _ in split_up:
            if name in numbers:
                family.add_metric(values, numbers[name])
        yield family
    distributed = {name for _, _, histograms in split_up for name in histograms}
    for name in sorted(one for one in distributed if not one.startswith(OF_REQUESTS)):
        yield histogram_family(
            f"xinference:engine_{name}",
            _documentation(name),
            (
                (values, histograms[name])
                for values, _, histograms in split_up
                if name in histograms
            ),
            labels=labels,
        )


def histogram_family(
    name: str,
    documentation: str,
    readings: Iterable[tuple[Sequence[str], HistogramReading]],
    *,
    labels: Sequence[str],
) -> Metric:
    """Return a family of histograms that have travelled, by the values of their labels."""
    family = HistogramMetricFamily(name, documentation, labels=labels)
    for values, reading in readings:
        family.add_metric(values, reading.buckets, reading.total)
    return family


def _documentation(name: str) -> str:
    return DOCUMENTATION.get(name, "As the engine last reported.")
