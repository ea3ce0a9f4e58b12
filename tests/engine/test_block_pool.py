# SPDX-License-Identifier: Apache-2.0
"""Blocks are free or held, never both, and low ids go first."""

import pytest

from xinference.engine.block_pool import BlockPool


def test_the_lowest_free_ids_are_handed_out_first() -> None:
    pool = BlockPool(6)
    first = pool.allocate(4)

    pool.release([first[0], first[2]])

    assert first == [0, 1, 2, 3]
    assert pool.allocate(3) == [0, 2, 4]


def test_a_shared_block_is_free_when_its_last_holder_lets_go() -> None:
    pool = BlockPool(2)
    blocks = pool.allocate(1)
    pool.share(blocks)

    pool.release(blocks)
    held_once = pool.num_used
    pool.release(blocks)

    assert held_once == 1
    assert pool.num_used == 0


def test_letting_go_of_a_free_block_is_a_bug() -> None:
    pool = BlockPool(2)

    with pytest.raises(AssertionError, match="already free"):
        pool.release([1])


def test_asking_for_more_than_there_is_takes_nothing() -> None:
    pool = BlockPool(2)

    with pytest.raises(AssertionError):
        pool.allocate(3)

    assert pool.num_free == 2


def test_the_invariants_find_a_block_that_nobody_holds() -> None:
    pool = BlockPool(3)
    table = pool.allocate(2)

    pool.check_invariants([table])

    with pytest.raises(AssertionError):
        pool.check_invariants([table[:1]])


def test_a_named_block_is_found_after_its_last_holder_has_let_go() -> None:
    pool = BlockPool(4)
    blocks = pool.allocate(2)
    for block_id, name in zip(blocks, (b"a", b"ab"), strict=True):
        pool.name(block_id, name)
    pool.release(blocks)

    found = pool.find([b"a", b"ab", b"abc"])
    pool.share(found)

    assert found == blocks
    assert (pool.num_used, pool.num_kept) == (2, 0)
    pool.check_invariants([found])


def test_a_prefix_is_forgotten_from_its_end_and_the_oldest_first() -> None:
    pool = BlockPool(4)
    for prefix in ("ab", "xy"):
        blocks = pool.allocate(2)
        for end, block_id in enumerate(blocks):
            pool.name(block_id, prefix[: end + 1].encode())
        pool.release(blocks)
        pool.check_invariants([])

    pool.allocate(1)
    left = [len(pool.find(names)) for names in ([b"a", b"ab"], [b"x", b"xy"])]
    pool.allocate(2)

    assert left == [1, 2]
    assert [len(pool.find(names)) for names in ([b"a", b"ab"], [b"x", b"xy"])] == [0, 1]


def test_blocks_without_a_name_go_before_kept_ones() -> None:
    pool = BlockPool(3)
    (kept,) = pool.allocate(1)
    pool.name(kept, b"a")
    pool.release([kept])

    assert pool.allocate(2) == [1, 2]
    assert pool.find([b"a"]) == [kept]
    assert pool.allocate(1) == [kept]
    assert pool.find([b"a"]) == []


def test_the_first_to_have_a_name_keeps_it() -> None:
    pool = BlockPool(2)
    first, second = pool.allocate(2)
    pool.name(first, b"a")
    pool.name(second, b"a")

    assert pool.find([b"a"]) == [first]
    pool.release([second])
    assert pool.num_kept == 0
    pool.check_invariants([[first]])


def test_a_named_block_takes_no_other_name() -> None:
    pool = BlockPool(1)
    (block_id,) = pool.allocate(1)
    pool.name(block_id, b"a")

    with pytest.raises(AssertionError, match="another name"):
        pool.name(block_id, b"b")
