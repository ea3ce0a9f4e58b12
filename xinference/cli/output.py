# SPDX-License-Identifier: Apache-2.0
"""Everything that is printed: results to stdout, the rest to stderr; rich only when it is used."""

import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from rich.console import Console

PIPE_WIDTH = 1000
"""Columns of a table that no terminal shows; nothing is cut or folded for another program."""


def say(text: str) -> None:
    """Print chatter: it is for people, not for scripts."""
    click.echo(text, err=True)


def show(text: str, *, nl: bool = True) -> None:
    """Print a result, at once."""
    click.echo(text, nl=nl)
    sys.stdout.flush()


def show_json(value: Any) -> None:
    """Print a result for a script."""
    show(json.dumps(value, indent=2, ensure_ascii=False))


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print rows as a table; None is an empty cell, a list its items."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=title or None, title_justify="left")
    for column in columns:
        table.add_column(column, overflow="fold")
    for row in rows:
        table.add_row(*(Text(_cell(value)) for value in row))
    console(sys.stdout).print(table)


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list | tuple):
        return ", ".join(_cell(item) for item in value)
    return str(value)


def console(stream: IO[str]) -> "Console":
    """Return a rich console for stdout or stderr."""
    from rich.console import Console

    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, soft_wrap=False)


class Progress(Protocol):
    """Shows how far something is."""

    def __call__(self, stage: str, fraction: float) -> None:
        """Show that it is at this stage; `fraction` is from 0 to 1."""
        ...


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show a bar on stderr while the block runs; a line per stage where that is no terminal."""
    if not sys.stderr.isatty():
        yield _StageLines(title)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=console(sys.stderr), transient=True) as bar:
        task = bar.add_task(title, total=1.0)
        yield lambda stage, fraction: bar.update(
            task, completed=fraction, description=f"{title}: {stage}"
        )


class _StageLines:
    """A line per stage, for logs."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""

    def __call__(self, stage: str, fraction: float) -> None:
        if stage != self._stage:
            self._stage = stage
            say(f"{self._title}: {stage}")
