# SPDX-License-Identifier: Apache-2.0
"""The catalogue over HTTP."""

import json
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.admin.convert import launch_of_version, version_items
from xinference.api.admin.schema import InstanceRequest
from xinference.protocol.downloads import KeptModels

from .test_cache import KEPT

FAMILY: dict[str, Any] = {
    "version": 2,
    "model_name": "mine",
    "model_lang": ["en"],
    "model_ability": ["generate"],
    "context_length": 256,
    "model_specs": [
        {"model_format": "pytorch", "model_size_in_billions": 1, "quantization": "none"}
    ],
}
REGISTRATIONS = "/v1/model_registrations/LLM"


async def register(http: httpx.AsyncClient, family: object = FAMILY) -> httpx.Response:
    body = {"model": json.dumps(family), "worker_ip": None, "persist": False}
    return await http.post(REGISTRATIONS, json=body)


async def test_a_family_can_be_added_seen_and_removed(http: httpx.AsyncClient) -> None:
    added = await register(http)
    listed = (await http.get(REGISTRATIONS)).json()
    one = (await http.get(f"{REGISTRATIONS}/mine")).json()
    removed = await http.delete(f"{REGISTRATIONS}/mine")

    assert (added.status_code, added.json()) == (200, None)
    assert listed == [
        {"model_name": "mine", "is_builtin": False},
        {"model_name": "xinference-guide", "is_builtin": True},
    ]
    (spec,) = one["model_specs"]
    assert spec.items() >= {"cache_status": False, "fits": None}.items()
    assert one == FAMILY | {"is_builtin": False, "model_specs": [spec]}
    assert (removed.status_code, removed.json()) == (200, None)
    assert (await http.get(f"{REGISTRATIONS}/mine")).status_code == 404


async def test_the_detailed_list_has_whole_families(http: httpx.AsyncClient) -> None:
    (guide,) = (await http.get(REGISTRATIONS, params={"detailed": "true"})).json()

    assert guide["model_specs"][0]["model_format"] == "pytorch"


async def test_a_name_that_is_taken_and_a_family_that_is_none_are_refused(
    http: httpx.AsyncClient,
) -> None:
    taken = await register(http, FAMILY | {"model_name": "xinference-guide"})
    no_family = await register(http, {"model_name": "x"})
    no_json = await http.post(REGISTRATIONS, json={"model": "{", "persist": True})
    builtin = await http.delete(f"{REGISTRATIONS}/xinference-guide")
    one_worker = await http.post(
        REGISTRATIONS, json={"model": "{}", "persist": True, "worker_ip": "1.2.3.4"}
    )

    assert taken.json()["error"]["code"] == "model_already_exists"
    assert {answer.status_code for answer in (taken, no_family, no_json, builtin, one_worker)} == {
        400
    }
    assert one_worker.json()["error"]["param"] == "worker_ip"


@pytest.mark.parametrize("path", ["/v1/model_registrations/audio", "/v1/engines/audio/x"])
async def test_a_type_that_does_not_exist_yet_is_refused(
    http: httpx.AsyncClient, path: str
) -> None:
    answer = await http.get(path)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "model_type")


@pytest.mark.parametrize(
    "path", ["/v1/engines/xinference-guide", "/v1/engines/LLM/xinference-guide"]
)
async def test_engines_say_what_they_run_or_why_not(http: httpx.AsyncClient, path: str) -> None:
    engines = (await http.get(path)).json()
    virtual = await http.get(path, params={"enable_virtual_env": "true"})

    assert engines["transformers"][0]["quantizations"] == ["none"]
    assert isinstance(engines["vLLM"], str)
    assert virtual.json() == engines


async def test_prompts_and_families_are_made_of_the_registrations(http: httpx.AsyncClient) -> None:
    await register(http)

    prompts = (await http.get("/v1/models/prompts")).json()
    families = (await http.get("/v1/models/families")).json()

    assert prompts.keys() == {"xinference-guide"}
    assert prompts["xinference-guide"]["stop_token_ids"] == [2]
    assert families["chat"] == ["xinference-guide"]
    assert families["generate"] == ["mine", "xinference-guide"]
    assert families["vision"] == []


@pytest.mark.parametrize(
    ("changes", "is_there"),
    [
        ({}, True),
        ({"model_ability": ["chat", "vision"]}, False),
        ({"model_specs": [{**FAMILY["model_specs"][0], "model_format": "ggufv2"}]}, False),
    ],
)
async def test_what_vllm_can_run_is_told_by_ability(
    http: httpx.AsyncClient, changes: dict[str, Any], is_there: bool
) -> None:
    await register(http, {**FAMILY, **changes})

    told = (await http.get("/v1/models/vllm-supported")).json()

    assert told.keys() == {"chat", "generate"}
    assert ("mine" in told["chat"] + told["generate"]) == is_there


async def test_a_version_of_a_family_is_found_and_launched(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    hubs = [
        {"model_format": "pytorch", "model_size_in_billions": "0_5", "quantization": "none"}
        | {"model_hub": hub, "model_id": "Qwen/Qwen"}
        for hub in ("huggingface", "modelscope")
    ]
    await register(http, {**FAMILY, "model_name": "qwen", "model_specs": hubs})
    cluster.keep(KEPT)

    (version,) = (await http.get("/v1/models/LLM/qwen/versions")).json()
    launched = await http.post(
        "/v1/models/instance",
        json={
            "model_uid": "mine",
            "model_engine": "transformers",
            "model_version": version["model_version"],
            "max_num_seqs": 3,
        },
    )

    assert version["model_version"] == "qwen--0_5B--pytorch--none"
    assert list(version["model_file_location"].values()) == [KEPT.path]
    assert version["cache_status"] is True
    assert launched.json() == {"model_uid": "mine"}
    (instance,) = (await http.get("/v1/models/instances?model_uid=mine")).json()
    assert instance["model_version"] == version["model_version"]
    assert cluster.launched[-1].engine_options.max_num_seqs == 3


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_version": "mine"}, "model_version"),
        ({"model_version": "mine--1B--pytorch--none", "model_name": "mine"}, "model_name"),
        ({"model_version": "mine--pytorch--none", "model_type": "embedding"}, "model_version"),
        ({}, "model_version"),
    ],
)
async def test_what_names_no_version_is_not_launched(
    http: httpx.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    refused = await http.post("/v1/models/instance", json=changes)

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize(
    ("model_type", "about", "version"),
    [
        ("embedding", {"max_tokens": 512, "dimensions": 384}, "mine--512--384--pytorch--none"),
        ("rerank", {"max_tokens": 512}, "mine--pytorch--none"),
    ],
)
def test_versions_of_models_that_embed_and_rerank_are_read_as_they_are_written(
    model_type: str, about: dict[str, Any], version: str
) -> None:
    spec = {**FAMILY["model_specs"][0], "cache_status": False}
    family = {"model_name": "mine", **about, "model_specs": [spec]}

    (item,) = version_items(model_type, family, KeptModels(models={}))
    launch = launch_of_version(InstanceRequest(model_type=model_type, model_version=version))

    assert (item["model_version"], item["model_file_location"]) == (version, None)
    assert (launch.model_name, launch.model_format) == ("mine", "pytorch")
    assert launch.quantization == "none"
