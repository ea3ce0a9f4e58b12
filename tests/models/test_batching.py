# SPDX-License-Identifier: Apache-2.0
"""Which texts are computed together, and when: any history of callers."""

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xinference.models.batching import (
    BATCH_SECONDS,
    CROWD_SECONDS,
    FIRST_BATCH_TOKENS,
    FREE_PADDING_TOKENS,
    MAX_ANSWER_BYTES,
    MAX_PADDING_SHARE,
    MIN_BATCH_TOKENS,
    BatchLimits,
    BatchPace,
    BatchQueue,
)

LIMITS = BatchLimits(
    max_items=8, max_tokens=1000, max_bytes=100_000, bytes_per_token=50, bytes_per_pair=1
)
INTERVAL = 0.003

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=20)
CALLERS = st.lists(LENGTHS, min_size=1, max_size=12)


def queue_of(
    *callers: list[int], limits: BatchLimits = LIMITS, is_crowd: bool = True
) -> BatchQueue[int]:
    """Return a queue in which these callers wait, all since second 0."""
    queue: BatchQueue[int] = BatchQueue(limits, interval_seconds=INTERVAL)
    for caller, lengths in enumerate(callers):
        answers = [12] * len(lengths)
        queue.add(caller, lengths, answer_bytes=answers, now=0.0, is_crowd=is_crowd and caller > 0)
    return queue


@given(CALLERS)
def test_every_text_is_in_exactly_one_batch_and_every_batch_within_the_limits(
    callers: list[list[int]],
) -> None:
    queue = queue_of(*callers)
    seen: Counter[tuple[int, int]] = Counter()

    while len(queue):
        batch = queue.take(now=0.0)
        seen.update(batch)
        lengths = [callers[caller][index] for caller, index in batch]
        padded = max(lengths) * len(lengths)
        padding = padded - sum(lengths)
        assert batch
        if len(batch) > 1:
            assert len(batch) <= LIMITS.max_items
            assert padded <= LIMITS.max_tokens
            assert LIMITS.num_bytes(len(batch), max(lengths)) <= LIMITS.max_bytes
            assert padding <= max(FREE_PADDING_TOKENS, MAX_PADDING_SHARE * padded)

    expected = {(caller, i) for caller, lengths in enumerate(callers) for i in range(len(lengths))}
    assert seen == Counter(expected)
    assert queue.num_tokens == 0


@given(CALLERS)
def test_every_caller_gets_on_in_every_round(callers: list[list[int]]) -> None:
    queue = queue_of(*callers)
    left = {caller: len(lengths) for caller, lengths in enumerate(callers)}

    while len(queue):
        waiting = {caller for caller, number in left.items() if number}
        served: set[int] = set()
        for _ in range(len(waiting)):
            if not len(queue):
                break
            for caller, _ in queue.take(now=0.0):
                left[caller] -= 1
                served.add(caller)
        assert waiting <= served


@given(CALLERS, st.data())
def test_a_caller_that_is_removed_is_never_computed_again(
    callers: list[list[int]], data: st.DataObject
) -> None:
    queue = queue_of(*callers)
    gone = data.draw(st.integers(0, len(callers) - 1))
    for _ in range(data.draw(st.integers(0, 3))):
        if len(queue):
            queue.take(now=0.0)

    queue.remove(gone)
    queue.remove(gone)

    while len(queue):
        assert gone not in {caller for caller, _ in queue.take(now=0.0)}
    assert queue.num_tokens == 0


def test_texts_of_one_length_share_a_batch_whoever_asks() -> None:
    queue = queue_of([20], [20, 21], [19])

    assert sorted(queue.take(now=0.0)) == [(0, 0), (1, 0), (1, 1), (2, 0)]


def test_a_short_text_does_not_pay_for_a_long_one() -> None:
    limits = BatchLimits(
        max_items=8, max_tokens=9000, max_bytes=10**9, bytes_per_token=1, bytes_per_pair=0
    )
    queue = queue_of([500], [3], limits=limits)

    assert queue.take(now=0.0) == [(0, 0)]
    assert queue.take(now=0.0) == [(1, 0)]


def test_a_large_request_does_not_keep_a_small_one_waiting() -> None:
    queue = queue_of([300] * 200, [5])

    batches = [queue.take(now=0.0) for _ in range(2)]

    assert (1, 0) in batches[1]


def test_rows_whose_pairs_are_too_many_are_not_together() -> None:
    limits = BatchLimits(
        max_items=8,
        max_tokens=9000,
        max_bytes=10**9,
        bytes_per_token=1,
        bytes_per_pair=8,
        has_pairs_alone=False,
        max_pair_bytes=8 * 2 * 100**2,
    )
    queue = queue_of([500, 500, 100, 100, 100], limits=limits)

    assert [len(queue.take(now=0.0)) for _ in range(4)] == [1, 1, 2, 1]


def test_a_text_beyond_every_limit_is_a_batch_of_its_own() -> None:
    queue = queue_of([5000, 10])

    assert queue.take(now=0.0) == [(0, 0)]


def test_answers_that_are_large_are_not_sent_all_at_once() -> None:
    queue: BatchQueue[str] = BatchQueue(LIMITS, interval_seconds=INTERVAL)
    half = MAX_ANSWER_BYTES // 2
    queue.add("a", [10, 10, 10], answer_bytes=[half, half, half], now=0.0, is_crowd=False)

    assert [len(queue.take(now=0.0)) for _ in range(2)] == [2, 1]


def test_a_batch_may_be_held_to_fewer_tokens_than_the_limits() -> None:
    queue = queue_of([100] * 8)

    assert len(queue.take(now=0.0, max_tokens=300)) == 3
    assert len(queue.take(now=0.0, max_tokens=50)) == 1
    assert len(queue.take(now=0.0, max_tokens=10**9)) == 4


def test_the_pace_is_that_of_the_last_batches() -> None:
    pace = BatchPace()
    assert pace.max_tokens() == FIRST_BATCH_TOKENS

    pace.observe(num_tokens=1000, seconds=0.5)
    assert pace.max_tokens() == pytest.approx(BATCH_SECONDS * 2000)

    for _ in range(30):
        pace.observe(num_tokens=1000, seconds=100.0)
    assert pace.max_tokens() == MIN_BATCH_TOKENS


def test_one_caller_alone_never_waits() -> None:
    queue = queue_of([5])

    assert queue.seconds_to_wait(0.0) == 0.0


def test_nobody_waits_for_nothing() -> None:
    assert queue_of().seconds_to_wait(0.0) is None


def test_in_a_crowd_a_batch_that_is_not_full_waits_for_the_next_text_and_no_longer() -> None:
    queue = queue_of([5], [6])

    assert queue.seconds_to_wait(0.0) == pytest.approx(INTERVAL)
    assert queue.seconds_to_wait(INTERVAL) == 0.0


def test_a_stream_of_texts_does_not_delay_the_first_for_ever() -> None:
    queue = queue_of([5], [6])

    for number in range(2, 8):
        now = number * INTERVAL * 0.9
        queue.add(number, [5], answer_bytes=[1], now=now, is_crowd=True)
        if queue.seconds_to_wait(now) == 0.0:
            break

    assert number * 0.9 <= 5


def test_those_who_were_just_answered_have_time_to_ask_again() -> None:
    queue = queue_of([5], [6])
    queue.take(now=0.0)
    queue.add(9, [5], answer_bytes=[1], now=0.1, is_crowd=True)
    assert queue.seconds_to_wait(0.2) == 0.0

    queue.note_answers(now=0.2)

    assert queue.seconds_to_wait(0.2) == pytest.approx(INTERVAL)
    assert queue.seconds_to_wait(0.2 + INTERVAL) == 0.0


def test_one_caller_of_many_texts_does_not_wait_between_its_batches() -> None:
    queue = queue_of([100] * LIMITS.max_items)
    queue.take(now=0.0, max_tokens=300)

    queue.note_answers(now=0.1)

    assert queue.seconds_to_wait(0.1) == 0.0


def test_a_full_batch_waits_for_nobody() -> None:
    queue = queue_of([5], [5] * LIMITS.max_items)

    assert queue.seconds_to_wait(0.0) == 0.0


def test_a_crowd_is_forgotten() -> None:
    queue = queue_of([5], [6])
    queue.take(now=0.0)

    queue.add(9, [5], answer_bytes=[1], now=CROWD_SECONDS + 1, is_crowd=False)

    assert queue.seconds_to_wait(CROWD_SECONDS + 1) == 0.0


@settings(max_examples=50)
@given(st.integers(1, 10**7), st.integers(1, 10**4), st.integers(0, 100))
def test_the_longest_text_that_fits_is_exact(max_bytes: int, of_token: int, of_pair: int) -> None:
    limits = BatchLimits(
        max_items=1,
        max_tokens=1,
        max_bytes=max_bytes,
        bytes_per_token=of_token,
        bytes_per_pair=of_pair,
    )

    longest = limits.longest_alone()

    assert limits.num_bytes(1, longest) <= max_bytes < limits.num_bytes(1, longest + 1)
