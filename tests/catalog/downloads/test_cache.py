# SPDX-License-Identifier: Apache-2.0
"""What a host keeps: listed and counted as it is on disk, removed without a trace and no more."""

import os
from pathlib import Path

import pytest

from tests.catalog.downloads.conftest import MODEL_ID, WEIGHTS, Host, files, request
from tests.fakes.hub import FakeHub
from xinference.errors import CacheInUse, DownloadFailed, InvalidRequest, ObjectNotFound
from xinference.protocol.downloads import HubSource

VERSION = request().model_version


def on_disk(directory: Path) -> int:
    """Return the bytes that the files of a directory take, by the file system's own account."""
    return sum(path.lstat().st_blocks * 512 for path in directory.rglob("*") if path.is_file())


def quantization(name: str, other_files: tuple[str, ...] = ()) -> dict[str, object]:
    return {
        "model_version": f"tiny--1B--ggufv2--{name}",
        "sources": (HubSource(hub="huggingface", model_id="owner/gguf"),),
        "patterns": (f"{name}.gguf", *other_files),
        "main_file": f"{name}.gguf",
    }


def test_what_is_kept_is_listed_with_its_size_on_disk(host: Host) -> None:
    path = host.download()

    (kept,) = host.cache.models()

    assert kept.model_version == VERSION
    assert kept.path == str(path)
    assert kept.is_complete
    manifest = path / ".xinference.json"
    assert kept.size_bytes == on_disk(path) - manifest.stat().st_blocks * 512
    assert kept.freed_bytes == kept.size_bytes


def test_nothing_kept_is_an_empty_list(host: Host) -> None:
    assert host.cache.models() == []


def test_a_removed_model_leaves_nothing_and_frees_what_was_said(host: Host) -> None:
    path = host.download()
    (kept,) = host.cache.models()

    removed = host.cache.remove(VERSION)

    assert removed.freed_bytes == kept.freed_bytes > 3_000_000
    assert not path.exists()
    assert host.cache.models() == []


def test_an_interrupted_download_is_listed_and_can_be_removed(host: Host, hub: FakeHub) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 0, 0, 0]
    with pytest.raises(DownloadFailed):
        host.download()
    (kept,) = host.cache.models()
    assert not kept.is_complete
    assert kept.size_bytes > 1_000_000

    host.cache.remove(VERSION)

    assert not list(host.home.rglob("*.part"))
    assert host.cache.models() == []


def test_what_another_variant_needs_stays(host: Host, hub: FakeHub) -> None:
    hub.add("owner/gguf", {"q4.gguf": b"4" * 9000, "q8.gguf": b"8" * 9000, "mm.gguf": b"m" * 9000})
    first = host.download(request(**quantization("q4", ("mm.gguf",))))
    second = host.download(request(**quantization("q8", ("mm.gguf",))))
    one, other = host.cache.models()
    assert [Path(file).name for file in one.files] == ["q4.gguf"]
    assert one.freed_bytes == one.size_bytes // 2
    assert one.path == other.path

    host.cache.remove(one.model_version)

    assert not first.exists()
    assert second.exists()
    assert (second.parent / "mm.gguf").exists()
    assert host.cache.find(request(**quantization("q8", ("mm.gguf",)))) == str(second)


def test_models_that_share_a_repository_are_both_listed(host: Host) -> None:
    host.download()

    host.download(request(model_version="same--1B--pytorch--none", model_name="same"))

    assert [one.model_name for one in host.cache.models()] == ["same", "tiny"]
    assert [one.freed_bytes for one in host.cache.models()] == [0, 0]


def test_a_file_that_has_another_name_elsewhere_frees_nothing(host: Host, tmp_path: Path) -> None:
    path = host.download()
    (before,) = host.cache.models()
    os.link(path / WEIGHTS, tmp_path / "mine.safetensors")
    (kept,) = host.cache.models()
    assert kept.size_bytes == before.size_bytes
    assert kept.freed_bytes < before.freed_bytes - 2_900_000

    removed = host.cache.remove(VERSION)

    assert removed.freed_bytes == kept.freed_bytes
    assert (tmp_path / "mine.safetensors").read_bytes() == files()[WEIGHTS]


def test_a_link_is_removed_and_not_what_it_points_to(host: Host, tmp_path: Path) -> None:
    path = host.download()
    (path / WEIGHTS).rename(tmp_path / "moved")
    (path / WEIGHTS).symlink_to(tmp_path / "moved")
    (kept,) = host.cache.models()
    assert kept.is_complete
    assert kept.freed_bytes < 100_000

    host.cache.remove(VERSION)

    assert (tmp_path / "moved").read_bytes() == files()[WEIGHTS]
    assert not path.exists()


def test_a_directory_that_is_outside_the_home_is_not_emptied(host: Host, tmp_path: Path) -> None:
    path = host.download()
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")

    with pytest.raises(InvalidRequest, match="outside XINFERENCE_HOME"):
        host.cache.remove(VERSION)

    assert (tmp_path / "elsewhere" / WEIGHTS).exists()


def test_files_that_somebody_put_there_stay(host: Host) -> None:
    path = host.download()
    (path / "notes.txt").write_text("mine")

    host.cache.remove(VERSION)

    assert [one.name for one in path.iterdir()] == ["notes.txt"]


def test_what_is_being_downloaded_is_not_removed(host: Host) -> None:
    host.download()
    source = HubSource(hub="huggingface", model_id=MODEL_ID)

    with (
        host.cache.locked(source, waits=False),
        pytest.raises(CacheInUse, match="used by a download"),
    ):
        host.cache.remove(VERSION)


def test_a_version_that_is_not_kept_cannot_be_removed(host: Host) -> None:
    with pytest.raises(ObjectNotFound, match="no cached model nothing"):
        host.cache.remove("nothing")


def test_a_list_that_cannot_be_read_hides_no_other(host: Host) -> None:
    path = host.download()
    broken = path.parent / "broken"
    broken.mkdir()
    (broken / ".xinference.json").write_text("{")

    assert [one.model_version for one in host.cache.models()] == [VERSION]
