# SPDX-License-Identifier: Apache-2.0
"""The scheduler on its own: random histories of arrivals, tokens, ends and aborts."""

import itertools
import random
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from xinference.engine.block_pool import BlockPool
from xinference.engine.scheduler import Schedule, Scheduler, Sequence
from xinference.identifiers import RequestId


def sequence(request_id: str, num_tokens: int) -> Sequence:
    return Sequence(
        request_id=RequestId(request_id), num_prompt_tokens=num_tokens, num_tokens=num_tokens
    )


def scheduler(
    num_blocks: int = 100, *, block_size: int = 4, seqs: int = 4, budget: int = 16
) -> tuple[Scheduler, BlockPool]:
    pool = BlockPool(num_blocks)
    made = Scheduler(pool, block_size=block_size, max_num_seqs=seqs, max_num_batched_tokens=budget)
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


@dataclass(frozen=True)
class World:
    """The sizes of one random history."""

    num_blocks: int
    block_size: int
    seqs: int
    budget: int
    seed: int


WORLDS = st.builds(
    World,
    num_blocks=st.integers(2, 24),
    block_size=st.sampled_from([1, 2, 3, 8]),
    seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    seed=st.integers(0, 2**32),
)


def live_through(world: World, num_steps: int) -> int:
    """Run one history, checking everything after each step; return the steps that computed."""
    source = random.Random(world.seed)
    made, pool = scheduler(
        world.num_blocks, block_size=world.block_size, seqs=world.seqs, budget=world.budget
    )
    capacity = world.num_blocks * world.block_size
    names = itertools.count()
    limits: dict[str, int] = {}
    known: dict[str, list[int]] = {}  # blocks of each running sequence, to see that they only grow
    num_computing = 0
    for _ in range(num_steps):
        while source.random() < 0.3 and len(limits) < 12:
            name, prompt = str(next(names)), source.randint(1, capacity)
            limits[name] = source.randint(prompt, capacity)
            made.add(sequence(name, prompt))
        if limits and source.random() < 0.1:
            gone = source.choice(sorted(limits))
            made.remove(RequestId(gone))
            del limits[gone]
            made.check_invariants()

        schedule = made.schedule()
        made.check_invariants()
        assert sum(row.num_new for row in schedule.rows) <= world.budget
        assert len({row.sequence.slot for row in schedule.rows}) == len(schedule.rows)
        assert bool(schedule.rows) == bool(limits), "with work to do, every step does some"
        assert all(row.num_new >= 1 for row in schedule.rows)
        for row in schedule.rows:
            name = row.sequence.request_id
            blocks = row.sequence.block_table
            end = row.sequence.num_computed + row.num_new
            assert end <= row.sequence.num_tokens
            assert end <= len(blocks) * world.block_size, "its blocks hold what is computed"
            if row.sequence.num_computed:
                assert blocks[: len(known[name])] == known[name], "tables only grow"
            known[name] = list(blocks)
        oldest = next(iter(made.sequences()), None)
        if oldest is not None:
            # The oldest running one is never starved, so everything ends.
            assert any(row.sequence is oldest for row in schedule.rows)
        made.commit(schedule)
        made.check_invariants()
        num_computing += bool(schedule.rows)
        for row in schedule.rows:
            name = row.sequence.request_id
            if row.sequence.num_tokens > limits[name]:
                made.remove(row.sequence.request_id)
                del limits[name]
        made.check_invariants()
    for name in limits:
        made.remove(RequestId(name))
    assert pool.num_free == world.num_blocks
    assert not made.has_work
    return num_computing


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(world=WORLDS)
def test_the_invariants_hold_through_any_history(world: World) -> None:
    live_through(world, num_steps=80)


def test_the_invariants_hold_through_long_histories(is_long: bool) -> None:
    source = random.Random(2)
    num_computing = 0
    for _ in range(500 if is_long else 10):
        world = World(
            num_blocks=source.randint(2, 24),
            block_size=source.choice([1, 2, 3, 8]),
            seqs=source.randint(1, 6),
            budget=source.randint(1, 40),
            seed=source.getrandbits(32),
        )
        num_computing += live_through(world, num_steps=300)

    assert num_computing > (100_000 if is_long else 2_000)


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
