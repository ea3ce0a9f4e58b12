# SPDX-License-Identifier: Apache-2.0
"""Scheduler and block pool through random histories, with a memory that shows every mistake.

Each token that a step computes is written to the block it belongs to, as a fingerprint of
everything up to it; each step then reads all that its rows would attend to. Sharing, forgetting,
preemption or reuse of a block that is wrong anywhere reads a fingerprint of somebody else.
"""

import itertools
import random
from dataclasses import dataclass

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.long_runs import RecordLongRun
from xinference.engine.block_pool import BlockPool
from xinference.engine.pace import StepPace
from xinference.engine.scheduler import Schedule, Scheduler, Sequence
from xinference.identifiers import RequestId
from xinference.protocol.deployment import SchedulerPolicy

MAX_LIVE = 12
BASES = 3
"""Prompts are beginnings of so many texts, with a few letters of their own."""


@dataclass(frozen=True)
class World:
    """The sizes of one random history."""

    num_blocks: int
    block_size: int
    seqs: int
    budget: int
    policy: SchedulerPolicy
    is_paced: bool
    is_chunked: bool
    """Prompts are cut at the multiples of a block, which needs a larger budget."""
    seed: int

    @property
    def step_budget(self) -> int:
        return self.budget + (self.block_size + self.seqs if self.is_chunked else 0)


class Text:
    """The tokens of one request, as fingerprints: number i stands for all tokens up to i."""

    def __init__(self, salt: int) -> None:
        self.prints: list[int] = []
        self._last = hash((salt, "start"))

    def append(self, token: int) -> None:
        self._last = hash((self._last, token))
        self.prints.append(self._last)

    def continued(self) -> None:
        """Append what a greedy model would: it follows from everything before."""
        self.append(self._last % 5)

    def names(self, block_size: int, num_tokens: int) -> list[bytes]:
        ends = range(block_size, num_tokens + 1, block_size)
        return [self.prints[end - 1].to_bytes(8, "big", signed=True) for end in ends]


class History:
    """One world, lived through step by step."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.source = random.Random(world.seed)
        self.pool = BlockPool(world.num_blocks)
        # Why not both: a pace cuts by the clock.
        self.pace = StepPace(0.2) if world.is_paced and not world.is_chunked else None
        self.scheduler = Scheduler(
            self.pool,
            block_size=world.block_size,
            max_num_seqs=world.seqs,
            max_num_batched_tokens=world.step_budget,
            policy=world.policy,
            pace=self.pace,
            chunk_size=world.block_size if world.is_chunked else None,
        )
        self.capacity = world.num_blocks * world.block_size
        self.memory: list[list[int | None]] = [
            [None] * world.block_size for _ in range(world.num_blocks)
        ]
        bases = self.source.getrandbits(32)
        self.bases = [
            [random.Random(bases + base).randrange(5) for _ in range(self.capacity)]
            for base in range(BASES)
        ]
        self.texts: dict[str, Text] = {}
        self.limits: dict[str, int] = {}
        self.sequences: dict[str, Sequence] = {}
        self.tables: dict[str, list[int]] = {}
        self.numbers = itertools.count()
        self.num_computing = 0
        self.num_hit_tokens = 0
        self.num_preempted = 0

    def arrive(self) -> None:
        """Somebody comes with a prompt that begins like others'."""
        source, name = self.source, str(next(self.numbers))
        num_tokens = source.randint(1, self.capacity)
        text = Text(salt=source.choice([0, 0, 0, 1]))
        base = source.choice(self.bases)
        common = source.randint(0, num_tokens)
        for position in range(num_tokens):
            text.append(base[position] if position < common else source.randrange(5))
        names = text.names(self.world.block_size, num_tokens) if source.random() < 0.9 else []
        self.texts[name] = text
        self.limits[name] = source.randint(num_tokens, self.capacity)
        self.sequences[name] = Sequence(
            request_id=RequestId(name),
            num_prompt_tokens=num_tokens,
            num_tokens=num_tokens,
            max_num_tokens=self.limits[name],
            priority=source.choice([0, 0, 0, 1, -1]),
            fairness_key=source.choice("abc"),
            block_hashes=names,
            wants_prompt_logits=source.random() >= 0.9,
        )
        self.scheduler.add(self.sequences[name])

    def leave(self, name: str) -> None:
        self.scheduler.remove(RequestId(name))
        for known in (self.texts, self.limits, self.sequences, self.tables):
            known.pop(name, None)  # type: ignore[attr-defined]

    def step(self) -> None:
        """Schedule, compute, commit; check everything on the way."""
        schedule = self.scheduler.schedule()
        self.scheduler.check_invariants()
        for victim in schedule.preempted:
            self.tables.pop(victim.request_id, None)
            self.num_preempted += 1
        self._check_shares(schedule)
        self.num_hit_tokens += sum(fresh.num_computed for fresh in schedule.admitted)
        for row in schedule.rows:
            self._compute(row.sequence, row.num_new)
        for row in schedule.rows:
            self._read(row.sequence, row.sequence.num_computed + row.num_new)
        if self.source.random() < 0.01:
            for row in schedule.rows:  # the forward raised: nothing is committed
                self.leave(row.sequence.request_id)
            self.scheduler.check_invariants()
            return
        for row in schedule.rows:
            self._name(row.sequence, row.sequence.num_computed + row.num_new)
        self.scheduler.commit(schedule)
        self.scheduler.check_invariants()
        self.check_names()
        self._observe(schedule)
        self.num_computing += bool(schedule.rows)
        for row in schedule.rows:
            sequence = row.sequence
            name = sequence.request_id
            if len(self.texts[name].prints) < sequence.num_tokens:
                self.texts[name].continued()
            if sequence.num_tokens > self.limits[name]:
                self.leave(name)
        self.scheduler.check_invariants()

    def _check_shares(self, schedule: Schedule) -> None:
        world, rows = self.world, schedule.rows
        assert sum(row.num_new for row in rows) <= world.step_budget
        assert len({row.sequence.slot for row in rows}) == len(rows)
        assert bool(rows) == bool(self.sequences), "with work to do, every step does some"
        assert all(row.num_new >= 1 for row in rows)
        if world.is_chunked:
            for row in rows:
                end = row.sequence.num_computed + row.num_new
                is_cut = end % world.block_size == 0 or end == row.sequence.num_tokens
                assert row.num_new <= world.block_size, row
                assert is_cut, "where a chunk ends depends on its sequence alone"
        served = {row.sequence.request_id for row in rows}
        running = [one for one in self.sequences.values() if one.slot is not None]
        streams = [one for one in running if one.num_tokens - one.num_computed == 1]
        if world.policy is SchedulerPolicy.FIFO:
            fresh = {one.request_id for one in schedule.admitted}
            waited_for = [one for one in streams if one.request_id not in fresh]
            assert served >= {one.request_id for one in waited_for}, "no stream waits"
            if waited_for and self.pace is not None:
                beside = sum(row.num_new for row in rows) - len(waited_for)
                assert beside <= self.pace.max_prompt_tokens()
        order = [one for one in self.scheduler.sequences() if one.slot is not None]
        prompts = [one for one in order if one not in streams]
        if prompts:
            assert min(prompts, key=lambda one: one.priority).request_id in served or (
                set(map(id, streams)) & {id(one) for one in schedule.admitted}
            ), "the first prompt gets on"
        for admitted in schedule.admitted:
            assert admitted.num_computed <= admitted.num_tokens - 1
            assert admitted.num_computed % world.block_size == 0
            assert not admitted.wants_prompt_logits or admitted.num_computed == 0

    def _compute(self, sequence: Sequence, num_new: int) -> None:
        """Write the fingerprints of a row's tokens to where its block table says."""
        size, name = self.world.block_size, sequence.request_id
        table = sequence.block_table
        end = sequence.num_computed + num_new
        assert end <= sequence.num_tokens
        assert end <= len(table) * size, "its blocks hold what is computed"
        known = self.tables.get(name, [])
        assert table[: len(known)] == known, "tables only grow"
        self.tables[name] = list(table)
        for position in range(sequence.num_computed, end):
            block_id = table[position // size]
            assert position // size >= sequence.num_named_blocks, "a named block is not written"
            assert self.holders_of(block_id) == [name], "what is written is nobody else's"
            self.memory[block_id][position % size] = self.texts[name].prints[position]

    def holders_of(self, block_id: int) -> list[str]:
        return [one for one, known in self.sequences.items() if block_id in known.block_table]

    def check_names(self) -> None:
        """Check that every block that can be found by a name holds what the name says."""
        for block_hash, block_id in self.pool._block_of.items():
            last = self.memory[block_id][-1]
            assert last is not None
            assert last.to_bytes(8, "big", signed=True) == block_hash, block_id

    def _read(self, sequence: Sequence, num_tokens: int) -> None:
        """Check that all that a row attends to is its own, whoever computed it."""
        size, prints = self.world.block_size, self.texts[sequence.request_id].prints
        for index in range(-(-num_tokens // size)):
            start = index * size
            filled = min(size, num_tokens - start)
            content = self.memory[sequence.block_table[index]][:filled]
            assert content == prints[start : start + filled], (sequence, index)

    def _name(self, sequence: Sequence, num_computed: int) -> None:
        """Extend the names to the blocks that are full now, as the engine does."""
        hashes, size = sequence.block_hashes, self.world.block_size
        is_named = bool(hashes) or sequence.num_prompt_tokens < size
        if is_named and num_computed // size > len(hashes):
            text = self.texts[sequence.request_id]
            hashes += text.names(size, num_computed)[len(hashes) :]

    def _observe(self, schedule: Schedule) -> None:
        if self.pace is not None and schedule.rows:
            num_streams = sum(row.num_new == 1 for row in schedule.rows)
            num_prompt = sum(row.num_new for row in schedule.rows) - num_streams
            self.pace.observe(
                num_stream_tokens=num_streams,
                num_prompt_tokens=num_prompt,
                seconds=self.source.uniform(0.001, 0.1) + num_prompt * 0.005,
            )

    def live(self, num_steps: int) -> None:
        """Let requests come and go for so many steps, then let all that are there end."""
        for _ in range(num_steps):
            while self.source.random() < 0.3 and len(self.sequences) < MAX_LIVE:
                self.arrive()
            if self.sequences and self.source.random() < 0.08:
                self.leave(self.source.choice(sorted(self.sequences)))
                self.scheduler.check_invariants()
            self.step()
        most = sum(self.limits.values()) * (MAX_LIVE + 1) + 10
        while self.sequences:
            self.step()
            most -= 1
            assert most > 0, "everybody ends"
        assert self.pool.num_free == self.world.num_blocks
        assert self.pool.num_used == 0
        assert not self.scheduler.has_work


WORLDS = st.builds(
    World,
    num_blocks=st.integers(2, 24),
    block_size=st.sampled_from([1, 2, 3, 8]),
    seqs=st.integers(1, 6),
    budget=st.integers(1, 40),
    policy=st.sampled_from(SchedulerPolicy),
    is_paced=st.booleans(),
    is_chunked=st.booleans(),
    seed=st.integers(0, 2**32),
)


@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(world=WORLDS)
def test_the_invariants_hold_through_any_history(world: World) -> None:
    History(world).live(num_steps=80)


def test_the_invariants_hold_through_long_histories(
    is_long: bool, record_long_run: RecordLongRun
) -> None:
    source = random.Random(2)
    num_computing = num_hit_tokens = num_preempted = num_requests = 0
    for _ in range(400 if is_long else 10):
        history = History(
            World(
                num_blocks=source.randint(2, 24),
                block_size=source.choice([1, 2, 3, 8]),
                seqs=source.randint(1, 6),
                budget=source.randint(1, 40),
                policy=source.choice(list(SchedulerPolicy)),
                is_paced=source.random() < 0.5,
                is_chunked=source.random() < 0.3,
                seed=source.getrandbits(32),
            )
        )
        history.live(num_steps=300)
        num_computing += history.num_computing
        num_hit_tokens += history.num_hit_tokens
        num_preempted += history.num_preempted
        num_requests += next(history.numbers)
    record_long_run(
        "Scheduler and block pool, random histories",
        steps=num_computing,
        requests=num_requests,
        preemptions=num_preempted,
        tokens_found_in_the_cache=num_hit_tokens,
    )

    assert num_computing > (100_000 if is_long else 2_000)
    assert num_hit_tokens > num_computing / 5, "the cache took part"
    assert num_preempted > num_computing / 100
