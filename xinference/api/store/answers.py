# SPDX-License-Identifier: Apache-2.0
"""Stored answers: responses, which may go on from one another, and chat completions.

What is kept is JSON that the routes have made. An answer goes some time after its last use; to
go on from a response is a use of all that it goes on from.
"""

import sqlite3
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import orjson

from xinference.errors import ObjectNotFound

from .database import Database
from .limits import StoreLimits
from .page import Page, page_of

MAX_TURNS = 10_000
"""How far a conversation is followed back."""


class AnswerKind(StrEnum):
    """What was asked; OpenAI's words, as errors say them."""

    RESPONSE = "response"
    CHAT = "chat completion"


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredAnswer:
    """An answer and what it is an answer to."""

    id: str
    given: list[dict[str, Any]]
    body: dict[str, Any]
    previous_id: str | None = None
    """The response that it goes on from."""


class Answers:
    """The answers of all owners."""

    def __init__(self, database: Database, limits: StoreLimits) -> None:
        self._database = database
        self._limits = limits

    async def save(
        self,
        owner: str,
        kind: AnswerKind,
        answer_id: str,
        *,
        model: str,
        given: Sequence[Mapping[str, Any]],
        body: bytes,
        previous_id: str | None = None,
    ) -> None:
        """Keep an answer, over an older one of this owner and id.

        Args:
            given: what it is an answer to.
            body: the answer, as JSON.
            previous_id: the response that it goes on from.
        """
        texts = (orjson.dumps(given).decode(), body.decode())
        num_bytes = sum(map(len, texts))
        row = (owner, answer_id, kind, model, previous_id, time.time(), num_bytes, *texts)

        def work(connection: sqlite3.Connection) -> None:
            connection.execute(
                "INSERT OR REPLACE INTO answer"
                " (owner, id, kind, model, previous_id, used_ts, num_bytes, given, body)"
                " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )

        await self._database.write(work)

    async def get(self, owner: str, kind: AnswerKind, answer_id: str) -> StoredAnswer:
        """Return one answer.

        Raises:
            ObjectNotFound
        """

        def work(connection: sqlite3.Connection) -> StoredAnswer:
            row = connection.execute(
                "SELECT id, given, body, previous_id FROM answer"
                " WHERE owner = ? AND kind = ? AND id = ?",
                (owner, kind, answer_id),
            ).fetchone()
            if row is None:
                raise ObjectNotFound(kind=kind, id=answer_id)
            return _answer(row)

        return await self._database.read(work)

    async def turns(self, owner: str, response_id: str) -> list[StoredAnswer]:
        """Return a response and all that it goes on from, oldest first. All count as used now.

        Raises:
            ObjectNotFound: one of them is not there, or no longer.
        """

        def work(connection: sqlite3.Connection) -> list[StoredAnswer]:
            rows = connection.execute(
                "WITH RECURSIVE turn AS ("
                " SELECT id, given, body, previous_id, 1 AS num FROM answer"
                " WHERE owner = :owner AND kind = :kind AND id = :id"
                " UNION ALL"
                " SELECT one.id, one.given, one.body, one.previous_id, num + 1 FROM turn"
                " JOIN answer one ON one.owner = :owner AND one.kind = :kind"
                " AND one.id = turn.previous_id WHERE num < :most"
                ") SELECT id, given, body, previous_id FROM turn ORDER BY num DESC",
                {
                    "owner": owner,
                    "kind": AnswerKind.RESPONSE,
                    "id": response_id,
                    "most": MAX_TURNS,
                },
            ).fetchall()
            turns = [_answer(row) for row in rows]
            missing = turns[0].previous_id if turns else response_id
            if missing is not None:
                raise ObjectNotFound(kind=AnswerKind.RESPONSE, id=missing)
            connection.executemany(
                "UPDATE answer SET used_ts = ? WHERE owner = ? AND id = ?",
                [(time.time(), owner, turn.id) for turn in turns],
            )
            return turns

        return await self._database.write(work)

    async def page(
        self,
        owner: str,
        kind: AnswerKind,
        page: Page,
        *,
        model: str | None,
        metadata: Mapping[str, str],
    ) -> tuple[Sequence[StoredAnswer], bool]:
        """Return one page of an owner's answers, and whether there are more.

        Args:
            model: only those of this model.
            metadata: only those that have all of it.

        Raises:
            ObjectNotFound: there is no answer that the page could come after.
        """
        wanted = "owner = ? AND kind = ?"
        values: list[object] = [owner, kind]
        if model is not None:
            wanted += " AND model = ?"
            values.append(model)
        for name, value in metadata.items():
            wanted += (
                " AND EXISTS (SELECT 1 FROM json_each(body, '$.metadata') label"
                " WHERE label.key = ? AND label.value = ?)"
            )
            values += [name, value]

        def work(connection: sqlite3.Connection) -> tuple[Sequence[StoredAnswer], bool]:
            rows, has_more = page_of(
                connection,
                page,
                table="answer",
                columns="id, given, body, previous_id",
                wanted=wanted,
                values=values,
                owner=owner,
                kind=kind,
            )
            return [_answer(row) for row in rows], has_more

        return await self._database.read(work)

    async def relabel(
        self, owner: str, kind: AnswerKind, answer_id: str, metadata: Mapping[str, str] | None
    ) -> StoredAnswer:
        """Give an answer other metadata; return it.

        Raises:
            ObjectNotFound
        """

        def work(connection: sqlite3.Connection) -> StoredAnswer:
            row = connection.execute(
                "UPDATE answer SET body = json_set(body, '$.metadata', json(?))"
                " WHERE owner = ? AND kind = ? AND id = ? RETURNING id, given, body, previous_id",
                (orjson.dumps(metadata).decode(), owner, kind, answer_id),
            ).fetchone()
            if row is None:
                raise ObjectNotFound(kind=kind, id=answer_id)
            return _answer(row)

        return await self._database.write(work)

    async def delete(self, owner: str, kind: AnswerKind, answer_id: str) -> None:
        """Forget an answer.

        Raises:
            ObjectNotFound
        """

        def work(connection: sqlite3.Connection) -> None:
            done = connection.execute(
                "DELETE FROM answer WHERE owner = ? AND kind = ? AND id = ?",
                (owner, kind, answer_id),
            )
            if not done.rowcount:
                raise ObjectNotFound(kind=kind, id=answer_id)

        await self._database.write(work)

    async def purge(self) -> None:
        """Forget what nobody has used for long, and then the least used beyond the bound."""
        oldest = time.time() - self._limits.answer_days * 86400
        most = self._limits.max_answer_bytes

        def work(connection: sqlite3.Connection) -> None:
            connection.execute("DELETE FROM answer WHERE used_ts < ?", (oldest,))
            connection.execute(
                "DELETE FROM answer WHERE seq IN (SELECT seq FROM ("
                " SELECT seq, sum(num_bytes) OVER (ORDER BY used_ts DESC, seq DESC) AS so_far"
                " FROM answer) WHERE so_far > ?)",
                (most,),
            )

        await self._database.write(work)


def _answer(row: tuple[str, str, str, str | None]) -> StoredAnswer:
    answer_id, given, body, previous_id = row
    return StoredAnswer(
        id=answer_id,
        given=orjson.loads(given),
        body=orjson.loads(body),
        previous_id=previous_id,
    )
