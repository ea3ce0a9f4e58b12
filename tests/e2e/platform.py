# SPDX-License-Identifier: Apache-2.0
"""A whole platform in processes of its own, started by the commands that users type.

Everything listens on loopback ports that the kernel picked, keeps its files in a directory of
the test, and is gone when the `with` block ends.
"""

import os
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx
import psutil

START_SECONDS = 60.0
STOP_SECONDS = 20.0


T = TypeVar("T")


def wait_until(what: str, probe: Callable[[], T], *, timeout_seconds: float) -> T:
    """Return the first true value of `probe`, asked every 20 ms.

    Raises:
        AssertionError: it was never true in time; the message carries `what` and the last value.
    """
    deadline = time.monotonic() + timeout_seconds
    while True:
        value = probe()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"not in {timeout_seconds} s: {what}; last: {value!r}")
        time.sleep(0.02)


def free_port() -> int:
    """Return a loopback TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def environment(home: Path) -> dict[str, str]:
    """Return the environment of a user whose files live under `home`."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("XINFERENCE_")}
    return kept | {"XINFERENCE_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


@dataclass(frozen=True)
class Platform:
    """A running cluster, as its user sees it."""

    endpoint: str
    home: Path
    process: subprocess.Popen[bytes]

    def processes(self, module: str) -> list[psutil.Process]:
        """Return the processes below the first one that run `python -m <module>`."""
        try:
            below = psutil.Process(self.process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [process for process in below if module in command_of(process)]

    @property
    def replicas(self) -> list[psutil.Process]:
        """The processes of models."""
        return self.processes("xinference.cluster.replica")

    def control(self, role: str) -> psutil.Process:
        """Return the one control process of this role: supervisor, worker or gateway."""
        (found,) = [
            process
            for process in self.processes("xinference.cli.process")
            if role in command_of(process)
        ]
        return found

    def command(self, *words: str, timeout_seconds: float = 90) -> subprocess.CompletedProcess[str]:
        """Run `xinference <words>` against this platform, to its end."""
        return subprocess.run(
            [sys.executable, "-m", "xinference", *words],
            env=environment(self.home) | {"XINFERENCE_ENDPOINT": self.endpoint},
            capture_output=True,
            text=True,
            timeout=timeout_seconds,
            check=False,
        )


def command_of(process: psutil.Process) -> list[str]:
    """Return the words a process was started with; none when it is gone."""
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@contextmanager
def started(
    home: Path,
    *words: str,
    port: int | None = None,
    max_files: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Iterator[Platform]:
    """Run `xinference-local <words>` until the block ends; then nothing of it may be left.

    Args:
        max_files: how many files and sockets each of its processes may open.
        variables: of its environment, beside those of every user.
    """

    def limit_files() -> None:
        if max_files is not None:
            resource.setrlimit(resource.RLIMIT_NOFILE, (max_files, max_files))

    port = port or free_port()
    endpoint = f"http://127.0.0.1:{port}"
    home.mkdir(parents=True, exist_ok=True)
    with (home / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", LOCAL, "-H", "127.0.0.1", "-p", str(port), *words],
            env=environment(home) | dict(variables or {}),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            preexec_fn=limit_files,
        )
    platform = Platform(endpoint=endpoint, home=home, process=process)
    try:
        wait_until_answering(platform)
        yield platform
    finally:
        stop(process)


# The console script `xinference-local`, without depending on where it is installed.
LOCAL = (
    "import sys; from xinference.cli.main import local; sys.argv[0] = 'xinference-local'; local()"
)


def wait_until_answering(platform: Platform) -> None:
    """Wait until the gateway answers and a worker has joined."""

    def answers() -> bool:
        assert platform.process.poll() is None, (platform.home / "output.txt").read_text()
        try:
            status = httpx.get(f"{platform.endpoint}/status", timeout=5)
        except httpx.TransportError:
            return False
        return status.status_code == 200 and bool(status.json()["workers"])

    wait_until("the platform answers", answers, timeout_seconds=START_SECONDS)


def stop(process: subprocess.Popen[bytes]) -> None:
    """End a platform as a user would, and check that nothing of it is left."""
    if process.poll() is not None:
        return
    below = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(STOP_SECONDS)
    finally:
        _, left = psutil.wait_procs(below, timeout=1)
        for orphan in [*left, psutil.Process(process.pid)] if process.poll() is None else left:
            orphan.kill()
        assert not left, f"still running after the platform stopped: {left}"
