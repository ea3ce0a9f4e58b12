# SPDX-License-Identifier: Apache-2.0
"""Which sequences run in the next step, and how many tokens of each.

There is no prefill phase and no decode phase: every sequence has `num_tokens` known tokens and
`num_computed` of them in the KV cache, and each step hands out tokens so that the second catches
up with the first. A decoding sequence lacks one token, a fresh prompt lacks all of them, a
preempted one lacks all of them again. The idea is vLLM's; the order and the admission rule here
are our own:

1. running sequences that lack one token (they stream to somebody), oldest first;
2. running sequences that lack more, by priority, then oldest first, as chunks of what is left of
   the budget; beside streams that is no more than the pace allows, so that they do not stall;
3. waiting sequences while there is a slot, budget, and room for the whole of each; one of a
   higher priority than what is left in 2 goes before it.

`PREFILL_FIRST` puts 1 behind 2 and 3, and knows no pace. What is waiting is `waiting.py`'s matter.

A sequence that is admitted starts behind the blocks whose content is already in the cache. When a
block is missing in 1, the youngest running sequence of the lowest priority is preempted: it gives
up its slot and its blocks and waits, first in line, to be computed again, or to find its blocks
again. Integers and names only: no tensors, tokens, clock or randomness.
"""

from collections import OrderedDict, deque
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from heapq import heappop, heappush

from xinference.identifiers import RequestId
from xinference.protocol.deployment import SchedulerPolicy

from .block_pool import BlockPool
from .pace import StepPace
from .waiting import WaitingQueue

MAX_LOGIT_ROWS = 256
"""Of prompts, in one step."""


@dataclass(slots=True, kw_only=True, eq=False)
class Sequence:
    """What the scheduler knows of one request. Written by the scheduler only.

    Invariants: `num_computed` ≤ `num_tokens`; `slot` is None and `block_table` is empty unless it
    runs; while it runs, the blocks hold at least `num_computed` tokens and only grow.
    """

    request_id: RequestId
    num_prompt_tokens: int
    num_tokens: int
    """Prompt and generated."""
    max_num_tokens: int
    """It ends when it has so many."""
    num_computed: int = 0
    """The tokens [0, num_computed) are in the KV cache."""
    slot: int | None = None
    block_table: list[int] = field(default_factory=list)
    priority: int = 0
    """Lower is earlier."""
    fairness_key: str = ""
    """Keys of one priority take turns."""
    block_hashes: list[bytes] = field(default_factory=list)
    """The names of its first full blocks of known tokens, by `prefix_hash`; the engine appends.
    Empty where prefixes are not kept."""
    wants_prompt_logits: bool = False
    """Every token of its prompt is to be computed, none taken from the cache, and not too many in
    one step: each has a row of logits as wide as the vocabulary."""
    num_cached_tokens: int | None = None
    """Of its prompt, how many were there when it was first admitted; None before."""
    num_named_blocks: int = 0
    """Of its block table, how many the pool knows by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledRow:
    """One sequence's share of a step: the tokens [num_computed, num_computed + num_new)."""

    sequence: Sequence
    num_new: int

    @property
    def samples(self) -> bool:
        """Whether the step computes the last known token, so that the next one can be drawn."""
        return self.sequence.num_computed + self.num_new == self.sequence.num_tokens


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """One step. `preempted` have lost their slots, `admitted` have just got theirs."""

    rows: tuple[ScheduledRow, ...]
    preempted: tuple[Sequence, ...]
    """With the slot each of them had, in `freed_slots`."""
    freed_slots: tuple[int, ...]
    admitted: tuple[Sequence, ...]


class Scheduler:
    """The queues, the slots and the block tables of one engine. Owned by the engine's thread.

    Invariants, checked by `check_invariants`: a sequence is waiting or running, not both; running
    ones have distinct slots; a step never exceeds `max_num_batched_tokens`; every stream gets its
    token in every step (but by `PREFILL_FIRST`), and of the prompts that run at least the first
    one, by priority and age, gets on.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
        policy: SchedulerPolicy = SchedulerPolicy.FIFO,
        pace: StepPace | None = None,
        chunk_size: int | None = None,
    ) -> None:
        """Make one for a pool.

        Args:
            pool: its blocks; nobody else takes from it.
            block_size: tokens in a block.
            max_num_seqs: slots.
            max_num_batched_tokens: of one step.
            policy: who goes first.
            pace: limits the prompt tokens of a step beside streams; None does not.
            chunk_size: prompts are cut at its multiples and nowhere else, so that how a sequence is
                computed is the same whatever runs beside it; None cuts where a step is full. A step
                must hold one chunk beside a token for every other slot.
        """
        assert chunk_size is None or max_num_batched_tokens >= chunk_size + max_num_seqs
        self._pool = pool
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        # Why: with more running sequences than tokens in a step, some would starve.
        self._max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self._free_slots = list(range(max_num_seqs))
        self._num_slots = max_num_seqs
        self._policy = policy
        self._pace = pace
        self._chunk_size = chunk_size
        self._waiting: WaitingQueue[Sequence] = WaitingQueue()
        self._running: OrderedDict[RequestId, Sequence] = OrderedDict()

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def add(self, sequence: Sequence) -> None:
        """Let a new sequence wait for its turn. Its prompt must fit the pool."""
        assert sequence.request_id not in self._running, sequence.request_id
        assert self._num_blocks_of(sequence.num_tokens) <= self._pool.num_blocks, sequence
        self._waiting.add(sequence)

    def schedule(self) -> Schedule:
        """Decide the next step and take the slots and blocks it needs.

        `commit` must be called with the result before the next `schedule`, or `remove` for each
        of its sequences.
        """
        preempted, freed_slots = self._grow_block_tables()
        streams: list[Sequence] = []
        prompts: list[Sequence] = []
        for sequence in self._running.values():
            is_stream = sequence.num_tokens - sequence.num_computed == 1
            (streams if is_stream else prompts).append(sequence)
        budget = self._max_num_batched_tokens
        if self._policy is SchedulerPolicy.FIFO:
            budget -= len(streams)
            if streams and self._pace is not None:
                budget = min(budget, self._pace.max_prompt_tokens())
        prompts.sort(key=lambda sequence: sequence.priority)
        # Why none after a preemption: what was just evicted would come straight back, and evict.
        chunks, admitted = self._share(budget, deque(prompts), may_admit=not preempted)
        if self._policy is SchedulerPolicy.PREFILL_FIRST:
            del streams[budget - sum(chunk.num_new for chunk in chunks) :]
        # Why streams first, whoever went first: attention reads single tokens as one run of rows.
        rows = [ScheduledRow(sequence=sequence, num_new=1) for sequence in streams] + chunks
        return Schedule(
            rows=tuple(rows),
            preempted=tuple(preempted),
            freed_slots=tuple(freed_slots),
            admitted=tuple(admitted),
        )

    def commit(self, schedule: Schedule) -> None:
        """Note that the step was computed: each row's tokens are in the cache, each block that is
        full and has a name can be found by it, and each row that samples has one more token."""
        for row in schedule.rows:
            sequence, sampled = row.sequence, row.samples
            sequence.num_computed += row.num_new
            sequence.num_tokens += sampled
            num_full = min(sequence.num_computed // self._block_size, len(sequence.block_hashes))
            for index in range(sequence.num_named_blocks, num_full):
                self._pool.name(sequence.block_table[index], sequence.block_hashes[index])
            sequence.num_named_blocks = max(sequence.num_named_blocks, num_full)

    def shrink(self, schedule: Schedule) -> Schedule:
        """Halve the token budget for good, and return the half of a step that it still holds.

        For a step that does not fit the device's memory. Rows that are left out, or cut, catch up
        in later steps.
        """
        budget = max(1, sum(row.num_new for row in schedule.rows) // 2)
        # Why not lower: every running sequence needs a token of each step.
        self._max_num_batched_tokens = max(
            self._max_num_running, min(self._max_num_batched_tokens, budget)
        )
        if self._chunk_size is not None:
            spare = self._max_num_batched_tokens - self._max_num_running
            self._chunk_size = max(1, min(self._chunk_size, spare))
        rows: list[ScheduledRow] = []
        for row in schedule.rows:
            num_new = min(row.num_new, budget)
            if num_new > 0:
                rows.append(ScheduledRow(sequence=row.sequence, num_new=num_new))
            budget -= num_new
        return replace(schedule, rows=tuple(rows))

    def remove(self, request_id: RequestId) -> int | None:
        """Forget a sequence, waiting or running; free its blocks and its slot.

        Returns:
            The slot it had; None if it was waiting.
        """
        if self._waiting.remove(request_id) is not None:
            return None
        return self._release(self._running.pop(request_id))

    def check_invariants(self) -> None:
        """Raise `AssertionError` if the queues, the slots and the pool contradict each other."""
        running = list(self._running.values())
        for sequence in self._waiting:
            assert sequence.request_id not in self._running, sequence
            assert sequence.slot is None, sequence
            assert not sequence.block_table, sequence
            assert sequence.num_computed == 0, sequence
        for sequence in running:
            assert 0 <= sequence.num_computed <= sequence.num_tokens, sequence
            assert sequence.num_computed <= len(sequence.block_table) * self._block_size, sequence
            assert sequence.num_named_blocks * self._block_size <= sequence.num_computed, sequence
            assert sequence.num_named_blocks <= len(sequence.block_hashes), sequence
        taken = sorted(slot for s in running if (slot := s.slot) is not None)
        assert len(taken) == len(running) <= self._max_num_running, running
        assert sorted(taken + self._free_slots) == list(range(self._num_slots)), taken
        self._pool.check_invariants(sequence.block_table for sequence in running)

    def sequences(self) -> Iterator[Sequence]:
        """Yield every live sequence: the running ones, oldest first, then the waiting ones."""
        yield from self._running.values()
        yield from self._waiting

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _grow_block_tables(self) -> tuple[list[Sequence], list[int]]:
        """Give every running sequence the blocks of its known tokens, preempting if need be."""
        preempted: list[Sequence] = []
        freed_slots: list[int] = []
        for sequence in list(self._running.values()):
            if sequence.slot is None:
                continue  # preempted below
            missing = self._num_blocks_of(sequence.num_tokens) - len(sequence.block_table)
            while missing > self._pool.num_free and sequence.slot is not None:
                victim = max(reversed(self._running.values()), key=lambda one: one.priority)
                del self._running[victim.request_id]
                freed_slots.append(self._release(victim))
                victim.num_computed = 0
                self._waiting.put_back(victim)
                preempted.append(victim)
            if missing > 0 and sequence.slot is not None:
                sequence.block_table.extend(self._pool.allocate(missing))
        return preempted, freed_slots

    def _share(
        self, budget: int, prompts: deque[Sequence], *, may_admit: bool
    ) -> tuple[list[ScheduledRow], list[Sequence]]:
        """Hand out a budget to prompts that run, by priority, and to those that are admitted."""
        chunks: list[ScheduledRow] = []
        admitted: list[Sequence] = []
        least = self._chunk_size or 1
        num_logit_rows = max(MAX_LOGIT_ROWS, least)
        while budget >= least:
            first = self._waiting.peek() if may_admit else None
            sequence = None
            if first is not None and (not prompts or first.priority < prompts[0].priority):
                sequence = self._admit(first)
                may_admit = sequence is not None
                if sequence is not None:
                    admitted.append(sequence)
            elif prompts:
                sequence = prompts.popleft()
            else:
                break
            if sequence is not None:
                num_new = min(budget, sequence.num_tokens - sequence.num_computed)
                if self._chunk_size is not None:
                    num_new = min(
                        num_new, self._chunk_size - sequence.num_computed % self._chunk_size
                    )
                if sequence.wants_prompt_logits:
                    if num_new > num_logit_rows:
                        # Why none of a fixed chunk: it is cut nowhere else.
                        num_new = num_logit_rows if self._chunk_size is None else 0
                    num_logit_rows -= num_new
                if num_new > 0:
                    chunks.append(ScheduledRow(sequence=sequence, num_new=num_new))
                    budget -= num_new
        return chunks, admitted

    def _admit(self, sequence: Sequence) -> Sequence | None:
        """Move the first waiting sequence to running if it fits whole; None if it does not."""
        if len(self._running) >= self._max_num_running:
            return None
        found = self._find_prefix(sequence)
        needed = self._num_blocks_of(sequence.num_tokens) - len(found)
        # Why: each running sequence may want a block soon; without one in reserve for each that can
        # still grow, a newcomer would be preempted again within a few steps.
        reserve = sum(
            len(running.block_table) * self._block_size < running.max_num_tokens
            for running in self._running.values()
        )
        if needed + reserve > self._pool.num_free - self._pool.num_free_among(found):
            return None
        self._waiting.pop()
        self._running[sequence.request_id] = sequence
        sequence.slot = heappop(self._free_slots)
        # Hazard: held before others are allocated, which would else forget what was just found.
        self._pool.share(found)
        # Why all at once: one request's blocks come out as consecutive ids.
        sequence.block_table.extend(found + self._pool.allocate(needed))
        sequence.num_named_blocks = len(found)
        sequence.num_computed = len(found) * self._block_size
        if sequence.num_cached_tokens is None:
            sequence.num_cached_tokens = sequence.num_computed
        return sequence

    def _find_prefix(self, sequence: Sequence) -> list[int]:
        """Return the blocks that are there of a sequence, at least one token short of all."""
        if sequence.wants_prompt_logits:
            return []
        most = (sequence.num_tokens - 1) // self._block_size
        return self._pool.find(sequence.block_hashes[:most])

    def _release(self, sequence: Sequence) -> int:
        assert sequence.slot is not None, sequence
        slot = sequence.slot
        self._pool.release(sequence.block_table)
        sequence.block_table.clear()
        sequence.num_named_blocks = 0
        heappush(self._free_slots, slot)
        sequence.slot = None
        return slot
