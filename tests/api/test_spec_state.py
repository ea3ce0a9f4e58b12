# SPDX-License-Identifier: Apache-2.0
"""Which specs of the catalogue need no download, and which fit: pure, and over HTTP."""

import json
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.admin.spec_state import with_state
from xinference.errors import InsufficientResources
from xinference.identifiers import NodeId
from xinference.protocol.downloads import CachedModel, HubSource

GIB = 2**30
ROUTE = "/v1/model_registrations/LLM"


def spec(hub: str, model_id: str | None, **fields: Any) -> dict[str, Any]:
    return {
        "model_format": "pytorch",
        "model_size_in_billions": 7,
        "quantization": "none",
        "model_hub": hub,
        "model_id": model_id,
        "model_revision": None,
        "model_uri": None,
        "memory_bytes": 15 * GIB,
        **fields,
    }


def kept(hub: str, model_id: str, **fields: Any) -> CachedModel:
    plain = CachedModel(
        model_version="v",
        model_name="tree",
        model_type="LLM",
        model_size_in_billions="7",
        model_format="pytorch",
        quantization="none",
        source=HubSource(hub=hub, model_id=model_id),
        path="/c",
        files=(),
        size_bytes=1,
        freed_bytes=1,
        is_complete=True,
    )
    return replace(plain, **fields)


def states(specs: list[dict[str, Any]], *models: CachedModel, room: int = 0) -> list[bool]:
    (family,) = with_state([{"model_name": "tree", "model_specs": specs}], models, room)
    return [one["cache_status"] for one in family["model_specs"]]


TREE = [
    spec("huggingface", "oak/tree"),
    spec("modelscope", "OAK/tree"),
    spec("huggingface", "oak/tree-small", model_size_in_billions="0_5"),
]


def test_what_came_from_one_hub_is_not_fetched_from_another() -> None:
    assert states(TREE) == [False, False, False]
    assert states(TREE, kept("modelscope", "OAK/tree")) == [True, True, False]
    assert states(TREE, kept("huggingface", "oak/tree-small")) == [False, False, True]


def test_a_download_that_is_not_whole_is_not_cached() -> None:
    assert not any(states(TREE, kept("huggingface", "oak/tree", is_complete=False)))


def test_files_that_another_family_brought_count_too() -> None:
    assert states(TREE, kept("huggingface", "oak/tree", model_name="bush"))[0]


def test_of_a_repository_of_gguf_files_each_quantization_is_its_own() -> None:
    both = [
        spec("huggingface", "oak/tree-GGUF", model_format="ggufv2", quantization=name)
        for name in ("Q4_K_M", "Q8_0")
    ]
    one = kept("huggingface", "oak/tree-GGUF", model_format="ggufv2", quantization="Q8_0")

    assert states(both, one) == [False, True]


def test_another_revision_is_another_download() -> None:
    pinned = [spec("huggingface", "oak/tree", model_revision="v1")]
    v1 = HubSource(hub="huggingface", model_id="oak/tree", revision="v1")

    assert states(pinned, kept("huggingface", "oak/tree")) == [False]
    assert states(pinned, kept("huggingface", "oak/tree", source=v1)) == [True]


def test_what_lies_at_a_path_needs_no_download() -> None:
    assert states([spec("local", None, model_uri="/models/tree")]) == [True]


@pytest.mark.parametrize(("memory_bytes", "fits"), [(15 * GIB, True), (17 * GIB, False), (0, None)])
def test_what_fits_is_told_where_the_need_is_known(memory_bytes: int, fits: bool | None) -> None:
    family = {"model_name": "tree", "model_specs": [{"memory_bytes": memory_bytes}]}

    ((found,),) = (one["model_specs"] for one in with_state([family], [], 16 * GIB))

    assert found["fits"] is fits


async def registered(http: httpx.AsyncClient) -> None:
    family = {
        "version": 2,
        "model_name": "tree",
        "model_ability": ["generate"],
        "model_specs": [
            spec("huggingface", "oak/tree"),
            spec("huggingface", "oak/leaf", model_size_in_billions=14),
        ],
    }
    body = {"model": json.dumps(family), "worker_ip": None, "persist": False}
    (await http.post(ROUTE, json=body)).raise_for_status()


async def test_the_list_can_be_narrowed_to_what_is_there(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await registered(http)
    cluster.keep(kept("huggingface", "oak/tree"))
    cluster.unanswered = (NodeId("10.0.0.8:9001"),)

    answer = await http.get(ROUTE, params={"cached": "true", "detailed": "true", "query": "tree"})
    short = await http.get(ROUTE, params={"cached": "true"})
    one = await http.get(f"{ROUTE}/tree")

    (tree,) = answer.json()
    assert [found["model_id"] for found in tree["model_specs"]] == ["oak/tree"]
    assert tree["model_specs"][0]["fits"] in (True, False)
    assert {"model_name": "tree", "is_builtin": False} in short.json()
    assert [found["cache_status"] for found in one.json()["model_specs"]] == [True, False]


async def test_the_catalogue_is_listed_before_any_worker_has_joined(
    http: httpx.AsyncClient, cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def nobody(worker_ip: str | None, *, timeout_seconds: float = 10.0) -> Any:
        raise InsufficientResources(problem="No worker has joined this cluster.")

    await registered(http)
    monkeypatch.setattr(cluster, "cached_models", nobody)

    answer = await http.get(ROUTE, params={"detailed": "true"})

    assert answer.status_code == 200
    assert "tree" in [family["model_name"] for family in answer.json()]
