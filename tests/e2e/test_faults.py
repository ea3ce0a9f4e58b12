# SPDX-License-Identifier: Apache-2.0
"""What is killed comes back, and users meanwhile get an answer that says so."""

import signal
import time
from pathlib import Path

import httpx
import psutil

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, free_port, started, wait_until

BACK_SECONDS = 45.0


def answers(platform: Platform) -> httpx.Response | None:
    """Ask the guide; None if nobody took the connection."""
    try:
        return httpx.post(
            f"{platform.endpoint}/v1/chat/completions",
            json={"model": GUIDE, "messages": [{"role": "user", "content": "hello"}]},
            timeout=30,
        )
    except httpx.TransportError:
        return None


def seconds_until_it_answers(platform: Platform, *, codes: set[int]) -> float:
    """Wait for a good answer; every answer before it must carry one of `codes`."""
    began = time.monotonic()

    def good() -> bool:
        reply = answers(platform)
        if reply is not None and reply.status_code != 200:
            assert reply.status_code in codes, reply.text
            assert reply.json()["error"]["message"] == reply.json()["detail"]
        return reply is not None and reply.status_code == 200

    wait_until("the guide answers again", good, timeout_seconds=BACK_SECONDS)
    return time.monotonic() - began


def test_a_killed_model_process_comes_back(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        launch_guide(platform)
        (first,) = platform.replicas

        first.send_signal(signal.SIGKILL)
        seconds = seconds_until_it_answers(platform, codes={503})

        (second,) = platform.replicas
        assert second.pid != first.pid
        (instance,) = httpx.get(f"{platform.endpoint}/v1/models/instances").json()
        assert instance["status"] == "READY"
        assert seconds < BACK_SECONDS


def test_a_killed_workers_model_answers_on_and_is_adopted(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        launch_guide(platform)
        (replica,) = platform.replicas

        platform.control("worker").send_signal(signal.SIGKILL)
        began = time.monotonic()

        def is_adopted() -> bool:
            reply = answers(platform)
            assert reply is not None
            assert reply.status_code == 200, reply.text
            events = httpx.get(f"{platform.endpoint}/v1/models/{GUIDE}/events").json()
            return any("adopted" in event["event_content"] for event in events)

        wait_until("a new worker has adopted it", is_adopted, timeout_seconds=BACK_SECONDS)
        assert time.monotonic() - began < BACK_SECONDS
        assert [one.pid for one in platform.replicas] == [replica.pid]

        platform.command("terminate", "--model-uid", GUIDE)
        assert not platform.replicas
        assert not psutil.pid_exists(replica.pid)


def test_a_killed_supervisor_does_not_stop_a_running_model(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        launch_guide(platform)
        (before,) = platform.replicas
        old = platform.control("supervisor")

        old.send_signal(signal.SIGKILL)
        while_away = answers(platform)

        assert while_away is not None
        assert while_away.status_code == 200
        wait_until(
            "the supervisor is back and lists the model",
            lambda: listed(platform) == [GUIDE],
            timeout_seconds=20,
        )
        (after,) = platform.replicas
        assert after.pid == before.pid


def listed(platform: Platform) -> list[str]:
    try:
        reply = httpx.get(f"{platform.endpoint}/v1/models", timeout=5)
    except httpx.TransportError:
        return []
    return [model["id"] for model in reply.json()["data"]] if reply.status_code == 200 else []


def test_after_everything_was_killed_a_start_brings_the_models_back(tmp_path: Path) -> None:
    port = free_port()
    with started(tmp_path, port=port) as platform:
        launch_guide(platform)
        everything = psutil.Process(platform.process.pid).children(recursive=True)
        for process in [psutil.Process(platform.process.pid), *everything]:
            process.kill()
        platform.process.wait(10)
        _, alive = psutil.wait_procs(everything, timeout=5)
        assert not [process for process in alive if process.status() != "zombie"]

    with started(tmp_path, port=port) as platform:
        seconds_until_it_answers(platform, codes={503})

        assert listed(platform) == [GUIDE]


def test_a_terminated_model_stays_away_after_a_restart(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        launch_guide(platform)
        platform.command("terminate", "--model-uid", GUIDE)

    with started(tmp_path) as platform:
        assert listed(platform) == []
        assert not platform.replicas


def test_a_killed_first_process_takes_everything_with_it(tmp_path: Path) -> None:
    with started(tmp_path) as platform:
        launch_guide(platform)
        below = psutil.Process(platform.process.pid).children(recursive=True)
        assert len(below) >= 4

        platform.process.kill()
        platform.process.wait(10)

        _, alive = psutil.wait_procs(below, timeout=10)
        assert not [process for process in alive if process.status() != "zombie"]
