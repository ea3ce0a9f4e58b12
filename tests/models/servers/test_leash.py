# SPDX-License-Identifier: Apache-2.0
"""A server ends with whoever asked for it, and so does everything that it has started."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

from xinference.models.servers.process import LEASH

SECONDS = 20.0
SERVER = """
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
{then}
"""
FOREVER = "time.sleep(600)"


def leashed(marker: Path, then: str = FOREVER) -> "subprocess.Popen[bytes]":
    """Run a server that has started a process of its own; `marker` gets that one's pid."""
    program = [sys.executable, "-c", SERVER.format(then=then), str(marker)]
    return subprocess.Popen([sys.executable, "-I", "-S", str(LEASH), *program], stdin=-1)


def pid_in(marker: Path) -> int:
    wait_until(lambda: marker.exists() and bool(marker.read_text()))
    return int(marker.read_text())


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + SECONDS
    while not is_so():
        assert time.monotonic() < deadline, "not in time"
        time.sleep(0.01)


def is_gone(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_all_of_it_ends_when_the_holder_lets_go(tmp_path: Path) -> None:
    process = leashed(tmp_path / "pid")
    below = pid_in(tmp_path / "pid")
    server = psutil.Process(process.pid).children()[0].pid

    assert process.stdin is not None
    process.stdin.close()

    process.wait(SECONDS)
    wait_until(lambda: is_gone(server) and is_gone(below))


def test_all_of_it_ends_when_the_holder_is_killed(tmp_path: Path) -> None:
    marker = tmp_path / "pid"
    words = [sys.executable, "-I", "-S", str(LEASH), sys.executable, "-c"]
    words += [SERVER.format(then=FOREVER), str(marker)]
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess; subprocess.Popen({words!r}, stdin=-1).wait()",
        ]
    )
    below = pid_in(marker)
    tree = psutil.Process(holder.pid).children(recursive=True)

    holder.kill()
    holder.wait(SECONDS)

    wait_until(lambda: is_gone(below) and all(is_gone(one.pid) for one in tree))


def test_it_ends_as_the_server_does_and_leaves_nothing_of_it(tmp_path: Path) -> None:
    with leashed(tmp_path / "pid", then="sys.exit(7)") as process:
        assert process.wait(SECONDS) == 7

    wait_until(lambda: is_gone(pid_in(tmp_path / "pid")))


def test_a_server_that_is_killed_is_told_of_by_its_signal(tmp_path: Path) -> None:
    with leashed(tmp_path / "pid") as process:
        below = pid_in(tmp_path / "pid")

        os.kill(psutil.Process(process.pid).children()[0].pid, signal.SIGKILL)

        assert process.wait(SECONDS) == -signal.SIGKILL
    wait_until(lambda: is_gone(below))


def test_a_server_that_is_asked_to_end_may_do_so_in_order(tmp_path: Path) -> None:
    farewell = tmp_path / "farewell"
    then = (
        "import signal\n"
        f"signal.signal(15, lambda *_: (pathlib.Path({str(farewell)!r}).touch(), sys.exit(0)))\n"
        "print('ready', flush=True)\n"
        "signal.pause()"
    )
    program = [sys.executable, "-c", SERVER.format(then=then), str(tmp_path / "pid")]
    words = [sys.executable, "-I", "-S", str(LEASH), *program]
    with subprocess.Popen(words, stdin=-1, stdout=-1) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"

        process.terminate()

        assert process.wait(SECONDS) == 0
        assert farewell.exists()
