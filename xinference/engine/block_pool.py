# SPDX-License-Identifier: Apache-2.0
"""Who holds which block of the KV cache: ids and reference counts, nothing else.

In: "give me n blocks", "one more holder", "I let go". Out: block ids, integers from 0.
It knows no tensors, no tokens and no requests; the memory those ids point into is
`kv_cache.py`'s, and its layout is the attention backend's.
"""

from collections.abc import Iterable, Sequence
from heapq import heappop, heappush


class BlockPool:
    """A fixed number of blocks, each free or held by one or more block tables.

    Invariants: a block is free if and only if its reference count is 0, and it is in the free
    heap exactly once then; free + used = total. Owned by the engine's thread.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self._ref_counts = [0] * num_blocks
        # Why a heap and not a queue: the lowest free id first keeps the blocks in use dense, so
        # that the CPU attention reads them as a few long ranges instead of copying them.
        self._free = list(range(num_blocks))

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_used(self) -> int:
        return len(self._ref_counts) - len(self._free)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, each held once by the caller, lowest ids first.

        Callers check `num_free` before; asking for more is a bug and raises `AssertionError`
        with nothing taken.
        """
        assert num_blocks <= len(self._free), (num_blocks, len(self._free))
        block_ids = [heappop(self._free) for _ in range(num_blocks)]
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one holder to each of these blocks, all of them in use."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is free"
            self._ref_counts[block_id] += 1

    def release(self, block_ids: Iterable[int]) -> None:
        """Take one holder off each of these blocks; the last one to go frees the block."""
        for block_id in block_ids:
            assert self._ref_counts[block_id] > 0, f"block {block_id} is already free"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                heappush(self._free, block_id)

    def check_invariants(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Compare the counts with all block tables; raise `AssertionError` on a difference."""
        held = [0] * self.num_blocks
        for block_table in block_tables:
            assert len(set(block_table)) == len(block_table), f"a block twice in {block_table}"
            for block_id in block_table:
                held[block_id] += 1
        assert held == self._ref_counts, (held, self._ref_counts)
        free = [block_id for block_id, count in enumerate(self._ref_counts) if count == 0]
        assert sorted(self._free) == free, (sorted(self._free), free)
        assert all(
            self._free[(child - 1) // 2] <= self._free[child] for child in range(1, len(self._free))
        )
