# SPDX-License-Identifier: Apache-2.0
"""A process that an event loop started leaves nothing behind in it."""

import asyncio
import os
import sys
from pathlib import Path

import pytest
import uvloop

from xinference.cluster.child_process import ChildProcess

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")

SAYS_A_LINE = "import sys; print(sys.stdin.readline().strip(), flush=True)"
TIMEOUT_SECONDS = 20.0


def num_descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_an_ended_process_leaves_no_descriptor_open(tmp_path: Path) -> None:
    async def live_and_end() -> None:
        with (tmp_path / "log").open("wb") as log:
            child = ChildProcess.spawn(
                [sys.executable, "-c", SAYS_A_LINE],
                environment=dict(os.environ),
                first_line=b"hello\n",
                log=log,
            )
        assert await child.read_line() == b"hello\n"
        await child.discard_output()
        assert await child.wait() == 0

    async def main() -> None:
        await live_and_end()
        before = num_descriptors()
        for _ in range(3):
            await live_and_end()
        deadline = asyncio.get_running_loop().time() + TIMEOUT_SECONDS
        while num_descriptors() > before:
            assert asyncio.get_running_loop().time() < deadline
            await asyncio.sleep(0.01)

    # The worker's loop; others close a pipe at its end, whatever they are told.
    uvloop.run(main())
