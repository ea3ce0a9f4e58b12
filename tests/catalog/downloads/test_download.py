# SPDX-License-Identifier: Apache-2.0
"""A download from a stand-in hub: whole, resumed, checked, refused; and what is kept of it."""

import shutil
import socket
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from tests.catalog.downloads.conftest import (
    MODEL_ID,
    NEEDED,
    WEIGHTS,
    Host,
    files,
    request,
)
from tests.fakes.hub import FakeHub
from xinference.errors import DiskFull, DownloadFailed, DownloadUnavailable, RepositoryNotFound
from xinference.protocol.downloads import HubSource

HUGGING_FACE = HubSource(hub="huggingface", model_id=MODEL_ID)
MODEL_SCOPE = HubSource(hub="modelscope", model_id=MODEL_ID)


def visible(directory: Path) -> dict[str, bytes]:
    """Return what a loader would see."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }


def parts(host: Host) -> list[Path]:
    return list(host.home.rglob("*.part"))


@pytest.mark.parametrize("source", [HUGGING_FACE, MODEL_SCOPE])
def test_the_needed_files_arrive_as_they_are_on_either_hub(
    host: Host, hub: FakeHub, source: HubSource
) -> None:
    path = host.download(request(sources=(source,)))

    assert visible(path) == {name: files()[name] for name in NEEDED}
    assert parts(host) == []


def test_every_file_is_told_of_by_its_bytes_up_to_the_last(host: Host) -> None:
    host.download()

    last = host.told[-1]
    assert {one.file_name: one.downloaded_bytes for one in last.files} == {
        name: len(files()[name]) for name in NEEDED
    }
    assert last.fraction == 1.0
    fractions = [told.fraction for told in host.told]
    assert fractions == sorted(fractions)


def test_what_is_here_is_used_without_asking_a_hub(host: Host, hub: FakeHub) -> None:
    first = host.download()
    hub.faults.status = 500

    assert host.download() == first
    assert len(hub.listed) == 1


def test_a_cut_connection_goes_on_where_it_stopped(host: Host, hub: FakeHub) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 500_000]

    path = host.download(max_attempts=3)

    assert visible(path)[WEIGHTS] == files()[WEIGHTS]
    assert hub.starts_of(WEIGHTS) == [0, 1_000_000, 1_500_000]


def test_a_connection_that_brings_nothing_is_replaced(host: Host, hub: FakeHub) -> None:
    hub.faults.holds[WEIGHTS] = [1_000_000]

    path = host.download(stall_seconds=0.5)

    assert visible(path)[WEIGHTS] == files()[WEIGHTS]
    assert hub.starts_of(WEIGHTS) == [0, 1_000_000]


def test_a_download_that_was_given_up_is_gone_on_with_by_the_next_one(
    host: Host, hub: FakeHub
) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 0, 0, 0]
    with pytest.raises(
        DownloadFailed, match=r"at 1,000,000 of 3,000,000 bytes.*goes on from there"
    ):
        host.download()
    hub.faults.cuts.clear()

    path = host.download()

    assert visible(path)[WEIGHTS] == files()[WEIGHTS]
    assert hub.starts_of(WEIGHTS)[-1] == 1_000_000


def test_a_hub_that_knows_no_ranges_is_read_from_the_start_again(host: Host, hub: FakeHub) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000]
    hub.faults.ignores_ranges = True

    assert visible(host.download())[WEIGHTS] == files()[WEIGHTS]


def test_bytes_that_are_wrong_are_fetched_again(host: Host, hub: FakeHub) -> None:
    hub.faults.corrupts = {WEIGHTS: 1, "config.json": 1}

    path = host.download()

    assert visible(path) == {name: files()[name] for name in NEEDED}
    assert hub.starts_of(WEIGHTS) == [0, 0]
    assert hub.starts_of("config.json") == [0, 0]


def test_bytes_that_stay_wrong_never_get_the_name_of_the_file(host: Host, hub: FakeHub) -> None:
    hub.faults.corrupts[WEIGHTS] = 99

    with pytest.raises(DownloadFailed, match=r"model\.safetensors arrived 2 times.*sha256:"):
        host.download()

    assert not list(host.home.rglob(WEIGHTS))
    (kept,) = host.cache.models()
    assert not kept.is_complete


def test_a_wrong_byte_before_an_interruption_is_found_at_the_end(host: Host, hub: FakeHub) -> None:
    hub.faults.corrupts[WEIGHTS] = 1
    hub.faults.cuts[WEIGHTS] = [1_000_000]

    assert visible(host.download())[WEIGHTS] == files()[WEIGHTS]
    assert hub.starts_of(WEIGHTS) == [0, 1_000_000, 0]


def test_files_larger_than_the_disk_are_refused_before_the_first_byte(
    host: Host, hub: FakeHub
) -> None:
    hub.faults.sizes[WEIGHTS] = 10**18

    with pytest.raises(DiskFull) as caught:
        host.download()

    assert caught.value.required_bytes > 10**18
    assert 0 < caught.value.available_bytes < 10**18
    assert f"{caught.value.available_bytes:,} free" in str(caught.value)
    assert hub.asked == []


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a disk that is full")
def test_a_disk_that_fills_up_meanwhile_is_told_with_both_numbers(host: Host, hub: FakeHub) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 0, 0, 0]
    with pytest.raises(DownloadFailed):
        host.download()
    hub.faults.cuts.clear()
    (part,) = parts(host)
    part.unlink()
    part.symlink_to("/dev/full")

    with pytest.raises(DiskFull) as caught:
        host.download(num_workers=1)

    assert caught.value.required_bytes >= len(files()[WEIGHTS])


def test_offline_takes_what_is_here_and_refuses_the_rest(host: Host, hub: FakeHub) -> None:
    with pytest.raises(DownloadUnavailable, match=r"XINFERENCE_OFFLINE is set.*model_path"):
        host.download(is_offline=True)
    with pytest.raises(DownloadUnavailable, match="HF_HUB_OFFLINE is set"):
        host.download(is_hf_offline=True)
    assert hub.listed == []
    path = host.download()

    assert host.download(is_offline=True) == path


def test_half_a_download_is_nothing_to_use_offline(host: Host, hub: FakeHub) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 0, 0, 0]
    with pytest.raises(DownloadFailed):
        host.download()

    with pytest.raises(DownloadUnavailable):
        host.download(is_offline=True)


def test_of_two_hubs_the_one_that_answers_is_taken(host: Host, hub: FakeHub) -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{nobody.getsockname()[1]}"

        host.download(request(sources=(HUGGING_FACE, MODEL_SCOPE)), hf_endpoint=silent)

    assert hub.listed == [f"modelscope:{MODEL_ID}"]


def test_a_hub_that_does_not_have_the_model_is_passed_over(host: Host, hub: FakeHub) -> None:
    gone = HubSource(hub="huggingface", model_id="owner/gone")

    host.download(request(sources=(gone, MODEL_SCOPE)))

    assert hub.listed == [f"modelscope:{MODEL_ID}"]


def test_the_hub_that_the_settings_name_is_the_only_one(host: Host, hub: FakeHub) -> None:
    gone = HubSource(hub="modelscope", model_id="owner/gone")

    with pytest.raises(DownloadFailed, match="modelscope"):
        host.download(request(sources=(HUGGING_FACE, gone)), model_src="modelscope")
    host.download(request(sources=(HUGGING_FACE,)), model_src="modelscope")

    assert hub.listed == [f"huggingface:{MODEL_ID}"]


def test_a_download_that_has_begun_goes_on_at_its_own_hub(host: Host, hub: FakeHub) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 0, 0, 0]
    with pytest.raises(DownloadFailed):
        host.download(request(sources=(MODEL_SCOPE,)))
    hub.faults.cuts.clear()

    host.download(request(sources=(HUGGING_FACE, MODEL_SCOPE)))

    assert hub.starts_of(WEIGHTS)[-1] == 1_000_000


def test_no_answer_from_any_hub_says_so_of_each(host: Host, hub: FakeHub) -> None:
    hub.faults.status = 503

    with pytest.raises(DownloadFailed, match=r"huggingface does not answer.*modelscope does not"):
        host.download(request(sources=(HUGGING_FACE, MODEL_SCOPE)), max_attempts=1)


def test_a_gated_model_says_what_to_do_and_comes_with_a_token(host: Host, hub: FakeHub) -> None:
    hub.repositories[MODEL_ID].is_gated = True
    with pytest.raises(DownloadFailed, match=r"accepted its terms.*HF_TOKEN"):
        host.download()

    host.download(hf_token="hf_1")

    # Large files are on another host, which is no business of the token.
    tokens = {one.path: one.token for one in hub.asked}
    assert tokens["config.json"] == "Bearer hf_1"
    assert tokens[WEIGHTS] is None


def test_a_model_or_revision_that_does_not_exist_is_told(host: Host) -> None:
    nowhere = HubSource(hub="huggingface", model_id="owner/nowhere")
    late = HubSource(hub="huggingface", model_id=MODEL_ID, revision="v9")

    with pytest.raises(RepositoryNotFound, match="has no owner/nowhere"):
        host.download(request(sources=(nowhere,)))
    with pytest.raises(RepositoryNotFound, match=f"no revision v9 of {MODEL_ID}"):
        host.download(request(sources=(late,)))


def test_what_one_hub_does_not_have_may_be_on_one_that_is_silent(host: Host) -> None:
    sources = tuple(replace(one, model_id="owner/nowhere") for one in (HUGGING_FACE, MODEL_SCOPE))
    with pytest.raises(RepositoryNotFound, match=r"huggingface: .* modelscope: "):
        host.download(request(sources=sources))

    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        silent = f"http://127.0.0.1:{nobody.getsockname()[1]}"
        with pytest.raises(DownloadFailed, match="huggingface does not answer") as failed:
            host.download(request(sources=sources), hf_endpoint=silent, max_attempts=1)

    assert failed.type is DownloadFailed


def test_revisions_lie_apart(host: Host) -> None:
    tagged = HubSource(hub="huggingface", model_id=MODEL_ID, revision="v1")

    first, second = host.download(), host.download(request(sources=(tagged,)))

    assert first != second
    assert visible(first) == visible(second)


def test_a_mirror_that_lists_names_alone_is_asked_for_each_file(host: Host, hub: FakeHub) -> None:
    hub.repositories[MODEL_ID].tells_sizes = False
    hub.faults.corrupts[WEIGHTS] = 1

    path = host.download()

    assert visible(path) == {name: files()[name] for name in NEEDED}
    assert hub.starts_of(WEIGHTS) == [0, 0]


def test_an_interrupted_download_of_a_changed_repository_mixes_nothing(
    host: Host, hub: FakeHub
) -> None:
    hub.faults.cuts[WEIGHTS] = [1_000_000, 0, 0, 0]
    with pytest.raises(DownloadFailed):
        host.download()
    hub.faults.cuts.clear()
    newer = {**files(), WEIGHTS: files()[WEIGHTS][::-1], "config.json": b'{"model_type": "gpt2"}'}
    hub.add(MODEL_ID, newer)

    path = host.download()

    assert visible(path) == {name: newer[name] for name in NEEDED}
    assert parts(host) == []


def test_two_downloads_of_one_model_at_once_are_one(host: Host, hub: FakeHub) -> None:
    hub.faults.holds[WEIGHTS] = [1000]
    other = Host(host.home, host.settings)
    first = threading.Thread(target=host.download)
    first.start()
    hub.wait_held()
    second = threading.Thread(target=other.download)
    second.start()
    waited = threading.Event()
    while not waited.wait(0.01) and second.is_alive():
        if any("waiting" in told.info for told in other.told):
            waited.set()

    hub.release()
    first.join(30)
    second.join(30)

    assert other.cache.find(request()) is not None
    assert hub.starts_of(WEIGHTS) == [0]


def test_one_file_of_a_repository_of_quantizations_is_the_path(host: Host, hub: FakeHub) -> None:
    names = {f"m-{one}.gguf": bytes([number]) * 5000 for number, one in enumerate(("q4", "q8"))}
    hub.add("owner/gguf", {**names, "config.json": b"{}"})
    source = HubSource(hub="huggingface", model_id="owner/gguf")

    path = host.download(request(sources=(source,), patterns=("m-q8.gguf",), main_file="m-q8.gguf"))

    assert path.name == "m-q8.gguf"
    assert set(visible(path.parent)) == {"m-q8.gguf"}


def test_a_file_that_is_missing_afterwards_is_fetched_again(host: Host, hub: FakeHub) -> None:
    path = host.download()
    (path / "config.json").unlink()

    host.download()

    assert hub.starts_of("config.json") == [0, 0]
    assert hub.starts_of(WEIGHTS) == [0]


def test_the_directory_moved_to_another_disk_by_a_link_still_counts(
    host: Host, tmp_path: Path, hub: FakeHub
) -> None:
    path = host.download()
    shutil.move(path, tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    hub.faults.status = 500

    assert host.download() == path
