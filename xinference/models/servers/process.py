# SPDX-License-Identifier: Apache-2.0
"""`ServerProcess`: the server of an engine as a child, with all below it; its log and its end.

It runs behind `leash.py`, so that it ends with this process however this process ends. What it
writes goes to the log of the replica, a record for each line, and the last lines are kept for the
error of a launch that fails.
"""

import contextlib
import logging
import signal
import socket
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger(__name__)

NUM_LAST_LINES = 30
NUM_TOLD_LINES = 8
MAX_LINE_LEN = 300
LEASH = Path(__file__).with_name("leash.py")


class ServerProcess:
    """A running or ended server. Any thread may call any method."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        *,
        secrets: Sequence[str],
    ) -> None:
        """Start it.

        Args:
            name: of the engine, for messages.
            command: what the leash is given.
            environment: the whole of it.
            secrets: the key that it asks its callers for, and others; no log has them.

        Raises:
            OSError: the interpreter does not start.
        """
        self._name = name
        self._lines: deque[str] = deque(maxlen=NUM_LAST_LINES)
        self._ended = threading.Event()
        self._secrets = [secret.encode() for secret in secrets]
        self._log = logging.getLogger(f"{__name__}.{name}")
        logger.info("%s starts: %s", name, self._hide(" ".join(command).encode()).decode())
        self._popen = subprocess.Popen(
            [sys.executable, "-I", "-S", str(LEASH), *command],
            env=dict(environment),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Why: Ctrl-C in a terminal is for who started the platform.
            start_new_session=True,
        )
        self._reader = threading.Thread(target=self._read, name="server log", daemon=True)
        self._reader.start()

    @property
    def has_ended(self) -> bool:
        """Whether it has ended and all it wrote was read."""
        return self._ended.is_set()

    @property
    def last_line(self) -> str:
        """What it wrote last."""
        return self._lines[-1] if self._lines else ""

    def wait(self, timeout_seconds: float) -> bool:
        """Return whether it has ended; wait for that, for a while."""
        return self._ended.wait(timeout_seconds)

    def describe_end(self) -> str:
        """Say how it ended, with its last lines."""
        status = self._popen.poll()
        how = f"exit status {status}"
        if status is not None and status < 0:
            with contextlib.suppress(ValueError):
                how = f"signal {signal.Signals(-status).name}"
        told = " | ".join([*self._lines][-NUM_TOLD_LINES:])
        return f"the server of {self._name} ended with {how}" + (
            f"; last lines of its log: {told}" if told else ""
        )

    def stop(self, grace_seconds: float) -> None:
        """End it in order, and after so many seconds anyhow; nothing of it is left then."""
        with contextlib.suppress(ProcessLookupError):
            self._popen.terminate()
        is_over = self._ended.wait(grace_seconds)
        assert self._popen.stdin is not None
        with contextlib.suppress(OSError):
            self._popen.stdin.close()  # the leash kills the whole group
        if not is_over:
            self._ended.wait(grace_seconds)

    def _hide(self, text: bytes) -> bytes:
        """Return a text without the secrets in it."""
        for secret in self._secrets:
            text = text.replace(secret, b"***")
        return text

    def _read(self) -> None:
        assert self._popen.stdout is not None
        with self._popen.stdout as written:
            for line_read in written:
                # Why: some servers write down all of their arguments.
                raw = self._hide(line_read)
                line = raw.decode(errors="replace").strip()
                if line:
                    self._log.info("%s", line)
                    self._lines.append(line[:MAX_LINE_LEN])
        self._popen.wait()
        self._ended.set()


def free_port() -> int:
    """Return a loopback TCP port that nobody listens on now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])
