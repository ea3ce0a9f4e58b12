# SPDX-License-Identifier: Apache-2.0
"""Opening an SQLite file that the gateways and the command lines of a home share."""

import sqlite3
import time
from collections.abc import Callable
from pathlib import Path

RETRY_SECONDS = 0.01


def open_shared(
    path: Path | str, prepare: Callable[[sqlite3.Connection], object], *, busy_seconds: float
) -> sqlite3.Connection:
    """Open a file in WAL mode and `prepare` it; any thread may use the connection.

    What `prepare` does may be done more than once, and by several processes. Statements wait up
    to `busy_seconds` for another process, and so does this; the calling thread waits meanwhile.

    Raises:
        sqlite3.Error: it is locked for longer, damaged, or cannot be read or written.
    """
    deadline = time.monotonic() + busy_seconds
    while True:
        connection = sqlite3.connect(
            path, isolation_level=None, timeout=busy_seconds, check_same_thread=False
        )
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            prepare(connection)
        except sqlite3.Error as error:
            connection.close()
            # Why: two that change the mode of a new file at once could each wait for the other,
            # so SQLite refuses one of them at once, whatever its timeout.
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        else:
            return connection
        # Why a sleep: nothing tells when the other one is done, which takes some milliseconds.
        time.sleep(RETRY_SECONDS)


def _is_busy(error: sqlite3.Error) -> bool:
    # The low byte is the error, the others say more of it. An error of the binding has none.
    return (getattr(error, "sqlite_errorcode", 0) & 0xFF) == sqlite3.SQLITE_BUSY
