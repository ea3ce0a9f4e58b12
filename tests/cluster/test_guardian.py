# SPDX-License-Identifier: Apache-2.0
"""The guardian with roles that are a few lines of Python: readiness, restarts, ends."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from xinference.cluster import model_actor, processes
from xinference.cluster.guardian import STOP_TIMEOUT_SECONDS

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 20.0

# Arguments: home, then the program of each role. Says "ready" when all are.
GUARDIAN = """
import dataclasses, logging, sys
from pathlib import Path
from xinference.cluster import guardian
from xinference.cluster.configuration import GatewayConfig, SupervisorConfig, WorkerConfig
logging.basicConfig(level="INFO")
home, *programs = sys.argv[1:]
configs = [config(home=Path(home), cluster_key="secret of the test")
           for config in (SupervisorConfig, WorkerConfig, GatewayConfig)[: len(programs)]]
program_of = dict(zip([config.role for config in configs], programs))
def on_ready():
    print("ready", flush=True)
sys.exit(guardian.run(configs, on_ready=on_ready,
         argv_of=lambda config: [sys.executable, "-c", program_of[config.role], config.role]))
"""

# A role that tells what it was told, is ready, and ends at SIGTERM.
GOOD = """
import json, os, signal, sys, time
told = json.loads(sys.stdin.readline())
path = f"{told['home']}/{sys.argv[1]}"
def end(*_):
    with open(f"{told['home']}/ends", "a") as ends: ends.write(sys.argv[1] + " ")
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
with open(path + ".new", "w") as file: json.dump(told | {"pid": os.getpid()}, file)
os.rename(path + ".new", path)
print(json.dumps({"ready": True}), flush=True)
while True: time.sleep(600)
"""
DEAF = GOOD.replace("sys.exit(143)", "return")
EXITS = "import sys; sys.stdin.readline(); sys.exit({status})"


class Guardian:
    def __init__(self, home: Path) -> None:
        self.home = home
        self.process: subprocess.Popen[str] | None = None

    def start(self, *programs: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", GUARDIAN, str(self.home), *programs],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait_ready(self) -> None:
        assert self.process is not None
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def told(self, role: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.home / role).read_text())
        return found

    def send(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def wait(self) -> int:
        assert self.process is not None
        return self.process.wait(TIMEOUT_SECONDS)

    def close(self) -> None:
        if self.process is not None:
            if self.process.poll() is None:
                self.process.terminate()
                self.process.wait(TIMEOUT_SECONDS)
            for pipe in (self.process.stdout, self.process.stderr):
                assert pipe is not None
                pipe.close()


@pytest.fixture
def guardian(tmp_path: Path) -> Iterator[Guardian]:
    guardian = Guardian(tmp_path)
    yield guardian
    guardian.close()


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True


def test_roles_are_told_where_the_supervisor_is_and_no_key_is_seen(guardian: Guardian) -> None:
    guardian.start(GOOD, GOOD, GOOD)
    guardian.wait_ready()

    supervisor, worker, gateway = map(guardian.told, ("supervisor", "worker", "gateway"))
    assert supervisor["listen"] == worker["supervisor_address"] == gateway["supervisor_address"]
    assert not supervisor["listen"].endswith(":0")
    assert worker["listen"] != supervisor["listen"]
    assert worker["cluster_key"] == "secret of the test"
    for told in (supervisor, worker, gateway):
        for kind in ("cmdline", "environ"):
            assert b"secret" not in Path(f"/proc/{told['pid']}/{kind}").read_bytes()


def test_sigterm_ends_the_roles_in_reverse_order(guardian: Guardian) -> None:
    guardian.start(GOOD, GOOD, GOOD)
    guardian.wait_ready()

    guardian.send(signal.SIGTERM)

    assert guardian.wait() == 0
    assert (guardian.home / "ends").read_text().split() == ["gateway", "worker", "supervisor"]
    assert not Path(guardian.told("worker")["run_directory"]).exists()


def test_a_second_signal_kills_what_does_not_end(guardian: Guardian) -> None:
    guardian.start(DEAF)
    guardian.wait_ready()
    pid = guardian.told("supervisor")["pid"]
    started = time.monotonic()

    guardian.send(signal.SIGINT)
    # Why not at once: two that come together are one.
    until((guardian.home / "ends").exists, "a role was told to end")
    guardian.send(signal.SIGINT)

    assert guardian.wait() == 0
    assert time.monotonic() - started < 10.0
    assert is_gone(pid)


def test_a_role_that_dies_is_started_again_at_the_same_address(guardian: Guardian) -> None:
    guardian.start(GOOD, GOOD)
    guardian.wait_ready()
    before = guardian.told("worker")

    os.kill(before["pid"], signal.SIGKILL)
    until(lambda: guardian.told("worker")["pid"] != before["pid"], "it is back")

    assert guardian.told("worker")["listen"] == before["listen"]


@pytest.mark.parametrize("status", [2, 7])
def test_a_role_that_cannot_start_ends_everything(guardian: Guardian, status: int) -> None:
    guardian.start(GOOD, EXITS.format(status=status))

    assert guardian.wait() == status
    if (guardian.home / "supervisor").exists():  # it may have been killed before it wrote that
        assert is_gone(guardian.told("supervisor")["pid"])


def test_a_role_that_was_asked_to_end_ends_everything(guardian: Guardian) -> None:
    asked = GOOD.replace("while True: time.sleep(600)", "sys.exit(0)")
    guardian.start(GOOD, asked)

    assert guardian.wait() == 0


def test_the_roles_of_a_killed_guardian_end(guardian: Guardian) -> None:
    guardian.start(GOOD, GOOD, GOOD)
    guardian.wait_ready()
    pids = [guardian.told(role)["pid"] for role in ("supervisor", "worker", "gateway")]

    guardian.send(signal.SIGKILL)

    until(lambda: all(map(is_gone, pids)), "they die with it")


def test_a_worker_has_the_time_that_its_replicas_may_take_to_end() -> None:
    worker_seconds = model_actor.END_SECONDS + processes.CLOSE_TIMEOUT_SECONDS

    assert worker_seconds < STOP_TIMEOUT_SECONDS
