# SPDX-License-Identifier: Apache-2.0
"""Command lines as pages show them: found, and read as the command itself would."""

import re
import shlex
from pathlib import Path

import click

from xinference.cli.main import program
from xinference.cli.serve import local_command, supervisor_command, worker_command

SERVERS = {
    "xinference-local": local_command,
    "xinference-supervisor": supervisor_command,
    "xinference-worker": worker_command,
}
"""Commands that stay."""


def commands_in(text: str) -> list[list[str]]:
    """Return the words of each of our commands in a text of bash."""
    found = []
    for line in text.replace("\\\n", " ").splitlines():
        for part in re.split(r"\s(?:\||&&|;|&)(?:\s|$)", line):
            words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words = words[1:]
            if words and Path(words[0]).name in {"xinference", *SERVERS}:
                found.append([Path(words[0]).name, *words[1:]])
    return found


def read(words: list[str], *, where: str) -> None:
    """Read a command line as the command would; values are not looked at.

    Raises:
        AssertionError: there is no such command or option.
    """
    command: click.Command = SERVERS.get(words[0], program)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        below = command.get_command(click.Context(command), rest[0])
        assert below is not None, f"{where}: {' '.join(words)}"
        command, rest = below, rest[1:]
    context = click.Context(command, **command.context_settings)
    try:
        command.make_parser(context).parse_args(list(rest))
    except click.UsageError as error:
        raise AssertionError(f"{where}: {' '.join(words)}: {error}") from None
