# SPDX-License-Identifier: Apache-2.0
"""The command tree: what it lists, how fast, and by which names."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from xinference import __version__
from xinference.cli.main import COMMANDS, program


@pytest.mark.parametrize("words", [["--help"], ["-h"], []])
def test_the_help_lists_every_command_with_what_it_does(words: list[str]) -> None:
    done = CliRunner().invoke(program, words, prog_name="xinference")

    for name in COMMANDS:
        (line,) = [line for line in done.output.splitlines() if line.split()[:1] == [name]]
        assert len(line.split()) > 2, line
    assert "xinference-local" in done.output


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_every_command_explains_its_options(name: str) -> None:
    done = CliRunner().invoke(program, [name, "--help"])

    assert done.exit_code == 0
    assert "--" in done.output


def test_the_version_is_printed() -> None:
    done = CliRunner().invoke(program, ["-v"], prog_name="xinference")

    assert done.output == f"xinference {__version__}\n"


@pytest.mark.parametrize(
    ("words", "instead"),
    [
        (["reload", "--model-uid", "m"], "terminate"),
        (["relaunch-api"], "comes back"),
        (["service", "install"], "systemd"),
        (["-H", "0.0.0.0"], "xinference-local"),
        (["--log-level", "DEBUG"], "xinference-local"),
    ],
)
def test_what_is_not_here_says_what_to_do_instead(words: list[str], instead: str) -> None:
    done = CliRunner().invoke(program, words, prog_name="xinference")

    assert done.exit_code == 2
    assert instead in done.stderr


def test_help_is_there_at_once() -> None:
    # Processor time, as tests that run beside this one do not lengthen it so much.
    seconds = []
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-m", "xinference", "--help"], check=True, stdout=subprocess.DEVNULL
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime)

    assert min(seconds) < 0.3


def test_the_page_tells_of_every_command() -> None:
    page = (Path(__file__).parents[2] / "doc" / "cli.md").read_text()

    assert [name for name in COMMANDS if f"`{name}" not in page and f" {name}" not in page] == []
