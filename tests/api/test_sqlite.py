# SPDX-License-Identifier: Apache-2.0
"""A file of the gateways can be opened by many at once, also when it is new."""

import sqlite3
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from xinference.api.sqlite import open_shared

NUM_FILES = 100
NUM_OPENERS = 4


def test_who_opens_a_new_file_at_once_all_get_it(tmp_path: Path) -> None:
    # One try in ten fails where an opener gives up when SQLite refuses to wait.
    barrier = Barrier(NUM_OPENERS)

    def open_one(path: Path) -> None:
        barrier.wait(timeout=30)
        open_shared(
            path,
            lambda connection: connection.execute("CREATE TABLE IF NOT EXISTS a (b)"),
            busy_seconds=30,
        ).close()

    with ThreadPoolExecutor(NUM_OPENERS) as threads:
        for i in range(NUM_FILES):
            path = tmp_path / f"{i}.db"
            list(threads.map(open_one, [path] * NUM_OPENERS))


def test_a_file_that_stays_locked_is_an_error_in_time(tmp_path: Path) -> None:
    path = tmp_path / "held.db"
    holder = open_shared(path, lambda connection: None, busy_seconds=1)
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(sqlite3.OperationalError, match="locked"):
            open_shared(
                path, lambda connection: connection.execute("BEGIN IMMEDIATE"), busy_seconds=0.05
            )
    finally:
        holder.close()
