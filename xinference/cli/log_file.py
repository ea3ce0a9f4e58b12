# SPDX-License-Identifier: Apache-2.0
"""Where the log lines of a server process go: stderr, and `<home>/logs/xinference.log`.

All processes of a host share the file; each line says which one wrote it. The file starts anew at
100 MiB, and the one before is kept as `xinference.log.1`.
"""

import contextlib
import fcntl
import logging
import sys
from io import TextIOWrapper
from logging.handlers import WatchedFileHandler
from pathlib import Path

from xinference.protocol.logs import set_up_logging

FILE_NAME = "xinference.log"
MAX_BYTES = 100 * 2**20


class SharedLogFile(WatchedFileHandler):
    """A log file that several processes append to, and that any of them may start anew."""

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record; a file that cannot be written does not fail what is being logged."""
        # Why quietly: stderr has the record as well.
        with contextlib.suppress(OSError):
            if self.stream is not None and self.stream.tell() > MAX_BYTES:
                self._start_anew()
            # The base class opens the new file if somebody moved the old one away.
            super().emit(record)

    def _open(self) -> TextIOWrapper:
        # Somebody may have removed it with all that is in it.
        Path(self.baseFilename).parent.mkdir(exist_ok=True)
        return super()._open()

    def _start_anew(self) -> None:
        path = Path(self.baseFilename)
        with path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            # Why look again: another process may have been first.
            if path.exists() and path.stat().st_size > MAX_BYTES:
                path.replace(path.with_name(f"{FILE_NAME}.1"))


def set_up_file_logging(home: Path, *, role: str, level: str, log_format: str) -> None:
    """Send the records of this process to stderr and to the file under `home`."""
    directory = home / "logs"
    directory.mkdir(parents=True, exist_ok=True)
    handlers = (
        logging.StreamHandler(sys.stderr),
        SharedLogFile(directory / FILE_NAME, encoding="utf-8"),
    )
    set_up_logging(handlers, role=role, level=level, log_format=log_format)
