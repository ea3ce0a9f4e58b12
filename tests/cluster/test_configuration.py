# SPDX-License-Identifier: Apache-2.0
"""Where a guardian keeps its sockets."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from xinference.cluster.configuration import MAX_RUN_DIRECTORY_LEN, make_run_directory


@pytest.mark.parametrize("num_chars", [1, 20, 60, 150])
def test_sockets_fit_a_unix_address_however_long_the_home_is(
    tmp_path: Path, num_chars: int
) -> None:
    home = tmp_path / ("h" * num_chars)
    home.mkdir()

    made = make_run_directory(home)

    assert made.stat().st_mode & 0o777 == 0o700
    assert len(str(made)) <= MAX_RUN_DIRECTORY_LEN
    shutil.rmtree(made)


@pytest.mark.parametrize("num_chars", [1, 150])
def test_what_a_killed_process_has_left_is_removed_by_the_next(
    tmp_path: Path, num_chars: int
) -> None:
    home = tmp_path / ("h" * num_chars)
    home.mkdir()
    ended = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True
    )
    first = make_run_directory(home)
    left = first.with_name(ended.stdout.decode().strip())
    first.rename(left)
    (left / "socket").touch()

    second = make_run_directory(home)

    assert not left.exists()
    assert second.parent == left.parent
    shutil.rmtree(second)


def test_a_directory_of_somebody_else_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    home = tmp_path / ("h" * 150)
    home.mkdir()
    first = make_run_directory(home)
    shutil.rmtree(first)
    first.parent.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    first.parent.symlink_to(elsewhere)

    second = make_run_directory(home)

    assert not any(elsewhere.iterdir())
    assert second.parent == tmp_path
