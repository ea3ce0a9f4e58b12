# SPDX-License-Identifier: Apache-2.0
"""Limits per minute: never more than the limit in a minute beyond what was saved up."""

from hypothesis import given
from hypothesis import strategies as st

from xinference.api.keys.rate import Bucket


def test_a_bucket_is_full_at_first_and_fills_evenly() -> None:
    bucket = Bucket.full(60, now=0.0).without(60)

    assert bucket.seconds_until(1, 60) == 1
    assert bucket.filled(60, now=0.5).seconds_until(1, 60) == 1
    assert bucket.filled(60, now=1.0).seconds_until(1, 60) == 0
    assert bucket.filled(60, now=1000.0).level == 60


def test_what_was_used_beyond_the_limit_must_be_made_up_for() -> None:
    bucket = Bucket.full(100, now=0.0).without(250)

    assert bucket.seconds_until(1, 100) == 91
    assert bucket.filled(100, now=91.0).seconds_until(1, 100) == 0


def test_a_clock_that_is_set_back_takes_nothing_away() -> None:
    assert Bucket(5.0, 1000.0).filled(10, now=0.0).level == 5.0


@given(st.integers(1, 50), st.lists(st.floats(0.0, 10.0), max_size=200))
def test_no_minute_has_more_requests_than_the_limit_and_what_fills_meanwhile(
    limit: int, pauses: list[float]
) -> None:
    bucket, now = Bucket.full(limit, now=0.0), 0.0
    times = []
    for pause in pauses:
        now += pause
        bucket = bucket.filled(limit, now=now)
        if bucket.seconds_until(1, limit) == 0:
            bucket = bucket.without(1)
            times.append(now)

    for start in times:
        assert sum(start <= at < start + 60 for at in times) <= 2 * limit
