# SPDX-License-Identifier: Apache-2.0
"""Logs of processes that are started here stay small: what is full is put aside as `<name>.1`.

A process whose stderr is a file looks after that file itself. Whatever writes to the descriptors
goes on in the new one: loggers, libraries, a traceback of the interpreter's own. Nothing is lost,
and nobody else has to know.
"""

import asyncio
import contextlib
import os
from pathlib import Path
from typing import BinaryIO

MAX_BYTES = 16 * 2**20
LOOK_SECONDS = 5.0

_OUTPUTS = (1, 2)
_STDERR = 2


def open_log(path: Path) -> BinaryIO:
    """Open a log to append to; one that is full is put aside first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists() and path.stat().st_size > MAX_BYTES:
        _move(path)
    return path.open("ab")


async def keep_small(path: Path) -> None:
    """Look after the file at `path` until cancelled."""
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        # Why: a full disk, or a folder that is gone, is no reason to end a model.
        with contextlib.suppress(OSError):
            put_aside(path, max_bytes=MAX_BYTES)


def put_aside(path: Path, *, max_bytes: int) -> bool:
    """Begin the file at `path` anew if it is this process's stderr, and full; return whether."""
    now = os.fstat(_STDERR)
    if now.st_size <= max_bytes or not os.path.samestat(now, path.stat()):
        return False
    _move(path)
    fresh = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
    try:
        for output in _OUTPUTS:
            if os.path.samestat(os.fstat(output), now):
                os.dup2(fresh, output)
    finally:
        os.close(fresh)
    return True


def _move(path: Path) -> None:
    path.replace(path.with_name(f"{path.name}.1"))
