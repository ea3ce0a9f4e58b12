# SPDX-License-Identifier: Apache-2.0
"""The table of long runs: rows are added up, renewed, and otherwise left alone."""

import pytest

from tests.long_runs import HEADER, PAGE, LongRuns, with_rows

PAGE_BEFORE = f"""# Title

{HEADER}
|---|
| a run | old |
| c run | old |

After.
"""


def report(name: str, *, outcome: str = "passed", **counted: float) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid="test",
        location=("test", 0, "test"),
        keywords={},
        outcome=outcome,  # type: ignore[arg-type]
        longrepr=None,
        when="call",
        duration=2.0,
        user_properties=[("long_run", {"name": name, "counted": counted})],
    )


def test_rows_of_what_ran_are_renewed_and_others_stay() -> None:
    page = with_rows(PAGE_BEFORE, {"b run": "| b run | new |", "c run": "| c run | new |"})

    rows = "| a run | old |\n| b run | new |\n| c run | new |"
    assert page == PAGE_BEFORE.replace("| a run | old |\n| c run | old |", rows)


def test_the_tests_of_a_run_are_added_up() -> None:
    runs = LongRuns()
    runs.pytest_runtest_logreport(report("r", steps=1000, smallest_margin=0.5, largest_gap=1))
    runs.pytest_runtest_logreport(report("r", steps=234, smallest_margin=0.25, largest_gap=7))

    row = runs._runs["r"].row("r", date="2026-01-02", commit="abc")

    assert row == (
        "| r | 1,234 steps, smallest margin 0.25, 7 largest gap | 2 | 4 | passed "
        "| 2026-01-02 | abc |"
    )


def test_a_run_with_a_failure_says_so() -> None:
    runs = LongRuns()
    runs.pytest_runtest_logreport(report("r", steps=1))
    runs.pytest_runtest_logreport(report("r", outcome="failed", steps=1))

    assert "| 1 FAILED |" in runs._runs["r"].row("r", date="", commit="")


def test_the_page_has_a_table_to_write_to() -> None:
    assert with_rows(PAGE.read_text(), {}) == PAGE.read_text()
