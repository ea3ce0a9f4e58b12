# SPDX-License-Identifier: Apache-2.0
"""`deploy/`: what its linters say, and that it names options and variables that there are.

The images are not built here, and nothing is deployed.
"""

import configparser
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.debian import need_command
from xinference.cli.serve import local_command, supervisor_command, worker_command
from xinference.settings import VARIABLES

DEPLOY = Path(__file__).parents[1] / "deploy"
COMMANDS = {
    "xinference-local": local_command,
    "xinference-supervisor": supervisor_command,
    "xinference-worker": worker_command,
}
DOCKERFILES = sorted(DEPLOY.glob("docker/Dockerfile*"))
MANIFESTS = sorted(DEPLOY.glob("kubernetes/*.yaml"))
UNITS = sorted(DEPLOY.glob("systemd/*.service"))


def check(*command: str) -> str:
    """Run a linter; return what it said.

    Raises:
        AssertionError: it has found something.
    """
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout + ran.stderr


def tool(name: str) -> str:
    """Return a command of this Python's environment."""
    return str(Path(sys.executable).parent / name)


def command_lines() -> Iterator[list[str]]:
    """Yield every command line of ours in the folder."""
    for path in DOCKERFILES:
        found = re.search(r'^CMD \["xinference.*\]$', path.read_text(), re.M)
        assert found, path
        yield yaml.safe_load(found.group().removeprefix("CMD "))
    for path in (*MANIFESTS, DEPLOY / "docker" / "compose.yaml"):
        yield from (
            line
            for document in yaml.safe_load_all(path.read_text())
            for line in commands_in(document)
        )
    for path in UNITS:
        executable, *words = shlex.split(unit(path)["Service"]["ExecStart"])
        yield [Path(executable).name, *words]


def commands_in(document: Any) -> Iterator[list[str]]:
    """Yield the commands in a manifest, however deep."""
    if isinstance(document, dict):
        command = document.get("command")
        if isinstance(command, list) and command[0].startswith("xinference"):
            yield command
        document = list(document.values())
    if isinstance(document, list):
        for part in document:
            yield from commands_in(part)


def unit(path: Path) -> configparser.ConfigParser:
    """Read a unit; of options that are there twice the last counts."""
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # names have capitals
    parser.read(path)
    return parser


def test_every_command_line_is_one_that_the_commands_take() -> None:
    lines = list(command_lines())
    assert {line[0] for line in lines} == COMMANDS.keys()
    for name, *words in lines:
        # Raises click.UsageError for what there is not.
        COMMANDS[name].make_context(name, list(words))


def test_every_variable_is_one_that_is_read() -> None:
    for path in (*DOCKERFILES, *MANIFESTS, *UNITS, DEPLOY / "docker" / "compose.yaml"):
        named = set(re.findall(r"XINFERENCE_[A-Z_]+", path.read_text()))
        assert named <= VARIABLES.keys(), path


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_hadolint_finds_nothing_in_the_images(path: Path) -> None:
    check(tool("hadolint"), str(path))


def test_the_compose_file_is_of_its_schema() -> None:
    compose = str(DEPLOY / "docker" / "compose.yaml")
    check(tool("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", compose)


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_manifests_are_of_kubernetes_schemas(path: Path) -> None:
    check(tool("kubernetes-validate"), "--strict", str(path))


def test_systemd_knows_every_line_of_the_units() -> None:
    systemd_analyze = need_command("systemd-analyze", package="systemd")
    ran = subprocess.run(
        [systemd_analyze, "verify", *map(str, UNITS)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    # The programs themselves are not installed where the units look for them.
    complaints = [
        line
        for line in ran.stderr.splitlines()
        if not re.search("xinference.* is not executable", line)
    ]
    assert complaints == []
