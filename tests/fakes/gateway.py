# SPDX-License-Identifier: Apache-2.0
"""A gateway in a process of its own over a fake cluster that runs one model, "guide".

`running()` starts `python -m tests.fakes.gateway` and gives it; the server is the real one.
"""

import asyncio
import logging
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import uvloop

from tests.fakes.cluster import FakeCluster
from xinference.api.app import create_app
from xinference.cli.http_server import server_of

STOP_SECONDS = 15.0


@dataclass(frozen=True)
class GatewayProcess:
    """A running gateway."""

    port: int
    process: psutil.Process

    def memory_mib(self) -> float:
        """Return what is the process's alone, in MiB."""
        return float(self.process.memory_full_info().uss / 2**20)

    def cpu_seconds(self) -> float:
        """Return how long its main thread has computed so far, which neighbours do not change."""
        on_cpu, *_ = Path(f"/proc/{self.process.pid}/schedstat").read_text().split()
        return int(on_cpu) / 1e9


@contextmanager
def running() -> Iterator[GatewayProcess]:
    """Run a gateway until the block ends."""
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.fakes.gateway"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    with process.stdout as said:
        try:
            yield GatewayProcess(int(said.readline()), psutil.Process(process.pid))
        finally:
            process.terminate()
            process.wait(STOP_SECONDS)


async def _serve() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        server = server_of(create_app(await FakeCluster.running()), keep_alive_seconds=5.0)
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        sys.stdout.write(f"{listener.getsockname()[1]}\n")
        sys.stdout.flush()
        await serving


if __name__ == "__main__":
    logging.basicConfig(level="ERROR")
    uvloop.run(_serve())
