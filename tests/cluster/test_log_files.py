# SPDX-License-Identifier: Apache-2.0
"""The log files of a host: their last lines, what came since, and what lies outside the folder."""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from xinference.cluster import log_files
from xinference.cluster.log_files import read_logs
from xinference.identifiers import ModelUid, NodeId
from xinference.protocol.logs import LogLine, LogPosition, LogQuery

NODE = NodeId("10.0.0.2:7000")
QWEN = LogQuery(model=ModelUid("qwen"))


def line(number: int, text: str = "", level: str = "INFO") -> str:
    seconds, ms = divmod(number, 1000)
    when = f"2026-11-21 10:{seconds // 60:02}:{seconds % 60:02},{ms:03}"
    return f"{when} {level} a.b: {text or number}\n"


@pytest.fixture
def logs(tmp_path: Path) -> Path:
    (tmp_path / "logs").mkdir()
    return tmp_path / "logs"


def read(
    logs: Path, query: LogQuery = QWEN, positions: list[LogPosition] | None = None
) -> tuple[list[str], list[LogPosition]]:
    given = None if positions is None else tuple(positions)
    lines, after = read_logs(logs.parent, replace(query, positions=given), node=NODE)
    return [one.message for one in lines], after


def test_the_last_lines_of_all_replicas_come_by_their_time(logs: Path) -> None:
    (logs / "qwen-rep0.log").write_text(line(1) + line(3) + line(5))
    (logs / "qwen-rep1.log").write_text(line(2) + line(4))
    (logs / "qwen2-rep0.log").write_text(line(6, "of another model"))

    lines, _ = read_logs(logs.parent, replace(QWEN, num_lines=3), node=NODE)

    assert [(one.message, one.replica, one.node) for one in lines] == [
        ("3", "qwen-rep0", NODE),
        ("4", "qwen-rep1", NODE),
        ("5", "qwen-rep0", NODE),
    ]
    assert read(logs, replace(QWEN, replica=1))[0] == ["2", "4"]
    assert read(logs, replace(QWEN, num_lines=0))[0] == []


def test_only_the_level_that_is_wanted_counts(logs: Path) -> None:
    told = "".join(line(n, level="ERROR" if n == 7 else "INFO") for n in range(4000))
    (logs / "qwen-rep0.log").write_text(told)

    assert read(logs, replace(QWEN, level="WARNING", num_lines=5))[0] == ["7"]


def test_what_comes_later_comes_once_and_half_a_line_waits(logs: Path) -> None:
    path = logs / "qwen-rep0.log"
    path.write_text(line(1))
    _, positions = read(logs)

    with path.open("a") as file:
        file.write(line(2) + line(3)[:10])
    first, positions = read(logs, positions=positions)
    with path.open("a") as file:
        file.write(line(3)[10:])
    second, positions = read(logs, positions=positions)

    assert (first, second) == (["2"], ["3"])
    assert read(logs, positions=positions)[0] == []


def test_a_traceback_that_comes_in_two_looks_keeps_its_level(logs: Path) -> None:
    path = logs / "qwen-rep0.log"
    path.write_text(line(1, "it failed", level="ERROR"))
    _, positions = read(logs)
    with path.open("a") as file:
        file.write("Traceback of it\n")

    assert read(logs, replace(QWEN, level="ERROR"), positions)[0] == ["Traceback of it"]


def test_a_replica_that_is_new_is_read_from_its_beginning(logs: Path) -> None:
    (logs / "qwen-rep0.log").write_text(line(1))
    _, positions = read(logs)
    (logs / "qwen-rep1.log").write_text(line(2) + line(3))

    told, positions = read(logs, positions=positions)

    assert told == ["2", "3"]
    assert {one.name for one in positions} == {"qwen-rep0.log", "qwen-rep1.log"}


def test_nothing_is_lost_where_a_file_was_put_aside(logs: Path) -> None:
    path = logs / "qwen-rep0.log"
    path.write_text(line(1))
    _, positions = read(logs)
    with path.open("a") as file:
        file.write(line(2))
    path.replace(logs / "qwen-rep0.log.1")
    path.write_text(line(3))

    told: list[str] = []
    for _ in range(3):
        lines, positions = read(logs, positions=positions)
        told += lines

    assert told == ["2", "3"]
    assert read(logs)[0] == ["1", "2", "3"]  # the last lines go back into it, too


def test_much_at_once_comes_in_parts(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "MAX_BATCH_BYTES", 1000)
    monkeypatch.setattr(log_files, "MAX_LOOK_BYTES", 1500)
    for replica in range(3):
        (logs / f"qwen-rep{replica}.log").write_text("")
    _, positions = read(logs)
    for replica in range(3):
        text = "".join(line(n, f"{replica}.{n}") for n in range(200))
        (logs / f"qwen-rep{replica}.log").write_text(text + "y" * 5000 + "\n")

    told: list[str] = []
    looks = 0
    while looks < 200:
        lines, positions = read(logs, positions=positions)
        if not lines:
            break
        told += lines
        looks += 1

    heads = [one for one in told if "." in one[:3]]
    assert sorted(one.partition("\n")[0] for one in heads) == sorted(
        f"{replica}.{n}" for replica in range(3) for n in range(200)
    )
    assert sum(one.count("y") for one in told) == 15000
    assert looks > 10


def test_the_end_of_a_long_log_is_found_without_reading_all_of_it(
    logs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_files, "SCAN_BYTES", (500, 2000))
    text = "".join(line(n) for n in range(1000))
    (logs / "qwen-rep0.log").write_text(text)

    assert read(logs, replace(QWEN, num_lines=3))[0] == ["997", "998", "999"]
    assert 20 < len(read(logs, replace(QWEN, num_lines=500))[0]) < 100


def test_the_hosts_own_log_is_that_of_its_processes_and_downloads(logs: Path) -> None:
    (logs / "xinference.log").write_text(
        "2026-11-21 10:00:00,001 INFO worker[7] xinference.cluster.worker: joined\n"
    )
    (logs / "downloads.log").write_text(line(2, "downloaded"))
    (logs / "qwen-rep0.log").write_text(line(3))

    lines, _ = read_logs(logs.parent, LogQuery(node=NODE), node=NODE)

    assert [(one.message, one.process, one.replica) for one in lines] == [
        ("joined", "worker[7]", None),
        ("downloaded", "", None),
    ]


@pytest.mark.parametrize(
    "model", ["../secret", "..", "/etc/passwd", "qwen/../../secret", "xinference", "*", "qwen-rep0"]
)
def test_no_name_leads_out_of_the_folder(logs: Path, model: str) -> None:
    (logs.parent / "secret-rep0.log").write_text(line(1, "secret"))
    (logs / "xinference.log").write_text(line(1, "of the host"))
    (logs / "qwen-rep0.log").write_text(line(2))
    position = LogPosition(node=NODE, name=f"{model}-rep0.log", inode=0, offset=0)

    assert read(logs, LogQuery(model=ModelUid(model))) == ([], [])
    assert read(logs, LogQuery(model=ModelUid(model)), [position]) == ([], [])


def test_links_and_pipes_in_the_folder_are_not_read(logs: Path) -> None:
    (logs.parent / "secret").write_text(line(1, "secret"))
    (logs / "qwen-rep0.log").symlink_to(logs.parent / "secret")
    os.mkfifo(logs / "qwen-rep1.log")
    (logs / "qwen-rep2.log").mkdir()

    assert read(logs) == ([], [])


def test_a_host_without_logs_has_none(tmp_path: Path) -> None:
    assert read_logs(tmp_path, QWEN, node=NODE) == ([], [])


def test_bytes_that_are_no_text_are_shown_as_such(logs: Path) -> None:
    (logs / "qwen-rep0.log").write_bytes(line(1, "a").encode() + b"\xff\xfe\r\n")

    (told,) = read(logs)[0]

    assert told.startswith("a\n�")


def test_lines_without_end_are_cut(logs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log_files, "MAX_BATCH_BYTES", 100)
    path = logs / "qwen-rep0.log"
    path.write_text("")
    _, positions = read(logs)
    path.write_text("x" * 250)

    lines: list[LogLine | str] = []
    for _ in range(3):
        told, positions = read(logs, positions=positions)
        lines += told

    assert lines == ["x" * 100, "x" * 100]
