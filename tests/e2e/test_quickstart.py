# SPDX-License-Identifier: Apache-2.0
"""The README's first command, behind the installing: start, launch, ask, stream, end."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.platform import environment


@pytest.mark.parametrize(
    ("question", "wanted"),
    [(None, "xinference"), ("How do I launch a model?", "xinference launch")],
)
def test_quickstart_prints_a_correct_answer_and_the_ways_on(
    tmp_path: Path, question: str | None, wanted: str
) -> None:
    asked = ["--question", question] if question else []

    done = subprocess.run(
        [sys.executable, "-m", "xinference", "quickstart", "--exit", *asked],
        env=environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )

    assert done.returncode == 0, done.stderr
    said = done.stdout + done.stderr
    assert wanted in done.stdout
    for way in ("http://127.0.0.1:", "/docs", "from xinference.client import Client", "curl"):
        assert way in said
    assert "Traceback" not in said
