# SPDX-License-Identifier: Apache-2.0
"""Listing and removing virtual environments of models."""

import httpx
import pytest

from tests.fakes.cluster import NODE, FakeCluster
from xinference.protocol.environments import VirtualEnvironment

FAMILY = "xinference-guide"
LAUNCH = {
    "model_name": FAMILY,
    "model_engine": "transformers",
    "model_uid": "in-one",
    "virtual_env_packages": ["tiny==2.0"],
    "virtual_env_find_links": ["/wheels"],
    "enable_virtual_env": True,
}


@pytest.fixture
def environments(cluster: FakeCluster) -> FakeCluster:
    """A cluster with one environment of its family, and one of another."""
    for name in (FAMILY, "other"):
        cluster.environments.append(
            VirtualEnvironment(
                model_name=name,
                model_engine="transformers",
                path=f"/home/virtualenv/{name}/transformers/3.11/0123",
                real_path=f"/data/virtualenv/{name}/transformers/3.11/0123",
                python_version="3.11",
                packages={"tiny": "2.0"},
                worker_ip=NODE.partition(":")[0],
            )
        )
    return cluster


async def test_a_launch_says_what_is_in_its_environment(
    http: httpx.AsyncClient, cluster: FakeCluster
) -> None:
    answer = await http.post("/v1/models", json=LAUNCH)
    smuggled = await http.post(
        "/v1/models", json=LAUNCH | {"model_uid": None, "virtual_env_packages": ["-r x"]}
    )

    assert answer.status_code == 200
    launched = cluster.launched[-1]
    assert launched.enable_virtual_env is True
    assert launched.virtual_env_packages == ("tiny==2.0",)
    assert launched.virtual_env_find_links == ("/wheels",)
    assert (smuggled.status_code, smuggled.json()["error"]["param"]) == (
        400,
        "virtual_env_packages.0",
    )


async def test_environments_are_listed_as_xinferences_users_know_them(
    http: httpx.AsyncClient, environments: FakeCluster
) -> None:
    listed = (await http.get("/v1/virtualenvs", params={"model_name": FAMILY})).json()["list"]
    everything = (await http.get("/v1/virtualenvs")).json()["list"]
    none = (await http.get("/v1/virtualenvs", params={"model_engine": "vllm"})).json()["list"]
    nowhere = await http.get("/v1/virtualenvs", params={"worker_ip": "10.9.9.9"})

    assert listed == [
        {
            "model_name": FAMILY,
            "model_engine": "transformers",
            "path": f"/home/virtualenv/{FAMILY}/transformers/3.11/0123",
            "real_path": f"/data/virtualenv/{FAMILY}/transformers/3.11/0123",
            "python_version": "3.11",
            "actor_ip_address": NODE.partition(":")[0],
            "packages": {"tiny": "2.0"},
            "replicas": [],
        }
    ]
    assert [one["model_name"] for one in everything] == [FAMILY, "other"]
    assert none == []
    assert (nowhere.status_code, nowhere.json()["error"]["param"]) == (400, "worker_ip")


async def test_an_environment_is_removed_unless_something_runs_in_it(
    http: httpx.AsyncClient, environments: FakeCluster
) -> None:
    await http.post("/v1/models", json=LAUNCH)
    whose = {"model_name": FAMILY}

    used = await http.delete("/v1/virtualenvs", params=whose)
    await http.delete("/v1/models/in-one")
    removed = await http.delete("/v1/virtualenvs", params=whose)
    again = await http.delete("/v1/virtualenvs", params=whose)
    nobodys = await http.delete("/v1/virtualenvs")

    assert (used.status_code, used.json()["error"]["code"]) == (409, "environment_in_use")
    assert "in-one-rep0" in used.json()["error"]["message"]
    assert (removed.json(), again.json()) == ({"result": True}, {"result": False})
    assert nobodys.status_code == 400
    assert [one.model_name for one in environments.environments] == ["other"]
