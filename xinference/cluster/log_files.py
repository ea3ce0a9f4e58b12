# SPDX-License-Identifier: Apache-2.0
"""The log files of one host, as they are read: the last records, or what came since a position.

A file that has grown large was put aside as `<name>.1` by who writes it, so a log is two files, of
which a reader may be in either. Files are chosen among those that are listed in the folder, by what
their names mean; no name that somebody gives is ever opened.
"""

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from xinference.errors import InvalidRequest
from xinference.identifiers import NodeId, ReplicaUid
from xinference.protocol.logs import (
    LogLine,
    LogPosition,
    LogQuery,
    is_at_least,
    is_head,
    records_of,
)

FOLDER = "logs"
OF_PROCESSES = ("xinference.log", "downloads.log")
"""What the processes of a host share; any other log is of a replica."""
SUFFIX = ".log"
MAX_FILES = 64
"""Of one log, the replicas that wrote last."""
SCAN_BYTES = (256 * 1024, 2 * 2**20, 8 * 2**20)
"""Of one file, so many bytes at the end are looked through until there are lines enough."""
MAX_BATCH_BYTES = 256 * 1024
"""Of what came since a position in one file, at a time."""
MAX_LOOK_BYTES = 2**20
"""Of all files of a log, at a time; the next look goes on from there."""
MAX_LAST_CHARS = 4 * 2**20
"""Of the last records."""
LOOK_BACK_BYTES = 16 * 1024
"""In which the record is looked for that lines without a head go on with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadLog:
    """Records of one file, and how far it was read."""

    lines: list[LogLine]
    inode: int
    offset: int
    num_bytes: int = 0
    """Of what came since a position."""


def read_logs(
    home: Path, query: LogQuery, *, node: NodeId
) -> tuple[list[LogLine], list[LogPosition]]:
    """Return the records of a log on this host, by their time, and how far each file was read.

    There is a position for each file that there is.
    """
    known = {one.name: one for one in query.positions or () if one.node == node}
    lines: list[LogLine] = []
    positions = []
    num_left = MAX_LOOK_BYTES
    for path in _files(home / FOLDER, query):
        position = known.get(path.name)
        if num_left <= 0:
            positions += [] if position is None else [position]
            continue
        try:
            read = _last(path, query) if query.positions is None else _since(path, position)
        except OSError:
            continue  # it was removed, or put aside, this very moment; the next look finds it
        if query.positions is not None:
            num_left -= read.num_bytes
        replica = None if query.model is None else path.name.removesuffix(SUFFIX)
        lines += [
            replace(line, node=node, replica=replica)
            for line in read.lines
            if is_at_least(line, query.level)
        ]
        positions.append(
            LogPosition(node=node, name=path.name, inode=read.inode, offset=read.offset)
        )
    lines.sort(key=lambda line: line.time)
    if query.positions is None:
        lines = last_lines(lines, query.num_lines)
    return lines, positions


def last_lines(lines: Sequence[LogLine], num_lines: int) -> list[LogLine]:
    """Return the last records, so many and not too long in all."""
    num_chars = 0
    first = len(lines)
    while first > max(0, len(lines) - num_lines):
        num_chars += len(lines[first - 1].message)
        if num_chars > MAX_LAST_CHARS:
            break
        first -= 1
    return list(lines[first:])


def _files(folder: Path, query: LogQuery) -> list[Path]:
    """Return the files of a log, the one that was written last at the end."""
    try:
        # Why no links: what they lead to is not of this folder.
        found = [
            (entry.stat(follow_symlinks=False).st_mtime, Path(entry.path))
            for entry in os.scandir(folder)
            if _is_of(entry.name, query) and entry.is_file(follow_symlinks=False)
        ]
    except OSError:
        return []
    return [path for _, path in sorted(found)[-MAX_FILES:]]


def _is_of(name: str, query: LogQuery) -> bool:
    if query.model is None:
        return name in OF_PROCESSES
    if not name.endswith(SUFFIX) or name in OF_PROCESSES:
        return False
    try:
        replica = ReplicaUid.parse(name.removesuffix(SUFFIX))
    except InvalidRequest:
        return False
    return replica.model == query.model and query.replica in (None, replica.index)


def _last(path: Path, query: LogQuery) -> ReadLog:
    """Return the last records of a file, with those of the one before it where it has too few."""
    inode, end = 0, 0
    lines: list[LogLine] = []
    for num_bytes in SCAN_BYTES:
        with _opened(path) as file:
            status = os.fstat(file)
            text, end = _text(file, max(0, status.st_size - num_bytes), status.st_size)
            inode = status.st_ino
        is_cut = status.st_size > num_bytes
        if not is_cut:
            text, is_cut = _with_older(path, text, num_bytes - status.st_size)
        records = _records(text, is_cut=is_cut, written_at=status.st_mtime)
        lines = [line for line in records if is_at_least(line, query.level)]
        if len(lines) >= query.num_lines or not is_cut:
            break
    return ReadLog(lines=last_lines(lines, query.num_lines), inode=inode, offset=end)


def _with_older(path: Path, text: bytes, num_bytes: int) -> tuple[bytes, bool]:
    """Return a file's text with the end of the file before it, and whether that was cut."""
    try:
        with _opened(_older(path)) as file:
            size = os.fstat(file).st_size
            older, _ = _text(file, max(0, size - num_bytes), size)
    except OSError:
        return text, False
    return older + b"\n" + text, size > num_bytes


def _since(path: Path, position: LogPosition | None) -> ReadLog:
    """Return what came since a position, or as much of it as is read at a time.

    Args:
        position: None: the file was not there when the others were read.
    """
    with _opened(path) as file:
        if position is None:
            return _part(file, 0)
        status = os.fstat(file)
        if status.st_ino == position.inode and position.offset <= status.st_size:
            return _part(file, position.offset)
    # It was put aside meanwhile. What was not read of it comes first.
    try:
        with _opened(_older(path)) as file:
            if os.fstat(file).st_ino == position.inode:
                rest = _part(file, position.offset)
                if rest.offset > position.offset:
                    return rest
    except OSError:
        pass
    with _opened(path) as file:
        return _part(file, 0)


def _part(file: int, start: int) -> ReadLog:
    status = os.fstat(file)
    text, end = _text(file, start, min(status.st_size, start + MAX_BATCH_BYTES))
    lines = _split(text)
    before = None
    if lines and start and not is_head(lines[0]):
        earlier, _ = _text(file, max(0, start - LOOK_BACK_BYTES), start)
        known = _records(earlier, is_cut=True, written_at=status.st_mtime)
        before = known[-1] if known else None
    records = records_of(lines, before=before, written_at=status.st_mtime)
    return ReadLog(lines=records, inode=status.st_ino, offset=end, num_bytes=end - start)


def _records(text: bytes, *, is_cut: bool, written_at: float) -> list[LogLine]:
    """Return the records of the end of a log.

    Args:
        is_cut: it begins in the middle of a line, or of a record.
    """
    lines = _split(text)
    if is_cut:
        first = next((index for index, line in enumerate(lines) if is_head(line)), 1)
        lines = lines[first:]
    return records_of(lines, before=None, written_at=written_at)


def _split(text: bytes) -> list[str]:
    return text.decode(errors="replace").replace("\r\n", "\n").replace("\r", "\n").split("\n")


def _text(file: int, start: int, end: int) -> tuple[bytes, int]:
    """Return whole lines of a file from `start` on, without the last line end, and where they end.

    A line that is not whole yet is left, unless it alone is more than is read at a time.
    """
    text = b"".join(_blocks(file, start, end))
    last = text.rfind(b"\n")
    if last >= 0:
        return text[:last], start + last + 1
    if len(text) >= MAX_BATCH_BYTES:
        return text, start + len(text)
    return b"", start


def _blocks(file: int, start: int, end: int) -> Iterator[bytes]:
    while start < end:
        block = os.pread(file, end - start, start)
        if not block:
            return
        start += len(block)
        yield block


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    """Give a descriptor of a plain file."""
    # Why O_NONBLOCK: to open a pipe would wait for who writes to it.
    file = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(file).st_mode):
            raise FileNotFoundError(path)
        yield file
    finally:
        os.close(file)


def _older(path: Path) -> Path:
    return path.with_name(f"{path.name}.1")
