# SPDX-License-Identifier: Apache-2.0
"""Log lines: what is written is read again, in both formats, with what others print."""

import json
import logging
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xinference.protocol.logs import (
    LEVELS,
    MAX_RECORD_LEN,
    REQUEST_ID,
    LineFormatter,
    LogFormat,
    LogLine,
    is_at_least,
    records_of,
)

both = pytest.mark.parametrize("log_format", list(LogFormat))


def written(log_format: str, message: str, **changes: object) -> str:
    record = logging.LogRecord("xinference.test", logging.ERROR, __file__, 1, message, (), None)
    for name, value in changes.items():
        setattr(record, name, value)
    return LineFormatter(log_format, role="gateway").format(record)


def read(text: str) -> list[LogLine]:
    return records_of(text.split("\n"), before=None, written_at=0.0)


@both
def test_what_is_written_is_read_again(log_format: str) -> None:
    token = REQUEST_ID.set("req-7")
    try:
        (line,) = read(written(log_format, "POST /v1/models failed: why?"))
    finally:
        REQUEST_ID.reset(token)

    assert (line.level, line.logger, line.request_id) == ("ERROR", "xinference.test", "req-7")
    assert line.message == "POST /v1/models failed: why?"
    assert line.process.startswith("gateway[")
    assert line.time == pytest.approx(time.time(), abs=60)


@both
def test_a_traceback_belongs_to_its_record(log_format: str) -> None:
    try:
        raise ZeroDivisionError("of a test")
    except ZeroDivisionError:
        text = written(log_format, "it failed", exc_info=sys.exc_info())

    (line,) = read(text)

    assert line.message.startswith("it failed\nTraceback")
    assert line.message.endswith("ZeroDivisionError: of a test")
    assert line.logger == "xinference.test"


def test_a_line_of_json_is_one_object_in_utc() -> None:
    text = written(LogFormat.JSON, "two\nlines", created=0.25)

    assert "\n" not in text
    assert json.loads(text)["time"] == "1970-01-01T00:00:00.250Z"


def test_the_id_of_a_request_is_not_said_twice() -> None:
    assert written(LogFormat.TEXT, "failed [abc]", request_id="abc").count("abc") == 1
    assert json.loads(written(LogFormat.JSON, "failed [abc]", request_id="abc"))["request_id"]


def test_what_others_print_stays_with_the_line_before_it() -> None:
    text = f"{written(LogFormat.TEXT, 'one')}\n  progress 10%\n\nlast\n{written('text', 'two')}"

    assert [line.message for line in read(text)] == ["one\n  progress 10%\n\nlast", "two"]


def test_what_stands_alone_has_the_time_it_was_written() -> None:
    (line,) = records_of(["Segmentation fault"], before=None, written_at=12.5)

    assert (line.time, line.level, line.message) == (12.5, "INFO", "Segmentation fault")


def test_lines_without_a_head_go_on_with_the_record_before_them() -> None:
    before = LogLine(time=3.0, level="ERROR", message="it failed", replica="m-rep0")

    (line,) = records_of(["  at line 2"], before=before, written_at=9.0)

    assert (line.time, line.level, line.message) == (3.0, "ERROR", "  at line 2")


def test_no_record_grows_without_end() -> None:
    lines = [written(LogFormat.TEXT, "first"), *["x" * 1000] * 200]

    found = records_of(lines, before=None, written_at=0.0)

    assert len(found) > 2
    assert all(len(line.message) <= MAX_RECORD_LEN + 1000 for line in found)
    assert {line.level for line in found} == {"ERROR"}


def test_levels_are_ordered() -> None:
    line = LogLine(time=0.0, level="WARNING", message="")

    assert [level for level in LEVELS if is_at_least(line, level)] == ["DEBUG", "INFO", "WARNING"]


@given(st.text(st.characters(exclude_characters="\n\r"), max_size=80))
def test_no_line_breaks_the_reader(text: str) -> None:
    head = "2026-11-21 21:06:53,123 INFO "
    for line in (text, f"{{{text}", f"{head}{text}", f'{{"time": "{text}", "level": "INFO"}}'):
        assert len(records_of([line], before=None, written_at=0.0)) <= 1
