# SPDX-License-Identifier: Apache-2.0
"""The file of the keys: what is in it, and that processes share it."""

import re
import sqlite3
import stat
import threading
from pathlib import Path

import pytest

from xinference.api.keys.key import KeySpec, Scope, digest_of, id_in
from xinference.api.keys.store import FILE, KeyStore, Used
from xinference.errors import ApiKeyNotFound, InvalidRequest

ADMIN = KeySpec(name="admin", scopes=frozenset({Scope.ADMIN}))


class Clock:
    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_a_key_is_told_once_and_only_its_digest_is_kept(tmp_path: Path) -> None:
    store = KeyStore.open(tmp_path)
    text, key = store.create(ADMIN)
    store.close()

    kept = b"".join(path.read_bytes() for path in (tmp_path / "auth").iterdir())
    secret = text.split("-", 2)[2]
    assert secret.encode() not in kept
    assert digest_of(text) in kept
    assert len(secret) >= 43
    assert id_in(text) == key.key_id
    assert key.is_made_of(text)
    assert not key.is_made_of(text[:-1])
    assert secret not in repr(key)


def test_only_its_owner_can_read_the_file(tmp_path: Path) -> None:
    KeyStore.open(tmp_path).close()

    for path in (tmp_path / FILE, tmp_path / FILE.parent):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0


def test_a_file_that_is_no_database_is_refused_by_its_name(tmp_path: Path) -> None:
    KeyStore.open(tmp_path).close()
    (tmp_path / FILE).write_text("no database " * 100)

    with pytest.raises(sqlite3.Error, match=f"{re.escape(str(tmp_path / FILE))}: file is not"):
        KeyStore.open(tmp_path)


def test_another_process_sees_what_was_made_and_what_was_revoked(tmp_path: Path) -> None:
    one, other = KeyStore.open(tmp_path), KeyStore.open(tmp_path)
    seen = other.generation()

    _, key = one.create(ADMIN)
    assert other.generation() > seen
    assert other.all_keys() == [key]
    seen = other.generation()

    one.revoke(key.key_id)
    assert other.generation() > seen
    assert other.all_keys()[0].state(now=0) == "revoked"
    one.close()
    other.close()


def test_the_first_key_must_be_able_to_make_others() -> None:
    store = KeyStore.in_memory()

    with pytest.raises(InvalidRequest, match="admin"):
        store.create(KeySpec(name="first"))
    assert store.all_keys() == []
    assert store.generation() == 0


def test_a_name_is_free_again_when_its_key_has_ended() -> None:
    clock = Clock()
    store = KeyStore.in_memory(clock=clock)
    store.create(ADMIN)
    _, gone = store.create(KeySpec(name="app"))
    with pytest.raises(InvalidRequest, match="app"):
        store.create(KeySpec(name="app"))
    store.revoke(gone.key_id)
    store.create(KeySpec(name="app", expires_ts=int(clock.now) + 10))
    clock.now += 10

    store.create(KeySpec(name="app"))

    states = [key.state(now=clock.now) for key in store.all_keys()]
    assert states == ["active", "revoked", "expired", "active"]


def test_revoking_again_changes_nothing_and_an_unknown_key_is_said_to_be() -> None:
    store = KeyStore.in_memory()
    _, key = store.create(ADMIN)

    once = store.revoke(key.key_id)
    assert store.revoke(key.key_id) == once
    with pytest.raises(ApiKeyNotFound):
        store.revoke("none")


def test_requests_are_limited_over_all_processes(tmp_path: Path) -> None:
    clock = Clock()
    stores = [KeyStore.open(tmp_path, clock=clock) for _ in range(2)]
    stores[0].create(ADMIN)
    _, key = stores[0].create(KeySpec(name="slow", requests_per_minute=3))

    waits = [stores[turn % 2].take(key) for turn in range(4)]

    assert waits == [0, 0, 0, 20]
    clock.now += 20
    assert stores[1].take(key) == 0
    for store in stores:
        store.close()


def test_a_request_may_start_while_any_token_is_left() -> None:
    clock = Clock()
    store = KeyStore.in_memory(clock=clock)
    store.create(ADMIN)
    _, key = store.create(KeySpec(name="short", tokens_per_minute=60))

    assert store.take(key) == 0
    store.charge(key, 100)
    assert store.take(key) == 41
    clock.now += 41
    assert store.take(key) == 0


def test_a_refused_request_takes_nothing_of_the_other_limit() -> None:
    clock = Clock()
    store = KeyStore.in_memory(clock=clock)
    store.create(ADMIN)
    _, key = store.create(KeySpec(name="both", requests_per_minute=2, tokens_per_minute=60))
    store.charge(key, 120)

    assert [store.take(key) for _ in range(5)] == [61] * 5
    clock.now += 61
    assert [store.take(key) for _ in range(3)] == [0, 0, 30]


def test_usage_adds_up_over_processes_and_days(tmp_path: Path) -> None:
    def count(day: str) -> None:
        store = KeyStore.open(tmp_path)
        for _ in range(50):
            store.add_usage({(day, "k", "guide"): Used(requests=1, prompt_tokens=3)})
        store.close()

    KeyStore.open(tmp_path).close()
    days = ["2026-01-01", "2026-01-02", "2026-01-02"]
    threads = [threading.Thread(target=count, args=[day]) for day in days]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)

    store = KeyStore.open(tmp_path)
    assert store.usage()["k", "guide"] == Used(requests=150, prompt_tokens=450)
    assert store.usage(since="2026-01-02")["k", "guide"].requests == 100
    assert store.usage(until="2026-01-01")["k", "guide"].requests == 50
    assert store.usage(key_id="other") == {}
    store.close()


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"name": ""}, "name"),
        ({"name": "a\nb"}, "name"),
        ({"name": "a", "scopes": frozenset()}, "scopes"),
        ({"name": "a", "models": frozenset()}, "models"),
        ({"name": "a", "scopes": frozenset({Scope.ADMIN}), "models": frozenset({"m"})}, "models"),
        ({"name": "a", "requests_per_minute": 0}, "requests_per_minute"),
        ({"name": "a", "tokens_per_minute": -1}, "tokens_per_minute"),
    ],
)
def test_a_key_that_makes_no_sense_is_refused_by_name(
    fields: dict[str, object], named: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        KeySpec(**fields)  # type: ignore[arg-type]
    assert refused.value.field == named


@pytest.mark.parametrize(
    "text", ["", "xin", "xin-", "xin--", "xin-a-", "sk-a-b", "xin-a-" + "b" * 300]
)
def test_what_is_no_key_names_none(text: str) -> None:
    assert id_in(text) is None
