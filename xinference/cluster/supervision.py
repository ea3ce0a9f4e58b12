# SPDX-License-Identifier: Apache-2.0
"""Process trees: adopt orphans, die with the parent, kill a tree so that nothing of it is left.

What only Linux has (parent-death signal, subreaper, /proc) is behind `Platform`, with a portable
implementation that does what it can. Standard library only: the guardian uses it.

Run as a script it is the launcher of every process we start,

    python -I -S supervision.py PARENT_PID SIGNAL OOM_SCORE_ADJ PROGRAM ARGUMENT…

which ties itself to its parent's life and then becomes the program. Why not `preexec_fn`: that
runs Python in a fork of a process with threads, which may deadlock.
"""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from typing import Protocol

INSTANCE_VARIABLE = "XINFERENCE_INSTANCE"
"""In the environment of every process below a replica: whose instance it is."""
OWNER_VARIABLE = "XINFERENCE_OWNER"
"""In that of every process below a guardian: `owner_of` it."""

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


class Platform(Protocol):
    """What an operating system offers to keep processes in order."""

    def become_subreaper(self) -> None:
        """Make orphans of this process's descendants its children, where that exists."""
        ...

    def die_with_parent(self, parent_pid: int, signal_number: int) -> None:
        """Get the signal when the parent ends; at once if it has ended already."""
        ...

    def children_of(self, pid: int) -> list[int]:
        """Return the living direct children of a process, dead but unreaped ones too."""
        ...

    def variable_of(self, pid: int, name: str) -> str | None:
        """Return an environment variable that the process was started with."""
        ...

    def tagged(self, name: str) -> dict[int, str]:
        """Return every process that was started with this variable, and its value."""
        ...

    def start_of(self, pid: int) -> int | None:
        """Return when a process started, in ticks; None if there is none, or a dead one.

        With the pid it names a process for good: pids come again.
        """
        ...

    def is_stopped(self, pid: int) -> bool:
        """Return whether a process was stopped by a signal and waits to be continued."""
        ...


class LinuxPlatform:
    """All of it, by prctl and /proc."""

    def become_subreaper(self) -> None:
        """See `Platform`."""
        self._prctl(_PR_SET_CHILD_SUBREAPER, 1)

    def die_with_parent(self, parent_pid: int, signal_number: int) -> None:
        """See `Platform`.

        Hazard: the kernel means the parent's *thread*; start processes from the main thread.
        """
        self._prctl(_PR_SET_PDEATHSIG, signal_number)
        if os.getppid() != parent_pid:
            os.kill(os.getpid(), signal_number)

    def children_of(self, pid: int) -> list[int]:
        """See `Platform`."""
        found: list[int] = []
        with contextlib.suppress(OSError), os.scandir(f"/proc/{pid}/task") as threads:
            for thread in threads:
                found += map(int, _read(f"{thread.path}/children").split())
        return found

    def variable_of(self, pid: int, name: str) -> str | None:
        """See `Platform`."""
        prefix = f"{name}=".encode()
        for entry in _read(f"/proc/{pid}/environ").split(b"\0"):
            if entry.startswith(prefix):
                return entry[len(prefix) :].decode(errors="replace")
        return None

    def tagged(self, name: str) -> dict[int, str]:
        """See `Platform`."""
        found = {}
        for entry in os.listdir("/proc"):  # noqa: PTH208
            if entry.isdecimal() and (value := self.variable_of(int(entry), name)) is not None:
                found[int(entry)] = value
        return found

    def start_of(self, pid: int) -> int | None:
        """See `Platform`."""
        fields = self._stat(pid)
        return None if not fields or fields[0] in {b"Z", b"X"} else int(fields[19])

    def is_stopped(self, pid: int) -> bool:
        """See `Platform`."""
        return self._stat(pid)[:1] == [b"T"]

    @staticmethod
    def _stat(pid: int) -> list[bytes]:
        """Return the fields behind the name, which may hold anything; the first is the state."""
        return _read(f"/proc/{pid}/stat").rpartition(b")")[2].split()

    @staticmethod
    def _prctl(option: int, argument: int) -> None:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(option, argument, 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl")


class PortablePlatform:
    """POSIX without prctl and /proc: orphans of orphans may escape; a poll replaces the signal."""

    def become_subreaper(self) -> None:
        """See `Platform`; there is no such thing."""

    def die_with_parent(self, parent_pid: int, signal_number: int) -> None:
        """See `Platform`; within a second. In the launcher it ends with the exec that follows."""

        def watch() -> None:
            while os.getppid() == parent_pid:
                time.sleep(1.0)
            os.kill(os.getpid(), signal_number)

        threading.Thread(target=watch, name="parent watch", daemon=True).start()

    def children_of(self, pid: int) -> list[int]:
        """See `Platform`."""
        listing = subprocess.run(
            ["ps", "-A", "-o", "pid=,ppid="], capture_output=True, text=True, check=False
        )
        pairs = [line.split() for line in listing.stdout.splitlines()]
        return [int(child) for child, parent in pairs if int(parent) == pid]

    def variable_of(self, pid: int, name: str) -> str | None:
        """See `Platform`; not to be known."""
        return None

    def tagged(self, name: str) -> dict[int, str]:
        """See `Platform`; not to be known."""
        return {}

    def start_of(self, pid: int) -> int | None:
        """See `Platform`; only whether there is one."""
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        except PermissionError:
            return 0
        return 0

    def is_stopped(self, pid: int) -> bool:
        """See `Platform`; not to be known."""
        return False


PLATFORM: Platform = LinuxPlatform() if sys.platform == "linux" else PortablePlatform()


def owner_of(home: str) -> str:
    """Return a name of this process, as the guardian of a home, that no other has."""
    return f"{os.getpid()}:{PLATFORM.start_of(os.getpid())}:{home}"


def kill_leftovers(home: str) -> int:
    """Kill what guardians of a home have left that are gone themselves; return how much."""
    num_killed = 0
    for pid, owner in PLATFORM.tagged(OWNER_VARIABLE).items():
        guardian, started, owned_home = owner.split(":", 2)
        if owned_home == home and str(PLATFORM.start_of(int(guardian))) != started:
            num_killed += PLATFORM.start_of(pid) is not None
            kill_tree(pid)
    return num_killed


def raise_descriptor_limit() -> None:
    """Let this process and those it starts open as many files and sockets as they may.

    Why: the usual limit is 1024, for the sake of programs that `select`. Each caller is a socket.
    """
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # more than the system has, on some
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def launch_argv(argv: Iterable[str], *, signal_number: int, oom_score_adj: int = 0) -> list[str]:
    """Return what starts `argv` as a process that gets the signal when this one ends; 0: none."""
    return [
        sys.executable,
        "-I",
        "-S",
        __file__,
        str(os.getpid()),
        str(int(signal_number)),
        str(oom_score_adj),
        *argv,
    ]


def descendants_of(pid: int) -> list[int]:
    """Return every process below `pid`, parents before their children."""
    found = PLATFORM.children_of(pid)
    for child in found:  # grows while it is walked
        found += PLATFORM.children_of(child)
    return found


def kill_tree(pid: int) -> None:
    """Send SIGKILL to a child of this process and to all below it. Reaps nothing.

    The tree is frozen first, so that no process of it starts another unseen.
    """
    frozen: list[int] = []
    while new := [each for each in (pid, *descendants_of(pid)) if each not in frozen]:
        for each in new:
            _signal(each, signal.SIGSTOP)
        frozen += new
    for each in frozen:
        _signal(each, signal.SIGKILL)


def kill_strays(known: Iterable[int], *, tag: str = "", spared: Iterable[str] = ()) -> int:
    """Kill every child of this process that it did not start, and reap those that are dead.

    They are orphans that came to this process as the subreaper. Returns at once, with how many
    are not gone yet; call it again until none is.

    Hazard: call it on the thread that starts processes, or it may kill one that is being born.

    Args:
        known: the children it did start; they are left alone.
        tag: names an environment variable that says whose a process is.
        spared: values of that variable whose owners live; their orphans are left alone.
    """
    own, living = set(known), set(spared)
    num_left = 0
    for pid in PLATFORM.children_of(os.getpid()):
        if pid in own or (tag and PLATFORM.variable_of(pid, tag) in living):
            continue
        kill_tree(pid)
        try:
            num_left += os.waitpid(pid, os.WNOHANG) == (0, 0)
        except ChildProcessError:
            continue
    return num_left


def kill_tagged(tag: str, value: str) -> int:
    """Kill every process with this value of a variable, but this one; return how many there were.

    Call it again until there is none: what is dying still counts, what is dead does not.
    """
    pids = [pid for pid, found in PLATFORM.tagged(tag).items() if found == value]
    left = [pid for pid in pids if pid != os.getpid() and PLATFORM.start_of(pid) is not None]
    for pid in left:
        kill_tree(pid)
    return len(left)


class OomWatch:
    """Whether the kernel has killed a process for want of memory since it was last looked at.

    It tells of the host, or of the container, not of one process.
    """

    def __init__(self, counters: os.PathLike[str] | str = "/proc/vmstat") -> None:
        """Look for the first time.

        Args:
            counters: the kernel's; where there are none, nothing is ever told.
        """
        self._counters = os.fspath(counters)
        self._num_seen = self._num_kills()

    def look(self) -> None:
        """Take what has happened so far for known."""
        self._num_seen = self._num_kills()

    def has_killed(self) -> bool:
        """Return whether it has, since the last look."""
        return self._num_kills() > self._num_seen

    def _num_kills(self) -> int:
        for line in _read(self._counters).splitlines():
            name, _, number = line.partition(b" ")
            if name == b"oom_kill":
                return int(number)
        return 0


def describe_exit(return_code: int | None) -> str:
    """Say how a process ended, from `Popen.returncode`; None: only that it did."""
    if return_code is None:
        return "it ended"
    if return_code >= 0:
        return f"exit status {return_code}"
    try:
        return f"signal {signal.Signals(-return_code).name}"
    except ValueError:
        return f"signal {-return_code}"


def _read(path: str) -> bytes:
    """Return what a file of /proc says; nothing if its process is gone."""
    # Why not pathlib: importing it would double the launcher's time.
    try:
        with open(path, "rb") as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return b""


def _signal(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)


def _launch(arguments: list[str]) -> None:
    parent_pid, signal_number, oom_score_adj, *argv = arguments
    if signal_number != "0":
        PLATFORM.die_with_parent(int(parent_pid), int(signal_number))
    if oom_score_adj != "0":
        with (
            contextlib.suppress(OSError),
            open("/proc/self/oom_score_adj", "w") as score,  # noqa: PTH123
        ):
            score.write(oom_score_adj)
    os.execvp(argv[0], argv)


if __name__ == "__main__":
    _launch(sys.argv[1:])
