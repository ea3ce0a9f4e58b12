# SPDX-License-Identifier: Apache-2.0
"""Chats that are kept: listed, labelled, read back and forgotten; and who is served first."""

from typing import Any

import httpx
import openai
import pytest

from tests.fakes.cluster import FakeCluster

from .conftest import chat, chunks_of
from .test_clients import with_openai

CHAT = "/v1/chat/completions"


async def kept(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    """Ask with `store`; return the answer."""
    answer = await http.post(CHAT, json=chat(store=True, **fields))
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def listed(http: httpx.AsyncClient, **query: Any) -> list[str]:
    answer = await http.get(CHAT, params=query)
    assert answer.status_code == 200, answer.text
    return [item["id"] for item in answer.json()["data"]]


async def test_a_stored_chat_is_what_was_sent_with_its_labels(http: httpx.AsyncClient) -> None:
    sent = await kept(http, metadata={"k": "v"}, prompt_cache_key="mine")

    found = (await http.get(f"{CHAT}/{sent['id']}")).json()
    messages = (await http.get(f"{CHAT}/{sent['id']}/messages")).json()

    assert found == sent | {"metadata": {"k": "v"}, "prompt_cache_key": "mine"}
    assert [(item["role"], item["content"]) for item in messages["data"]] == [
        ("user", "What is a replica?")
    ]


async def test_a_streamed_chat_is_stored_as_one_that_came_whole(http: httpx.AsyncClient) -> None:
    whole = await kept(http)
    streamed = await http.post(CHAT, json=chat(store=True, stream=True, request_id="mine"))
    assert chunks_of(streamed.text)[-1] == "[DONE]"

    found = (await http.get(f"{CHAT}/chatcmpl-mine")).json()

    assert found["choices"] == whole["choices"]
    assert found["usage"] == whole["usage"]


async def test_what_is_not_to_be_stored_is_not(http: httpx.AsyncClient) -> None:
    sent = (await http.post(CHAT, json=chat(metadata={"k": "v"}))).json()

    assert (await http.get(f"{CHAT}/{sent['id']}")).status_code == 404
    assert await listed(http) == []


async def test_chats_are_listed_by_label_a_page_at_a_time(http: httpx.AsyncClient) -> None:
    names = ["a", "b", "c"]
    for name in names:
        await kept(http, request_id=name, metadata={"name": name, "all": "1"})
    ids = [f"chatcmpl-{name}" for name in names]

    assert await listed(http) == ids
    assert await listed(http, order="desc") == ids[::-1]
    assert await listed(http, limit=2) == ids[:2]
    assert await listed(http, limit=2, after=ids[1]) == ids[2:]
    assert await listed(http, limit=1, after=ids[1], order="desc") == ids[:1]
    assert await listed(http, **{"metadata[name]": "b"}) == ids[1:2]
    assert await listed(http, **{"metadata[name]": "b", "metadata[all]": "2"}) == []
    assert await listed(http, model="guide") == ids
    assert await listed(http, model="nobody") == []
    assert (await http.get(CHAT, params={"after": "nobody"})).status_code == 404


async def test_labels_may_be_changed_and_chats_forgotten(http: httpx.AsyncClient) -> None:
    sent = await kept(http, metadata={"k": "v"})
    one = f"{CHAT}/{sent['id']}"

    changed = await http.post(one, json={"metadata": {"k": "w"}})
    bare = await http.post(one, json={"metadata": None})
    wrong = await http.post(one, json={"metadata": {"k": 1}})
    deleted = await http.delete(one)

    assert changed.json()["metadata"] == {"k": "w"}
    assert bare.json()["metadata"] is None
    assert (wrong.status_code, wrong.json()["error"]["param"]) == (400, "metadata.k")
    assert deleted.json()["deleted"] is True
    assert (await http.get(one)).status_code == 404
    assert (await http.delete(one)).status_code == 404


async def test_a_tier_is_a_priority_and_is_said_back(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    told = {}
    for tier in ("auto", "default", "flex", "priority", "fast"):
        told[tier] = (await http.post(CHAT, json=chat(service_tier=tier))).json()["service_tier"]
    plain = (await http.post(CHAT, json=chat())).json()
    streamed = await http.post(CHAT, json=chat(service_tier="flex", stream=True))

    assert [request.priority for request in cluster.requests] == [0, 0, 1, -1, -1, 0, 1]
    assert told["auto"] == told["default"] == "default"
    assert told["fast"] == told["priority"] == "priority"
    assert "service_tier" not in plain
    assert '"service_tier":"flex"' in chunks_of(streamed.text)[1]


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"service_tier": "scale"}, "service_tier"),
        ({"service_tier": "priority", "priority": 4}, "priority"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k"),
        ({"store": "yes"}, "store"),
    ],
)
async def test_a_bad_value_is_refused_by_name(
    http: httpx.AsyncClient, given: dict[str, Any], named: str
) -> None:
    answer = await http.post(CHAT, json=chat(**given))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == named


async def test_openais_client_works_with_stored_chats(port: int) -> None:
    def use(client: openai.OpenAI) -> None:
        made = client.chat.completions.create(
            model="guide",
            messages=[{"role": "user", "content": "Hi"}],
            store=True,
            metadata={"k": "v"},
        )
        (found,) = client.chat.completions.list(metadata={"k": "v"})
        assert found.choices == made.choices
        assert client.chat.completions.retrieve(made.id).id == made.id
        client.chat.completions.update(made.id, metadata={"k": "w"})
        assert list(client.chat.completions.list(metadata={"k": "v"})) == []
        (message,) = client.chat.completions.messages.list(made.id)
        assert message.content == "Hi"
        assert client.chat.completions.delete(made.id).deleted

    await with_openai(port, use)
