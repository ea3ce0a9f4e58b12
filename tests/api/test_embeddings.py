# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/embeddings` over a fake cluster: what may be asked, and what the answer looks like."""

import asyncio
import base64
import struct
from typing import Any

import httpx
import ollama
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.protocol.vectors import (
    CUT_TO_MODEL,
    EmbeddingRequest,
    Input,
    InputType,
    VectorKind,
)

EMBEDDINGS = "/v1/embeddings"


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "guide", "input": "hello world", **fields}


def asked_of(cluster: FakeCluster) -> EmbeddingRequest:
    (asked,) = cluster.computed
    assert isinstance(asked, EmbeddingRequest)
    return asked


async def test_vectors_come_in_openais_form_and_in_the_order_of_the_texts(
    http: httpx.AsyncClient,
) -> None:
    answer = await http.post(EMBEDDINGS, json=body(input=["one two", "three"]))

    assert answer.status_code == 200
    assert answer.json() == {
        "object": "list",
        "model": "guide",
        "data": [
            {"index": 0, "object": "embedding", "embedding": [7.0, 0.0, 0.5]},
            {"index": 1, "object": "embedding", "embedding": [5.0, 1.0, 0.5]},
        ],
        "usage": {"prompt_tokens": 3, "total_tokens": 3},
    }


async def test_base64_is_the_same_numbers(http: httpx.AsyncClient) -> None:
    given = [f"text {number}" for number in range(200)]
    plain = (await http.post(EMBEDDINGS, json=body(input=given))).json()["data"]
    encoded = (
        await http.post(EMBEDDINGS, json=body(input=given, encoding_format="base64"))
    ).json()["data"]

    for one, other in zip(plain, encoded, strict=True):
        numbers = struct.unpack("<3f", base64.b64decode(other["embedding"]))
        assert list(numbers) == one["embedding"]


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("a", ("a",)),
        (["a", "b"], ("a", "b")),
        ([5, 0, 7], ((5, 0, 7),)),
        ([[5, 0], [7]], ((5, 0), (7,))),
    ],
)
async def test_inputs_are_texts_or_token_ids(
    http: httpx.AsyncClient, cluster: FakeCluster, given: Any, meant: tuple[Input, ...]
) -> None:
    answer = await http.post(EMBEDDINGS, json=body(input=given))

    assert answer.status_code == 200
    assert asked_of(cluster).inputs == meant


@pytest.mark.parametrize("given", [[], [[]], [1, "a"], [["a"]], [-1], None, 7, {}, {"text": "a"}])
async def test_any_other_input_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, given: Any
) -> None:
    answer = await http.post(EMBEDDINGS, json=body(input=given))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "input"
    assert cluster.computed == []


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"dimensions": 2}, {"dimensions": 2}),
        ({"truncate_prompt_tokens": 9}, {"truncate_to": 9}),
        ({"truncate_prompt_tokens": -1}, {"truncate_to": CUT_TO_MODEL}),
        ({"prompt": "p: "}, {"prompt": "p: "}),
        ({"prompt_name": "query"}, {"prompt_name": "query"}),
        ({"input_type": "search_query"}, {"input_type": InputType.QUERY}),
        ({"input_type": "document"}, {"input_type": InputType.DOCUMENT}),
        ({"return_sparse": True}, {"kinds": (VectorKind.SPARSE,)}),
        (
            {"return_dense": True, "return_multi_vector": True},
            {"kinds": (VectorKind.DENSE, VectorKind.MULTI_VECTOR)},
        ),
        ({"request_id": "mine"}, {"request_id": "mine"}),
        ({"user": "me"}, {}),
    ],
)
async def test_every_field_reaches_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any], meant: dict[str, Any]
) -> None:
    answer = await http.post(EMBEDDINGS, json=body(**fields))

    assert answer.status_code == 200
    asked = asked_of(cluster)
    assert {name: getattr(asked, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"dimension": 3}, "dimension"),
        ({"dimensions": 0}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
        ({"input_type": "clustering"}, "input_type"),
        ({"input": ""}, "input.0"),
        ({"input": ["a", ""]}, "input.1"),
        ({"prompt": "p", "input_type": "query"}, "input_type"),
        ({"prompt": "p", "input": [1, 2]}, "prompt"),
        ({"return_dense": False}, "return_dense"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post(EMBEDDINGS, json=body(**fields))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert cluster.computed == []


async def test_weights_of_tokens_stand_in_the_place_of_the_vector_if_they_alone_are_wanted(
    http: httpx.AsyncClient,
) -> None:
    alone = (await http.post(EMBEDDINGS, json=body(return_sparse=True))).json()["data"]
    beside = await http.post(EMBEDDINGS, json=body(return_sparse=True, return_dense=True))

    assert alone[0]["embedding"] == {"0": 1.0, "1": 0.5}
    (item,) = beside.json()["data"]
    assert item["embedding"] == [11.0, 0.0, 0.5]
    assert item["sparse_embedding"] == {"0": 1.0, "1": 0.5}


async def test_a_vector_for_each_token_is_a_list_of_vectors(http: httpx.AsyncClient) -> None:
    answer = await http.post(EMBEDDINGS, json=body(return_multi_vector=True))

    assert answer.json()["data"][0]["multi_vector"] == [[0.0, 1.0], [1.0, 1.0]]


async def test_refusals_of_the_cluster_are_statuses(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    unknown = await http.post(EMBEDDINGS, json=body(model="nobody"))
    cluster.queue_is_full = True
    full = await http.post(EMBEDDINGS, json=body())

    assert (unknown.status_code, full.status_code) == (404, 429)
    assert full.headers["retry-after"] == "7"


async def test_what_was_read_is_counted(http: httpx.AsyncClient) -> None:
    await http.post(EMBEDDINGS, json=body(input=["one two", "three"]))

    page = (await http.get("/metrics")).text
    assert 'xinference:input_tokens_total{model_uid="guide"} 3.0' in page
    assert 'xinference:model_serve_count{model_uid="guide"} 0.0' in page


async def test_a_client_that_leaves_ends_its_request(cluster: FakeCluster, port: int) -> None:
    cluster.holds_accept = True
    async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}") as client:
        asking = asyncio.create_task(client.post(EMBEDDINGS, json=body(request_id="gone")))
        await cluster.wait_until(lambda: cluster.computed)
        asking.cancel()
        await cluster.wait_until(lambda: cluster.aborted)

    assert cluster.aborted == ["gone"]


async def test_ollamas_clients_embed_one_text_or_several(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    several = await http.post(
        "/api/embed", json={"model": "guide:latest", "input": ["one two", "three"]}
    )
    one = await http.post("/api/embeddings", json={"model": "guide", "prompt": "one two"})

    assert several.json()["embeddings"] == [[7.0, 0.0, 0.5], [5.0, 1.0, 0.5]]
    assert several.json()["prompt_eval_count"] == 3
    assert one.json() == {"embedding": [7.0, 0.0, 0.5]}
    assert [getattr(asked, "truncate_to", 0) for asked in cluster.computed] == [CUT_TO_MODEL] * 2


async def test_ollamas_clients_may_forbid_to_cut(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    given = {"model": "guide", "input": "one", "truncate": False, "dimensions": 2}
    answer = await http.post("/api/embed", json=given)

    assert answer.json()["embeddings"] == [[3.0, 0.0]]
    assert asked_of(cluster).truncate_to is None


@pytest.mark.parametrize(
    ("path", "fields", "named"),
    [
        ("/api/embed", {"input": []}, "input"),
        ("/api/embed", {"input": "a", "options": {"num_ctx": 8}}, "options.num_ctx: "),
        ("/api/embed", {"input": "a", "keep_alive": 0}, "keep_alive"),
        ("/api/embed", {"prompt": "a"}, "prompt"),
        ("/api/embeddings", {"prompt": ["a"]}, "prompt"),
    ],
)
async def test_ollamas_clients_are_told_what_is_wrong(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], named: str
) -> None:
    answer = await http.post(path, json={"model": "guide", **fields})

    assert answer.status_code == 400
    assert answer.json()["error"].startswith(named)


async def test_ollamas_own_client_embeds(cluster: FakeCluster, port: int) -> None:
    client = ollama.AsyncClient(host=f"http://127.0.0.1:{port}")

    # The options as LangChain sends them.
    options = {"num_ctx": None, "temperature": None}
    answer = await client.embed("guide", ["one two", "three"], options=options)

    assert [list(vector) for vector in answer.embeddings] == [[7.0, 0.0, 0.5], [5.0, 1.0, 0.5]]
    await client._client.aclose()
