# SPDX-License-Identifier: Apache-2.0
"""The autostart list over HTTP."""

from typing import Any

import httpx
import pytest

from tests.fakes.cluster import FakeCluster

ENTRY: dict[str, Any] = {
    "launch": {
        "model_uid": "mine",
        "model_name": "xinference-guide",
        "model_engine": "transformers",
        "envs": {"TOKEN": "secret"},
        "max_num_seqs": 4,
        "replica": 2,
        "replica_config": [{"devices": [{"n_gpu": None}]}, {"devices": [{"n_gpu": None}]}],
    },
    "priority": 7,
}


async def test_an_entry_is_added_listed_and_removed(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    added = await http.post("/v1/autostart/models", json=ENTRY)

    assert added.status_code == 200, added.text
    assert added.json() == {
        "model_uid": "mine",
        "enabled": True,
        "priority": 7,
        "max_retries": 3,
        "retry_interval_seconds": 30.0,
        "num_attempts": 0,
        "problem": "",
        "launch": {
            "model_uid": "mine",
            "model_name": "xinference-guide",
            "model_engine": "transformers",
            "envs": {"TOKEN": "***"},
            "max_num_seqs": 4,
            "replica": 2,
            "replica_config": [
                {"devices": [{"worker_ip": None, "n_gpu": 0, "gpu_idx": None}]},
                {"devices": [{"worker_ip": None, "n_gpu": 0, "gpu_idx": None}]},
            ],
        },
    }
    assert (await http.get("/v1/autostart/models")).json() == {"models": [added.json()]}
    (summary,) = (await http.get("/v1/autostart/models/summary")).json()
    assert (summary["model_name"], summary["status"]) == ("xinference-guide", None)
    assert "launch" not in summary
    (entry,) = [status.entry for status in await cluster.autostart()]
    assert entry.launch.envs == {"TOKEN": "secret"}

    assert (await http.delete("/v1/autostart/models/mine")).status_code == 200
    assert (await http.get("/v1/autostart/models")).json() == {"models": []}
    missing = await http.delete("/v1/autostart/models/mine")
    assert (missing.status_code, "autostart list mine" in missing.text) == (404, True)


async def test_no_secret_of_a_server_is_listed(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    launch = {
        "model_uid": "mine",
        "model_name": "xinference-guide",
        "model_engine": "SGLang",
        "hf_token": "sesame",
        "admin-api-key": "sesame",
        "tokenizer_mode": "auto",
    }

    added = await http.post("/v1/autostart/models", json={"launch": launch})

    assert added.status_code == 200, added.text
    assert "sesame" not in added.text
    assert added.json()["launch"] == launch | {"hf_token": "***", "admin-api-key": "***"}
    (entry,) = [status.entry for status in await cluster.autostart()]
    assert entry.launch.server_options is not None
    assert entry.launch.server_options.secrets == ("sesame", "sesame")


@pytest.mark.parametrize(
    ("changes", "refused"),
    [
        ({"launch": {**ENTRY["launch"], "model_uid": None}}, "launch.model_uid"),
        ({"launch": {"model_uid": "mine"}}, "launch.model_name"),
        ({"max_retries": -1}, "max_retries"),
        ({"retry_interval_seconds": 0}, "retry_interval_seconds"),
        ({"every_day": True}, "every_day"),
    ],
)
async def test_an_entry_that_cannot_be_is_refused_by_name(
    http: httpx.AsyncClient, changes: dict[str, Any], refused: str
) -> None:
    answer = await http.post("/v1/autostart/models", json=ENTRY | changes)

    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"] == refused


async def test_an_entry_that_is_sent_back_as_it_was_listed_keeps_its_secrets(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    launch = {
        "model_uid": "mine",
        "model_name": "xinference-guide",
        "model_engine": "SGLang",
        "envs": {"TOKEN": "secret", "MODE": "fast"},
        "hf_token": "sesame",
    }
    await http.post("/v1/autostart/models", json={"launch": launch})
    (listed,) = (await http.get("/v1/autostart/models")).json()["models"]
    listed["launch"]["envs"]["MODE"] = "slow"

    back = await http.post("/v1/autostart/models", json={**listed, "priority": 5})

    assert back.status_code == 200, back.text
    (entry,) = [status.entry for status in await cluster.autostart()]
    assert entry.priority == 5
    assert entry.launch.envs == {"TOKEN": "secret", "MODE": "slow"}
    assert entry.launch.server_options is not None
    assert entry.launch.server_options.flags["hf_token"] == "sesame"


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"launch": {**ENTRY["launch"], "envs": {"TOKEN": "***"}}}, "launch.envs.TOKEN"),
        ({"launch": ENTRY["launch"], "model_uid": "other"}, "model_uid"),
    ],
)
async def test_an_entry_is_refused_whose_hidden_values_nobody_knows(
    http: httpx.AsyncClient, changes: dict[str, Any], field: str
) -> None:
    refused = await http.post("/v1/autostart/models", json=changes)

    assert (refused.status_code, refused.json()["error"]["param"]) == (400, field)
