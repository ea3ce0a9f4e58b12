# SPDX-License-Identifier: Apache-2.0
"""The page of faults tells of every row, and of nothing that is not there."""

import re

from tests.faults.table import ELSEWHERE, PAGE, Outcome, numbers_in, page, rows_of
from tests.long_runs import ROOT

NUMBERS = [f"F{number:02}" for number in range(1, 47)] + [f"S{number:02}" for number in range(1, 7)]


def test_every_row_of_the_matrix_is_told() -> None:
    told = numbers_in(" ".join(line.split("|")[1] for line in lines_of(PAGE.read_text())))

    assert [number for number in NUMBERS if number not in told] == []


def test_the_page_is_as_it_would_be_written() -> None:
    assert PAGE.read_text() == page(rows_of(PAGE))


def test_tests_that_are_named_exist() -> None:
    for _, _, text in ELSEWHERE:
        for path, _, name in re.findall(r"(tests/[\w/]+\.py)(::(\w+))?", text):
            assert not name or f"def {name}(" in (ROOT / path).read_text()
            assert (ROOT / path).exists()


def test_a_new_row_replaces_the_old_one_and_the_others_stay() -> None:
    rows = {
        name: Outcome(row=name, fault="old", failed={}).line(date="", commit="")
        for name in ("F01", "F02, F03")
    }
    new = Outcome(row="F01", fault="new", failed={"model_not_ready": 3}).line(date="", commit="")

    lines = lines_of(page(rows | {"F01": new}))

    assert [line for line in lines if "| old |" in line] == [rows["F02, F03"]]
    assert [line for line in lines if "| new |" in line] == [new]
    assert "3 × `model_not_ready`" in new


def test_of_several_runs_the_worst_is_told_and_what_there_was_in_all() -> None:
    runs = [
        Outcome(row="F01", fault="a fault", good_seconds=1.0, failed={"a": 1}, num_requests=10),
        Outcome(row="F01", fault="a fault", good_seconds=2.0, failed={"a": 1, "b": 2}),
        Outcome(row="F01", fault="a fault", failed={}, num_requests=5, num_hung=1),
    ]

    worst = Outcome.of_all(runs)

    assert (worst.good_seconds, worst.whole_seconds) == (2.0, None)
    assert (worst.failed, worst.num_requests, worst.num_hung) == ({"a": 2, "b": 2}, 15, 1)
    assert "the worst of 3 runs" in worst.line(date="", commit="")


def lines_of(text: str) -> list[str]:
    return [line for line in text.splitlines() if re.match(r"\| [FS]\d\d", line)]
