# SPDX-License-Identifier: Apache-2.0
"""What the C library's allocator keeps of memory that is free, given back to the system.

Batches and steps of ever new shapes leave holes of ever new sizes: the process grows although
nothing in it does. Knows glibc, and does nothing where there is another.
"""

import ctypes
import os
from collections.abc import Callable
from pathlib import Path

KEPT_BYTES = 16 * 2**20
"""That a process may grow by before the holes are given back. Why not 0: pages that come back cost
time, and a batch of a shape that was there before takes the same ones again."""
KEPT_IDLE_BYTES = 2 * 2**20
"""The same where it is done while there is nothing to do."""


class Heap:
    """The heap of this process, as its owner found it. Not shared: one thread calls it."""

    def __init__(
        self,
        *,
        kept_bytes: int = KEPT_BYTES,
        resident_bytes: Callable[[], int] | None = None,
        trim: Callable[[], object] | None = None,
    ) -> None:
        """Look at what there is now.

        Args:
            kept_bytes: that the process may grow by before free memory is given back.
            resident_bytes: says how much memory the process has. None: asks the system.
            trim: gives free memory back. None: glibc's, if that is there.
        """
        self._kept_bytes = kept_bytes
        self._resident_bytes = resident_bytes or _resident_bytes
        self._trim = trim or _glibc_trim()
        self._had_bytes = self._resident_bytes()

    def give_back(self) -> None:
        """Give free memory back if the process has grown by much since that was last done."""
        if self._trim is None or self._resident_bytes() - self._had_bytes <= self._kept_bytes:
            return
        self._trim()
        self._had_bytes = self._resident_bytes()


def _resident_bytes() -> int:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


def _glibc_trim() -> Callable[[], object] | None:
    try:
        malloc_trim = ctypes.CDLL(None).malloc_trim
    except (OSError, AttributeError, TypeError):
        return None
    malloc_trim.argtypes = [ctypes.c_size_t]
    return lambda: malloc_trim(0)
