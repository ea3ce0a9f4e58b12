# SPDX-License-Identifier: Apache-2.0
"""Writes `doc/reference/`: every command with its options, every route with its scope.

`python -m tests.pages.reference` writes the pages; `tests/test_docs.py` compares. What is in them
is what click and the gateway say of themselves, so nothing is in the code and not there.
"""

from collections.abc import Callable, Iterator
from typing import Any

import click

from tests.fakes.cluster import FakeCluster
from tests.pages.blocks import ROOT
from xinference.api.access import ACCESS
from xinference.api.app import create_app
from xinference.api.openapi import document_of
from xinference.cli.main import program
from xinference.cli.serve import local_command, supervisor_command, worker_command

COMMAND = "python -m tests.pages.reference"
FOLDER = ROOT / "doc" / "reference"


def commands() -> Iterator[tuple[str, click.Command]]:
    """Yield every command by the words it is called with, groups left out."""
    for server in (local_command, supervisor_command, worker_command):
        assert server.name is not None
        yield server.name, server
    yield from _below("xinference", program)


def _below(words: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    if not isinstance(command, click.Group):
        yield words, command
        return
    context = click.Context(command)
    for name in command.list_commands(context):
        below = command.get_command(context, name)
        assert below is not None
        yield from _below(f"{words} {name}", below)


def commands_page() -> str:
    """Return what the page of the commands has to say."""
    parts = [
        "# Commands and their options",
        f"Written by `{COMMAND}`, from the commands themselves. "
        "[The command line](../cli.md) tells how they are used.",
    ]
    for words, command in commands():
        context = click.Context(command, info_name=words)
        parts.append(f"## {words}")
        parts.append(_sentences(command.help or ""))
        rows = [
            _row(option)
            for option in command.params
            if isinstance(option, click.Option) and not option.hidden
        ]
        arguments = [one for one in command.params if isinstance(one, click.Argument)]
        usage = " ".join([words, *(one.make_metavar(context) for one in arguments)])
        parts.append(f"`{usage}`" + (", with" if rows else ""))
        if rows:
            parts.append("\n".join(["| option | value | |", "|---|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _sentences(text: str) -> str:
    """Return a help text as Markdown: one line for each of its paragraphs."""
    paragraphs = [" ".join(part.split()) for part in text.replace("\b", "").split("\n\n")]
    return "\n\n".join(_escaped(part) for part in paragraphs if part)


def _row(option: click.Option) -> str:
    shown = sorted((*option.opts, *option.secondary_opts), key=lambda one: one.startswith("--"))
    names = ", ".join(f"`{one}`" for one in shown)
    notes = ["required"] if option.required else []
    notes += ["may be repeated"] if option.multiple else []
    notes += [f"default: {option.default}"] if option.show_default else []
    told = _escaped(" ".join([option.help or "", *(f"({note})" for note in notes)]))
    return f"| {names} | {_value(option)} | {told} |"


def _value(option: click.Option) -> str:
    """Return what goes behind an option, in words that no version of click changes."""
    kind = option.type
    if option.is_flag or option.count:
        return ""
    if option.metavar:
        return f"`{option.metavar}`"
    if isinstance(kind, click.Choice):
        return ", ".join(f"`{choice}`" for choice in kind.choices)
    if isinstance(kind, click.IntRange | click.FloatRange):
        ends = [end for end in (kind.min, kind.max) if end is not None]
        return f"{ends[0]} to {ends[1]}" if len(ends) == 2 else f"{ends[0]} or more"
    words = {"text": "text", "integer": "number", "float": "number", "boolean": "true or false"}
    return " ".join([words.get(kind.name, kind.name)] * option.nargs)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("_", "\\_")


def routes() -> dict[str, dict[str, Any]]:
    """Return every operation of the gateway's own description, by method and path."""
    document = document_of(create_app(FakeCluster()))
    return {
        f"{method.upper()} {path}": operation
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    }


def routes_page() -> str:
    """Return what the page of the routes has to say."""
    described = routes()
    undescribed = sorted(row for row in ACCESS if row.replace(":path}", "}") not in described)
    parts = [
        "# Routes",
        f"Written by `{COMMAND}`, from what the gateway says of itself at `/openapi.json`. "
        "[The HTTP API](../api.md) tells what goes in and comes out, and "
        "[API keys](../api-keys.md#scopes) what the scopes are.",
    ]
    groups: dict[str, list[str]] = {}
    for row, operation in described.items():
        groups.setdefault(operation["tags"][0], []).append(
            f"| `{row}` | {_scope(row)} | {_escaped(operation.get('description', ''))} |"
        )
    for group, rows in groups.items():
        parts.append(f"## {group}")
        parts.append("\n".join(["| route | scope | |", "|---|---|---|", *rows]))
    parts.append("## For people and probes")
    rows = [f"| `{row}` | {_scope(row)} |" for row in undescribed]
    parts.append("\n".join(["| route | scope |", "|---|---|", *rows]))
    return "\n\n".join(parts) + "\n"


def _scope(row: str) -> str:
    (scope,) = {needed for one, needed in ACCESS.items() if one.replace(":path}", "}") == row} or {
        ACCESS.get(row)
    }
    return str(scope.value) if scope is not None else "none"


REFERENCE: dict[str, Callable[[], str]] = {"commands.md": commands_page, "routes.md": routes_page}
"""Each page of the folder, and what it has to say."""


def main() -> None:
    """Write the pages."""
    FOLDER.mkdir(exist_ok=True)
    for name, page in REFERENCE.items():
        (FOLDER / name).write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
