# SPDX-License-Identifier: Apache-2.0
"""A platform that may open few files, and more callers than that."""

import contextlib
import socket
import time
from pathlib import Path

import httpx
import pytest

from tests.e2e.platform import Platform, started, wait_until

MAX_FILES = 256
HEALTH = b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n"
DEADLINE_SECONDS = 20.0


def connect(platform: Platform) -> socket.socket:
    host, _, port = platform.endpoint.removeprefix("http://").rpartition(":")
    return socket.create_connection((host, int(port)), timeout=DEADLINE_SECONDS)


def status_of(connection: socket.socket) -> bytes:
    """Return the status of an answer on a connection; empty if it was closed without one."""
    with contextlib.suppress(ConnectionError):
        return connection.recv(65536)[9:12]
    return b""


def test_f38_with_no_descriptor_left_callers_are_told_so_and_it_recovers(
    tmp_path: Path, is_long: bool
) -> None:
    if not is_long:
        pytest.skip("run by --long")
    with started(tmp_path, max_files=MAX_FILES) as platform, contextlib.ExitStack() as open_ones:
        first = open_ones.enter_context(connect(platform))
        first.sendall(HEALTH)
        assert status_of(first) == b"200"

        many = [open_ones.enter_context(connect(platform)) for _ in range(MAX_FILES + 50)]
        told = []
        for connection in many:
            with contextlib.suppress(ConnectionError):
                connection.sendall(HEALTH)
            told.append(status_of(connection))
        assert set(told) == {b"200", b"503"}
        assert told.count(b"200") > MAX_FILES / 4
        first.sendall(HEALTH)
        assert status_of(first) == b"200"
        assert platform.control("gateway").num_fds() < MAX_FILES

        open_ones.close()
        released_at = time.monotonic()

        def answers() -> bool:
            return httpx.get(f"{platform.endpoint}/status", timeout=5).status_code == 200

        wait_until("it answers again", answers, timeout_seconds=DEADLINE_SECONDS)
        print(f"it answers {time.monotonic() - released_at:.2f} s after")  # noqa: T201
