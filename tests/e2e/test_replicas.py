# SPDX-License-Identifier: Apache-2.0
"""Several copies of a model: launched, added and removed while requests are answered."""

import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started, wait_until


def ask_until(platform: Platform, is_over: Callable[[], bool]) -> list[int]:
    """Ask the guide again and again; return the statuses of the answers."""
    statuses = []
    while not is_over():
        body = {"model": GUIDE, "prompt": "A replica is", "max_tokens": 8}
        reply = httpx.post(f"{platform.endpoint}/v1/completions", json=body, timeout=30)
        statuses.append(reply.status_code)
    return statuses


def test_a_model_is_scaled_while_it_serves(tmp_path: Path) -> None:
    with started(tmp_path) as platform, ThreadPoolExecutor() as pool:
        launch_guide(platform)
        scaling = pool.submit(platform.command, "scale", "-u", GUIDE, "-r", "2")
        statuses = ask_until(platform, scaling.done)

        assert scaling.result().stdout == f"{GUIDE} has 2 replicas.\n", scaling.result().stderr
        assert len(platform.replicas) == 2
        listed = httpx.get(f"{platform.endpoint}/v1/models/{GUIDE}/replicas").json()
        assert [one["status"] for one in listed] == ["READY", "READY"]

        scaling = pool.submit(platform.command, "scale", "-u", GUIDE, "-r", "1")
        statuses += ask_until(platform, scaling.done)

        assert scaling.result().stdout == f"{GUIDE} has 1 replica.\n"
        assert len(platform.replicas) == 1
        assert set(statuses) == {200}


def pid_of_the_busy_replica(platform: Platform) -> int:
    """Return the process that works on the only request."""
    seconds = {one.pid: sum(one.cpu_times()[:2]) for one in platform.replicas}
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for one in platform.replicas:
            if sum(one.cpu_times()[:2]) - seconds[one.pid] > 0.1:
                return one.pid
        time.sleep(0.01)
    raise AssertionError("no replica is busy")


def test_a_stream_whose_replica_is_killed_goes_on_at_another(tmp_path: Path) -> None:
    body = {
        "model": GUIDE,
        "prompt": "Once upon a time",
        # The model still writes when its replica is killed.
        "max_tokens": 400,
        "ignore_eos": True,
        "temperature": 0.7,
        "seed": 4,
        "stream": True,
    }
    with started(tmp_path) as platform:
        launch_guide(platform, replica=2)
        whole = streamed(platform, body)

        killed = []

        def kill_after(num_pieces: int) -> None:
            if num_pieces == 10:
                killed.append(pid_of_the_busy_replica(platform))
                os.kill(killed[0], signal.SIGKILL)

        again = streamed(platform, body, kill_after)

        assert killed
        assert again == whole
        wait_until(
            "the second replica is back",
            lambda: (
                len(httpx.get(f"{platform.endpoint}/v1/models/{GUIDE}/replicas").json()) == 2
                and len(platform.replicas) == 2
            ),
            timeout_seconds=30,
        )


def streamed(
    platform: Platform, body: dict[str, Any], on_piece: Callable[[int], None] = lambda _: None
) -> tuple[str, str]:
    """Return the text of a streamed answer and how it ended."""
    text, reason = "", ""
    url = f"{platform.endpoint}/v1/completions"
    with httpx.stream("POST", url, json=body, timeout=60) as reply:
        for number, line in enumerate(reply.iter_lines()):
            if line.startswith("data: {"):
                (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                text += choice["text"]
                reason = choice["finish_reason"] or reason
                on_piece(number)
    return text, reason
