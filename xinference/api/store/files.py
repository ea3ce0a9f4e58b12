# SPDX-License-Identifier: Apache-2.0
"""Uploaded files and the results of batches, in pieces, so that none is ever in memory whole."""

import secrets
import sqlite3
import time
from collections.abc import AsyncIterable, AsyncIterator
from dataclasses import dataclass

from xinference.errors import InvalidRequest, ObjectNotFound

from .database import Database
from .limits import StoreLimits
from .page import Page, page_of

KIND = "file"
UNFINISHED_SECONDS = 3600
"""After so long an upload that has not ended never will: its gateway is gone."""

_COLUMNS = "id, filename, purpose, num_bytes, created_ts, expires_ts"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredFile:
    """What is known of a file."""

    id: str
    filename: str
    purpose: str
    num_bytes: int
    created_ts: int
    expires_ts: int | None
    """None: it stays until it is deleted."""


class Files:
    """The files of all owners."""

    def __init__(self, database: Database, limits: StoreLimits) -> None:
        self._database = database
        self._limits = limits

    async def create(
        self,
        owner: str,
        pieces: AsyncIterable[bytes],
        *,
        filename: str,
        purpose: str,
        lifetime_seconds: int | None,
        is_bounded: bool = True,
    ) -> StoredFile:
        """Store a file. Nobody sees it before it is whole; nothing of it stays if that fails.

        Args:
            is_bounded: the limits hold. Results that were computed are kept beyond them.

        Raises:
            InvalidRequest: it is too large, alone or with all others.
        """
        now = int(time.time())
        expires_ts = None if lifetime_seconds is None else now + lifetime_seconds
        file_id = f"file-{secrets.token_hex(16)}"
        seq = await self._database.write(
            lambda connection: connection.execute(
                "INSERT INTO file (owner, id, filename, purpose, num_bytes, created_ts,"
                " expires_ts, is_whole) VALUES (?, ?, ?, ?, 0, ?, ?, 0) RETURNING seq",
                (owner, file_id, filename, purpose, now, expires_ts),
            ).fetchone()[0]
        )
        try:
            position = 0
            async for piece in pieces:
                await self._append(seq, position, piece, is_bounded=is_bounded)
                position += 1
            await self._database.write(
                lambda connection: connection.execute(
                    "UPDATE file SET is_whole = 1 WHERE seq = ?", (seq,)
                )
            )
        except BaseException:
            await self._database.write(
                lambda connection: connection.execute("DELETE FROM file WHERE seq = ?", (seq,))
            )
            raise
        return await self.get(owner, file_id)

    async def _append(self, seq: int, position: int, piece: bytes, *, is_bounded: bool) -> None:
        def work(connection: sqlite3.Connection) -> None:
            connection.execute("INSERT INTO file_chunk VALUES (?, ?, ?)", (seq, position, piece))
            (num_bytes,) = connection.execute(
                "UPDATE file SET num_bytes = num_bytes + ? WHERE seq = ? RETURNING num_bytes",
                (len(piece), seq),
            ).fetchone()
            if not is_bounded:
                return
            if num_bytes > self._limits.max_file_bytes:
                raise InvalidRequest(
                    field="file", problem=f"is larger than {self._limits.max_file_bytes} bytes"
                )
            (total,) = connection.execute("SELECT sum(num_bytes) FROM file").fetchone()
            if total > self._limits.max_files_bytes:
                raise InvalidRequest(
                    field="file",
                    problem=f"with it all files are larger than {self._limits.max_files_bytes} "
                    "bytes; delete some",
                )

        await self._database.write(work)

    async def get(self, owner: str, file_id: str) -> StoredFile:
        """Return what is known of a file.

        Raises:
            ObjectNotFound
        """
        row = await self._database.read(
            lambda connection: connection.execute(
                f"SELECT {_COLUMNS} FROM file WHERE owner = ? AND id = ? AND is_whole",
                (owner, file_id),
            ).fetchone()
        )
        if row is None:
            raise ObjectNotFound(kind=KIND, id=file_id)
        return _file(row)

    async def page(
        self, owner: str, page: Page, *, purpose: str | None
    ) -> tuple[list[StoredFile], bool]:
        """Return one page of an owner's files, and whether there are more.

        Raises:
            ObjectNotFound: there is no file that the page could come after.
        """
        wanted, values = "owner = ? AND is_whole", [owner]
        if purpose is not None:
            wanted += " AND purpose = ?"
            values.append(purpose)
        rows, has_more = await self._database.read(
            lambda connection: page_of(
                connection,
                page,
                table="file",
                columns=_COLUMNS,
                wanted=wanted,
                values=values,
                owner=owner,
                kind=KIND,
            )
        )
        return [_file(row) for row in rows], has_more

    async def pieces(self, owner: str, file_id: str) -> AsyncIterator[bytes]:
        """Yield what is in a file.

        Raises:
            ObjectNotFound: it is not there, or was deleted meanwhile.
        """
        position, file = 0, await self.get(owner, file_id)
        left = file.num_bytes
        while left:
            row = await self._database.read(
                lambda connection, position=position: connection.execute(  # type: ignore[misc]  # bound in this turn
                    "SELECT data FROM file_chunk JOIN file ON seq = file_seq"
                    " WHERE owner = ? AND id = ? AND position = ?",
                    (owner, file_id, position),
                ).fetchone()
            )
            if row is None:
                raise ObjectNotFound(kind=KIND, id=file_id)
            left -= len(row[0])
            position += 1
            yield row[0]

    async def delete(self, owner: str, file_id: str) -> None:
        """Forget a file.

        Raises:
            ObjectNotFound
        """
        done = await self._database.write(
            lambda connection: (
                connection.execute(
                    "DELETE FROM file WHERE owner = ? AND id = ? AND is_whole", (owner, file_id)
                ).rowcount
            )
        )
        if not done:
            raise ObjectNotFound(kind=KIND, id=file_id)

    async def purge(self) -> None:
        """Forget what has expired, and uploads that were given up."""
        now = int(time.time())
        await self._database.write(
            lambda connection: connection.execute(
                "DELETE FROM file WHERE expires_ts < ? OR (NOT is_whole AND created_ts < ?)",
                (now, now - UNFINISHED_SECONDS),
            )
        )


def _file(row: tuple[str, str, str, int, int, int | None]) -> StoredFile:
    file_id, filename, purpose, num_bytes, created_ts, expires_ts = row
    return StoredFile(
        id=file_id,
        filename=filename,
        purpose=purpose,
        num_bytes=num_bytes,
        created_ts=created_ts,
        expires_ts=expires_ts,
    )
