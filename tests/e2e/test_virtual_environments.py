# SPDX-License-Identifier: Apache-2.0
"""Models that run in virtual environments of their own, over a whole platform. No network."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.e2e.platform import Platform, started, wait_until
from tests.wheels import save_endless_sdist, save_wheel

HOSTS = "iniconfig"
"""The host has another version of it, which no replica needs."""
OLD = "0.0.1"
NAME = "in-an-environment"
SECONDS = 60.0


@pytest.fixture(scope="module")
def wheels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wheels")
    save_wheel(directory, HOSTS, OLD)
    return directory


@pytest.fixture(scope="module")
def platform(
    tmp_path_factory: pytest.TempPathFactory, wheels: Path, guide_files: Path
) -> Iterator[Platform]:
    """A platform that knows a family which wants an environment."""
    home = tmp_path_factory.mktemp("e")
    variables = {
        "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": "1",
        "XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS": str(wheels),
    }
    family = {
        "version": 2,
        "model_name": NAME,
        "model_lang": ["en"],
        "model_ability": ["generate", "chat"],
        "model_family": "qwen2-instruct",
        "context_length": 1024,
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": 4,
                "quantization": "none",
                "model_uri": str(guide_files),
            }
        ],
        "virtualenv": {
            "packages": [f"{HOSTS}=={OLD}", "nothing-there ; #engine# == 'vllm'"],
            "find_links": [str(wheels)],
            "inherit_pip_config": False,
        },
    }
    file = home / "family.json"
    file.write_text(json.dumps(family))
    with started(home, variables=variables) as platform:
        registered = platform.command("register", "--file", str(file), "--persist")
        assert registered.returncode == 0, registered.stderr
        yield platform


def get(platform: Platform, path: str) -> Any:
    return httpx.get(f"{platform.endpoint}{path}", timeout=30).raise_for_status().json()


def launched(platform: Platform, *words: str) -> psutil.Process:
    """Launch the model by command; return its process."""
    done = platform.command("launch", "-en", "transformers", "-n", NAME, "-u", "m", *words)
    assert done.returncode == 0, done.stderr
    (replica,) = platform.replicas
    return replica


def maps_of(process: psutil.Process) -> str:
    """Return which files a process has loaded."""
    return Path(f"/proc/{process.pid}/maps").read_text()


def packages_of(platform: Platform) -> Any:
    """Return what the model's process says of its environment."""
    (model,) = get(platform, "/v1/models/instances")
    return model["replica_statuses"][0]["virtual_env_packages"]


@pytest.mark.timeout(300)
def test_a_model_has_another_version_of_a_package_than_the_host_for_as_long_as_it_runs(
    platform: Platform,
) -> None:
    replica = launched(platform, "--env", "A", "0")
    (environment,) = get(platform, "/v1/virtualenvs")["list"]
    asked = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    answer = httpx.post(f"{platform.endpoint}/v1/chat/completions", json=asked, timeout=SECONDS)

    assert packages_of(platform) == {HOSTS: OLD}
    assert replica.cmdline()[0] == f"{environment['path']}/bin/python"
    assert replica.environ()["A"] == "0"
    torch = importlib.util.find_spec("torch")
    assert torch is not None
    assert f"{Path(str(torch.origin)).parent}/lib/libtorch" in maps_of(replica)
    assert answer.json()["choices"][0]["message"]["content"]
    assert environment["replicas"] == ["m-rep0"]

    in_use = platform.command("virtual-env", "remove", "-n", NAME)
    assert in_use.returncode == 1
    assert "m-rep0" in in_use.stderr

    first = replica.pid
    replica.kill()
    wait_until(
        "it is back in the same environment",
        lambda: [one for one in platform.replicas if one.pid != first and packages_of(platform)],
        timeout_seconds=SECONDS,
    )
    listed = platform.command("virtual-env", "list", "--json")
    httpx.delete(f"{platform.endpoint}/v1/models/m", timeout=SECONDS).raise_for_status()
    removed = platform.command("virtual-env", "remove", "-n", NAME)

    (shown,) = json.loads(listed.stdout)
    assert (shown["path"], shown["packages"]) == (environment["path"], {HOSTS: OLD})
    assert removed.returncode == 0, removed.stderr
    assert get(platform, "/v1/virtualenvs")["list"] == []
    assert not Path(environment["path"]).exists()


def test_a_package_that_is_not_there_ends_the_launch_with_the_installers_words(
    platform: Platform,
) -> None:
    words = ("launch", "-en", "transformers", "-n", NAME, "-u", "m", "-vp", "nobody-has-this")
    done = platform.command(*words)

    assert done.returncode == 1
    assert "nobody-has-this" in done.stderr
    assert "not found" in (platform.home / "logs" / "m-rep0.log").read_text()
    assert get(platform, "/v1/virtualenvs")["list"] == []


def test_making_an_environment_is_shown_and_can_be_cancelled(
    platform: Platform, wheels: Path, tmp_path: Path
) -> None:
    told = tmp_path / "builds"
    save_endless_sdist(wheels, "endless", told)
    body = {
        "model_name": NAME,
        "model_engine": "transformers",
        "model_uid": "m",
        "virtual_env_packages": ["endless"],
    }
    url = f"{platform.endpoint}/v1/models"
    httpx.post(url, params={"wait_ready": False}, json=body, timeout=30).raise_for_status()
    wait_until("it is being built", told.exists, timeout_seconds=SECONDS)
    build = psutil.Process(int(wait_until("its pid", told.read_text, timeout_seconds=5)))
    progress = get(platform, "/v1/models/m/progress")

    httpx.post(f"{url}/m/cancel", timeout=30).raise_for_status()

    assert "endless" in progress["info"]
    assert progress["stage"] == "launching"
    assert not build.is_running()
    assert get(platform, "/v1/virtualenvs")["list"] == []
    left = [path for path in (platform.home / "virtualenv").rglob("*") if path.is_file()]
    assert left == []
