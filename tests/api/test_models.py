# SPDX-License-Identifier: Apache-2.0
"""The life of models over HTTP: launch, look, cancel, scale, terminate."""

import asyncio
from dataclasses import replace
from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.api.admin.convert import description_item, launch_spec
from xinference.api.admin.schema import LaunchRequest
from xinference.api.fields import Only
from xinference.errors import DownloadFailed, LaunchCancelled, LoadFailed, RepositoryNotFound
from xinference.protocol.deployment import EngineOptions, LaunchSpec, ReplicaPlacement

LAUNCH = {"model_name": "xinference-guide", "model_engine": "transformers"}


def refused_fields() -> dict[str, Only]:
    return {
        name: mark
        for name, field in LaunchRequest.model_fields.items()
        for mark in field.metadata
        if isinstance(mark, Only)
    }


async def launch(http: httpx.AsyncClient, **fields: Any) -> httpx.Response:
    return await http.post("/v1/models", json={**LAUNCH, "model_uid": "mine", **fields})


async def test_a_launch_returns_the_uid_of_a_model_that_answers(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/models", json=LAUNCH)

    assert answer.json() == {"model_uid": "xinference-guide"}
    described = (await http.get("/v1/models/xinference-guide")).json()
    assert (described["status"], described["model_type"]) == ("READY", "LLM")


async def test_every_honoured_field_of_a_launch_reaches_the_cluster(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    await launch(
        http,
        model_size_in_billions="0.01",
        model_format="pytorch",
        quantization="none",
        model_path="/models/mine",
        worker_ip="127.0.0.1:5001",
        envs={"A": "b"},
        max_num_seqs=4,
        context_length=256,
        n_gpu=None,
        trust_remote_code=True,
        request_limits=7,
        download_hub="ModelScope",
        replica=2,
        min_replicas=1,
        max_replicas=3,
        idle_timeout=90,
        autoload=True,
    )

    assert cluster.launched[-1] == LaunchSpec(
        model_uid="mine",  # type: ignore[arg-type]  # a plain text is equal
        model_name="xinference-guide",
        model_engine="transformers",
        model_size_in_billions="0_01",
        model_format="pytorch",
        quantization="none",
        model_path="/models/mine",
        worker_ip="127.0.0.1:5001",
        envs={"A": "b"},
        engine_options=EngineOptions(
            max_num_seqs=4, max_model_len=256, device="cpu", trust_remote_code=True
        ),
        request_limits=7,
        download_hub="modelscope",
        n_gpu=0,
        replica=2,
        min_replicas=1,
        max_replicas=3,
        idle_timeout=90,
        autoload=True,
    )


async def test_the_engine_and_with_files_the_name_may_be_left_out(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    answer = await launch(http, model_engine=None)

    assert answer.status_code == 200, answer.text
    assert cluster.launched[-1].model_engine is None
    assert launch_spec(LaunchRequest(model_path="/models/mine")).model_name == ""
    assert launch_spec(LaunchRequest(model_name="Qwen/Qwen3-8B")).model_name == "Qwen/Qwen3-8B"


@pytest.mark.parametrize(
    ("fields", "refused"),
    [
        ({"min_replicas": 1}, "min_replicas"),
        ({"max_replicas": 4, "min_replicas": 2}, "min_replicas"),
        ({"max_replicas": 1, "replica": 2}, "max_replicas"),
        ({"max_replicas": 4, "gpu_idx": [0]}, "max_replicas"),
        ({"max_replicas": 4, "replica_config": [{"devices": [{"n_gpu": 1}]}]}, "max_replicas"),
        ({"max_replicas": 10**6}, "max_replicas"),
        ({"idle_timeout": 0}, "idle_timeout"),
        ({"idle_timeout": "soon"}, "idle_timeout"),
        ({"autoload": "often"}, "autoload"),
    ],
)
async def test_a_wish_for_scaling_or_sleep_that_cannot_be_is_refused(
    http: httpx.AsyncClient, cluster: FakeCluster, fields: dict[str, Any], refused: str
) -> None:
    answer = await launch(http, **fields)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == refused


@pytest.mark.parametrize("given", [True, False, None])
async def test_a_launch_may_say_that_thoughts_are_told_apart(
    http: httpx.AsyncClient, given: bool | None
) -> None:
    answer = await launch(http, reasoning_content=given)

    assert answer.json() == {"model_uid": "mine"}


@pytest.mark.parametrize("name", ["model_size_in_billions", "size_in_billions"])
@pytest.mark.parametrize("size", [0.01, "0.01", "0_01", "0_010"])
async def test_a_size_may_be_written_in_each_known_way(
    http: httpx.AsyncClient, cluster: FakeCluster, name: str, size: Any
) -> None:
    answer = await launch(http, **{name: size})

    assert answer.status_code == 200, answer.text
    assert cluster.launched[-1].model_size_in_billions == "0_01"


@pytest.mark.parametrize(
    ("given", "device"),
    [({}, "auto"), ({"n_gpu": "auto"}, "auto"), ({"n_gpu": None}, "cpu"), ({"n_gpu": 0}, "cpu")],
)
async def test_no_gpu_means_the_cpu(
    http: httpx.AsyncClient, cluster: FakeCluster, given: dict[str, Any], device: str
) -> None:
    await launch(http, **given)

    assert cluster.launched[-1].engine_options.device == device


@pytest.mark.parametrize("name", sorted(refused_fields()))
async def test_a_field_that_is_not_honoured_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, name: str
) -> None:
    for given in (7, "x", [1], {"a": 1}):
        answer = await launch(http, **{name: given})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == name

    for neutral in (None, *refused_fields()[name].neutral):
        answer = await launch(http, model_uid=None, **{name: neutral})
        assert answer.status_code == 200, (neutral, answer.text)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model_name": None}, "model_name"),
        ({"model_name": ""}, "model_name"),
        ({"model_name": "a/b/c"}, "model_name"),
        ({"model_name": "a/"}, "model_name"),
        ({"model_type": "embedding"}, "model_type"),
        ({"model_uid": "a b"}, "model_uid"),
        ({"model_uid": "x" * 101}, "model_uid"),
        ({"model_uid": "x-rep0"}, "model_uid"),
        ({"model_size_in_billions": "7B"}, "model_size_in_billions"),
        ({"model_size_in_billions": True}, "model_size_in_billions"),
        ({"size_in_billions": -1}, "size_in_billions"),
        ({"size_in_billions": 1, "model_size_in_billions": 2}, "size_in_billions"),
        ({"envs": {"A": 1}}, "envs.A"),
        ({"envs": {"A=B": "1"}}, "envs.A=B"),
        ({"max_num_seq": 4}, "max_num_seq"),
        ({"max_num_seqs": 0}, "max_num_seqs"),
        ({"max_num_seqs": "8"}, "max_num_seqs"),
        ({"dtype": "int3"}, "dtype"),
        ({"device": "tpu"}, "device"),
        ({"device": ["cpu"]}, "device"),
        ({"trust_remote_code": "yes"}, "trust_remote_code"),
        ({"context_length": 8, "max_model_len": 9}, "context_length"),
        ({"n_gpu": 0, "device": "cuda"}, "n_gpu"),
        ({"n_gpu": 2}, "n_gpu"),
        ({"n_gpu": "many"}, "n_gpu"),
        ({"n_gpu": True}, "n_gpu"),
        ({"gpu_idx": [0, 1]}, "gpu_idx"),
        ({"gpu_idx": [7]}, "gpu_idx"),
        ({"gpu_idx": "0"}, "gpu_idx"),
        ({"replica": 0}, "replica"),
        ({"replica": 1.5}, "replica"),
        ({"replica": True}, "replica"),
        ({"worker_ip": "10.9.9.9"}, "worker_ip"),
        ({"replica_config": [{}]}, "replica_config[0].devices"),
        ({"replica_config": [{"devices": [{}]}], "n_gpu": 1}, "n_gpu"),
        ({"replica_config": [{"devices": [{}]}], "replica": 2}, "replica_config"),
        ({"replica_config": [{"devices": [{}], "role": "decode"}]}, "replica_config[0].role"),
        ({"gpu_memory_utilization": 0.9}, "gpu_memory_utilization"),
    ],
)
async def test_a_bad_launch_is_refused_by_name_before_anything_starts(
    http: httpx.AsyncClient, cluster: FakeCluster, given: dict[str, Any], named: str
) -> None:
    before = len(cluster.launched)

    answer = await launch(http, **given)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)
    assert len(cluster.launched) == before


async def test_what_the_catalogue_refuses_keeps_its_status(http: httpx.AsyncClient) -> None:
    unknown = await launch(http, model_name="xinference-gide")
    engine = await launch(http, model_engine="vLLM")
    taken = await launch(http, model_uid="guide")

    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "family_not_found")
    assert "xinference-guide" in unknown.json()["detail"]
    assert (engine.status_code, engine.json()["error"]["code"]) == (400, "unsupported_variant")
    assert (taken.status_code, taken.json()["error"]["code"]) == (400, "model_already_exists")


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (LoadFailed(model="mine", problem="no weights"), 503),
        (LaunchCancelled(model="mine"), 499),
        (DownloadFailed(model="a/b", problem="the hub does not answer"), 503),
        (RepositoryNotFound(model="a/b", problem="no hub has it"), 404),
    ],
)
async def test_a_launch_that_ends_badly_says_why(
    http: httpx.AsyncClient, cluster: FakeCluster, error: Any, status: int
) -> None:
    cluster.launch_error = error

    answer = await launch(http)

    assert answer.status_code == status
    assert answer.json()["detail"] == str(error)


async def test_a_launch_can_be_watched_without_waiting(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.holds_launches = True
    answer = await http.post(
        "/v1/models", params={"wait_ready": False}, json=LAUNCH | {"model_uid": "mine"}
    )
    loading = (await http.get("/v1/models/mine/progress")).json()
    listed = (await http.get("/v1/models")).json()["data"]
    instances = (await http.get("/v1/models/instances", params={"model_uid": "mine"})).json()
    cluster.finish_launch("mine")
    ready = (await http.get("/v1/models/mine/progress")).json()

    assert answer.json() == {"model_uid": "mine"}
    assert (loading["stage"], ready["stage"], ready["progress"]) == ("loading", "completed", 1.0)
    (replica,) = loading["replicas"]
    assert (replica["replica_model_uid"], replica["stage"]) == ("mine-rep0", "loading")
    assert [model["id"] for model in listed] == ["guide"]
    assert [instance["status"] for instance in instances] == ["LOADING"]
    assert instances[0]["replica_statuses"][0]["model_state"] == "loading"


async def test_progress_of_an_unknown_model_is_pending(http: httpx.AsyncClient) -> None:
    answer = await http.get("/v1/models/nope/progress")

    assert answer.json() == {
        "progress": 0.0,
        "stage": "pending",
        "info": "",
        "download_files": [],
        "replicas": [],
    }


async def test_a_cancelled_launch_is_a_499_for_who_waits_and_null_for_who_cancels(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.holds_launches = True
    waiting = asyncio.create_task(launch(http))
    await cluster.wait_until(lambda: len(cluster.launched) == 2)

    cancelled = await http.post("/v1/models/mine/cancel")
    waited = await waiting

    assert (cancelled.status_code, cancelled.json()) == (200, None)
    assert (waited.status_code, waited.json()["error"]["code"]) == (499, "launch_cancelled")
    assert (await http.get("/v1/models/mine")).status_code == 404


async def test_a_ready_model_cannot_be_cancelled(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/models/guide/cancel")

    assert answer.status_code == 400


async def test_the_list_is_openais_with_the_description_beside_it(http: httpx.AsyncClient) -> None:
    body = (await http.get("/v1/models")).json()

    (model,) = body["data"]
    assert body["object"] == "list"
    assert (model["id"], model["object"], model["owned_by"]) == ("guide", "model", "xinference")
    assert isinstance(model["created"], int)
    assert model["model_ability"] == ["chat", "generate"]
    assert (model["replica"], model["context_length"]) == (1, 1024)


@pytest.mark.parametrize(("known", "shown"), [("7", 7), ("0_5", "0_5"), ("0", None)])
async def test_a_size_is_described_as_registrations_have_it(
    cluster: FakeCluster, known: str, shown: int | str | None
) -> None:
    (model,) = await cluster.models()

    described = description_item(replace(model.description, model_size_in_billions=known))

    assert described["model_size_in_billions"] == shown


async def test_instances_can_be_asked_for_by_name_or_uid(http: httpx.AsyncClient) -> None:
    await launch(http)

    async def uids(**params: str) -> list[str]:
        answer = await http.get("/v1/models/instances", params=params)
        return [instance["model_uid"] for instance in answer.json()]

    assert await uids() == ["guide", "mine"]
    assert await uids(model_uid="mine") == ["mine"]
    assert await uids(model_name="xinference-guide") == ["guide", "mine"]
    assert await uids(model_name="other") == []


async def test_a_replica_that_died_shows_its_restarts(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.lose_replica("guide")

    (replica,) = (await http.get("/v1/models/guide/replicas")).json()

    assert (replica["replica_id"], replica["replica_model_uid"]) == (0, "guide-rep0")
    assert (replica["num_restarts"], replica["status"]) == (1, "LOADING")


async def test_replicas_are_placed_as_a_launch_says(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    devices = [{"worker_ip": "127.0.0.1:5001", "gpu_idx": [0]}, {"n_gpu": None}]
    config = [{"devices": [device]} for device in devices]

    plain = await launch(http, replica="3", gpu_idx=[0, 0, 0])
    placed = await launch(http, model_uid="placed", replica=2, replica_config=config)

    assert plain.status_code == placed.status_code == 200, (plain.text, placed.text)
    first, second = cluster.launched[-2:]
    assert (first.replica, first.gpu_idx) == (3, (0, 0, 0))
    assert second.replica_config == (
        ReplicaPlacement(worker_ip="127.0.0.1:5001", gpu_idx=(0,)),
        ReplicaPlacement(n_gpu=0),
    )
    replicas = (await http.get("/v1/models/placed/replicas")).json()
    assert [(one["replica_id"], one["gpu_idx"]) for one in replicas] == [(0, [0]), (1, None)]
    assert replicas[0]["accelerators"] == ["0"]


async def test_replicas_are_added_and_removed_and_the_last_takes_the_model_along(
    http: httpx.AsyncClient,
) -> None:
    one = await http.post("/v1/models/guide/replicas")
    more = await http.post("/v1/models/guide/replicas", json={"replica": 2})
    wrong = await http.delete("/v1/models/guide/replicas/7")

    assert one.json() == {
        "replica_id": 1,
        "replica_model_uid": "guide-rep1",
        "worker_address": "127.0.0.1:5001",
    }
    assert more.json()["replica"] == 2
    assert [added["replica_id"] for added in more.json()["replicas"]] == [2, 3]
    assert (await http.get("/v1/models/guide")).json()["replica"] == 4
    assert wrong.status_code == 400
    left = [(await http.delete(f"/v1/models/guide/replicas/{index}")).json() for index in range(4)]
    assert left == [{"remaining_replicas": count} for count in (3, 2, 1, 0)]
    assert (await http.get("/v1/models/guide")).status_code == 404


@pytest.mark.parametrize(
    ("body", "named"),
    [
        ({"replica": 0}, "replica"),
        ({"model_engine": "vllm"}, "model_engine"),
        ({"replica_config": {}}, "replica_config"),
        ({"replica_config": {"devices": [{"gpu_idx": 9}]}}, "gpu_idx"),
        ({"replica_config": [{"devices": [{}]}], "replica": 2}, "replica_config"),
        ({"replica_config": {"devices": [{}]}, "n_gpu": 1}, "n_gpu"),
    ],
)
async def test_a_replica_that_cannot_be_is_refused_by_name(
    http: httpx.AsyncClient, body: dict[str, Any], named: str
) -> None:
    answer = await http.post("/v1/models/guide/replicas", json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, named)
    assert len((await http.get("/v1/models/guide/replicas")).json()) == 1


async def test_a_terminated_model_is_gone(http: httpx.AsyncClient) -> None:
    answer = await http.delete("/v1/models/guide")

    assert (answer.status_code, answer.json()) == (200, None)
    assert (await http.get("/v1/models")).json()["data"] == []


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/models/nope"),
        ("DELETE", "/v1/models/nope"),
        ("POST", "/v1/models/nope/cancel"),
        ("GET", "/v1/models/nope/events"),
        ("GET", "/v1/models/nope/replicas"),
        ("POST", "/v1/models/nope/replicas"),
        ("DELETE", "/v1/models/nope/replicas/0"),
        ("POST", "/v1/models/nope/requests/r/abort"),
        ("GET", "/v1/models/%ff%00%ed%a0%80"),
    ],
)
async def test_an_unknown_model_is_a_404(http: httpx.AsyncClient, method: str, path: str) -> None:
    answer = await http.request(method, path)

    assert answer.status_code == 404
    assert answer.json()["error"]["code"] == "model_not_found"


async def test_the_story_of_a_model_is_told_oldest_first(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    cluster.lose_replica("guide")

    story = (await http.get("/v1/models/guide/events")).json()

    assert [event["event_content"] for event in story] == [
        "launched",
        "ready",
        "its process was killed",
    ]
    assert story[-1]["event_type"] == "ERROR"


@pytest.mark.parametrize("seconds", [-1, "x", 10**9, None])
async def test_a_bad_block_duration_is_refused(http: httpx.AsyncClient, seconds: Any) -> None:
    answer = await http.post("/v1/models/guide/requests/r/abort", json={"block_duration": seconds})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "block_duration")


async def test_an_id_with_slashes_can_be_aborted(http: httpx.AsyncClient) -> None:
    answer = await http.post("/v1/models/guide/requests/a%2Fb/c/abort", json={})

    assert answer.json() == {"msg": "NOT_FOUND"}
