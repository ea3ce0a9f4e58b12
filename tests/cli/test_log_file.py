# SPDX-License-Identifier: Apache-2.0
"""The log file that the processes of a host share."""

import logging
import shutil
from pathlib import Path

import pytest

from xinference.cli import log_file
from xinference.cli.log_file import SharedLogFile


def line(text: str) -> logging.LogRecord:
    return logging.LogRecord("test", logging.INFO, __file__, 1, text, None, None)


def test_a_full_file_is_put_aside_once_and_every_process_goes_on_in_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_file, "MAX_BYTES", 100)
    path = tmp_path / log_file.FILE_NAME
    one, two = SharedLogFile(path), SharedLogFile(path)

    two.emit(line("first of two"))
    one.emit(line("x" * 200))
    one.emit(line("second of one"))
    two.emit(line("second of two"))
    one.close()
    two.close()

    assert path.read_text().splitlines() == ["second of one", "second of two"]
    assert "first of two" in path.with_name(f"{log_file.FILE_NAME}.1").read_text()


def test_a_directory_that_somebody_removes_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "logs" / log_file.FILE_NAME
    handler = SharedLogFile(path)
    handler.emit(line("before"))

    shutil.rmtree(path.parent)
    handler.emit(line("after"))
    handler.close()

    assert path.read_text() == "after\n"


def test_a_home_that_is_gone_fails_nobody_who_logs(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    handler = SharedLogFile(home / "logs" / log_file.FILE_NAME)

    shutil.rmtree(home)
    handler.emit(line("to stderr alone"))
    handler.emit(line("and this"))
    handler.close()

    assert not home.exists()
