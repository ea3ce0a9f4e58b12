# SPDX-License-Identifier: Apache-2.0
"""`KeyStore`: keys, their limits' levels and what was used, in one SQLite file.

Every gateway process of a host has it open, and so has the command line when it works without a
server. A call is one transaction of well under a millisecond and runs on the event loop. The file
and its directory are readable by their owner alone; no secret is in it.
"""

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Self

from xinference.api.sqlite import open_shared
from xinference.errors import ApiKeyNotFound, InvalidRequest

from .key import ApiKey, KeySpec, Scope, new_key
from .rate import Bucket

FILE = Path("auth") / "keys.sqlite3"
"""Below the home."""
BUSY_SECONDS = 2.0
"""How long a call waits for another process's transaction."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS api_key (
    key_id TEXT PRIMARY KEY, digest BLOB NOT NULL, name TEXT NOT NULL, scopes TEXT NOT NULL,
    models TEXT, created_ts INTEGER NOT NULL, expires_ts INTEGER, requests_per_minute INTEGER,
    tokens_per_minute INTEGER, revoked_ts INTEGER
) STRICT;
CREATE TABLE IF NOT EXISTS generation (
    id INTEGER PRIMARY KEY CHECK (id = 0), value INTEGER NOT NULL
) STRICT;
INSERT OR IGNORE INTO generation VALUES (0, 0);
CREATE TABLE IF NOT EXISTS bucket (
    key_id TEXT NOT NULL, kind TEXT NOT NULL, level REAL NOT NULL, at REAL NOT NULL,
    PRIMARY KEY (key_id, kind)
) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS usage (
    day TEXT NOT NULL, key_id TEXT NOT NULL, model_uid TEXT NOT NULL, requests INTEGER NOT NULL,
    prompt_tokens INTEGER NOT NULL, completion_tokens INTEGER NOT NULL,
    cached_tokens INTEGER NOT NULL, reasoning_tokens INTEGER NOT NULL,
    PRIMARY KEY (day, key_id, model_uid)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True)
class Used:
    """What a number of requests used, in tokens."""

    requests: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Of the prompts."""
    reasoning_tokens: int = 0
    """Of the completions."""


UsageOf = tuple[str, str, str]
"""(day as "2026-01-31" in UTC, key id or "" without keys, model uid)."""


class KeyStore:
    """The file; see the module. Belongs to one thread at a time."""

    def __init__(self, connection: sqlite3.Connection, clock: Callable[[], float]) -> None:
        self._db = connection
        self._clock = clock

    @classmethod
    def open(cls, home: Path, *, clock: Callable[[], float] = time.time) -> Self:
        """Open or make the file of a home.

        Raises:
            OSError, sqlite3.Error: it cannot be made, or is no database; says which.
        """
        path = home / FILE
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
        try:
            return cls(_opened(str(path)), clock)
        except sqlite3.Error as error:
            raise sqlite3.OperationalError(f"{path}: {error}") from error

    @classmethod
    def in_memory(cls, *, clock: Callable[[], float] = time.time) -> Self:
        """Return one that is gone with this process."""
        return cls(_opened(":memory:"), clock)

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    # --- keys

    def generation(self) -> int:
        """Return a number that grows with every change of a key."""
        return int(self._db.execute("SELECT value FROM generation").fetchone()[0])

    def all_keys(self) -> list[ApiKey]:
        """Return every key that was ever made, oldest first."""
        rows = self._db.execute(
            "SELECT key_id, digest, name, scopes, models, created_ts, expires_ts,"
            " requests_per_minute, tokens_per_minute, revoked_ts FROM api_key"
            " ORDER BY created_ts, rowid"
        )
        return [_key(row) for row in rows]

    def create(self, spec: KeySpec) -> tuple[str, ApiKey]:
        """Make a key; return its text, which is told this once, and what is kept of it.

        Raises:
            InvalidRequest: an active key has the name; or it is the first and could make no other.
        """
        now = self._clock()
        text, key = new_key(spec, now=now)
        with self._transaction(durable=True):
            known = self.all_keys()
            if not known and not key.may(Scope.ADMIN):
                raise InvalidRequest(
                    field="scopes",
                    problem="the first key must have admin: with it the gateway is locked, "
                    "and only such a key can make others",
                )
            if any(one.spec.name == spec.name and one.state(now=now) == "active" for one in known):
                raise InvalidRequest(field="name", problem=f"{spec.name!r} is the name of a key")
            self._db.execute(
                "INSERT INTO api_key VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (
                    key.key_id,
                    key.digest,
                    spec.name,
                    json.dumps(sorted(spec.scopes)),
                    None if spec.models is None else json.dumps(sorted(spec.models)),
                    key.created_ts,
                    spec.expires_ts,
                    spec.requests_per_minute,
                    spec.tokens_per_minute,
                ),
            )
            self._db.execute("UPDATE generation SET value = value + 1")
        return text, key

    def revoke(self, key_id: str) -> ApiKey:
        """End a key for good; one that was revoked stays as it is.

        Raises:
            ApiKeyNotFound
        """
        with self._transaction(durable=True):
            found = {key.key_id: key for key in self.all_keys()}.get(key_id)
            if found is None:
                raise ApiKeyNotFound(key_id=key_id)
            if found.revoked_ts is None:
                found = replace(found, revoked_ts=int(self._clock()))
                self._db.execute(
                    "UPDATE api_key SET revoked_ts = ? WHERE key_id = ?", (found.revoked_ts, key_id)
                )
                self._db.execute("UPDATE generation SET value = value + 1")
        return found

    # --- limits

    def take(self, key: ApiKey) -> int:
        """Take one request of a key's allowance; return 0, or the seconds until there is one.

        A key without limits costs nothing.
        """
        spec = key.spec
        if spec.requests_per_minute is None and spec.tokens_per_minute is None:
            return 0
        wait_seconds = 0
        with self._transaction():
            if spec.tokens_per_minute is not None:
                left = self._bucket(key, "tokens", spec.tokens_per_minute)
                wait_seconds = left.seconds_until(1, spec.tokens_per_minute)
            if spec.requests_per_minute is not None:
                left = self._bucket(key, "requests", spec.requests_per_minute)
                wait_seconds = max(wait_seconds, left.seconds_until(1, spec.requests_per_minute))
                if wait_seconds == 0:
                    self._save(key, "requests", left.without(1))
        return wait_seconds

    def charge(self, key: ApiKey, num_tokens: int) -> None:
        """Take the tokens of an answer that has ended."""
        limit = key.spec.tokens_per_minute
        if limit is not None:
            with self._transaction():
                self._save(key, "tokens", self._bucket(key, "tokens", limit).without(num_tokens))

    def _bucket(self, key: ApiKey, kind: str, limit: int) -> Bucket:
        now = self._clock()
        row = self._db.execute(
            "SELECT level, at FROM bucket WHERE key_id = ? AND kind = ?", (key.key_id, kind)
        ).fetchone()
        return Bucket.full(limit, now=now) if row is None else Bucket(*row).filled(limit, now=now)

    def _save(self, key: ApiKey, kind: str, bucket: Bucket) -> None:
        self._db.execute(
            "INSERT INTO bucket VALUES (?, ?, ?, ?)"
            " ON CONFLICT DO UPDATE SET level = excluded.level, at = excluded.at",
            (key.key_id, kind, bucket.level, bucket.at),
        )

    # --- usage

    def add_usage(self, used: Mapping[UsageOf, Used]) -> None:
        """Count what was used; all of it or, if it raises, nothing."""
        with self._transaction():
            self._db.executemany(
                "INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT DO UPDATE SET"
                " requests = requests + excluded.requests,"
                " prompt_tokens = prompt_tokens + excluded.prompt_tokens,"
                " completion_tokens = completion_tokens + excluded.completion_tokens,"
                " cached_tokens = cached_tokens + excluded.cached_tokens,"
                " reasoning_tokens = reasoning_tokens + excluded.reasoning_tokens",
                [
                    (
                        *of,
                        one.requests,
                        one.prompt_tokens,
                        one.completion_tokens,
                        one.cached_tokens,
                        one.reasoning_tokens,
                    )
                    for of, one in used.items()
                ],
            )

    def usage(
        self, *, since: str = "", until: str = "9999", key_id: str | None = None
    ) -> dict[tuple[str, str], Used]:
        """Return what was used by (key id, model uid), from one day to another, both included."""
        rows = self._db.execute(
            "SELECT key_id, model_uid, sum(requests), sum(prompt_tokens), sum(completion_tokens),"
            " sum(cached_tokens), sum(reasoning_tokens) FROM usage"
            " WHERE day BETWEEN ? AND ? AND (? IS NULL OR key_id = ?)"
            " GROUP BY key_id, model_uid ORDER BY key_id, model_uid",
            (since, until, key_id, key_id),
        )
        return {
            (found_id, model): Used(
                requests=requests,
                prompt_tokens=prompt,
                completion_tokens=completion,
                cached_tokens=cached,
                reasoning_tokens=reasoning,
            )
            for found_id, model, requests, prompt, completion, cached, reasoning in rows
        }

    @contextmanager
    def _transaction(self, *, durable: bool = False) -> Iterator[None]:
        """Run a block as one change, which with `durable` survives a power cut.

        Why not always: waiting for the disk takes milliseconds, and of limits and usage a power cut
        may take the last second.
        """
        self._db.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        # Why IMMEDIATE: what is read first must still be so when it is written.
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _opened(path: str) -> sqlite3.Connection:
    return open_shared(
        path,
        lambda connection: connection.executescript(_SCHEMA),
        busy_seconds=BUSY_SECONDS,
    )


def _key(row: tuple[Any, ...]) -> ApiKey:
    key_id, digest, name, scopes, models, created, expires, requests, tokens, revoked = row
    return ApiKey(
        key_id=key_id,
        digest=digest,
        spec=KeySpec(
            name=name,
            scopes=frozenset(map(Scope, json.loads(scopes))),
            models=None if models is None else frozenset(json.loads(models)),
            expires_ts=expires,
            requests_per_minute=requests,
            tokens_per_minute=tokens,
        ),
        created_ts=created,
        revoked_ts=revoked,
    )
