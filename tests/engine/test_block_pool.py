# SPDX-License-Identifier: Apache-2.0
"""Blocks are free or held, never both, and low ids go first."""

import pytest

from xinference.engine.block_pool import BlockPool


def test_the_lowest_free_ids_are_handed_out_first() -> None:
    pool = BlockPool(6)
    first = pool.allocate(4)

    pool.release([first[2], first[0]])

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
