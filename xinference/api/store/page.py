# SPDX-License-Identifier: Apache-2.0
"""Lists that are read a page at a time, in the order in which things were stored."""

import sqlite3
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xinference.errors import ObjectNotFound


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """Which part of a list is wanted."""

    limit: int
    after: str | None = None
    """The id of the last one that is known already."""
    newest_first: bool = False


def page_of(
    connection: sqlite3.Connection,
    page: Page,
    *,
    table: str,
    columns: str,
    wanted: str,
    values: Sequence[object],
    owner: str,
    kind: str,
) -> tuple[list[Any], bool]:
    """Return the rows of a page of a table, and whether there are more.

    Args:
        table, columns, wanted: parts of the query; never a caller's words.
        values: those of the question marks in `wanted`.
        kind: what the things are called when `page.after` is none of the owner's.

    Raises:
        ObjectNotFound: there is no `page.after`.
    """
    values = list(values)
    if page.after is not None:
        row = connection.execute(
            f"SELECT seq FROM {table} WHERE owner = ? AND id = ?", (owner, page.after)
        ).fetchone()
        if row is None:
            raise ObjectNotFound(kind=kind, id=page.after)
        wanted += " AND seq < ?" if page.newest_first else " AND seq > ?"
        values.append(row[0])
    order = "DESC" if page.newest_first else "ASC"
    rows = connection.execute(
        f"SELECT {columns} FROM {table} WHERE {wanted} ORDER BY seq {order} LIMIT ?",
        (*values, page.limit + 1),
    ).fetchall()
    return rows[: page.limit], len(rows) > page.limit
