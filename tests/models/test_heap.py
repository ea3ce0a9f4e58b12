# SPDX-License-Identifier: Apache-2.0
"""When free memory is given back to the system."""

import subprocess
import sys

from xinference.models.heap import KEPT_BYTES, Heap


class Process:
    """How much memory a process has, and how much of it is free."""

    def __init__(self) -> None:
        self.used_bytes, self.free_bytes, self.num_trims = 10 * KEPT_BYTES, 0, 0

    def trim(self) -> None:
        self.free_bytes = 0
        self.num_trims += 1

    def heap(self) -> Heap:
        return Heap(resident_bytes=lambda: self.used_bytes + self.free_bytes, trim=self.trim)


def test_what_is_kept_for_the_next_batch_stays_and_more_goes_back() -> None:
    process = Process()
    heap = process.heap()

    process.free_bytes = KEPT_BYTES
    heap.give_back()
    assert process.num_trims == 0

    process.free_bytes += 1
    heap.give_back()
    assert (process.num_trims, process.free_bytes) == (1, 0)


def test_one_that_keeps_less_gives_back_sooner() -> None:
    process = Process()
    heap = Heap(
        kept_bytes=1,
        resident_bytes=lambda: process.used_bytes + process.free_bytes,
        trim=process.trim,
    )

    process.free_bytes = 2
    heap.give_back()

    assert process.free_bytes == 0


def test_what_is_used_is_not_looked_through_again_and_again() -> None:
    process = Process()
    heap = process.heap()
    process.used_bytes += 2 * KEPT_BYTES

    for _ in range(10):
        heap.give_back()

    assert process.num_trims == 1


def test_a_real_process_gets_smaller() -> None:
    # Why another process: in one that ran other tests the blocks find free memory.
    ran = subprocess.run(
        [sys.executable, "-c", GROW_AND_GIVE_BACK],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    grown, left = map(int, ran.stdout.split())

    assert grown > 80 * 2**20
    assert left < 0.7 * grown


# Each block is too small for the allocator to ask the system for it alone; every second is kept.
GROW_AND_GIVE_BACK = """
import numpy as np
from xinference.models.heap import Heap, _resident_bytes
heap = Heap()
before = _resident_bytes()
blocks = [np.ones(12_000) for _ in range(1000)]
held = blocks[::2]
grown = _resident_bytes() - before
del blocks
heap.give_back()
print(grown, _resident_bytes() - before)
assert len(held) == 500
"""
