# SPDX-License-Identifier: Apache-2.0
"""The tokens and sampling parameters of everything that runs, as arrays indexed by slot.

A running sequence owns one slot. A step is an index vector over slots, so building its batch is
a handful of numpy calls whatever the lengths are: nothing here loops over tokens, and nothing
copies a context. The scheduler hands out the slots; this fills and reads them.
"""

from collections.abc import Sequence as Items

import numpy as np
import numpy.typing as npt

from xinference.protocol.generation import LEAST_TOP_P, SamplingParams

from .batch import Batch
from .logit_adjustment import needs_adjustment
from .scheduler import ScheduledRow, Sequence


class SlotTable:
    """State of up to `max_num_seqs` running sequences. Owned by the engine's thread."""

    def __init__(self, *, max_num_seqs: int, max_model_len: int, block_size: int) -> None:
        self._block_size = block_size
        # Why not int64: these are the only arrays as long as the context times the slots.
        self._token_ids = np.zeros((max_num_seqs, max_model_len), np.int32)
        self._block_tables = np.zeros((max_num_seqs, -(-max_model_len // block_size)), np.int32)
        self._num_blocks = np.zeros(max_num_seqs, np.int64)
        self.temperature = np.zeros(max_num_seqs, np.float32)
        self.top_p = np.ones(max_num_seqs, np.float32)
        self.top_k = np.zeros(max_num_seqs, np.int64)
        self.seed = np.zeros(max_num_seqs, np.uint64)
        self.min_p = np.zeros(max_num_seqs, np.float32)
        self.typical_p = np.ones(max_num_seqs, np.float32)
        self.adjusts = np.zeros(max_num_seqs, bool)
        """Whether the sequence changes its logits before it draws."""
        self.num_logprobs = np.full(max_num_seqs, -1, np.int64)
        """-1: none are wanted; 0: only the token's own."""

    def fill(
        self, sequence: Sequence, token_ids: npt.NDArray[np.int32], sampling: SamplingParams
    ) -> None:
        """Take over a sequence that was just admitted; every array of its slot is set anew.

        `sampling` must be complete (`resolve_sampling`, with a seed).
        """
        slot = sequence.slot
        assert slot is not None, sequence
        assert sampling.temperature is not None, sampling
        assert sampling.top_p is not None, sampling
        assert sampling.top_k is not None, sampling
        assert sampling.seed is not None, sampling
        self._token_ids[slot, : len(token_ids)] = token_ids
        self._num_blocks[slot] = 0
        self.temperature[slot] = sampling.temperature
        self.top_p[slot] = max(sampling.top_p, LEAST_TOP_P)
        self.top_k[slot] = max(sampling.top_k, 0)
        self.seed[slot] = sampling.seed % 2**64
        assert sampling.min_p is not None, sampling
        assert sampling.typical_p is not None, sampling
        self.min_p[slot] = sampling.min_p
        self.typical_p[slot] = sampling.typical_p
        self.adjusts[slot] = needs_adjustment(sampling)
        self.num_logprobs[slot] = -1 if sampling.logprobs is None else sampling.logprobs

    def token_ids_of(self, slot: int, num_tokens: int) -> npt.NDArray[np.int32]:
        """Return a copy of a slot's first tokens; a preempted sequence keeps them outside."""
        return self._token_ids[slot, :num_tokens].copy()

    def tokens_between(self, slot: int, start: int, end: int) -> npt.NDArray[np.int32]:
        """Return the tokens [start, end) of a slot, not copied."""
        return self._token_ids[slot, start:end]

    def append(
        self,
        slots: npt.NDArray[np.int64],
        positions: npt.NDArray[np.int64],
        token_ids: npt.NDArray[np.int64],
    ) -> None:
        """Write one new token per slot at the given positions; three arrays of one length."""
        self._token_ids[slots, positions] = token_ids

    def build(self, rows: Items[ScheduledRow]) -> Batch:
        """Return the step of these rows, which are in the order the scheduler gave them."""
        num_rows = len(rows)
        slots = np.empty(num_rows, np.int64)
        starts = np.empty(num_rows, np.int64)
        query_lens = np.empty(num_rows, np.int64)
        samples = np.empty(num_rows, bool)
        for index, row in enumerate(rows):
            slot = row.sequence.slot
            assert slot is not None, row
            slots[index], starts[index] = slot, row.sequence.num_computed
            query_lens[index], samples[index] = row.num_new, row.samples
            self._copy_new_blocks(slot, row.sequence.block_table)
        query_starts = np.concatenate(([0], np.cumsum(query_lens)))
        row_of_token = np.repeat(np.arange(num_rows), query_lens)
        positions = np.arange(query_starts[-1]) + (starts - query_starts[:-1])[row_of_token]
        most_blocks = max(len(row.sequence.block_table) for row in rows)
        return Batch(
            token_ids=self._token_ids[slots[row_of_token], positions].astype(np.int64),
            positions=positions,
            query_starts=query_starts,
            context_lens=starts + query_lens,
            block_tables=self._block_tables[slots, :most_blocks].astype(np.int64),
            block_size=self._block_size,
            sample_tokens=query_starts[1:][samples] - 1,
        )

    def _copy_new_blocks(self, slot: int, block_table: list[int]) -> None:
        known = int(self._num_blocks[slot])
        if known < len(block_table):
            self._block_tables[slot, known : len(block_table)] = block_table[known:]
            self._num_blocks[slot] = len(block_table)
