# SPDX-License-Identifier: Apache-2.0
"""The page `doc/operations/faults.md`: what became of users and of the cluster at each fault.

A test that lets a fault happen takes the fixture `record_fault` and tells what was seen:

    record_fault(outcome)

Under `--long` each becomes a row of the page; rows of tests that did not run stay as they are. With
`--repeats 20` each such test runs so often, and its row has the worst of each time, and the sums;
one that failed once leaves its row as it was. Rows of the matrix that are proven by other tests, or
cannot be run here, are told below.
"""

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Self

import pytest

from tests.faults.other_rows import NOT_RUN, PROVEN_ALONE
from tests.long_runs import ROOT, commit_of

PAGE = ROOT / "doc" / "operations" / "faults.md"

COLUMNS = (
    "row",
    "fault",
    "detected",
    "first good",
    "whole",
    "slowest",
    "requests",
    "failed",
    "retried",
    "continued",
    "hung",
    "wrong",
    "processes, files left",
    "memory, descriptors grown",
    "date",
    "commit",
)

_WORST = (
    "detected_seconds",
    "good_seconds",
    "whole_seconds",
    "slowest_seconds",
    "mib_grown",
    "descriptors_grown",
)
_SUMS = (
    "num_requests",
    "num_retried",
    "num_continued",
    "num_hung",
    "num_wrong",
    "processes_left",
    "files_left",
)
_PROPERTY = "fault"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What was seen of one fault. Times are seconds from the fault; None: does not apply."""

    row: str
    """Its numbers in the matrix."""
    fault: str
    detected_seconds: float | None = None
    detected_within: float | None = None
    good_seconds: float | None = None
    good_within: float | None = None
    whole_seconds: float | None = None
    whole_within: float | None = None
    slowest_seconds: float | None = None
    """Of all good answers, those that waited for the fault to be noticed among them."""
    num_requests: int = 0
    failed: dict[str, int]
    num_retried: int = 0
    num_continued: int = 0
    num_hung: int = 0
    num_wrong: int = 0
    processes_left: int = 0
    files_left: int = 0
    mib_grown: float | None = None
    """Of the processes that lived through it."""
    descriptors_grown: int | None = None
    """Of the same."""
    note: str = ""
    num_runs: int = 1

    @classmethod
    def of_all(cls, outcomes: Sequence[Self]) -> Self:
        """Return the worst that was seen of one row, and how much in all; told as the last was."""
        failed: Counter[str] = sum((Counter(one.failed) for one in outcomes), Counter())
        return replace(
            outcomes[-1],
            num_runs=len(outcomes),
            failed=dict(failed),
            **{name: _largest(outcomes, name) for name in _WORST},
            **{name: sum(getattr(one, name) for one in outcomes) for name in _SUMS},
        )

    def is_within_bounds(self, slack: float = 1.0) -> bool:
        """Return whether all that has a bound kept so many times it."""
        return all(
            seen is None or within is None or seen <= within * slack
            for seen, within in (
                (self.detected_seconds, self.detected_within),
                (self.good_seconds, self.good_within),
                (self.whole_seconds, self.whole_within),
            )
        )

    def line(self, *, date: str, commit: str) -> str:
        """Return the row of the table."""
        grown = "–"
        if self.mib_grown is not None:
            grown = f"{self.mib_grown:+.1f} MiB, {self.descriptors_grown:+d}"
        cells = (
            self.row,
            self.fault
            + (f"; {self.note}" if self.note else "")
            + (f"; the worst of {self.num_runs} runs" if self.num_runs > 1 else ""),
            _seconds(self.detected_seconds, self.detected_within),
            _seconds(self.good_seconds, self.good_within),
            _seconds(self.whole_seconds, self.whole_within),
            _seconds(self.slowest_seconds, None),
            self.num_requests,
            ", ".join(f"{count} × `{code}`" for code, count in self.failed.items()) or "0",
            self.num_retried,
            self.num_continued,
            self.num_hung,
            self.num_wrong,
            f"{self.processes_left}, {self.files_left}",
            grown,
            date,
            commit,
        )
        return "| " + " | ".join(map(str, cells)) + " |"


RecordFault = Callable[[Outcome], None]


def recorder(request: pytest.FixtureRequest) -> RecordFault:
    """Return what a test calls for each row; the fixture `record_fault` is it."""

    def record(outcome: Outcome) -> None:
        told = {one.name: getattr(outcome, one.name) for one in fields(outcome)}
        request.node.user_properties.append((_PROPERTY, told))
        print(outcome.line(date="", commit=""))  # noqa: T201  # shown when a test fails

    return record


class FaultTable:
    """A pytest plugin: gathers what passed, and writes the page when all have run.

    With xdist it lives in the process that hears the workers' reports.
    """

    def __init__(self) -> None:
        self._outcomes: list[tuple[str, Outcome]] = []
        """With the test, whichever of its repeats it was."""
        self._failed: set[str] = set()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Take what a test recorded that passed."""
        test = re.sub(r"[\[-]\d+\]$", "", report.nodeid)
        if report.failed:
            self._failed.add(test)
        elif report.when == "call":
            for key, told in report.user_properties:
                if key == _PROPERTY:
                    assert isinstance(told, dict)
                    self._outcomes.append((test, Outcome(**told)))

    def pytest_sessionfinish(self) -> None:
        """Put the rows into the page."""
        if self._outcomes:
            date, commit = time.strftime("%Y-%m-%d"), commit_of(besides=PAGE)
            known = rows_of(PAGE)
            runs: defaultdict[str, list[Outcome]] = defaultdict(list)
            for test, one in self._outcomes:
                # Why none of them then: the row would be of the runs that went well.
                if test not in self._failed:
                    runs[one.row].append(one)
            known |= {
                row: Outcome.of_all(outcomes).line(date=date, commit=commit)
                for row, outcomes in runs.items()
            }
            PAGE.write_text(page(known))


def rows_of(path: Path) -> dict[str, str]:
    """Return the measured rows of a page, by their numbers."""
    found = [
        line
        for line in (path.read_text().splitlines() if path.exists() else [])
        if re.match(r"\| [FS]\d\d", line) and line.count(" | ") == len(COLUMNS) - 1
    ]
    return {line.split("|")[1].strip(): line for line in found}


def page(rows: dict[str, str]) -> str:
    """Return the page with these measured rows."""
    told_elsewhere = [f"| {row} | {what} | {test} |" for row, what, test in ELSEWHERE]
    refused = [f"| {row} | {what} | {why} |" for row, what, why in REFUSED]
    return "\n".join(
        [
            HEAD,
            _header(COLUMNS),
            *(rows[name] for name in sorted(rows)),
            "\n## By other tests\n",
            _header(("row", "fault", "test, with its bound")),
            *told_elsewhere,
            *(["\n## Not run\n", _header(("row", "fault", "why"))] if refused else []),
            *refused,
            "",
        ]
    )


def numbers_in(text: str) -> set[str]:
    """Return the numbers of rows that a text names; "F31-F33" names three."""
    found = set()
    for first, last in re.findall(r"\b([FS]\d\d)(?:-([FS]\d\d))?", text):
        for number in range(int(first[1:]), int((last or first)[1:]) + 1):
            found.add(f"{first[0]}{number:02}")
    return found


def _largest(outcomes: Sequence[Outcome], name: str) -> Any:
    """Return the largest of one number; None if it applies to none."""
    return max((seen for one in outcomes if (seen := getattr(one, name)) is not None), default=None)


def _header(columns: tuple[str, ...]) -> str:
    return f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}"


def _seconds(seen: float | None, within: float | None) -> str:
    if seen is None:
        return "–"
    return f"{seen:.2f}" + ("" if within is None else f" (≤ {within:g})")


HEAD = """# Faults, and what users notice of them

Written by `pytest tests/faults --long`: real processes on one machine, two replicas of a model that
counts (2 ms a token, loads at once) unless the row says otherwise, 25 requests a second of 40
tokens, half of them streamed. Times are seconds from the fault, in brackets the bound that the test
asserts. *Detected* is when the platform first shows it: a gateway ejects a replica, the supervisor
reports a replica or a worker otherwise, the guardian logs a death. *First good* is the first answer
to a request that was sent after the fault, *whole* when all replicas are ready again. *Slowest* is
the answer that took longest, of those that ran at the fault and all after it. *Failed* is the
errors that users got, by code: 503 with `Retry-After` while nothing was there to serve them.
*Retried* and *continued* are requests that were sent again, and streams that went on at another
replica; nobody noticed. *Left* is what is there in the end and was not before, *grown* is of the
processes that lived through it.

## Measured
"""

ELSEWHERE: tuple[tuple[str, str, str], ...] = (
    (
        "F07",
        "the engine's thread dies, its process does not",
        "`tests/cluster/test_replica_threads.py`: the process ends, and is started again",
    ),
    (
        "F22",
        "one of two gateways is killed, as callers by HTTP see it",
        "`tests/e2e/test_gateway_processes.py`: the other serves meanwhile",
    ),
    (
        "F26",
        "a client leaves a streamed request or a whole one, by HTTP, on a real engine",
        "`tests/e2e/test_abort.py`: ended within one step; `tests/api/test_disconnect.py`",
    ),
    *PROVEN_ALONE,
)

REFUSED: tuple[tuple[str, str, str], ...] = (*NOT_RUN,)
