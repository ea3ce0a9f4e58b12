# SPDX-License-Identifier: Apache-2.0
"""The table of the long runs: what ran, how much of it, how it ended, when, on which commit.

A test that counts takes the fixture `record_long_run` and tells what it did:

    record_long_run("Engine histories", steps=812, requests=96, smallest_margin=0.0031)

Under `--long` the counts of all tests of one name become one row of `doc/experiments/long-runs.md`:
added up, but for `smallest_…` and `largest_…`. Rows of runs that did not run stay as they are.
"""

import subprocess
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "doc" / "experiments" / "long-runs.md"
HEADER = "| run | counted | tests | seconds | result | date | commit |"

Number = int | float
RecordLongRun = Callable[..., None]
"""Called with the name of the run and what was counted, by keyword."""

_PROPERTY = "long_run"


def recorder(request: pytest.FixtureRequest) -> RecordLongRun:
    """Return what a test calls, at most once; the fixture `record_long_run` is it."""

    def record(name: str, **counted: Number) -> None:
        request.node.user_properties.append((_PROPERTY, {"name": name, "counted": counted}))

    return record


@dataclass
class _Run:
    counted: dict[str, Number] = field(default_factory=dict)
    num_tests: int = 0
    num_failed: int = 0
    seconds: float = 0.0

    def add(self, counted: dict[str, Number], *, seconds: float, has_failed: bool) -> None:
        """Add one test."""
        for what, number in counted.items():
            known = self.counted.get(what)
            if known is None:
                self.counted[what] = number
            elif what.startswith("smallest_"):
                self.counted[what] = min(known, number)
            elif what.startswith("largest_"):
                self.counted[what] = max(known, number)
            else:
                self.counted[what] = known + number
        self.num_tests += 1
        self.num_failed += has_failed
        self.seconds += seconds

    def row(self, name: str, *, date: str, commit: str) -> str:
        """Return the line of the table."""
        counted = ", ".join(_phrase(what, number) for what, number in self.counted.items())
        result = f"{self.num_failed} FAILED" if self.num_failed else "passed"
        cells = (name, counted, self.num_tests, f"{self.seconds:.0f}", result, date, commit)
        return "| " + " | ".join(map(str, cells)) + " |"


class LongRuns:
    """A pytest plugin: gathers what the tests recorded, and writes it when all have run.

    With xdist it lives in the process that hears the workers' reports.
    """

    def __init__(self) -> None:
        self._runs: defaultdict[str, _Run] = defaultdict(_Run)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test recorded."""
        if report.when == "call":
            for key, recorded in report.user_properties:
                if key == _PROPERTY:
                    assert isinstance(recorded, dict)
                    self._runs[recorded["name"]].add(
                        recorded["counted"], seconds=report.duration, has_failed=report.failed
                    )

    def pytest_sessionfinish(self) -> None:
        """Put the rows into the page."""
        if self._runs:
            date, commit = time.strftime("%Y-%m-%d"), commit_of(besides=PAGE)
            rows = {
                name: run.row(name, date=date, commit=commit) for name, run in self._runs.items()
            }
            PAGE.write_text(with_rows(PAGE.read_text(), rows))


def with_rows(page: str, rows: dict[str, str]) -> str:
    """Return the page with these rows, by name of the run, in its table; the others stay."""
    before, header, after = page.partition(f"{HEADER}\n")
    assert header, "the page has no table of runs"
    lines = after.split("\n")
    num_lines = next(index for index, line in enumerate(lines) if not line.startswith("|"))
    rule, *old = lines[:num_lines]
    known = {row.split("|")[1].strip(): row for row in old} | rows
    table = [rule, *(known[name] for name in sorted(known))]
    return before + header + "\n".join(table + lines[num_lines:])


def _phrase(what: str, number: Number) -> str:
    words = what.replace("_", " ")
    if isinstance(number, float):
        return f"{words} {number:.3g}"
    return f"{number:,} {words}"


def commit_of(*, besides: Path) -> str:
    """Return the commit that ran, with a plus if the tree had more than it, `besides` a page."""

    def git(*command: str) -> str:
        ended = subprocess.run(
            ["git", *command], cwd=ROOT, capture_output=True, text=True, check=False
        )
        return ended.stdout.strip()

    page = f":(exclude){besides.relative_to(ROOT)}"
    others = git("status", "--porcelain", "--untracked-files=no", "--", ".", page)
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("+" if others else "")
