# SPDX-License-Identifier: Apache-2.0
"""Where a guardian keeps its sockets."""

import shutil
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
