# SPDX-License-Identifier: Apache-2.0
"""`POST /v1/rerank` and `/v2/rerank` over a fake cluster."""

from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.protocol.vectors import RerankRequest

DOCUMENTS = ["a dog sat", "the cat sat on it", "the cat", "nothing"]


def body(**fields: Any) -> dict[str, Any]:
    return {"model": "guide", "query": "the cat sat", "documents": DOCUMENTS, **fields}


@pytest.mark.parametrize("path", ["/v1/rerank", "/v2/rerank"])
async def test_the_best_documents_come_first(http: httpx.AsyncClient, path: str) -> None:
    answer = await http.post(path, json=body(request_id="mine"))

    assert answer.status_code == 200
    said = answer.json()
    assert said["id"] == "mine"
    assert [one["index"] for one in said["results"]] == [1, 2, 0, 3]
    assert said["results"][1] == {"index": 2, "relevance_score": 2 / 3, "document": None}
    assert said["meta"]["tokens"] is None
    assert said["usage"] == {"prompt_tokens": 23, "total_tokens": 23}


async def test_only_the_best_and_their_texts_if_asked(http: httpx.AsyncClient) -> None:
    fields = {"top_n": 1, "return_documents": True, "return_len": True}
    said = (await http.post("/v1/rerank", json=body(**fields))).json()

    assert said["results"] == [
        {"index": 1, "relevance_score": 1.0, "document": {"text": DOCUMENTS[1]}}
    ]
    assert said["meta"]["tokens"] == {"input_tokens": 23, "output_tokens": 0}


async def test_documents_may_be_objects_with_a_text(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await http.post("/v1/rerank", json=body(documents=[{"text": "a"}, "b"]))

    (asked,) = cluster.computed
    assert isinstance(asked, RerankRequest)
    assert asked.documents == ("a", "b")


@pytest.mark.parametrize(
    ("fields", "meant"),
    [
        ({"max_chunks_per_doc": 2}, {"max_chunks_per_doc": 2}),
        ({"max_tokens_per_doc": 9}, {"max_tokens_per_doc": 9}),
        ({"instruction": "be strict"}, {"instruction": "be strict"}),
        ({"kwargs": '{"instruction": "be strict"}'}, {"instruction": "be strict"}),
        ({"kwargs": "{}", "top_n": None, "max_chunks_per_doc": None}, {"instruction": None}),
    ],
)
async def test_every_field_reaches_the_model(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any], meant: dict[str, Any]
) -> None:
    answer = await http.post("/v1/rerank", json=body(**fields))

    assert answer.status_code == 200
    (asked,) = cluster.computed
    assert {name: getattr(asked, name) for name in meant} == meant


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"query": ""}, "query"),
        ({"documents": []}, "documents"),
        ({"documents": "a"}, "documents"),
        ({"documents": [7]}, "documents"),
        ({"documents": [{"image": "x"}]}, "documents.0"),
        ({"documents": [{"text": "a", "title": "b"}]}, "documents.0"),
        ({"top_n": 0}, "top_n"),
        ({"max_chunks_per_doc": 0}, "max_chunks_per_doc"),
        ({"rank_fields": ["title"]}, "rank_fields"),
        ({"kwargs": "{"}, "kwargs"),
        ({"kwargs": '{"activation": "none"}'}, "kwargs"),
        ({"kwargs": "[]"}, "kwargs"),
        ({"topn": 3}, "topn"),
    ],
)
async def test_what_makes_no_sense_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any], param: str
) -> None:
    answer = await http.post("/v1/rerank", json=body(**fields))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == param
    assert cluster.computed == []
