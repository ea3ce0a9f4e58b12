# SPDX-License-Identifier: Apache-2.0
"""How many prompt tokens fit a step, and when a refused caller may come back."""

import random

import pytest

from xinference.engine.pace import MIN_PROMPT_TOKENS, UNKNOWN_RETRY_SECONDS, EndRate, StepPace


def test_before_anything_is_known_a_step_takes_a_few() -> None:
    assert StepPace(0.2).max_prompt_tokens() == MIN_PROMPT_TOKENS


def test_what_streams_need_is_left_to_them() -> None:
    pace = StepPace(0.2)
    pace.observe(num_stream_tokens=0, num_prompt_tokens=500, seconds=0.5)

    alone = pace.max_prompt_tokens()
    pace.observe(num_stream_tokens=8, num_prompt_tokens=0, seconds=0.15)

    assert alone == 200
    assert pace.max_prompt_tokens() == 50


def test_one_small_dear_chunk_does_not_drive_the_price_up() -> None:
    pace = StepPace(0.2)
    pace.observe(num_stream_tokens=0, num_prompt_tokens=1000, seconds=1.0)
    pace.observe(num_stream_tokens=0, num_prompt_tokens=2, seconds=0.05)

    assert pace.max_prompt_tokens() > 150


@pytest.mark.parametrize("fixed_seconds", [0.0, 0.03, 0.08])
@pytest.mark.parametrize("tokens_per_second", [200, 2000, 50_000])
def test_steps_settle_near_the_target_whatever_the_machine(
    fixed_seconds: float, tokens_per_second: int
) -> None:
    source = random.Random(0)
    pace = StepPace(0.2)
    pace.observe(num_stream_tokens=0, num_prompt_tokens=10, seconds=fixed_seconds + 0.05)
    took = []
    for step in range(120):
        num_prompt_tokens = 0 if step % 10 == 0 else pace.max_prompt_tokens()
        seconds = fixed_seconds + num_prompt_tokens / tokens_per_second
        seconds *= source.uniform(0.9, 1.1)
        took.append((num_prompt_tokens, seconds))
        pace.observe(num_stream_tokens=8, num_prompt_tokens=num_prompt_tokens, seconds=seconds)

    settled = [seconds for count, seconds in took[60:] if count]
    assert max(settled) < 0.26
    assert min(settled) > 0.15


def test_a_long_prompt_whose_tokens_grow_dear_stays_near_the_target() -> None:
    pace, done, took = StepPace(0.5), 0, []
    pace.observe(num_stream_tokens=0, num_prompt_tokens=128, seconds=0.25)
    pace.observe(num_stream_tokens=8, num_prompt_tokens=0, seconds=0.05)
    while done < 4096:
        count = pace.max_prompt_tokens()
        # Three times as dear in the end as at first.
        seconds = 0.05 + count * 0.002 * (1 + 2 * done / 4096)
        took.append(seconds)
        done += count
        pace.observe(num_stream_tokens=8, num_prompt_tokens=count, seconds=seconds)

    assert max(took) < 0.57
    assert min(took) > 0.4


def test_a_machine_that_slows_down_gets_smaller_chunks_within_a_few_steps() -> None:
    pace = StepPace(0.2)
    for _ in range(20):
        count = pace.max_prompt_tokens()
        pace.observe(num_stream_tokens=0, num_prompt_tokens=count, seconds=count / 1000)
    before = pace.max_prompt_tokens()
    took = []
    for _ in range(12):
        count = pace.max_prompt_tokens()
        took.append(count / 100)
        pace.observe(num_stream_tokens=0, num_prompt_tokens=count, seconds=took[-1])

    assert before == pytest.approx(200, abs=2)
    assert took[0] > 1.5
    assert took[-1] < 0.3


def test_who_is_refused_is_told_how_long_the_queue_takes() -> None:
    rate = EndRate()
    for second in range(20):
        rate.note(2, now=float(second))

    assert rate.retry_after_seconds(30, now=19.0) == 15
    assert rate.retry_after_seconds(1, now=19.0) == 1
    assert rate.retry_after_seconds(10_000, now=19.0) == 60


def test_an_idle_hour_says_nothing_of_the_rate() -> None:
    rate = EndRate()
    rate.note(5, now=0.0)

    assert rate.retry_after_seconds(100, now=3600.0) == UNKNOWN_RETRY_SECONDS
