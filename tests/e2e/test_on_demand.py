# SPDX-License-Identifier: Apache-2.0
"""Models that cost nothing while nobody asks them, and get more replicas when many do."""

import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started, wait_until

QUESTION = {"model": GUIDE, "prompt": "A replica is", "max_tokens": 8}


def ask(platform: Platform, **fields: Any) -> int:
    url = f"{platform.endpoint}/v1/completions"
    return httpx.post(url, json=QUESTION | fields, timeout=120).status_code


def instance(platform: Platform) -> dict[str, Any]:
    (one,) = httpx.get(f"{platform.endpoint}/v1/models/instances").json()
    assert isinstance(one, dict)
    return one


def test_a_model_that_nobody_asks_sleeps_until_somebody_does(tmp_path: Path) -> None:
    with started(tmp_path) as platform, ThreadPoolExecutor() as pool:
        launch_guide(platform, idle_timeout=2)

        wait_until(
            "the model sleeps",
            lambda: instance(platform)["status"] == "ASLEEP" and not platform.replicas,
            timeout_seconds=60,
        )
        wait_until(
            "its replica is said to sleep, too",
            lambda: [one["status"] for one in instance(platform)["replica_statuses"]] == ["ASLEEP"],
            timeout_seconds=60,
        )
        (listed,) = httpx.get(f"{platform.endpoint}/v1/models").json()["data"]
        assert (listed["id"], listed["status"]) == (GUIDE, "ASLEEP")

        # Several at once: all of them wait for the one start.
        assert set(pool.map(lambda _: ask(platform), range(3))) == {200}
        assert len(platform.replicas) == 1


def test_replicas_come_with_the_load(tmp_path: Path) -> None:
    with started(tmp_path) as platform, ThreadPoolExecutor() as pool:
        words = ("-n", GUIDE, "-en", "transformers", "--max-replicas", "2", "--max_num_seqs", "1")
        platform.command("launch", *words)
        deadline = time.monotonic() + 90

        def ask_until_scaled() -> list[int]:
            statuses = []
            while time.monotonic() < deadline and len(platform.replicas) < 2:
                statuses.append(ask(platform, max_tokens=64, ignore_eos=True))
            return statuses

        answered = [one.result() for one in [pool.submit(ask_until_scaled) for _ in range(4)]]
        assert {status for statuses in answered for status in statuses} == {200}

        wait_until(
            "both serve",
            lambda: (
                [one["status"] for one in instance(platform)["replica_statuses"]]
                == ["READY", "READY"]
            ),
            timeout_seconds=60,
        )
