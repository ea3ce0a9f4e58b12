# SPDX-License-Identifier: Apache-2.0
"""Process trees: what is killed is gone with all below it, whatever it did to hide."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from xinference.cluster.supervision import (
    PLATFORM,
    LinuxPlatform,
    PortablePlatform,
    descendants_of,
    describe_exit,
    launch_argv,
)

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

ROOT = Path(__file__).parents[2]
TIMEOUT_SECONDS = 10.0

# A process with a child, a grandchild in a session of its own, and a daemon that nobody's child is.
FAMILY = """
import os, subprocess, sys, time
sleeper = [sys.executable, "-S", "-c", "import time; time.sleep(600)"]
def say(pid):
    sys.stdout.write(f"{pid}\\n"); sys.stdout.flush()
say(os.getpid())
say(subprocess.Popen(sleeper).pid)
say(subprocess.Popen(sleeper, start_new_session=True).pid)
middle = subprocess.Popen(
    [sys.executable, "-S", "-c", "import subprocess, sys; "
     f"print(subprocess.Popen({sleeper!r}, start_new_session=True).pid, flush=True)"],
    stdout=subprocess.PIPE, text=True)
say(int(middle.stdout.readline())); middle.wait()
time.sleep(600)
"""

# A keeper: the subreaper that starts the family and does with it what its argument says.
KEEPER = """
import os, signal, subprocess, sys, time
from xinference.cluster.supervision import PLATFORM, kill_strays, kill_tree, launch_argv
PLATFORM.become_subreaper()
argv = launch_argv([sys.executable, "-c", sys.argv[2]], signal_number=signal.SIGKILL)
child = subprocess.Popen(argv, stdin=subprocess.PIPE)
sys.stdin.readline()
if sys.argv[1] == "kill_tree":
    kill_tree(child.pid)
else:
    os.kill(child.pid, signal.SIGKILL)
child.wait()
while kill_strays([]):
    time.sleep(0.001)
sys.stdout.write("done\\n"); sys.stdout.flush()
sys.stdin.readline()
"""


def until(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, what
        time.sleep(0.005)


def is_gone(pid: int) -> bool:
    try:
        return b") Z " in Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return True


@pytest.mark.parametrize("how", ["kill_tree", "kill_root_only"])
def test_nothing_of_a_killed_tree_is_left(how: str) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER, how, FAMILY],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as keeper:
        assert keeper.stdin is not None
        assert keeper.stdout is not None
        family = [int(keeper.stdout.readline()) for _ in range(4)]
        assert set(family) <= set(descendants_of(keeper.pid))

        keeper.stdin.write("go\n")
        keeper.stdin.flush()

        assert keeper.stdout.readline() == "done\n"
        assert all(map(is_gone, family))
        # What was adopted at the very end is a zombie until the keeper looks again.
        until(lambda: all(map(is_gone, PLATFORM.children_of(keeper.pid))), "all are gone")


def test_a_launched_process_dies_with_its_parent() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", KEEPER, "wait", FAMILY],
        cwd=ROOT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as keeper:
        assert keeper.stdout is not None
        root, *rest = [int(keeper.stdout.readline()) for _ in range(4)]

        keeper.kill()
        keeper.wait()

    until(lambda: is_gone(root), "it died with its parent")
    for pid in rest:  # ours to end: nobody was left to
        os.kill(pid, signal.SIGKILL)


def test_a_process_whose_parent_has_ended_already_does_not_start() -> None:
    argv = launch_argv([sys.executable, "-c", "print('started')"], signal_number=signal.SIGKILL)
    argv[argv.index(str(os.getpid()))] = "1"  # as if another process had started it

    done = subprocess.run(argv, capture_output=True, text=True, check=False)

    assert (done.returncode, done.stdout) == (-signal.SIGKILL, "")


def test_the_variables_of_a_process_tell_whose_it_is() -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"],
        stdin=subprocess.PIPE,
        env={**os.environ, "WHOSE": "mine"},
    ) as process:
        until(lambda: PLATFORM.variable_of(process.pid, "WHOSE") == "mine", "it is told")
        assert PLATFORM.variable_of(process.pid, "WHO") is None
        process.kill()


def test_the_portable_platform_sees_the_same_children() -> None:
    with subprocess.Popen(
        [sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE
    ) as process:
        for platform in (LinuxPlatform(), PortablePlatform()):
            assert process.pid in platform.children_of(os.getpid())
        process.kill()


def test_an_exit_is_told_in_words() -> None:
    assert describe_exit(3) == "exit status 3"
    assert describe_exit(-9) == "signal SIGKILL"
    assert describe_exit(-63) == "signal 63"
