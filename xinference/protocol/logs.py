# SPDX-License-Identifier: Apache-2.0
"""Log lines: how every process writes one, as text or as JSON, and how one is read again.

    2026-11-21 21:06:53,123 ERROR gateway[812] xinference.api.edge [4f0c…]: POST /v1/… failed
    {"time": "2026-11-21T20:06:53.123Z", "level": "ERROR", "process": "gateway[812]", …}

What libraries print by themselves stands between such lines, and belongs to the one before it, as a
traceback does. Nothing here opens a file.
"""

import json
import logging
import os
import re
import time
from collections.abc import Iterable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from xinference.identifiers import ModelUid, NodeId

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
MAX_RECORD_LEN = 64 * 1024
"""Characters of one record; what follows begins another one."""
SUPERVISOR_NODE = NodeId("supervisor")
"""As a node: the host of the supervisor."""

REQUEST_ID: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being answered, for the lines that are written meanwhile."""

_HEAD = re.compile(
    r"(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d),(?P<ms>\d{3}) "
    rf"(?P<level>{'|'.join(LEVELS)}) "
    r"(?:(?P<process>[\w.-]+\[\d+\]) )?"
    r"(?P<logger>[^\s:]+)"
    r"(?: \[(?P<request_id>[\x21-\x7e]{1,128})\])?: (?P<message>.*)",
    re.DOTALL,
)


class LogFormat(StrEnum):
    """How lines are written."""

    TEXT = "text"
    JSON = "json"


@dataclass(frozen=True, slots=True, kw_only=True)
class LogLine:
    """One record: a line, with the lines of a traceback behind it."""

    time: float
    """Unix seconds, by the clock of the host that wrote it."""
    level: str
    message: str
    process: str = ""
    """Such as "gateway[812]"; empty: what is not known."""
    logger: str = ""
    request_id: str = ""
    node: NodeId | None = None
    """Where it was read."""
    replica: str | None = None
    """Whose log it is from; None: the host's own processes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogPosition:
    """How far a log was read. It names no file that could be opened: only one that was listed."""

    node: NodeId
    name: str
    inode: int
    offset: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LogQuery:
    """What of which log is asked for."""

    model: ModelUid | None = None
    """The log of its replicas. None: that of the processes of `node`."""
    node: NodeId | None = None
    """A worker: its host, or "host:port"; or `SUPERVISOR_NODE`. None, of a model: every worker."""
    replica: int | None = None
    """None: all."""
    level: str = "DEBUG"
    """The lowest that is wanted."""
    num_lines: int = 100
    """At most; of what is there, the last ones."""
    positions: tuple[LogPosition, ...] | None = None
    """What was read before: only what came later is wanted. None: the last lines."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogBatch:
    """Lines of one or more logs, by their time."""

    lines: tuple[LogLine, ...]
    positions: tuple[LogPosition, ...]
    """From where to go on."""
    silent: Mapping[NodeId, str]
    """Hosts whose lines are missing, and why."""


QUIET = ("httpx", "httpcore", "uvicorn", "asyncio", "xoscar")
"""Loggers of others, heard only from WARNING on."""


def set_up_logging(
    handlers: Sequence[logging.Handler], *, role: str, level: str, log_format: str
) -> None:
    """Send the records of this process to `handlers`."""
    formatter = LineFormatter(log_format, role=role)
    for handler in handlers:
        handler.setFormatter(formatter)
    logging.basicConfig(level=level, handlers=handlers, force=True)
    for name in QUIET:
        logging.getLogger(name).setLevel(max(logging.WARNING, logging.getLevelName(level)))
    logging.captureWarnings(True)


class LineFormatter(logging.Formatter):
    """Writes the records of one process; each has the id of the request that it is about."""

    def __init__(self, log_format: str, *, role: str) -> None:
        super().__init__()
        self._is_json = log_format == LogFormat.JSON
        self._process = f"{role}[{os.getpid()}]"

    def format(self, record: logging.LogRecord) -> str:
        """Return a record, without a line end behind it."""
        message = record.getMessage()
        if record.exc_info and not record.exc_text:
            record.exc_text = self.formatException(record.exc_info)
        for more in (record.exc_text, record.stack_info):
            if more:
                message = f"{message}\n{more}"
        request_id = getattr(record, "request_id", None) or REQUEST_ID.get()
        if self._is_json:
            return self._as_json(record, message, request_id)
        when = self.formatTime(record)
        # Why not always: some messages are about the request, and name it themselves.
        about = f" [{request_id}]" if request_id and request_id not in message else ""
        return f"{when} {record.levelname} {self._process} {record.name}{about}: {message}"

    def _as_json(self, record: logging.LogRecord, message: str, request_id: str | None) -> str:
        when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        fields = {
            "time": when.replace("+00:00", "Z"),
            "level": record.levelname,
            "process": self._process,
            "logger": record.name,
            "message": message,
        }
        if request_id:
            fields["request_id"] = request_id
        return json.dumps(fields, ensure_ascii=False)


def is_head(line: str) -> bool:
    """Return whether a line begins a record."""
    return _read_head(line) is not None


def records_of(lines: Iterable[str], *, before: LogLine | None, written_at: float) -> list[LogLine]:
    """Return the records of consecutive lines.

    Args:
        before: the record before them, which lines without a head go on with.
        written_at: Unix seconds, for what is known by nothing else.
    """
    found: list[LogLine] = []
    for line in lines:
        head = _read_head(line)
        if head is not None:
            found.append(head)
        elif found and len(found[-1].message) + len(line) < MAX_RECORD_LEN:
            found[-1] = replace(found[-1], message=f"{found[-1].message}\n{line}")
        elif line.strip():
            last = found[-1] if found else before
            if last is None:
                found.append(LogLine(time=written_at, level="INFO", message=line))
            else:
                found.append(replace(last, message=line))
    return found


def is_at_least(line: LogLine, level: str) -> bool:
    """Return whether a record is of a level, or a graver one."""
    return LEVELS.index(line.level) >= LEVELS.index(level)


def _read_head(line: str) -> LogLine | None:
    if line.startswith("{"):
        return _read_json(line)
    # Why first: most lines without a head are of tracebacks, and a pattern costs more.
    if not line[:4].isdecimal():
        return None
    head = _HEAD.fullmatch(line)
    if head is None:
        return None
    try:
        seconds = time.mktime(time.strptime(head["time"], "%Y-%m-%d %H:%M:%S"))
    except (ValueError, OverflowError):
        return None
    return LogLine(
        time=seconds + int(head["ms"]) / 1000,
        level=head["level"],
        message=head["message"],
        process=head["process"] or "",
        logger=head["logger"],
        request_id=head["request_id"] or "",
    )


def _read_json(line: str) -> LogLine | None:
    try:
        fields: dict[str, Any] = json.loads(line)
        level = str(fields["level"])
        seconds = datetime.fromisoformat(fields["time"]).timestamp()
        message = str(fields["message"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return None
    if level not in LEVELS:
        return None
    return LogLine(
        time=seconds,
        level=level,
        message=message,
        process=str(fields.get("process", "")),
        logger=str(fields.get("logger", "")),
        request_id=str(fields.get("request_id", "")),
    )
