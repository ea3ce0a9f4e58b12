# SPDX-License-Identifier: Apache-2.0
"""Which sequences run in the next step, and how many tokens of each.

There is no prefill phase and no decode phase: every sequence has `num_tokens` known tokens and
`num_computed` of them in the KV cache, and each step hands out tokens so that the second catches
up with the first. A decoding sequence lacks one token, a fresh prompt lacks all of them, a
preempted one lacks all of them again. The idea is vLLM's; the order and the admission rule here
are our own:

1. running sequences that lack one token (they stream to somebody), oldest first;
2. running sequences that lack more, oldest first, as chunks of what is left of the budget;
3. waiting sequences while there is a slot, budget, and room for the whole of each.

When a block is missing in 1, the youngest running sequence is preempted: it gives up its slot
and its blocks and waits, first in line, to be computed again. Integers only: no tensors, tokens,
clock or randomness.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from heapq import heappop, heappush

from xinference.identifiers import RequestId

from .block_pool import BlockPool

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
    num_computed: int = 0
    """The tokens [0, num_computed) are in the KV cache."""
    slot: int | None = None
    block_table: list[int] = field(default_factory=list)
    wants_prompt_logits: bool = False
    """Every token of its prompt is to be computed, none taken from a cache, and not too many in one
    step: each has a row of logits as wide as the vocabulary."""


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
    ones have distinct slots; a step never exceeds `max_num_batched_tokens`; every running sequence
    gets at least one token in every step, unless an older one waits for a whole chunk before it.
    """

    def __init__(
        self,
        pool: BlockPool,
        *,
        block_size: int,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        self._pool = pool
        self._block_size = block_size
        self._max_num_batched_tokens = max_num_batched_tokens
        # Why: with more running sequences than tokens in a step, some would starve.
        self._max_num_running = min(max_num_seqs, max_num_batched_tokens)
        self._free_slots = list(range(max_num_seqs))
        self._num_slots = max_num_seqs
        self._waiting: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._running: OrderedDict[RequestId, Sequence] = OrderedDict()
        self._num_logit_rows = MAX_LOGIT_ROWS
        """Of the step that is being decided, for prompts; what is left."""

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
        """Put a new sequence behind the waiting ones. Its prompt must fit the pool."""
        assert sequence.request_id not in self._waiting, sequence.request_id
        assert sequence.request_id not in self._running, sequence.request_id
        assert self._num_blocks_of(sequence.num_tokens) <= self._pool.num_blocks, sequence
        self._waiting[sequence.request_id] = sequence

    def schedule(self) -> Schedule:
        """Decide the next step and take the slots and blocks it needs.

        `commit` must be called with the result before the next `schedule`, or `remove` for each
        of its sequences.
        """
        preempted, freed_slots = self._grow_block_tables()
        rows: list[ScheduledRow] = []
        budget = self._max_num_batched_tokens
        self._num_logit_rows = MAX_LOGIT_ROWS
        catching_up: list[Sequence] = []
        for sequence in self._running.values():
            if sequence.num_tokens - sequence.num_computed == 1:
                rows.append(ScheduledRow(sequence=sequence, num_new=1))
                budget -= 1
            else:
                catching_up.append(sequence)
        for sequence in catching_up:
            budget -= self._take_chunk(sequence, budget, rows)
        admitted: list[Sequence] = []
        # Why not after a preemption: what was just evicted would come straight back, and evict.
        while not preempted and budget > 0 and (fresh := self._admit()) is not None:
            admitted.append(fresh)
            budget -= self._take_chunk(fresh, budget, rows)
        assert budget >= 0, budget
        return Schedule(
            rows=tuple(rows),
            preempted=tuple(preempted),
            freed_slots=tuple(freed_slots),
            admitted=tuple(admitted),
        )

    def commit(self, schedule: Schedule) -> None:
        """Note that the step was computed: each row's tokens are in the cache, and each row that
        samples has one more token."""
        for row in schedule.rows:
            sampled = row.samples
            row.sequence.num_computed += row.num_new
            row.sequence.num_tokens += sampled

    def remove(self, request_id: RequestId) -> int | None:
        """Forget a sequence, waiting or running; free its blocks and its slot.

        Returns:
            The slot it had; None if it was waiting.
        """
        waiting = self._waiting.pop(request_id, None)
        if waiting is not None:
            return None
        return self._release(self._running.pop(request_id))

    def check_invariants(self) -> None:
        """Raise `AssertionError` if the queues, the slots and the pool contradict each other."""
        running = list(self._running.values())
        assert not self._waiting.keys() & self._running.keys()
        for sequence in self._waiting.values():
            assert sequence.slot is None, sequence
            assert not sequence.block_table, sequence
            assert sequence.num_computed == 0, sequence
        for sequence in running:
            assert 0 <= sequence.num_computed <= sequence.num_tokens, sequence
            assert sequence.num_computed <= len(sequence.block_table) * self._block_size, sequence
        taken = sorted(slot for s in running if (slot := s.slot) is not None)
        assert len(taken) == len(running) <= self._max_num_running, running
        assert sorted(taken + self._free_slots) == list(range(self._num_slots)), taken
        self._pool.check_invariants(sequence.block_table for sequence in running)

    def sequences(self) -> Iterator[Sequence]:
        """Yield every live sequence, the running ones first, oldest first."""
        yield from self._running.values()
        yield from self._waiting.values()

    def _num_blocks_of(self, num_tokens: int) -> int:
        return -(-num_tokens // self._block_size)

    def _grow_block_tables(self) -> tuple[list[Sequence], list[int]]:
        """Give every running sequence the blocks of its known tokens, preempting if need be."""
        preempted: list[Sequence] = []
        freed_slots: list[int] = []
        for sequence in list(self._running.values()):
            if sequence.slot is None:
                break  # preempted below, and so is everything younger
            missing = self._num_blocks_of(sequence.num_tokens) - len(sequence.block_table)
            while missing > self._pool.num_free and sequence.slot is not None:
                _, youngest = self._running.popitem(last=True)
                freed_slots.append(self._release(youngest))
                youngest.num_computed = 0
                self._waiting[youngest.request_id] = youngest
                self._waiting.move_to_end(youngest.request_id, last=False)
                preempted.append(youngest)
            if missing > 0 and sequence.slot is not None:
                sequence.block_table.extend(self._pool.allocate(missing))
        return preempted, freed_slots

    def _take_chunk(self, sequence: Sequence, budget: int, rows: list[ScheduledRow]) -> int:
        num_new = min(budget, sequence.num_tokens - sequence.num_computed)
        if sequence.wants_prompt_logits:
            num_new = min(num_new, self._num_logit_rows)
            self._num_logit_rows -= num_new
        if num_new > 0:
            rows.append(ScheduledRow(sequence=sequence, num_new=num_new))
        return num_new

    def _admit(self) -> Sequence | None:
        """Move the first waiting sequence to running if it fits whole; None if it does not."""
        if not self._waiting or len(self._running) >= self._max_num_running:
            return None
        sequence = next(iter(self._waiting.values()))
        needed = self._num_blocks_of(sequence.num_tokens)
        # Why: each running sequence may want a block soon; without one in reserve for each, a
        # newcomer would be preempted again within a few steps.
        reserve = len(self._running)
        if needed + reserve > self._pool.num_free:
            return None
        del self._waiting[sequence.request_id]
        self._running[sequence.request_id] = sequence
        sequence.slot = heappop(self._free_slots)
        # Why all at once: one request's blocks come out as consecutive ids.
        sequence.block_table.extend(self._pool.allocate(needed))
        return sequence

    def _release(self, sequence: Sequence) -> int:
        assert sequence.slot is not None, sequence
        slot = sequence.slot
        self._pool.release(sequence.block_table)
        sequence.block_table.clear()
        heappush(self._free_slots, slot)
        sequence.slot = None
        return slot
