# SPDX-License-Identifier: Apache-2.0
"""The store: shared by gateways, apart by owners, within bounds, and honest about its disk."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.api.store.answers import AnswerKind
from xinference.api.store.limits import StoreLimits
from xinference.api.store.store import Store
from xinference.errors import ObjectNotFound

RESPONSE = AnswerKind.RESPONSE
LARGE = b'["' + b"x" * 94 + b'"]'
"""With what it is an answer to, 100 bytes."""


@asynccontextmanager
async def opened(path: Path | None, **limits: float) -> AsyncIterator[Store]:
    store = Store(path, StoreLimits(**limits))  # type: ignore[arg-type]  # numbers all
    try:
        yield store
    finally:
        await store.aclose()


async def save(
    store: Store, name: str, *, owner: str = "", body: bytes = b"{}", previous_id: str | None = None
) -> None:
    await store.answers.save(
        owner, RESPONSE, name, model="guide", given=[], body=body, previous_id=previous_id
    )


async def names(store: Store, *wanted: str, owner: str = "") -> list[str]:
    """Return which of these are there."""
    found = []
    for name in wanted:
        try:
            found.append((await store.answers.get(owner, RESPONSE, name)).id)
        except ObjectNotFound:
            continue
    return found


async def test_two_gateways_see_one_store(tmp_path: Path) -> None:
    cluster = await FakeCluster.running()
    async with opened(tmp_path / "store.db") as one, opened(tmp_path / "store.db") as other:
        clients = [
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app=create_app(cluster, store=store)),
                base_url="http://gateway",
            )
            for store in (one, other)
        ]
        body = {"model": "guide", "input": "Hi"}
        made = await asyncio.gather(
            *(client.post("/v1/responses", json=body) for client in clients * 8)
        )
        first, second = clients
        for answer in made:
            ours = (await first.get(f"/v1/responses/{answer.json()['id']}")).json()
            theirs = (await second.get(f"/v1/responses/{answer.json()['id']}")).json()
            assert ours == theirs == answer.json()
        for client in clients:
            await client.aclose()


async def test_owners_do_not_see_each_others_things() -> None:
    async with opened(None) as store:
        await save(store, "resp_a", owner="ann")
        await save(store, "resp_b", owner="ann", previous_id="resp_a")
        await save(store, "resp_c", owner="bob", previous_id="resp_b")

        assert await names(store, "resp_a", "resp_b", "resp_c", owner="bob") == ["resp_c"]
        with pytest.raises(ObjectNotFound, match="resp_b"):
            await store.answers.turns("bob", "resp_c")
        with pytest.raises(ObjectNotFound):
            await store.answers.delete("bob", RESPONSE, "resp_a")


async def test_what_is_old_goes(tmp_path: Path) -> None:
    async with opened(tmp_path / "store.db") as store:
        await save(store, "resp_a")
        await store.answers.purge()
        assert await names(store, "resp_a") == ["resp_a"]
    async with opened(tmp_path / "store.db", answer_days=0) as store:
        await store.answers.purge()
        assert await names(store, "resp_a") == []


async def test_beyond_the_bound_the_least_used_goes_first() -> None:
    async with opened(None, max_answer_bytes=250) as store:
        for name in ("resp_a", "resp_b", "resp_c"):
            await save(store, name, body=LARGE)
        await store.answers.turns("", "resp_a")
        await store.answers.purge()

        assert await names(store, "resp_a", "resp_b", "resp_c") == ["resp_a", "resp_c"]


async def test_going_on_from_a_response_uses_all_its_turns() -> None:
    async with opened(None, max_answer_bytes=350) as store:
        await save(store, "resp_a", body=LARGE)
        await save(store, "resp_b", body=LARGE, previous_id="resp_a")
        await save(store, "resp_c", body=LARGE)
        turns = await store.answers.turns("", "resp_b")
        await save(store, "resp_d", body=LARGE)
        await store.answers.purge()

        assert [turn.id for turn in turns] == ["resp_a", "resp_b"]
        kept = await names(store, "resp_a", "resp_b", "resp_c", "resp_d")
        assert kept == ["resp_a", "resp_b", "resp_d"]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_store_that_does_not_work_is_a_503_or_an_event(
    tmp_path: Path, stream: bool
) -> None:
    (tmp_path / "store.db").write_bytes(b"no database" * 1000)
    cluster = await FakeCluster.running()
    async with opened(tmp_path / "store.db") as store:
        transport = httpx.ASGITransport(app=create_app(cluster, store=store))
        async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as http:
            body = {"model": "guide", "input": "Hi", "stream": stream}
            kept = await http.post("/v1/responses", json=body)
            plain = await http.post("/v1/responses", json=body | {"store": False})

    assert kept.status_code == (200 if stream else 503)
    assert "store_unavailable" in kept.text
    assert ("response.failed" in kept.text) is stream
    assert plain.status_code == 200
    assert "You said: Hi" in plain.text
