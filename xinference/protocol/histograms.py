# SPDX-License-Identifier: Apache-2.0
"""Histograms among the counters of a replica, which travel as names and numbers.

A histogram `queue_seconds` is a number for each of its buckets, cumulative as Prometheus has them
("queue_seconds:0.1", …, "queue_seconds:+Inf"), and the sum of all values ("queue_seconds:sum"). All
of them only grow, so those of several replicas may be added.
"""

import math
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
"""The buckets of durations."""
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0)
"""The buckets of the time between two tokens."""
COUNTS = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0)
"""The buckets of small numbers."""

_SEPARATOR = ":"
_SUM = "sum"


class Histogram:
    """How often a value fell into which bucket.

    One thread observes. Another may read meanwhile; it then may miss the last value.
    """

    def __init__(self, bounds: tuple[float, ...]) -> None:
        """Begin at 0, with a bucket up to each bound and one for what is above."""
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def counters(self, name: str) -> dict[str, float]:
        """Return it as counters travel."""
        counters = {}
        num_so_far = 0
        for bound, count in zip((*self._bounds, math.inf), self._counts, strict=True):
            num_so_far += count
            counters[_key(name, _bound_name(bound))] = float(num_so_far)
        counters[_key(name, _SUM)] = self._sum
        return counters


@dataclass(frozen=True, slots=True, kw_only=True)
class HistogramReading:
    """A histogram as it has travelled."""

    buckets: tuple[tuple[str, float], ...]
    """The bound of each, as Prometheus writes it, and how many values are not above."""
    total: float
    """Of all values."""

    @property
    def num_values(self) -> float:
        """How many were counted."""
        return self.buckets[-1][1]


def split(
    counters: Mapping[str, float],
) -> tuple[dict[str, float], dict[str, HistogramReading]]:
    """Return the plain counters, and the histograms among them by name."""
    plain: dict[str, float] = {}
    buckets: dict[str, list[tuple[str, float]]] = {}
    totals: dict[str, float] = {}
    for key, value in counters.items():
        name, is_part, part = key.partition(_SEPARATOR)
        if not is_part:
            plain[key] = value
        elif part == _SUM:
            totals[name] = value
        else:
            buckets.setdefault(name, []).append((part, value))
    histograms = {
        name: HistogramReading(
            buckets=tuple(sorted(found, key=lambda bucket: float(bucket[0]))),
            total=totals.get(name, 0.0),
        )
        for name, found in buckets.items()
    }
    return plain, histograms


def _key(name: str, part: str) -> str:
    return f"{name}{_SEPARATOR}{part}"


def _bound_name(bound: float) -> str:
    return "+Inf" if math.isinf(bound) else repr(bound)
