# SPDX-License-Identifier: Apache-2.0
"""The scheduler on its own: who runs, how much, and who gives way."""

from typing import Any

import pytest

from xinference.engine.block_pool import BlockPool
from xinference.engine.pace import MIN_PROMPT_TOKENS, StepPace
from xinference.engine.scheduler import Schedule, Scheduler, Sequence
from xinference.identifiers import RequestId
from xinference.protocol.deployment import SchedulerPolicy


def sequence(
    request_id: str, num_tokens: int, *, max_num_tokens: int = 1000, **given: Any
) -> Sequence:
    return Sequence(
        request_id=RequestId(request_id),
        num_prompt_tokens=num_tokens,
        num_tokens=num_tokens,
        max_num_tokens=max_num_tokens,
        **given,
    )


def scheduler(
    num_blocks: int = 100, *, block_size: int = 4, seqs: int = 4, budget: int = 16, **given: Any
) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    made = Scheduler(
        pool, block_size=block_size, max_num_seqs=seqs, max_num_batched_tokens=budget, **given
    )
    return made, pool


def shares(schedule: Schedule) -> dict[str, int]:
    return {row.sequence.request_id: row.num_new for row in schedule.rows}


def test_a_long_prompt_is_computed_in_chunks_of_the_budget() -> None:
    made, _ = scheduler(budget=16)
    made.add(sequence("long", 40))

    steps = []
    for _ in range(4):
        schedule = made.schedule()
        steps.append(shares(schedule)["long"])
        made.commit(schedule)

    assert steps == [16, 16, 8, 1]


def test_running_streams_get_their_token_before_prompts_share_what_is_left() -> None:
    made, _ = scheduler(budget=10)
    made.add(sequence("stream", 3))
    made.commit(made.schedule())
    made.add(sequence("first", 20))
    made.add(sequence("second", 2))

    schedule = made.schedule()

    assert shares(schedule) == {"stream": 1, "first": 9}
    assert schedule.rows[0].samples
    assert not schedule.rows[1].samples


def test_the_end_of_one_prompt_and_the_start_of_the_next_share_a_step() -> None:
    made, _ = scheduler(budget=10)
    made.add(sequence("first", 12))
    made.add(sequence("second", 30))
    made.commit(made.schedule())

    assert shares(made.schedule()) == {"first": 2, "second": 8}


def test_no_more_run_than_there_are_slots() -> None:
    made, _ = scheduler(seqs=2)
    for name in "abc":
        made.add(sequence(name, 2))

    made.commit(made.schedule())

    assert (made.num_running, made.num_waiting) == (2, 1)


def test_the_youngest_gives_way_when_a_block_is_missing_and_comes_back_first() -> None:
    made, pool = scheduler(num_blocks=4, block_size=2, budget=16)
    made.add(sequence("old", 2))
    made.add(sequence("young", 2))
    made.add(sequence("waiting", 3))
    made.commit(made.schedule())

    preempted: list[str] = []
    while made.num_running == 2:
        schedule = made.schedule()
        preempted += [victim.request_id for victim in schedule.preempted]
        made.commit(schedule)
        made.check_invariants()
    made.remove(RequestId("old"))
    back = made.schedule()

    assert preempted == ["young"]
    assert [admitted.request_id for admitted in back.admitted][:1] == ["young"]
    assert shares(back)["young"] > 2, "what it had generated is computed again with its prompt"
    assert pool.num_used > 0


def test_a_waiting_request_is_not_let_in_without_room_for_all_of_it() -> None:
    made, pool = scheduler(num_blocks=6, block_size=4)
    made.add(sequence("running", 8))
    made.add(sequence("large", 16))
    made.add(sequence("small", 1))

    made.commit(made.schedule())

    assert (made.num_running, made.num_waiting) == (1, 2), "nobody overtakes the large one"
    assert pool.num_used == 2


def test_removing_frees_slot_and_blocks_at_once() -> None:
    made, pool = scheduler()
    made.add(sequence("running", 9))
    made.add(sequence("waiting", 9))
    made.schedule()

    slots = [made.remove(RequestId("running")), made.remove(RequestId("waiting"))]

    assert slots[0] == 0
    assert pool.num_used == 0
    assert not made.has_work


@pytest.mark.parametrize("budget", [1, 2, 5])
def test_everybody_ends_even_with_a_tiny_budget(budget: int) -> None:
    made, _ = scheduler(num_blocks=6, block_size=2, seqs=4, budget=budget)
    for index in range(6):
        made.add(sequence(str(index), 3 + index))

    ended = []
    for _ in range(400):
        schedule = made.schedule()
        made.commit(schedule)
        for row in schedule.rows:
            if row.sequence.num_tokens >= 12:
                made.remove(row.sequence.request_id)
                ended.append(row.sequence.request_id)
        if not made.has_work:
            break

    assert sorted(ended) == [str(index) for index in range(6)]


def names(text: str) -> list[bytes]:
    """Return a name per letter; like begins alike."""
    return [text[: end + 1].encode() for end in range(len(text))]


def test_a_prompt_that_begins_alike_starts_behind_what_is_there() -> None:
    made, pool = scheduler(budget=100)
    made.add(sequence("first", 12, block_hashes=names("abc")))
    made.commit(made.schedule())
    made.add(sequence("second", 13, block_hashes=names("abx")))

    schedule = made.schedule()

    assert shares(schedule) == {"first": 1, "second": 5}
    (second,) = schedule.admitted
    assert second.num_cached_tokens == second.num_computed == 8
    assert second.block_table[:2] == [0, 1]
    assert pool.num_used == 4 + 2
    made.check_invariants()


def test_at_least_one_token_is_computed_even_if_all_are_there() -> None:
    made, _ = scheduler(budget=100)
    made.add(sequence("first", 8, block_hashes=names("ab")))
    made.commit(made.schedule())
    made.add(sequence("again", 8, block_hashes=names("ab")))

    assert shares(made.schedule())["again"] == 4


def test_what_nobody_holds_any_more_is_found_until_its_blocks_are_needed() -> None:
    made, pool = scheduler(num_blocks=4, budget=100)
    made.add(sequence("first", 12, block_hashes=names("abc")))
    made.commit(made.schedule())
    made.remove(RequestId("first"))
    assert (pool.num_used, pool.num_kept) == (0, 3)

    made.add(sequence("other", 8, block_hashes=names("xy")))
    made.commit(made.schedule())
    made.remove(RequestId("other"))
    made.add(sequence("again", 13, block_hashes=names("abc")))
    (again,) = made.schedule().admitted

    # "other" took the free block and the end of the first one's prefix.
    assert again.num_cached_tokens == 8
    made.check_invariants()


def test_two_that_begin_alike_in_one_step_both_compute_and_both_are_right() -> None:
    made, pool = scheduler(budget=100)
    for name in ("one", "two"):
        made.add(sequence(name, 9, block_hashes=names("ab")))
    schedule = made.schedule()
    made.commit(schedule)
    made.check_invariants()

    assert shares(schedule) == {"one": 9, "two": 9}
    assert pool.num_used == 6, "tables only grow: what was computed twice stays twice"
    for name in ("one", "two"):
        made.remove(RequestId(name))
    assert (pool.num_used, pool.num_kept) == (0, 2)


def test_a_sequence_may_decline_what_is_there() -> None:
    made, _ = scheduler(budget=100)
    made.add(sequence("first", 12, block_hashes=names("abc")))
    made.commit(made.schedule())
    made.add(sequence("second", 12, block_hashes=names("abc"), wants_prompt_logits=True))

    assert shares(made.schedule())["second"] == 12


def test_a_pool_that_holds_every_context_lets_every_sequence_run() -> None:
    """As the KV cache is sized by default: none waits for the blocks that others will not want."""
    made, _ = scheduler(num_blocks=4 * 3, block_size=4, seqs=4, budget=64)
    for name in "abcd":
        made.add(sequence(name, 8, max_num_tokens=12))

    first = made.schedule()
    made.commit(first)
    for _ in range(4):
        schedule = made.schedule()
        made.commit(schedule)
        assert shares(schedule) == dict.fromkeys("abcd", 1)

    assert shares(first) == dict.fromkeys("abcd", 8)


def test_a_sequence_of_its_last_block_keeps_none_in_reserve() -> None:
    made, _ = scheduler(num_blocks=4, block_size=4, seqs=2, budget=64)
    made.add(sequence("all there", 7, max_num_tokens=8))
    made.commit(made.schedule())
    made.add(sequence("newcomer", 8, max_num_tokens=8))

    assert "newcomer" in shares(made.schedule())


def test_a_preempted_sequence_finds_its_blocks_again() -> None:
    made, _ = scheduler(num_blocks=5, block_size=2, budget=16)
    made.add(sequence("old", 2))
    made.add(sequence("young", 4, block_hashes=names("ab")))
    preempted: list[Sequence] = []
    while not preempted:
        schedule = made.schedule()
        preempted += schedule.preempted
        made.commit(schedule)
    made.remove(RequestId("old"))
    (back,) = made.schedule().admitted

    assert back.request_id == "young"
    assert back.num_computed == 4
    assert back.num_cached_tokens == 0, "its prompt was not there when it came"


def test_the_lowest_number_is_admitted_first_and_keys_take_turns() -> None:
    made, _ = scheduler(seqs=1)
    for name in ("many 1", "many 2", "many 3"):
        made.add(sequence(name, 2, fairness_key="many"))
    made.add(sequence("few", 2, fairness_key="few"))
    made.add(sequence("urgent", 2, priority=-1, fairness_key="many"))

    order = []
    while made.has_work:
        schedule = made.schedule()
        made.commit(schedule)
        order += [row.sequence.request_id for row in schedule.rows]
        made.remove(schedule.rows[0].sequence.request_id)

    assert order == ["urgent", "many 1", "few", "many 2", "many 3"]


def test_an_urgent_prompt_goes_before_one_that_is_being_computed() -> None:
    made, _ = scheduler(budget=16)
    made.add(sequence("long", 60))
    made.commit(made.schedule())
    made.add(sequence("urgent", 6, priority=-1))
    made.add(sequence("like the long one", 6))

    assert shares(made.schedule()) == {"urgent": 6, "long": 10}


def test_the_least_urgent_gives_way_even_if_it_is_older() -> None:
    made, _ = scheduler(num_blocks=4, block_size=2)
    made.add(sequence("old", 2, priority=1))
    made.add(sequence("young", 2))
    made.commit(made.schedule())

    preempted: list[str] = []
    while not preempted:
        schedule = made.schedule()
        preempted += [victim.request_id for victim in schedule.preempted]
        made.commit(schedule)
        made.check_invariants()

    assert preempted == ["old"]


def test_beside_streams_a_prompt_gets_what_the_pace_allows() -> None:
    pace = StepPace(0.2)
    made, _ = scheduler(num_blocks=1000, budget=500, pace=pace)
    made.add(sequence("stream", 100))
    made.commit(made.schedule())
    pace.observe(num_stream_tokens=0, num_prompt_tokens=100, seconds=0.5)
    pace.observe(num_stream_tokens=1, num_prompt_tokens=0, seconds=0.1)
    made.add(sequence("long", 400))
    beside = shares(made.schedule())
    made.remove(RequestId("stream"))

    assert beside == {"stream": 1, "long": 20}
    assert shares(made.schedule()) == {"long": 400}, "nobody waits for the end of this step"


def test_on_a_slow_machine_a_prompt_gets_on_all_the_same() -> None:
    pace = StepPace(0.2)
    pace.observe(num_stream_tokens=1, num_prompt_tokens=0, seconds=3.0)
    made, _ = scheduler(budget=500, pace=pace)
    made.add(sequence("stream", 1))
    made.commit(made.schedule())
    made.add(sequence("long", 100))

    assert shares(made.schedule())["long"] == MIN_PROMPT_TOKENS


def test_by_prefill_first_streams_wait_for_prompts() -> None:
    made, _ = scheduler(budget=16, policy=SchedulerPolicy.PREFILL_FIRST)
    made.add(sequence("stream", 3))
    made.commit(made.schedule())
    made.add(sequence("long", 20))

    steps = []
    for _ in range(3):
        schedule = made.schedule()
        steps.append(shares(schedule))
        made.commit(schedule)

    assert steps == [{"long": 16}, {"long": 4, "stream": 1}, {"long": 1, "stream": 1}]
