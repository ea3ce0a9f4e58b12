# SPDX-License-Identifier: Apache-2.0
"""What one forward computes, as numpy arrays: ragged rows, concatenated, without padding.

Tokens of row r are [query_starts[r], query_starts[r + 1]) of the concatenation:

    row:        0   1   2 2 2 2 2   3 3 3
    token:      0   1   2 3 4 5 6   7 8 9
    position:  41   7   0 1 2 3 4   9 10 11      of the token in its own sequence
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One step, built by `SlotTable.build` or by the self-test; int64 throughout."""

    token_ids: IntArray
    """(T,)"""
    positions: IntArray
    """(T,)"""
    query_starts: IntArray
    """(R + 1,)"""
    context_lens: IntArray
    """(R,) tokens of each sequence that are in the cache once this step has stored its own."""
    block_tables: IntArray
    """(R, most blocks of a row); entries beyond a row's context are not read."""
    block_size: int
    sample_tokens: IntArray
    """(rows that sample,) indices into T whose logits are wanted."""

    @property
    def query_lens(self) -> IntArray:
        """(R,)"""
        return np.diff(self.query_starts)

    @property
    def num_decode_rows(self) -> int:
        """How many of the first rows have one token each."""
        longer = np.flatnonzero(self.query_lens != 1)
        return int(longer[0]) if longer.size else len(self.context_lens)

    @property
    def cache_slots(self) -> IntArray:
        """(T,) where each token's key and value go: block id × block_size + place in the block."""
        rows = np.repeat(np.arange(len(self.context_lens)), self.query_lens)
        blocks = self.block_tables[rows, self.positions // self.block_size]
        return blocks * self.block_size + self.positions % self.block_size


def padded_groups(context_lens: IntArray, max_tokens: int) -> Iterator[IntArray]:
    """Yield rows in order, in groups whose contexts, padded to the longest, are at most
    `max_tokens` in all; a longer row is a group by itself."""
    start = 0
    while start < len(context_lens):
        longest = np.maximum.accumulate(context_lens[start:])
        padded = longest * np.arange(1, len(longest) + 1)
        size = max(1, int(np.searchsorted(padded, max_tokens, side="right")))
        yield np.arange(start, start + size)
        start += size
