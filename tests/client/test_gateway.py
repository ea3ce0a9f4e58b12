# SPDX-License-Identifier: Apache-2.0
"""The client against the real HTTP layer, over a cluster that is faked below it."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.fakes.cluster import GUIDE, FakeCluster
from tests.fakes.http import serving
from xinference.api.app import create_app
from xinference.client import (
    AsyncClient,
    BadRequest,
    ChatModelHandle,
    Client,
    Conflict,
    NotFound,
    StreamFailed,
    Unavailable,
)
from xinference.errors import LoadFailed, ReplicaLost

MESSAGES = [{"role": "user", "content": "good day"}]


@pytest.fixture(scope="module")
def cluster() -> FakeCluster:
    return asyncio.run(FakeCluster.running())


@pytest.fixture(scope="module")
def endpoint(cluster: FakeCluster) -> Iterator[str]:
    with serving(create_app(cluster)) as address:
        yield address


@pytest.fixture
def client(endpoint: str) -> Iterator[Client]:
    with Client(endpoint) as made:
        yield made


@pytest.fixture
def guide(client: Client) -> ChatModelHandle:
    model = client.get_model("guide")
    assert isinstance(model, ChatModelHandle)
    return model


def text_of(answer: Any) -> str:
    if isinstance(answer, dict):
        (choice,) = answer["choices"]
        return str(choice.get("text") or choice["message"]["content"])
    pieces = [choice for chunk in answer for choice in chunk["choices"]]
    return "".join(one.get("text") or one.get("delta", {}).get("content") or "" for one in pieces)


@pytest.mark.parametrize("stream", [False, True])
def test_a_chat_and_a_completion_are_answered_whole_or_streamed(
    guide: ChatModelHandle, stream: bool
) -> None:
    config = {"stream": stream, "max_tokens": 5}

    assert text_of(guide.chat(MESSAGES, generate_config=config)) == "You said: good day"
    assert text_of(guide.generate("good day", generate_config=config)) == "You said: good day"


def test_the_awaited_client_is_answered_the_same(endpoint: str) -> None:
    async def ask() -> str:
        async with AsyncClient(endpoint) as client:
            model: Any = await client.get_model("guide")
            stream = await model.chat(MESSAGES, generate_config={"stream": True})
            return text_of([chunk async for chunk in stream])

    assert asyncio.run(ask()) == "You said: good day"


def test_a_model_is_launched_described_listed_and_terminated(client: Client) -> None:
    uid = client.launch_model(
        "xinference-guide",
        model_engine="transformers",
        model_uid="mine",
        model_size_in_billions=0.01,
        model_format="pytorch",
        n_gpu=None,
        max_num_seqs=2,
    )

    assert uid == "mine"
    assert set(client.list_models()) == {"guide", "mine"}
    assert client.describe_model("mine")["model_name"] == "xinference-guide"
    assert client.get_launch_model_progress("mine")["stage"] == "completed"
    (instance,) = client.get_instance_info(model_uid="mine")
    assert instance["status"] == "READY"
    client.terminate_model("mine")
    assert set(client.list_models()) == {"guide"}
    with pytest.raises(NotFound, match="mine"):
        client.get_model("mine")


def test_a_launch_that_fails_says_why(client: Client, cluster: FakeCluster) -> None:
    cluster.launch_error = LoadFailed(model="bad", problem="no config.json")
    try:
        with pytest.raises(Unavailable, match=r"no config\.json") as caught:
            client.launch_model("xinference-guide", model_engine="transformers", model_uid="bad")
    finally:
        cluster.launch_error = None
        client.cancel_launch_model("bad")

    assert caught.value.code == "load_failed"


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("replica", 0),
        ("n_worker", 2),
        ("gpu_idx", [9]),
        ("peft_model_config", {"lora_list": []}),
        ("replica_config", [{}]),
        ("virtual_env_packages", ["--index-url=x"]),
        ("no_such_option", 1),
    ],
)
def test_what_this_version_cannot_do_is_refused_by_name(
    client: Client, option: str, value: object
) -> None:
    with pytest.raises(BadRequest, match=option):
        client.launch_model("xinference-guide", model_engine="transformers", **{option: value})


def test_the_catalogue_is_read_and_written(client: Client) -> None:
    mine = GUIDE | {"model_name": "mine"}

    client.register_model("LLM", json.dumps(mine), persist=False)

    assert client.get_model_registration("LLM", "mine")["model_lang"] == ["en"]
    names = [family["model_name"] for family in client.list_model_registrations("LLM")]
    assert names == ["mine", "xinference-guide"]
    assert client.query_engine_by_model_name("mine")["transformers"]
    with pytest.raises(BadRequest, match="already exists"):
        client.register_model("LLM", json.dumps(mine), persist=False)
    client.unregister_model("LLM", "mine")
    with pytest.raises(NotFound):
        client.get_model_registration("LLM", "mine")


def test_a_request_is_aborted_by_its_id(
    client: Client, guide: ChatModelHandle, cluster: FakeCluster
) -> None:
    assert client.abort_request("guide", "early", block_duration=30) == {"msg": "NOT_FOUND"}

    with pytest.raises(Conflict, match="early"):
        guide.chat(MESSAGES, generate_config={"request_id": "early"})


def test_a_full_queue_says_when_to_come_back(guide: ChatModelHandle, cluster: FakeCluster) -> None:
    cluster.queue_is_full = True
    try:
        with pytest.raises(Unavailable) as caught:
            guide.chat(MESSAGES, generate_config={"stream": True})
    finally:
        cluster.queue_is_full = False

    assert (caught.value.status, caught.value.retry_after_seconds) == (429, 7)


def test_an_answer_that_fails_on_the_way_is_an_error(
    guide: ChatModelHandle, cluster: FakeCluster
) -> None:
    def words(_request: object) -> Iterator[str]:
        yield "Once "
        raise ReplicaLost(model="guide", problem="killed")

    told, cluster.words = cluster.words, words
    try:
        stream: Any = guide.chat(MESSAGES, generate_config={"stream": True})
        with pytest.raises(StreamFailed, match="killed") as caught:
            text_of(stream)
        with pytest.raises(Unavailable, match="killed"):
            guide.chat(MESSAGES)
    finally:
        cluster.words = told

    assert caught.value.code == "replica_lost"


def test_the_cluster_is_described_and_stopped(client: Client, cluster: FakeCluster) -> None:
    assert client.get_supervisor_info()["supervisor_ip"] == "127.0.0.1"
    assert len(client.get_workers_info()) == 1
    assert client.abort_cluster() == {"result": True}
    assert cluster.is_stopped
