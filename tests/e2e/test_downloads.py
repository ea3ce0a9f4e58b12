# SPDX-License-Identifier: Apache-2.0
"""Models by name from a stand-in hub: launched, watched, cancelled, gone on with, asked."""

import json
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.platform import Platform, started, wait_until
from tests.e2e.reciting_model import ANSWER, NAME, registration, save_reciting_model
from tests.fakes.hub import FakeHub, serving
from tests.gguf_tiny import save_gguf

MODEL_ID = "owner/reciter"
WEIGHTS = "model.safetensors"
LAUNCH = ("launch", "-n", NAME, "--model-engine", "transformers")


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHub]:
    with serving() as served:
        served.add_directory(MODEL_ID, save_reciting_model(tmp_path_factory.mktemp(NAME)))
        yield served


@pytest.fixture(scope="module")
def platform(hub: FakeHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A platform whose hub is the stand-in, and that knows the reciting model by its id there."""
    home = tmp_path_factory.mktemp("home")
    family = registration(home)
    (spec,) = family["model_specs"]
    del spec["model_uri"]
    spec["model_id"] = MODEL_ID
    with started(home, variables=hub.environment()) as running:
        body = {"model": json.dumps(family), "persist": False}
        url = f"{running.endpoint}/v1/model_registrations/LLM"
        httpx.post(url, json=body, timeout=30).raise_for_status()
        yield running


@pytest.fixture
def cold(platform: Platform, hub: FakeHub) -> Platform:
    """The same without the model's files."""
    shutil.rmtree(platform.home / "cache", ignore_errors=True)
    hub.start_afresh()
    return platform


def answer_of(platform: Platform, uid: str) -> str:
    body = {"model": uid, "messages": [{"role": "user", "content": "Where is it?"}]}
    reply = httpx.post(f"{platform.endpoint}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["message"]["content"])


def terminate(platform: Platform, uid: str) -> None:
    httpx.delete(f"{platform.endpoint}/v1/models/{uid}", timeout=60).raise_for_status()


def downloads(platform: Platform) -> list[object]:
    return list(platform.processes("xinference.catalog.downloads"))


def has_part(platform: Platform, size_bytes: int) -> bool:
    """Return whether so much of a file is on the disk."""
    parts = (platform.home / "cache").rglob("*.part")
    return any(part.stat().st_size >= size_bytes for part in parts)


def test_a_launch_by_name_downloads_and_answers(cold: Platform) -> None:
    done = cold.command(*LAUNCH)

    assert done.returncode == 0, done.stderr
    assert "downloading" in done.stderr
    assert answer_of(cold, NAME) == ANSWER
    terminate(cold, NAME)


def test_a_download_is_watched_by_its_bytes_and_cancelled_and_gone_on_with(
    cold: Platform, hub: FakeHub
) -> None:
    size = len(hub.repositories[MODEL_ID].files[WEIGHTS])
    hub.faults.holds[WEIGHTS] = [size // 2]
    url = f"{cold.endpoint}/v1/models"
    body = {"model_name": NAME, "model_uid": "watched", "model_engine": "transformers"}
    httpx.post(url, params={"wait_ready": False}, json=body, timeout=30).raise_for_status()

    def bytes_there() -> int:
        progress = httpx.get(f"{url}/watched/progress", timeout=30).json()
        files = {one["file_name"]: one for one in progress["download_files"]}
        return int(files[WEIGHTS]["downloaded_bytes"]) if WEIGHTS in files else 0

    wait_until("half of it is there", lambda: bytes_there() == size // 2, timeout_seconds=60)
    progress = httpx.get(f"{url}/watched/progress", timeout=30).json()
    assert progress["stage"] == "downloading"
    assert 0.0 < progress["progress"] < 0.8
    assert "bytes from huggingface" in progress["info"]
    (state,) = httpx.get(f"{url}/instances", params={"model_uid": "watched"}, timeout=30).json()
    assert state["replica_statuses"][0]["model_state"] == "downloading"

    began = time.monotonic()
    httpx.post(f"{url}/watched/cancel", timeout=30).raise_for_status()
    seconds = time.monotonic() - began

    assert downloads(cold) == []
    assert httpx.get(f"{url}/watched", timeout=30).status_code == 404
    assert seconds < 5.0
    hub.release()
    done = cold.command("download", "-n", NAME)
    assert done.returncode == 0, done.stderr
    assert hub.starts_of(WEIGHTS) == [0, size // 2]


def test_a_launch_goes_on_with_its_download_when_the_worker_was_killed(
    cold: Platform, hub: FakeHub
) -> None:
    size = len(hub.repositories[MODEL_ID].files[WEIGHTS])
    hub.faults.holds[WEIGHTS] = [size // 2, size // 4]
    url = f"{cold.endpoint}/v1/models"
    body = {"model_name": NAME, "model_uid": "tough", "model_engine": "transformers"}
    httpx.post(url, params={"wait_ready": False}, json=body, timeout=30).raise_for_status()
    wait_until("half of it is there", lambda: has_part(cold, size // 2), timeout_seconds=60)

    cold.control("worker").kill()

    wait_until(
        "the next worker goes on", lambda: len(hub.starts_of(WEIGHTS)) == 2, timeout_seconds=90
    )
    assert hub.starts_of(WEIGHTS) == [0, size // 2]
    httpx.post(f"{url}/tough/cancel", timeout=30).raise_for_status()
    assert downloads(cold) == []


def test_two_launches_of_one_model_at_once_download_it_once(cold: Platform, hub: FakeHub) -> None:
    hub.faults.holds[WEIGHTS] = [100]
    url = f"{cold.endpoint}/v1/models"
    body = {"model_name": NAME, "model_engine": "transformers"}
    for uid in ("first", "second"):
        httpx.post(
            url, params={"wait_ready": False}, json={**body, "model_uid": uid}, timeout=30
        ).raise_for_status()

    def stage_of(uid: str) -> str:
        return str(httpx.get(f"{url}/{uid}/progress", timeout=30).json()["stage"])

    for uid in ("first", "second"):
        wait_until("it downloads", lambda: stage_of(uid) == "downloading", timeout_seconds=60)  # noqa: B023
    assert len(downloads(cold)) == 1
    hub.release()

    for uid in ("first", "second"):
        wait_until("it is ready", lambda: stage_of(uid) == "completed", timeout_seconds=90)  # noqa: B023
        assert answer_of(cold, uid) == ANSWER
        terminate(cold, uid)
    assert hub.starts_of(WEIGHTS) == [0]


def test_a_download_that_fails_ends_the_launch_with_the_reason_and_what_to_do(
    cold: Platform, hub: FakeHub, platform: Platform
) -> None:
    hub.faults.status = 404

    done = cold.command(*LAUNCH, "--model-uid", "hopeless")

    assert done.returncode == 1
    assert f"has no {MODEL_ID}" in done.stderr
    assert "Traceback" not in done.stderr
    assert not cold.replicas


def test_a_model_is_downloaded_without_a_launch_listed_and_removed(
    cold: Platform, hub: FakeHub
) -> None:
    version = f"{NAME}--0_001B--pytorch--none"
    done = cold.command("download", "-n", NAME)
    assert done.returncode == 0, done.stderr
    assert f"{WEIGHTS}, " in done.stderr
    (kept,) = json.loads(cold.command("cached", "--json").stdout)
    assert kept["model_version"] == version
    assert kept["size_bytes"] >= len(hub.repositories[MODEL_ID].files[WEIGHTS])
    hub.faults.status = 500
    launched = cold.command(*LAUNCH)
    assert launched.returncode == 0, launched.stderr
    assert "downloading" not in launched.stderr

    refused = cold.command("remove-cache", "-n", version, "--check")

    assert refused.returncode == 1
    assert f"used by {NAME}" in refused.stderr
    assert answer_of(cold, NAME) == ANSWER
    terminate(cold, NAME)
    removed = cold.command("remove-cache", "-n", version, "--check")
    assert removed.returncode == 0, removed.stderr
    assert not list((cold.home / "cache").rglob("*.safetensors"))
    assert json.loads(cold.command("cached", "--json").stdout) == []


UNKNOWN_ID = "somebody/my.Reciter"


def test_a_repository_that_the_catalogue_does_not_know_is_launched_by_its_id(
    cold: Platform, hub: FakeHub
) -> None:
    hub.repositories[UNKNOWN_ID] = hub.repositories[MODEL_ID]

    done = cold.command("launch", "--model-name", UNKNOWN_ID)

    assert done.returncode == 0, done.stderr
    assert "Model uid: my.Reciter" in done.stdout
    assert "downloading" in done.stderr
    assert answer_of(cold, "my.Reciter") == ANSWER
    described = httpx.get(f"{cold.endpoint}/v1/models/my.Reciter", timeout=30).json()
    assert described["model_ability"] == ["chat"]
    assert described["model_hub"] == "huggingface"
    (kept,) = json.loads(cold.command("cached", "--json").stdout)
    assert (kept["model_id"], kept["is_complete"]) == (UNKNOWN_ID, True)
    terminate(cold, "my.Reciter")
    hub.faults.status = 500
    again = cold.command("launch", "--model-name", UNKNOWN_ID)
    assert again.returncode == 0, again.stderr
    terminate(cold, "my.Reciter")


def test_a_repository_of_gguf_files_is_launched_by_its_id(
    cold: Platform, hub: FakeHub, tmp_path: Path
) -> None:
    data = save_gguf(tmp_path / "tiny.gguf").read_bytes()
    hub.add("somebody/tiny-GGUF", {"tiny-Q8_0.gguf": data, "tiny-Q4_K_M.gguf": data})
    words = ("--model-engine", "llama.cpp", "-q", "q8_0", "-u", "tiny", "--context_length", "512")

    done = cold.command("launch", "-n", "somebody/tiny-GGUF", *words)

    assert done.returncode == 0, done.stderr
    body = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4}
    reply = httpx.post(f"{cold.endpoint}/v1/chat/completions", json=body, timeout=60)
    assert reply.status_code == 200, reply.text
    assert reply.json()["usage"]["completion_tokens"] > 0
    (kept,) = json.loads(cold.command("cached", "--json").stdout)
    assert (kept["quantization"], kept["is_complete"]) == ("Q8_0", True)
    terminate(cold, "tiny")


def test_a_repository_that_is_nowhere_or_cannot_be_served_is_refused_with_the_reason(
    cold: Platform, hub: FakeHub
) -> None:
    config = {"model_type": "nobody_knows", "architectures": ["NobodyKnowsForCausalLM"]}
    files = {"config.json": json.dumps(config).encode(), WEIGHTS: b"0" * 2000}
    hub.add("somebody/strange", files)

    strange = cold.command("launch", "--model-name", "somebody/strange")
    nowhere = cold.command("launch", "--model-name", "somebody/nothing")

    assert strange.returncode == nowhere.returncode == 1
    assert "transformers has no NobodyKnowsForCausalLM" in strange.stderr
    assert WEIGHTS not in {one.path for one in hub.asked}
    assert "huggingface: 127.0.0.1" in nowhere.stderr
    assert "has no somebody/nothing" in nowhere.stderr
    assert not list((cold.home / "cache").rglob(WEIGHTS))
