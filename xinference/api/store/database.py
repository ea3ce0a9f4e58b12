# SPDX-License-Identifier: Apache-2.0
"""The one SQLite file in which the gateways of a home keep what outlives a request.

It is opened at its first use. One thread of each gateway works on it, so that no event loop
waits for a disk; several processes share it (WAL, and a writer waits for another). What it holds
belongs to *owners*: an API key sees its own things only.
"""

import asyncio
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from xinference.api.sqlite import open_shared
from xinference.errors import StoreUnavailable

SCHEMA_VERSION = 1
BUSY_SECONDS = 10.0
"""How long a writer waits for another process."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS answer (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    id TEXT NOT NULL,
    kind TEXT NOT NULL,
    model TEXT NOT NULL,
    previous_id TEXT,
    used_ts REAL NOT NULL,
    num_bytes INTEGER NOT NULL,
    given TEXT NOT NULL,
    body TEXT NOT NULL,
    UNIQUE (owner, id)
) STRICT;
CREATE INDEX IF NOT EXISTS answer_by_use ON answer (used_ts);
CREATE TABLE IF NOT EXISTS file (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,
    filename TEXT NOT NULL,
    purpose TEXT NOT NULL,
    num_bytes INTEGER NOT NULL,
    created_ts INTEGER NOT NULL,
    expires_ts INTEGER,
    is_whole INTEGER NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS file_chunk (
    file_seq INTEGER NOT NULL REFERENCES file (seq) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    data BLOB NOT NULL,
    PRIMARY KEY (file_seq, position)
) STRICT;
CREATE TABLE IF NOT EXISTS batch (
    seq INTEGER PRIMARY KEY AUTOINCREMENT,
    owner TEXT NOT NULL,
    id TEXT NOT NULL UNIQUE,
    status TEXT NOT NULL,
    document TEXT NOT NULL,
    lease_holder TEXT NOT NULL,
    lease_until REAL NOT NULL
) STRICT;
CREATE INDEX IF NOT EXISTS batch_by_status ON batch (status);
CREATE TABLE IF NOT EXISTS batch_line (
    batch_seq INTEGER NOT NULL REFERENCES batch (seq) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    is_error INTEGER NOT NULL,
    data TEXT NOT NULL,
    PRIMARY KEY (batch_seq, position)
) STRICT;
"""

Result = TypeVar("Result")


class Database:
    """The file, and the thread that works on it."""

    def __init__(self, path: Path | None) -> None:
        """Take a path; None keeps everything in memory, for this process alone."""
        self._path = path
        self._connection: sqlite3.Connection | None = None
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="store")

    async def read(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do `work`, which changes nothing, in the thread of the store.

        Raises:
            StoreUnavailable: the file is damaged, or cannot be read.
        """
        return await self._run("DEFERRED", work)

    async def write(self, work: Callable[[sqlite3.Connection], Result]) -> Result:
        """Do `work` in one transaction, in the thread of the store. It stays undone if it raises.

        Raises:
            StoreUnavailable: the disk is full, the file is locked for long, or it is damaged.
        """
        # Why immediate: a transaction that reads first and then writes could not wait for another
        # writer, it would fail.
        return await self._run("IMMEDIATE", work)

    async def aclose(self) -> None:
        """Finish what was asked, and close the file."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown()

    async def _run(self, mode: str, work: Callable[[sqlite3.Connection], Result]) -> Result:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._do, mode, work)

    def _do(self, mode: str, work: Callable[[sqlite3.Connection], Result]) -> Result:
        try:
            if self._connection is None:
                self._connection = _opened(self._path)
            with _transaction(self._connection, mode):
                return work(self._connection)
        except sqlite3.DatabaseError as error:
            raise StoreUnavailable(problem=str(error)) from error

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()


def _opened(path: Path | None) -> sqlite3.Connection:
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Why not if it is there: to close a file drops the locks that SQLite has on it here.
        with suppress(FileExistsError):
            path.touch(mode=0o600, exist_ok=False)
    return open_shared(":memory:" if path is None else path, _prepare, busy_seconds=BUSY_SECONDS)


def _prepare(connection: sqlite3.Connection) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute("PRAGMA foreign_keys=ON")
    with _transaction(connection, "IMMEDIATE"):
        (version,) = connection.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise sqlite3.DatabaseError("it was written by a newer version of xinference")
        for statement in _SCHEMA.split(";\n"):
            connection.execute(statement)
        connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")


@contextmanager
def _transaction(connection: sqlite3.Connection, mode: str) -> Iterator[None]:
    connection.execute(f"BEGIN {mode}")
    try:
        yield
    except BaseException:
        connection.execute("ROLLBACK")
        raise
    connection.execute("COMMIT")
