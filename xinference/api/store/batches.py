# SPDX-License-Identifier: Apache-2.0
"""Batches: what was asked, who works on it now, and which lines are done.

A gateway works on a batch only while it holds its *lease*, which it renews. Every write of its
work names the lease, and is refused when another has taken it over; so a batch goes on where it
was when its gateway dies, and no line of it has two outcomes.

What a batch looks like to callers is a JSON object, the *document*. This module reads three fields
of it: `id`, `status` and `request_counts`.
"""

import asyncio
import secrets
import sqlite3
import time
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from xinference.errors import InvalidRequest, ObjectNotFound

from .database import Database
from .page import Page, page_of

KIND = "batch"
LEASE_SECONDS = 10.0
LINES_AT_ONCE = 256


class BatchStatus(StrEnum):
    """How far a batch is, in OpenAI's words."""

    VALIDATING = "validating"
    IN_PROGRESS = "in_progress"
    FINALIZING = "finalizing"
    CANCELLING = "cancelling"
    COMPLETED = "completed"
    FAILED = "failed"
    EXPIRED = "expired"
    CANCELLED = "cancelled"


LIVE = (
    BatchStatus.VALIDATING,
    BatchStatus.IN_PROGRESS,
    BatchStatus.FINALIZING,
    BatchStatus.CANCELLING,
)
"""Those of batches that somebody has to work on."""
_IS_LIVE = f"status IN ({', '.join(repr(str(status)) for status in LIVE)})"


class LeaseLostError(Exception):
    """Another gateway works on the batch now."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The right to work on a batch."""

    seq: int
    owner: str
    holder: str


class Batches:
    """The batches of all owners."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self.created = asyncio.Event()
        """Set when this process has stored a batch; whoever waits for it clears it."""

    async def create(self, owner: str, document: Mapping[str, Any]) -> None:
        """Store a new batch."""
        row = (owner, document["id"], document["status"], orjson.dumps(document).decode())
        await self._database.write(
            lambda connection: connection.execute(
                "INSERT INTO batch (owner, id, status, document, lease_holder, lease_until)"
                " VALUES (?, ?, ?, ?, '', 0)",
                row,
            )
        )
        self.created.set()

    async def get(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Return a batch with its counts.

        Raises:
            ObjectNotFound
        """
        return await self._database.read(lambda connection: _find(connection, owner, batch_id)[1])

    async def page(self, owner: str, page: Page) -> tuple[list[dict[str, Any]], bool]:
        """Return one page of an owner's batches, and whether there are more.

        Raises:
            ObjectNotFound: there is no batch that the page could come after.
        """

        def work(connection: sqlite3.Connection) -> tuple[list[dict[str, Any]], bool]:
            rows, has_more = page_of(
                connection,
                page,
                table="batch",
                columns="seq, document",
                wanted="owner = ?",
                values=[owner],
                owner=owner,
                kind=KIND,
            )
            return [_counted(connection, *row) for row in rows], has_more

        return await self._database.read(work)

    async def cancel(self, owner: str, batch_id: str) -> dict[str, Any]:
        """Ask for the end of a batch; return it.

        Raises:
            ObjectNotFound
            InvalidRequest: it has ended.
        """

        def work(connection: sqlite3.Connection) -> dict[str, Any]:
            seq, document = _find(connection, owner, batch_id)
            if document["status"] not in LIVE:
                raise InvalidRequest(
                    field="batch_id", problem=f"this batch has ended: it is {document['status']}"
                )
            changes = {"status": BatchStatus.CANCELLING, "cancelling_at": int(time.time())}
            if document["status"] not in (BatchStatus.CANCELLING, BatchStatus.FINALIZING):
                document |= changes
                _put(connection, seq, document)
            return document

        return await self._database.write(work)

    async def claim(self) -> Lease | None:
        """Take the oldest live batch that nobody works on; None if there is none."""
        now, holder = time.time(), secrets.token_hex(8)
        oldest = f"SELECT min(seq) FROM batch WHERE {_IS_LIVE} AND lease_until < ?"
        # Why two steps: workers look all the time, and only who writes keeps others waiting.
        (seq,) = await self._database.read(
            lambda connection: connection.execute(oldest, (now,)).fetchone()
        )
        if seq is None:
            return None
        row = await self._database.write(
            lambda connection: connection.execute(
                f"UPDATE batch SET lease_holder = ?, lease_until = ? WHERE seq = ({oldest})"
                " RETURNING seq, owner",
                (holder, now + LEASE_SECONDS, now),
            ).fetchone()
        )
        return None if row is None else Lease(seq=row[0], owner=row[1], holder=holder)

    async def renew(self, lease: Lease) -> dict[str, Any]:
        """Keep a lease for another while; return the batch as it is now.

        Raises:
            LeaseLostError
        """
        return await self.change(lease, {})

    async def change(self, lease: Lease, fields: dict[str, Any]) -> dict[str, Any]:
        """Set fields of the document, unless it is being cancelled, and keep the lease.

        Return the batch.

        Raises:
            LeaseLostError
        """

        def work(connection: sqlite3.Connection) -> dict[str, Any]:
            document = _held(connection, lease)
            if fields and document["status"] != BatchStatus.CANCELLING:
                document |= fields
                _put(connection, lease.seq, document)
            return _counted(connection, lease.seq, orjson.dumps(document).decode())

        return await self._database.write(work)

    async def end(self, lease: Lease, fields: dict[str, Any]) -> None:
        """Set the last fields of the document, and forget the lines.

        Raises:
            LeaseLostError
        """

        def work(connection: sqlite3.Connection) -> None:
            document = orjson.dumps(_held(connection, lease)).decode()
            _put(connection, lease.seq, _counted(connection, lease.seq, document) | fields)
            connection.execute("DELETE FROM batch_line WHERE batch_seq = ?", (lease.seq,))

        await self._database.write(work)

    async def release(self, lease: Lease) -> None:
        """Let another take the batch at once."""
        await self._database.write(
            lambda connection: connection.execute(
                "UPDATE batch SET lease_until = 0 WHERE seq = ? AND lease_holder = ?",
                (lease.seq, lease.holder),
            )
        )

    async def save_line(self, lease: Lease, position: int, line: bytes, *, is_error: bool) -> None:
        """Keep what came of a line of the input.

        Raises:
            LeaseLostError
        """

        def work(connection: sqlite3.Connection) -> None:
            _held(connection, lease)
            connection.execute(
                "INSERT INTO batch_line VALUES (?, ?, ?, ?)",
                (lease.seq, position, is_error, line.decode()),
            )

        await self._database.write(work)

    async def positions_done(self, lease: Lease) -> set[int]:
        """Return which lines of the input have an outcome."""
        rows = await self._database.read(
            lambda connection: connection.execute(
                "SELECT position FROM batch_line WHERE batch_seq = ?", (lease.seq,)
            ).fetchall()
        )
        return {row[0] for row in rows}

    async def next_lines(
        self, lease: Lease, *, is_error: bool, after: int
    ) -> list[tuple[int, bytes]]:
        """Return the next outcomes after a position, each with its own; none after the last."""
        rows = await self._database.read(
            lambda connection: connection.execute(
                "SELECT position, data FROM batch_line WHERE batch_seq = ? AND is_error = ?"
                " AND position > ? ORDER BY position LIMIT ?",
                (lease.seq, is_error, after, LINES_AT_ONCE),
            ).fetchall()
        )
        return [(position, data.encode()) for position, data in rows]

    async def purge(self, *, older_than_ts: int) -> None:
        """Forget batches that have ended and were made before a time."""
        await self._database.write(
            lambda connection: connection.execute(
                f"DELETE FROM batch WHERE NOT {_IS_LIVE}"
                " AND json_extract(document, '$.created_at') < ?",
                (older_than_ts,),
            )
        )


def _find(connection: sqlite3.Connection, owner: str, batch_id: str) -> tuple[int, dict[str, Any]]:
    row = connection.execute(
        "SELECT seq, document FROM batch WHERE owner = ? AND id = ?", (owner, batch_id)
    ).fetchone()
    if row is None:
        raise ObjectNotFound(kind=KIND, id=batch_id)
    return row[0], _counted(connection, *row)


def _counted(connection: sqlite3.Connection, seq: int, text: str) -> dict[str, Any]:
    """Return a document with how many of its lines are done."""
    document: dict[str, Any] = orjson.loads(text)
    if document["status"] in LIVE:
        num_failed, num_done = connection.execute(
            "SELECT coalesce(sum(is_error), 0), count(*) FROM batch_line WHERE batch_seq = ?",
            (seq,),
        ).fetchone()
        # Why the greater: what is given up before it was checked has no total yet.
        total = max(document["request_counts"]["total"], num_done)
        counts = {"total": total, "completed": num_done - num_failed, "failed": num_failed}
        document["request_counts"] = counts
    return document


def _held(connection: sqlite3.Connection, lease: Lease) -> dict[str, Any]:
    """Return the document of a batch, after keeping the lease for another while."""
    row = connection.execute(
        "UPDATE batch SET lease_until = ? WHERE seq = ? AND lease_holder = ? RETURNING document",
        (time.time() + LEASE_SECONDS, lease.seq, lease.holder),
    ).fetchone()
    if row is None:
        raise LeaseLostError
    document: dict[str, Any] = orjson.loads(row[0])
    return document


def _put(connection: sqlite3.Connection, seq: int, document: Mapping[str, Any]) -> None:
    connection.execute(
        "UPDATE batch SET status = ?, document = ? WHERE seq = ?",
        (document["status"], orjson.dumps(document).decode(), seq),
    )
