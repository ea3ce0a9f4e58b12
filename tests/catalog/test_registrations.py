# SPDX-License-Identifier: Apache-2.0
"""Files of registrations: whole or absent, private, and nothing else is touched."""

import subprocess
import sys
from pathlib import Path

import pytest

from xinference.catalog.registrations import Registrations
from xinference.errors import InsufficientResources

SAVES_FOREVER = """
import sys
from pathlib import Path
from xinference.catalog.registrations import Registrations
registrations = Registrations(Path(sys.argv[1]))
for round in range(10_000_000):
    registrations.save("mine", str(round % 10) * 100_000)
    print(round, flush=True)
"""


def names_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    registrations = Registrations(tmp_path / "llm")

    registrations.save("b", "two")
    registrations.save("a", "eins – 一")

    assert list(Registrations(tmp_path / "llm").load()) == [("a", "eins – 一"), ("b", "two")]
    assert registrations.path_of("a").stat().st_mode & 0o777 == 0o600


def test_saving_again_replaces_the_document(tmp_path: Path) -> None:
    registrations = Registrations(tmp_path)

    registrations.save("a", "old")
    registrations.save("a", "new")

    assert [text for _, text in registrations.load()] == ["new"]
    assert names_in(tmp_path) == ["a.json"]


def test_a_directory_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert list(Registrations(tmp_path / "none").load()) == []
    assert not (tmp_path / "none").exists()


def test_removing_takes_the_one_file_and_may_be_repeated(tmp_path: Path) -> None:
    registrations = Registrations(tmp_path)
    registrations.save("a", "one")
    registrations.save("b", "two")

    registrations.remove("a")
    registrations.remove("a")

    assert names_in(tmp_path) == ["b.json"]


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    outside = tmp_path / "outside.json"
    outside.write_text("keep")
    directory = tmp_path / "llm"
    directory.mkdir()
    (directory / "a.json").symlink_to(outside)
    registrations = Registrations(directory)

    [(name, text)] = registrations.load()
    registrations.remove(name)

    assert text == "keep"
    assert outside.exists()
    assert names_in(directory) == []


def test_a_directory_that_cannot_be_made_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("a file in the way")

    with pytest.raises(InsufficientResources) as caught:
        Registrations(tmp_path / "model" / "llm").save("a", "one")

    assert str(tmp_path / "model" / "llm" / "a.json") in str(caught.value)


def test_a_disk_that_fills_up_leaves_the_old_document_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registrations = Registrations(tmp_path)
    registrations.save("a", "old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InsufficientResources, match="No space left"):
        registrations.save("a", "new")

    assert [text for _, text in registrations.load()] == ["old"]
    assert names_in(tmp_path) == ["a.json"]


def test_an_unreadable_file_is_skipped_and_left(tmp_path: Path) -> None:
    (tmp_path / "broken.json").write_bytes(b"\xff\xfe")
    (tmp_path / "folder.json").mkdir()
    registrations = Registrations(tmp_path)
    registrations.save("a", "one")

    assert [text for _, text in registrations.load()] == ["one"]
    assert names_in(tmp_path) == ["a.json", "broken.json", "folder.json"]


@pytest.mark.parametrize("num_saves", [1, 7])
def test_a_killed_process_leaves_a_whole_document(tmp_path: Path, num_saves: int) -> None:
    saver = subprocess.Popen(
        [sys.executable, "-c", SAVES_FOREVER, str(tmp_path)], stdout=subprocess.PIPE
    )
    assert saver.stdout is not None
    for _ in range(num_saves):
        saver.stdout.readline()
    saver.kill()
    saver.wait(timeout=30)
    saver.stdout.close()

    [(_, text)] = Registrations(tmp_path).load()

    assert len(text) == 100_000
    assert len(set(text)) == 1
    assert names_in(tmp_path) == ["mine.json"]
