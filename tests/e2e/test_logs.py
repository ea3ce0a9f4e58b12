# SPDX-License-Identifier: Apache-2.0
"""Logs of a real platform, in JSON: read by the command line, followed, without prompts."""

import json
import queue
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, environment, started

SECONDS = 60.0


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    words = ("--log-format", "json")
    variables = {"XINFERENCE_LOG_REQUESTS": "summary"}
    with started(tmp_path_factory.mktemp("home"), *words, variables=variables) as running:
        launch_guide(running)
        yield running


def test_a_models_log_is_read_and_outlives_the_model(platform: Platform) -> None:
    launch_guide(platform, model_uid="short")
    httpx.delete(f"{platform.endpoint}/v1/models/short", timeout=60).raise_for_status()

    done = platform.command("logs", "short", "--json")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert {line["replica"] for line in lines} == {"short-rep0"}
    assert {line["process"].partition("[")[0] for line in lines} == {"replica"}
    assert lines == sorted(lines, key=lambda line: line["time"])
    unknown = platform.command("logs", "nobody")
    assert unknown.returncode == 1
    assert "nobody" in unknown.stderr


def test_a_request_is_found_by_its_id_and_its_prompt_is_not(platform: Platform) -> None:
    body = {"model": GUIDE, "prompt": "a-secret-of-mine", "max_tokens": 2}
    httpx.post(
        f"{platform.endpoint}/v1/completions",
        json=body,
        headers={"x-request-id": "find-me"},
        timeout=60,
    ).raise_for_status()

    done = platform.command("logs", "--node", "supervisor", "--json")

    lines = [json.loads(line) for line in done.stdout.splitlines()]
    (found,) = [line for line in lines if line["request_id"] == "find-me"]
    assert "POST /v1/completions 200 in" in found["message"]
    assert found["process"].startswith("gateway[")
    for path in (platform.home / "logs").iterdir():
        text = path.read_text()
        assert "a-secret-of-mine" not in text, path
    raw = (platform.home / "logs" / "xinference.log").read_text().splitlines()
    assert all(json.loads(line)["level"] for line in raw)


def test_a_log_is_followed_as_it_is_written(platform: Platform) -> None:
    following = subprocess.Popen(
        [sys.executable, "-m", "xinference", "logs", GUIDE, "-f", "-n", "1", "--json"],
        env=environment(platform.home) | {"XINFERENCE_ENDPOINT": platform.endpoint},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    lines: queue.Queue[str] = queue.Queue()

    def read() -> None:
        assert following.stdout is not None
        for line in following.stdout:
            lines.put(line)

    reading = threading.Thread(target=read)
    reading.start()
    try:
        lines.get(timeout=SECONDS)  # the last one that was there
        (log,) = Path(platform.home, "logs").glob(f"{GUIDE}-rep0.log")
        with log.open("a") as file:
            file.write("what a library prints\n")
        assert json.loads(lines.get(timeout=SECONDS))["message"] == "what a library prints"
    finally:
        following.kill()
        following.wait(SECONDS)
        reading.join(SECONDS)
        for pipe in (following.stdout, following.stderr):
            assert pipe is not None
            pipe.close()
