# SPDX-License-Identifier: Apache-2.0
"""Several copies of a model: launched, added and removed while requests are answered."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started


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
