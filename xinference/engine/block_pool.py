# SPDX-License-Identifier: Apache-2.0
"""Who holds which block of the KV cache, and which blocks of the past can be used again.

In: "give me n blocks", "this block now holds what that hash names", "I let go". Out: block ids,
integers from 0. It knows no tensors, no tokens and no requests; the memory those ids point into is
`kv_cache.py`'s, its layout is the attention backend's, and hashes are made by `prefix_hash.py`.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from heapq import heappop, heappush


class BlockPool:
    """A fixed number of blocks, each free or held by one or more block tables.

    A free block whose content has a name is kept as long as possible and can be held again by
    that name; the one let go the longest time ago is forgotten first.

    Invariants: a block is free if and only if its reference count is 0, and then it is in exactly
    one of the free heap (no name) and the kept ones (a name); free + used = total. A name belongs
    to one block and a block has at most one. Owned by the engine's thread.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 1:
            raise ValueError(f"a pool needs at least one block, got {num_blocks}")
        self._ref_counts = [0] * num_blocks
        # Why a heap and not a queue: the lowest free id first keeps the blocks in use dense, so
        # that the CPU attention reads them as a few long ranges instead of copying them.
        self._free = list(range(num_blocks))
        self._kept: OrderedDict[int, None] = OrderedDict()  # the next one to be forgotten first
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}

    @property
    def num_blocks(self) -> int:
        return len(self._ref_counts)

    @property
    def num_free(self) -> int:
        """Blocks that nobody holds, kept ones included."""
        return len(self._free) + len(self._kept)

    @property
    def num_used(self) -> int:
        return len(self._ref_counts) - self.num_free

    @property
    def num_kept(self) -> int:
        """Blocks that nobody holds and whose content can be used again."""
        return len(self._kept)

    def allocate(self, num_blocks: int) -> list[int]:
        """Take `num_blocks` free blocks, each held once by the caller: those without a name first,
        lowest ids first, then the kept ones, which lose theirs.

        Callers check `num_free` before; asking for more is a bug and raises `AssertionError`
        with nothing taken.
        """
        assert num_blocks <= self.num_free, (num_blocks, self.num_free)
        block_ids = [heappop(self._free) for _ in range(min(num_blocks, len(self._free)))]
        forgotten = [self._kept.popitem(last=False)[0] for _ in range(num_blocks - len(block_ids))]
        for block_id in forgotten:
            self._forget(block_id)
        # Why sorted: a sequence that goes on from id to next id is read as one range.
        block_ids += sorted(forgotten)
        for block_id in block_ids:
            self._ref_counts[block_id] = 1
        return block_ids

    def find(self, hashes: Iterable[bytes]) -> list[int]:
        """Return the blocks of these names, up to the first that is not there. Takes nothing."""
        block_ids = []
        for block_hash in hashes:
            block_id = self._block_of.get(block_hash)
            if block_id is None:
                break
            block_ids.append(block_id)
        return block_ids

    def num_free_among(self, block_ids: Iterable[int]) -> int:
        """Return how many of these blocks nobody holds."""
        return sum(self._ref_counts[block_id] == 0 for block_id in block_ids)

    def share(self, block_ids: Iterable[int]) -> None:
        """Add one holder to each of these blocks, all of them in use or kept."""
        for block_id in block_ids:
            if self._ref_counts[block_id] == 0:
                assert block_id in self._kept, f"block {block_id} is free"
                del self._kept[block_id]
            self._ref_counts[block_id] += 1

    def name(self, block_id: int, block_hash: bytes) -> None:
        """Say what a block in use holds from now on; it must not be written any more.

        If another block has the name, that one keeps it: two that computed the same thing side by
        side both go on with their own, since block tables only grow.
        """
        assert self._ref_counts[block_id] > 0, f"block {block_id} is free"
        assert self._hash_of[block_id] in (None, block_hash), f"block {block_id} has another name"
        if self._block_of.setdefault(block_hash, block_id) == block_id:
            self._hash_of[block_id] = block_hash

    def release(self, block_table: Sequence[int]) -> None:
        """Take one holder off each of these blocks; the last one to go frees the block."""
        # Why reversed: a kept prefix is worth nothing without its first block. Letting go of the
        # tail first makes forgetting eat prefixes from their ends.
        for block_id in reversed(block_table):
            assert self._ref_counts[block_id] > 0, f"block {block_id} is already free"
            self._ref_counts[block_id] -= 1
            if self._ref_counts[block_id] == 0:
                if self._hash_of[block_id] is None:
                    heappush(self._free, block_id)
                else:
                    self._kept[block_id] = None

    def check_invariants(self, block_tables: Iterable[Sequence[int]]) -> None:
        """Compare the counts with all block tables; raise `AssertionError` on a difference."""
        held = [0] * self.num_blocks
        for block_table in block_tables:
            assert len(set(block_table)) == len(block_table), f"a block twice in {block_table}"
            for block_id in block_table:
                held[block_id] += 1
        assert held == self._ref_counts, (held, self._ref_counts)
        free = [block_id for block_id, count in enumerate(self._ref_counts) if count == 0]
        assert sorted([*self._free, *self._kept]) == free, (self._free, self._kept, free)
        assert all(
            self._free[(child - 1) // 2] <= self._free[child] for child in range(1, len(self._free))
        )
        assert all(self._hash_of[block_id] is None for block_id in self._free), self._free
        assert all(self._hash_of[block_id] is not None for block_id in self._kept), self._kept
        named = {name: block_id for block_id, name in enumerate(self._hash_of) if name is not None}
        assert named == self._block_of, (named, self._block_of)
        assert len(named) == sum(name is not None for name in self._hash_of), self._hash_of

    def _forget(self, block_id: int) -> None:
        block_hash = self._hash_of[block_id]
        assert block_hash is not None, f"block {block_id} has no name"
        self._hash_of[block_id] = None
        del self._block_of[block_hash]
