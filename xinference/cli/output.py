# SPDX-License-Identifier: Apache-2.0
"""Everything that is printed: results to stdout, the rest to stderr; rich only when it is used."""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import IO, TYPE_CHECKING, Any, Protocol

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

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

    def __call__(
        self, stage: str, fraction: float, files: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        """Show that it is at this stage.

        Args:
            fraction: from 0 to 1.
            files: those of a download, as the progress of a launch has them.
        """
        ...


@contextmanager
def progress_bar(title: str) -> Iterator[Progress]:
    """Show bars on stderr while the block runs: one for all, and one for each file on its way.

    Where that is no terminal there is a line per stage, and one per file that has arrived.
    """
    if not sys.stderr.isatty():
        yield _StageLines(title)
        return
    from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
    from rich.progress import Progress as RichProgress

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TextColumn("{task.fields[amount]}"),
        TimeElapsedColumn(),
    )
    with RichProgress(*columns, console=console(sys.stderr), transient=True) as bars:
        yield _Bars(title, bars)


class _Bars:
    """A bar for all, and one below it for each file that is on its way."""

    def __init__(self, title: str, bars: "RichProgress") -> None:
        self._title = title
        self._bars = bars
        self._whole = bars.add_task(title, total=1.0, amount="")
        self._files: dict[str, TaskID] = {}

    def __call__(
        self, stage: str, fraction: float, files: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        self._bars.update(
            self._whole,
            completed=fraction,
            description=f"{self._title}: {stage}",
            amount=_amount_of_all(files),
        )
        for file in files:
            self._show(file["file_name"], file["downloaded_bytes"], file["size_bytes"])

    def _show(self, name: str, done: int, size: int) -> None:
        task = self._files.get(name)
        if 0 < done < size:
            if task is None:
                task = self._bars.add_task(f"  {name}", total=size, amount="")
                self._files[name] = task
            self._bars.update(task, completed=done, amount=_amount(done, size))
        elif task is not None:
            self._bars.remove_task(self._files.pop(name))


class _StageLines:
    """A line per stage and per file, for logs."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._stage = ""
        self._arrived: set[str] = set()

    def __call__(
        self, stage: str, fraction: float, files: Sequence[Mapping[str, Any]] = ()
    ) -> None:
        if stage != self._stage:
            self._stage = stage
            say(f"{self._title}: {stage}")
        for file in files:
            name, size = file["file_name"], file["size_bytes"]
            if file["downloaded_bytes"] == size and name not in self._arrived:
                self._arrived.add(name)
                say(f"{self._title}: {name}, {size_of(size)}")


def size_of(num_bytes: int) -> str:
    """Return a number of bytes as people read it: "512 B", "1.5 GB"."""
    size = float(num_bytes)
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} GB"


def _amount(done: int, size: int) -> str:
    return f"{size_of(done)} of {size_of(size)}"


def _amount_of_all(files: Sequence[Mapping[str, Any]]) -> str:
    if not files:
        return ""
    done = sum(file["downloaded_bytes"] for file in files)
    return _amount(done, sum(file["size_bytes"] for file in files))
