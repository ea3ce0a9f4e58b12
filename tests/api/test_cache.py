# SPDX-License-Identifier: Apache-2.0
"""What the workers keep of models, over HTTP."""

import json

import httpx
import pytest

from tests.fakes.cluster import GUIDE, NODE, FakeCluster
from xinference.api.admin.convert import download_progress
from xinference.identifiers import NodeId
from xinference.protocol.downloads import (
    CachedModel,
    DownloadProgress,
    DownloadStage,
    DownloadStatus,
    FileProgress,
    HubSource,
)

VERSION = "qwen--0_5B--pytorch--none"
KEPT = CachedModel(
    model_version=VERSION,
    model_name="qwen",
    model_type="LLM",
    model_size_in_billions="0_5",
    model_format="pytorch",
    quantization="none",
    source=HubSource(hub="huggingface", model_id="Qwen/Qwen"),
    path="/home/cache/huggingface/Qwen--Qwen",
    files=("/home/cache/huggingface/Qwen--Qwen/config.json",),
    size_bytes=2000,
    freed_bytes=1500,
    is_complete=True,
    used_by=("my-qwen",),
)
CACHE = "/v1/cache/models"


@pytest.fixture
def kept(cluster: FakeCluster) -> FakeCluster:
    cluster.keep(KEPT)
    return cluster


async def test_what_is_kept_is_listed_with_the_names_that_users_know(
    http: httpx.AsyncClient, kept: FakeCluster
) -> None:
    answer = await http.get(CACHE)

    assert answer.json() == {
        "list": [
            {
                "model_name": "qwen",
                "model_type": "LLM",
                "model_size_in_billions": "0_5",
                "model_format": "pytorch",
                "quantization": "none",
                "model_version": VERSION,
                "path": KEPT.path,
                "real_path": KEPT.path,
                "actor_ip_address": NODE,
                "model_hub": "huggingface",
                "model_id": "Qwen/Qwen",
                "revision": None,
                "size_bytes": 2000,
                "freed_bytes": 1500,
                "is_complete": True,
                "used_by": ["my-qwen"],
            }
        ],
        "unanswered": [],
    }
    other = await http.get(CACHE, params={"model_name": "other"})
    assert other.json() == {"list": [], "unanswered": []}


async def test_a_worker_that_is_silent_is_named_and_the_others_are_listed(
    http: httpx.AsyncClient, kept: FakeCluster
) -> None:
    kept.unanswered = (NodeId("10.0.0.8:9001"),)

    listed = await http.get(CACHE)
    removed = await http.delete(CACHE, params={"model_version": VERSION, "force": "true"})

    assert len(listed.json()["list"]) == 1
    assert listed.json()["unanswered"] == ["10.0.0.8:9001"]
    assert removed.json() == {
        "result": True,
        "freed_bytes": 1500,
        "unanswered": ["10.0.0.8:9001"],
    }


async def test_what_would_be_removed_is_told_first(
    http: httpx.AsyncClient, kept: FakeCluster
) -> None:
    answer = await http.get(f"{CACHE}/files", params={"model_version": VERSION})

    assert answer.json() == {
        "model_version": VERSION,
        "worker_ip": None,
        "paths": list(KEPT.files),
        "freed_bytes": 1500,
        "used_by": ["my-qwen"],
        "unanswered": [],
    }
    unknown = await http.get(f"{CACHE}/files", params={"model_version": "nothing"})
    assert unknown.status_code == 404
    assert (await http.get(f"{CACHE}/files")).status_code == 400


async def test_what_a_model_runs_from_is_a_conflict_unless_it_is_forced(
    http: httpx.AsyncClient, kept: FakeCluster
) -> None:
    refused = await http.delete(CACHE, params={"model_version": VERSION})

    assert refused.status_code == 409
    assert refused.json()["error"]["code"] == "cache_in_use"
    assert "my-qwen" in refused.json()["error"]["message"]
    forced = await http.delete(CACHE, params={"model_version": VERSION, "force": True})
    assert forced.json() == {"result": True, "freed_bytes": 1500, "unanswered": []}
    assert (await http.get(CACHE)).json()["list"] == []
    again = await http.delete(CACHE, params={"model_version": VERSION})
    assert again.status_code == 404


async def test_a_download_is_started_watched_and_cancelled(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    (spec,) = GUIDE["model_specs"]
    family = {**GUIDE, "model_name": "far", "model_specs": [{**spec, "model_src": {}}]}
    await cluster.register("LLM", json.dumps(family), persist=False)

    started = await http.post(
        CACHE, json={"model_name": "far", "model_size_in_billions": 0.5, "download_hub": "auto"}
    )

    assert started.status_code == 200, started.text
    uid = started.json()["cache_uid"]
    assert cluster.launched[-1].model_size_in_billions == "0_5"
    assert (await http.get(f"{CACHE}/{uid}/progress")).json()["stage"] == "downloading"
    assert (await http.post(f"{CACHE}/{uid}/cancel")).json() is None
    assert (await http.get(f"{CACHE}/{uid}/progress")).json()["stage"] == "cancelled"
    assert (await http.post(f"{CACHE}/{uid}/cancel")).status_code == 404


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({}, "model_name"),
        ({"model_name": "xinference-guide"}, "model_name"),
        ({"model_name": "xinference-guide", "download_hub": "csghub"}, "download_hub"),
        ({"model_name": "xinference-guide", "model_type": "image"}, "model_type"),
        ({"model_name": "xinference-guide", "worker_ip": "10.0.0.9"}, "worker_ip"),
        ({"model_name": "xinference-guide", "max_num_seqs": 1}, "max_num_seqs"),
    ],
)
async def test_a_download_that_cannot_be_is_refused_by_name(
    http: httpx.AsyncClient, body: dict[str, object], field: str
) -> None:
    answer = await http.post(CACHE, json=body)

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == field


async def test_progress_of_an_unknown_download_is_pending(http: httpx.AsyncClient) -> None:
    answer = (await http.get(f"{CACHE}/nope/progress")).json()

    assert (answer["progress"], answer["stage"], answer["workers"]) == (0.0, "pending", [])


def test_a_download_on_several_workers_is_as_far_as_the_last_and_fails_with_one() -> None:
    def at(done: int) -> DownloadStatus:
        file = FileProgress(file_name="w", size_bytes=100, downloaded_bytes=done)
        return DownloadStatus(
            stage=DownloadStage.DOWNLOADING, progress=DownloadProgress(files=(file,))
        )

    done = DownloadStatus(stage=DownloadStage.COMPLETED)
    failed = DownloadStatus(stage=DownloadStage.ERROR, error_message="no such model")
    one, two, three = NodeId("1"), NodeId("2"), NodeId("3")

    both = download_progress({one: at(30), two: at(60), three: done})
    worst = download_progress({one: at(30), two: failed})

    assert (both["progress"], both["stage"]) == (0.3, "downloading")
    assert both["download_files"][0].downloaded_bytes == 30
    assert (worst["stage"], worst["info"]) == ("error", "no such model")
