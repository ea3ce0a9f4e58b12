# SPDX-License-Identifier: Apache-2.0
"""What survives a power cut: which models should run, and the supervisor's epoch.

SQLite in WAL mode with `synchronous=FULL`: a call that returned is on the disk. One process has
one store open; calls take well under a millisecond and run on the event loop.
"""

import fcntl
import logging
import sqlite3
from pathlib import Path
from typing import Self, TextIO

import msgspec

from xinference.errors import InvalidSetting, XinferenceError
from xinference.identifiers import ModelUid

from .messages import DesiredModel

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS model (model_uid TEXT PRIMARY KEY, document BLOB NOT NULL) STRICT;
"""


class DesiredStore:
    """The desired state on disk. Only the supervisor writes it, before it acts."""

    def __init__(self, connection: sqlite3.Connection, lock: TextIO) -> None:
        self._connection = connection
        self._lock = lock

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create the file, readable by its owner alone.

        Raises:
            InvalidSetting: another process has it open.
            sqlite3.Error: the file is no database, or cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        path.touch(mode=0o600)
        connection = sqlite3.connect(path, isolation_level=None, timeout=5.0)
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            connection.execute("PRAGMA synchronous=FULL")
            connection.executescript(_SCHEMA)
        except sqlite3.Error:
            connection.close()
            lock.close()
            raise
        return cls(connection, lock)

    def next_epoch(self) -> int:
        """Count this start and return its number; the first is 1."""
        row = self._connection.execute(
            "INSERT INTO counter VALUES ('supervisor_epoch', 1)"
            " ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value"
        ).fetchone()
        return int(row[0])

    def models(self) -> list[DesiredModel]:
        """Return every model that should run, sorted by uid; one that cannot be read is logged."""
        found = []
        for uid, document in self._connection.execute(
            "SELECT model_uid, document FROM model ORDER BY model_uid"
        ):
            try:
                found.append(msgspec.json.decode(document, type=DesiredModel))
            except (msgspec.DecodeError, XinferenceError) as error:
                logger.warning(
                    "Model %s is not started: what an earlier version has stored of it cannot be "
                    "read (%s). Launch it again under its uid; that replaces the entry.",
                    uid,
                    error,
                )
        return found

    def save(self, model: DesiredModel) -> None:
        """Write the model down, over an older entry of its uid."""
        self._connection.execute(
            "INSERT INTO model VALUES (?, ?)"
            " ON CONFLICT (model_uid) DO UPDATE SET document = excluded.document",
            (model.model_uid, msgspec.json.encode(model)),
        )

    def forget(self, model_uid: ModelUid) -> None:
        """Remove a model; nothing happens if there is none."""
        self._connection.execute("DELETE FROM model WHERE model_uid = ?", (model_uid,))

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
        self._lock.close()


def _locked(path: Path) -> TextIO:
    """Return a file whose lock says that the store is in use; it ends with this process.

    Why: two supervisors on one store would both start every model.
    """
    lock = path.with_name(f"{path.name}.lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise InvalidSetting(
            name="XINFERENCE_HOME",
            value=str(path.parent),
            expected="a directory that no other running cluster uses",
        ) from error
    return lock
