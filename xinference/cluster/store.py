# SPDX-License-Identifier: Apache-2.0
"""What survives a power cut: which models should run, which to start, and the supervisor's epoch.

SQLite in WAL mode with `synchronous=FULL`: a call that returned is on the disk. One process has
one store open; calls take well under a millisecond and run on the event loop.

Beside it is a copy, made at each start and now and then when something has changed. A file that is
damaged is put aside, and the copy takes its place.
"""

import fcntl
import logging
import shutil
import sqlite3
from pathlib import Path
from typing import Literal, Self, TextIO, TypeVar

import msgspec

from xinference.errors import InvalidSetting, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.autostart import AutostartEntry

from .messages import DesiredModel

logger = logging.getLogger(__name__)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS counter (name TEXT PRIMARY KEY, value INTEGER NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS model (model_uid TEXT PRIMARY KEY, document BLOB NOT NULL) STRICT;
CREATE TABLE IF NOT EXISTS autostart (model_uid TEXT PRIMARY KEY, document BLOB NOT NULL) STRICT;
"""

_Table = Literal["model", "autostart"]
DocumentT = TypeVar("DocumentT")


LOCKED_SECONDS = 0.2
"""For another program that reads or copies the file to let it go. The event loop waits, too."""
COPY_SUFFIX = ".copy"
DAMAGED_SUFFIX = ".damaged"


class DesiredStore:
    """The desired state on disk. Only the supervisor writes it, before it acts."""

    def __init__(self, connection: sqlite3.Connection, lock: TextIO, path: Path) -> None:
        self._connection = connection
        self._lock = lock
        self._path = path
        self._num_copied = -1
        """Changes that the copy has."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open or create the file, readable by its owner alone.

        Raises:
            InvalidSetting: another process has it open; or it is damaged, and so is its copy.
            sqlite3.Error: it cannot be written.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _locked(path)
        try:
            connection = _opened(path) or _restored(path)
        except sqlite3.Error as error:
            lock.close()
            raise sqlite3.OperationalError(f"{path}: {error}") from error
        except BaseException:
            lock.close()
            raise
        return cls(connection, lock, path)

    def next_epoch(self) -> int:
        """Count this start and return its number; the first is 1."""
        row = self._connection.execute(
            "INSERT INTO counter VALUES ('supervisor_epoch', 1)"
            " ON CONFLICT (name) DO UPDATE SET value = value + 1 RETURNING value"
        ).fetchone()
        return int(row[0])

    def models(self) -> list[DesiredModel]:
        """Return every model that should run, sorted by uid; one that cannot be read is logged."""
        remedy = "Launch it again under its uid"
        return self._documents("model", DesiredModel, remedy=remedy)

    def autostart(self) -> list[AutostartEntry]:
        """Return the autostart list; an entry that cannot be read is logged."""
        remedy = "Add it to the autostart list again"
        return self._documents("autostart", AutostartEntry, remedy=remedy)

    def save(self, model: DesiredModel) -> None:
        """Write the model down, over an older entry of its uid."""
        self._save("model", model.model_uid, model)

    def save_autostart(self, entry: AutostartEntry) -> None:
        """Write an entry of the autostart list down, over an older one of its uid."""
        self._save("autostart", entry.model_uid, entry)

    def forget(self, model_uid: ModelUid) -> None:
        """Remove a model; nothing happens if there is none."""
        self._forget("model", model_uid)

    def forget_autostart(self, model_uid: ModelUid) -> None:
        """Remove an entry of the autostart list; nothing happens if there is none."""
        self._forget("autostart", model_uid)

    def copy(self) -> None:
        """Make the copy, if anything has changed since the last one. Takes some milliseconds.

        Raises:
            sqlite3.Error: it cannot be written; the one before it stays.
        """
        num_changes = self._connection.total_changes
        if num_changes == self._num_copied:
            return
        draft = self._path.with_name(f"{self._path.name}{COPY_SUFFIX}.new")
        draft.unlink(missing_ok=True)
        draft.touch(mode=0o600)
        copied = sqlite3.connect(draft, isolation_level=None)
        try:
            self._connection.backup(copied)
        finally:
            copied.close()
        draft.replace(self._path.with_name(self._path.name + COPY_SUFFIX))
        self._num_copied = num_changes

    def close(self) -> None:
        """Close the file."""
        self._connection.close()
        self._lock.close()

    def _documents(self, table: _Table, kind: type[DocumentT], *, remedy: str) -> list[DocumentT]:
        found = []
        for uid, document in self._connection.execute(
            f"SELECT model_uid, document FROM {table} ORDER BY model_uid"
        ):
            try:
                found.append(msgspec.json.decode(document, type=kind))
            except (msgspec.DecodeError, XinferenceError) as error:
                logger.warning(
                    "Model %s is not started: what an earlier version has stored of it cannot be "
                    "read (%s). %s; that replaces the entry.",
                    uid,
                    error,
                    remedy,
                )
        return found

    def _save(self, table: _Table, model_uid: ModelUid, document: object) -> None:
        self._connection.execute(
            f"INSERT INTO {table} VALUES (?, ?)"
            " ON CONFLICT (model_uid) DO UPDATE SET document = excluded.document",
            (model_uid, msgspec.json.encode(document)),
        )

    def _forget(self, table: _Table, model_uid: ModelUid) -> None:
        self._connection.execute(f"DELETE FROM {table} WHERE model_uid = ?", (model_uid,))


def _opened(path: Path) -> sqlite3.Connection | None:
    """Return a connection to a file that is whole, new or old; None if it is damaged.

    Raises:
        sqlite3.Error: it cannot be used for another reason.
    """
    path.touch(mode=0o600)
    connection = sqlite3.connect(path, isolation_level=None, timeout=LOCKED_SECONDS)
    try:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("PRAGMA synchronous=FULL")
        connection.executescript(_SCHEMA)
        if connection.execute("PRAGMA quick_check(1)").fetchone() == ("ok",):
            return connection
    except sqlite3.DatabaseError as error:
        connection.close()
        # The low byte is the error, the others say more of it.
        if (error.sqlite_errorcode & 0xFF) not in {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB}:
            raise
    except sqlite3.Error:
        connection.close()
        raise
    connection.close()
    return None


def _restored(path: Path) -> sqlite3.Connection:
    """Put a damaged file aside and its copy in its place; return a connection to that.

    Raises:
        InvalidSetting: there is no copy that is whole.
    """
    copy = path.with_name(path.name + COPY_SUFFIX)
    candidate = path.with_name(f"{path.name}{COPY_SUFFIX}.new")
    if copy.exists():
        shutil.copyfile(copy, candidate)
        whole = _opened(candidate)
        if whole is not None:
            whole.close()
            aside = path.with_name(f"{path.name}{DAMAGED_SUFFIX}")
            path.replace(aside)
            for suffix in ("-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
            candidate.replace(path)
            logger.error(
                "%s is damaged. Its last copy takes its place: models launched or terminated since "
                "then are as they were before. The damaged file is now %s",
                path,
                aside,
            )
            connection = _opened(path)
            assert connection is not None, "it was whole a moment ago"
            return connection
    raise InvalidSetting(
        name="XINFERENCE_HOME",
        value=str(path.parent),
        expected=f"a directory whose {path.name} is whole: it is damaged, and there is no copy. "
        "Restore it, or remove it and launch the models again",
    )


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
            expected="a directory that no other running cluster uses. Stop that, or set another",
        ) from error
    return lock
