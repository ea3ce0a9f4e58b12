# SPDX-License-Identifier: Apache-2.0
"""Histograms as they travel among counters."""

import math

from hypothesis import given
from hypothesis import strategies as st

from xinference.protocol.histograms import COUNTS, SECONDS, Histogram, split

VALUES = st.lists(st.floats(0, 1000, allow_nan=False), max_size=30)


@given(VALUES)
def test_what_is_read_is_what_was_observed(values: list[float]) -> None:
    histogram = Histogram(SECONDS)
    for value in values:
        histogram.observe(value)

    plain, found = split({"num_steps": 3.0, **histogram.counters("queue_seconds")})

    assert plain == {"num_steps": 3.0}
    reading = found["queue_seconds"]
    for bound, count in reading.buckets:
        assert count == sum(value <= float(bound) for value in values)
    assert [float(bound) for bound, _ in reading.buckets] == [*SECONDS, math.inf]
    assert reading.num_values == len(values)
    assert math.isclose(reading.total, math.fsum(values), abs_tol=1e-6)


@given(VALUES, VALUES)
def test_those_of_two_replicas_may_be_added(ours: list[float], theirs: list[float]) -> None:
    one, other, both = Histogram(COUNTS), Histogram(COUNTS), Histogram(COUNTS)
    for histogram, values in ((one, ours), (other, theirs), (both, ours + theirs)):
        for value in values:
            histogram.observe(value)

    left, right = one.counters("batch_size"), other.counters("batch_size")
    added = {name: left[name] + right[name] for name in left}

    expected = both.counters("batch_size")
    assert math.isclose(added.pop("batch_size:sum"), expected.pop("batch_size:sum"), rel_tol=1e-9)
    assert added == expected


def test_a_value_on_a_bound_is_not_above_it() -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.observe(2.0)

    assert histogram.counters("n") == {"n:1.0": 0, "n:2.0": 1, "n:+Inf": 1, "n:sum": 2}
