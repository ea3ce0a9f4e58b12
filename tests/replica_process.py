# SPDX-License-Identifier: Apache-2.0
"""A replica's process, real or fake, started as a worker starts it."""

import contextlib
import json
import os
import select
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from xinference.cluster.replica import Bootstrap

ROOT = Path(__file__).parents[1]
REAL = "xinference.cluster.replica"
FAKE = "tests.fakes.replica"
START_SECONDS = 30.0


class ReplicaProcess:
    """A process that listens. `address` is where."""

    def __init__(self, module: str, bootstrap: Bootstrap) -> None:
        self.popen = subprocess.Popen(
            [sys.executable, "-m", module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"},
        )
        assert self.popen.stdin is not None
        assert self.popen.stdout is not None
        self.popen.stdin.write(bootstrap.to_line())
        self.popen.stdin.flush()
        readable, _, _ = select.select([self.popen.stdout], [], [], START_SECONDS)
        line = self.popen.stdout.readline() if readable else b""
        if not line:
            self.popen.kill()
            raise AssertionError(f"it did not start: {self.popen.communicate()[1].decode()}")
        said = json.loads(line)
        self.address: str = said["address"]
        self.pid: int = said["pid"]

    def wait(self, timeout_seconds: float = 10.0) -> int:
        """Return the exit code; its stdin stays open meanwhile."""
        return self.popen.wait(timeout_seconds)

    def close(self) -> str:
        """Kill it if it still runs; return what it has logged."""
        if self.popen.poll() is None:
            self.popen.kill()
        return self.popen.communicate(timeout=10.0)[1].decode()


@contextlib.contextmanager
def replica_process(module: str, bootstrap: Bootstrap) -> Iterator[ReplicaProcess]:
    """Start a process of `REAL` or `FAKE`, and leave none."""
    process = ReplicaProcess(module, bootstrap)
    try:
        yield process
    finally:
        print(process.close())  # noqa: T201  # shown by pytest when the test fails
