# SPDX-License-Identifier: Apache-2.0
"""`ChildProcess`: a process that an event loop started, its first line, and its end;
`AdoptedProcess`: one that another process had started.

The end is noticed by a pidfd where there is one, within milliseconds and without a thread.
"""

import asyncio
import contextlib
import logging
import os
import signal
import subprocess
import threading
from collections.abc import Mapping, Sequence
from typing import BinaryIO, Self

from .supervision import PLATFORM, kill_tree, launch_argv

logger = logging.getLogger(__name__)

MAX_LINE_BYTES = 64 * 1024
POLL_SECONDS = 0.2
"""Where no pidfd tells of an end."""


class ChildProcess:
    """A living or ended child. It dies with this process. Belongs to one event loop."""

    def __init__(self, popen: "subprocess.Popen[bytes]") -> None:
        self._popen = popen
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[int] = self._loop.create_future()
        self._output = bytearray()
        """What it said and nobody has read; at most about twice `MAX_LINE_BYTES`."""
        self._output_ended = False
        self._output_changed = asyncio.Event()
        self._pidfd: int | None = None
        self._is_reading = False
        self._watch()

    @classmethod
    def spawn(
        cls,
        argv: Sequence[str],
        *,
        environment: Mapping[str, str],
        first_line: bytes,
        log: BinaryIO,
        lifeline: int | None = None,
    ) -> Self:
        """Start a process in a session of its own.

        Its stdin gets `first_line` and stays open for as long as this process lives; its stderr
        goes to `log`. It must not run in a thread: the child is tied to the thread that made it.

        Args:
            lifeline: a file descriptor that it inherits and lives by, instead of by this process.

        Raises:
            OSError: the interpreter that launches it does not start.
        """
        popen = subprocess.Popen(
            launch_argv(
                argv,
                signal_number=signal.SIGKILL if lifeline is None else 0,
                oom_score_adj=500,
            ),
            pass_fds=() if lifeline is None else (lifeline,),
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            bufsize=0,
            start_new_session=True,
        )
        assert popen.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            popen.stdin.write(first_line)
        return cls(popen)

    @property
    def pid(self) -> int:
        """Of the process; it leads a session of the same number."""
        return self._popen.pid

    async def read_line(self) -> bytes:
        """Return the next line of its stdout, or b"" at the end of it.

        A line that is longer than any that we wait for is b"", too.
        """
        self._listen()
        while (end := self._output.find(b"\n") + 1) == 0:
            if self._output_ended or len(self._output) > MAX_LINE_BYTES:
                return b""
            await self._next_output()
        line = bytes(self._output[:end])
        del self._output[:end]
        return line

    async def discard_output(self) -> None:
        """Read and drop its stdout until that ends, so that the child never blocks on it."""
        self._listen()
        while not self._output_ended:
            self._output.clear()
            await self._next_output()

    async def _next_output(self) -> None:
        self._output_changed.clear()
        await self._output_changed.wait()

    def _listen(self) -> None:
        if self._is_reading:
            return
        self._is_reading = True
        assert self._popen.stdout is not None
        os.set_blocking(self._popen.stdout.fileno(), False)
        # Why no transport: uvloop's closes the descriptor, and then the file closes it once more;
        # what another thread has opened between the two is closed instead.
        self._loop.add_reader(self._popen.stdout.fileno(), self._on_output)

    def _on_output(self) -> None:
        pipe = self._popen.stdout
        assert pipe is not None
        try:
            data = os.read(pipe.fileno(), MAX_LINE_BYTES)
        except BlockingIOError:
            return
        if data and len(self._output) <= MAX_LINE_BYTES:
            self._output += data
        if not data:
            self._loop.remove_reader(pipe.fileno())
            pipe.close()
            self._output_ended = True
        self._output_changed.set()

    async def wait(self) -> int | None:
        """Return its return code, as `subprocess.Popen.returncode`, once it has ended."""
        return await asyncio.shield(self._exit)

    @property
    def has_ended(self) -> bool:
        """Whether it was reaped."""
        return self._exit.done()

    def kill_tree(self) -> None:
        """Kill it and everything below it; `wait` then returns soon."""
        if not self.has_ended:
            kill_tree(self.pid)

    def _watch(self) -> None:
        if hasattr(os, "pidfd_open"):
            with contextlib.suppress(OSError):
                self._pidfd = os.pidfd_open(self.pid)
                self._loop.add_reader(self._pidfd, self._on_exit)
                return
        threading.Thread(target=self._wait_in_thread, name="child exit", daemon=True).start()

    def _wait_in_thread(self) -> None:
        self._popen.wait()
        with contextlib.suppress(RuntimeError):  # the loop is closed: this process is ending
            self._loop.call_soon_threadsafe(self._on_exit)

    def _on_exit(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        return_code = self._popen.wait()
        if self._popen.stdin is not None:
            self._popen.stdin.close()
        if not self._exit.done():
            self._exit.set_result(return_code)


class AdoptedProcess:
    """A process that an earlier worker had started. Belongs to one event loop.

    How it ends is for whoever reaps it to know, so `wait` returns None.
    """

    def __init__(self, pid: int) -> None:
        """Watch a living process."""
        self.pid = pid
        self._loop = asyncio.get_running_loop()
        self._exit: asyncio.Future[None] = self._loop.create_future()
        self._pidfd: int | None = None
        if hasattr(os, "pidfd_open"):
            try:
                self._pidfd = os.pidfd_open(pid)
            except ProcessLookupError:
                self._exit.set_result(None)
            else:
                self._loop.add_reader(self._pidfd, self._on_exit)
        else:
            self._polling = asyncio.create_task(self._poll(), name="adopted process")

    @property
    def has_ended(self) -> bool:
        """Whether it has."""
        return self._exit.done()

    async def wait(self) -> int | None:
        """Return None, once it has ended."""
        await asyncio.shield(self._exit)
        return None

    async def discard_output(self) -> None:
        """Do nothing: nobody reads what it writes."""

    def kill_tree(self) -> None:
        """Kill it and everything below it; `wait` then returns soon."""
        if not self.has_ended:
            kill_tree(self.pid)

    async def _poll(self) -> None:
        while PLATFORM.start_of(self.pid) is not None:  # noqa: ASYNC110  # nothing tells
            await asyncio.sleep(POLL_SECONDS)
        self._on_exit()

    def _on_exit(self) -> None:
        if self._pidfd is not None:
            self._loop.remove_reader(self._pidfd)
            os.close(self._pidfd)
            self._pidfd = None
        if not self._exit.done():
            self._exit.set_result(None)
