# SPDX-License-Identifier: Apache-2.0
"""The first seed's three ways to launch, on a registered local model; then nothing is left."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import psutil
import pytest

from tests.e2e.platform import Platform, environment, wait_until

NAME = "my-own-chat"


@pytest.fixture(scope="module")
def own_model(
    platform: Platform, guide_files: Path, tmp_path_factory: pytest.TempPathFactory
) -> Platform:
    """A platform on which a model of the user's own is registered."""
    here = tmp_path_factory.mktemp("own")
    shutil.copytree(guide_files, here / "files")
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
                "model_uri": str(here / "files"),
            }
        ],
    }
    (here / "model.json").write_text(json.dumps(family))
    done = platform.command("register", "--file", str(here / "model.json"), "--persist")
    assert done.returncode == 0, done.stderr
    return platform


def launch_by_command(platform: Platform) -> str:
    words = f"launch -e {platform.endpoint} --model-engine transformers -n {NAME} -s 4"
    done = platform.command(*words.split(), "-f", "pytorch", "-q", "none")
    assert done.returncode == 0, done.stderr
    assert f"Model uid: {NAME}" in done.stdout
    return NAME


def launch_by_curl(platform: Platform) -> str:
    done = subprocess.run(
        [
            *("curl", "--silent", "--show-error", "-X", "POST"),
            f"{platform.endpoint}/v1/models",
            *("-H", "accept: application/json", "-H", "Content-Type: application/json"),
            "-d",
            f"""{{
              "model_engine": "transformers",
              "model_name": "{NAME}",
              "model_format": "pytorch",
              "size_in_billions": 4,
              "quantization": "none"
            }}""",
        ],
        capture_output=True,
        check=True,
        timeout=90,
    )
    return str(json.loads(done.stdout)["model_uid"])


def launch_by_python(platform: Platform) -> str:
    program = f"""
from xinference.client import Client
client = Client("{platform.endpoint}")
model_uid = client.launch_model(
  model_engine="transformers",
  model_name="{NAME}",
  model_format="pytorch",
  model_size_in_billions=4,
  quantization="none"
)
print('Model uid: ' + model_uid)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env=environment(platform.home),
        capture_output=True,
        text=True,
        check=True,
        timeout=90,
    )
    return done.stdout.strip().removeprefix("Model uid: ")


@pytest.mark.parametrize("launch", [launch_by_command, launch_by_curl, launch_by_python])
def test_a_registered_model_is_launched_asked_and_terminated_without_a_trace(
    own_model: Platform, launch
) -> None:
    uid = launch(own_model)

    assert uid == NAME
    (process,) = own_model.replicas
    listed = json.loads(own_model.command("list", "--json").stdout)
    assert NAME in json.dumps(listed)
    reply = httpx.post(
        f"{own_model.endpoint}/v1/chat/completions",
        json={"model": uid, "messages": [{"role": "user", "content": "hello"}]},
        timeout=60,
    )
    assert reply.status_code == 200, reply.text
    assert reply.json()["choices"][0]["message"]["content"]

    done = own_model.command("terminate", "--model-uid", uid)

    assert done.returncode == 0, done.stderr
    assert not own_model.replicas
    assert not psutil.pid_exists(process.pid)
    gone = httpx.get(f"{own_model.endpoint}/v1/models/{uid}")
    assert gone.status_code == 404
    assert httpx.get(f"{own_model.endpoint}/v1/models").json()["data"] == []


def test_a_launch_can_be_watched_and_cancelled(own_model: Platform) -> None:
    url = f"{own_model.endpoint}/v1/models"
    body = {"model_name": NAME, "model_engine": "transformers", "model_uid": "soon-gone"}
    httpx.post(url, params={"wait_ready": False}, json=body, timeout=30).raise_for_status()
    wait_until("its process runs", lambda: own_model.replicas, timeout_seconds=30)
    progress = httpx.get(f"{url}/soon-gone/progress").json()
    assert 0 <= progress["progress"] < 1

    cancelled = httpx.post(f"{url}/soon-gone/cancel", timeout=30)

    assert cancelled.status_code == 200, cancelled.text
    assert not own_model.replicas
    assert httpx.get(f"{url}/soon-gone").status_code == 404


def test_a_launch_that_fails_says_why_and_leaves_no_process(
    own_model: Platform, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")

    done = own_model.command(
        *("launch", "-n", NAME, "--model-engine", "transformers"),
        *("--model-uid", "broken", "--model-path", str(tmp_path)),
    )

    assert done.returncode == 1
    assert "Error" in done.stderr
    assert "Traceback" not in done.stderr
    assert not own_model.replicas
