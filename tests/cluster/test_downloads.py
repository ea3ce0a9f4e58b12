# SPDX-License-Identifier: Apache-2.0
"""Downloads of a worker: one process however many wait, gone as soon as nobody does."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import psutil
import pytest

from tests.catalog.downloads.conftest import MODEL_ID, WEIGHTS, files, request
from tests.fakes.hub import FakeHub, serving
from xinference.cluster.downloads import Downloads
from xinference.errors import DownloadFailed, DownloadUnavailable
from xinference.protocol.downloads import DownloadProgress, HubSource
from xinference.settings import DownloadSettings

TIMEOUT_SECONDS = 30.0


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as served:
        served.add(MODEL_ID, files())
        yield served


@pytest.fixture
async def downloads(hub: FakeHub, tmp_path: Path) -> AsyncIterator[Downloads]:
    settings = DownloadSettings(hf_endpoint=hub.endpoint, max_attempts=1)
    downloads = Downloads(home=tmp_path, settings=settings)
    yield downloads
    await downloads.close()
    assert downloads.pids == []


def ignore(progress: DownloadProgress) -> None:
    """Take it as read."""


async def held(hub: FakeHub) -> None:
    """Return when a download waits for its next byte."""
    await asyncio.to_thread(hub.wait_held)


async def test_a_download_ends_with_the_path_and_has_told_of_each_file(
    downloads: Downloads,
) -> None:
    told: list[DownloadProgress] = []

    path = await downloads.fetch(request(), told.append)

    assert (Path(path) / WEIGHTS).read_bytes() == files()[WEIGHTS]
    assert told[-1].fraction == 1.0
    assert {one.file_name for one in told[-1].files} >= {WEIGHTS, "config.json"}


async def test_what_is_here_needs_no_process_and_tells_nothing(
    downloads: Downloads, hub: FakeHub
) -> None:
    path = await downloads.fetch(request(), ignore)
    hub.faults.status = 500

    def refuse(progress: DownloadProgress) -> None:
        raise AssertionError("nothing is downloaded")

    assert await downloads.fetch(request(), refuse) == path


async def test_two_that_want_the_same_share_one_process(downloads: Downloads, hub: FakeHub) -> None:
    hub.faults.holds[WEIGHTS] = [1000]
    first = asyncio.create_task(downloads.fetch(request(), ignore))
    await held(hub)
    told = asyncio.Event()
    second = asyncio.create_task(downloads.fetch(request(), lambda _: told.set()))
    await asyncio.wait_for(told.wait(), TIMEOUT_SECONDS)
    assert len(downloads.pids) == 1

    hub.release()

    assert await first == await second
    assert hub.starts_of(WEIGHTS) == [0]


async def test_a_cancel_ends_the_process_within_a_second_and_keeps_what_has_arrived(
    downloads: Downloads, hub: FakeHub
) -> None:
    hub.faults.holds[WEIGHTS] = [1_000_000]
    fetching = asyncio.create_task(downloads.fetch(request(), ignore))
    await held(hub)
    (pid,) = downloads.pids
    await wait_for_part(downloads, 1_000_000)
    process = psutil.Process(pid)

    began = time.monotonic()
    fetching.cancel()
    await asyncio.to_thread(process.wait, TIMEOUT_SECONDS)
    seconds = time.monotonic() - began

    assert seconds < 1.0
    hub.release()
    await downloads.fetch(request(), ignore)
    assert hub.starts_of(WEIGHTS) == [0, 1_000_000]


async def test_one_more_than_may_run_at_once_waits_and_says_so(
    hub: FakeHub, tmp_path: Path
) -> None:
    hub.add("owner/other", files())
    other = request(
        model_version="other", sources=(HubSource(hub="huggingface", model_id="owner/other"),)
    )
    settings = DownloadSettings(hf_endpoint=hub.endpoint, max_attempts=1, max_models=1)
    downloads = Downloads(home=tmp_path / "narrow", settings=settings)
    told: list[str] = []
    waits = asyncio.Event()

    def note(progress: DownloadProgress) -> None:
        told.append(progress.info)
        if "waits for other" in progress.info:
            waits.set()

    hub.faults.holds[WEIGHTS] = [1000]
    first = asyncio.create_task(downloads.fetch(request(), ignore))
    await held(hub)
    given_up = asyncio.create_task(downloads.fetch(other, note))
    await asyncio.wait_for(waits.wait(), TIMEOUT_SECONDS)
    assert len(downloads.pids) == 1
    given_up.cancel()
    await asyncio.gather(given_up, return_exceptions=True)
    second = asyncio.create_task(downloads.fetch(other, note))

    hub.release()

    assert (await first).endswith("owner--tiny")
    assert (await second).endswith("owner--other")
    await downloads.close()


async def test_one_of_two_that_does_not_wait_any_more_ends_nothing(
    downloads: Downloads, hub: FakeHub
) -> None:
    hub.faults.holds[WEIGHTS] = [1000]
    first = asyncio.create_task(downloads.fetch(request(), ignore))
    second = asyncio.create_task(downloads.fetch(request(), ignore))
    await held(hub)

    first.cancel()
    hub.release()

    assert (await second).endswith(MODEL_ID.replace("/", "--"))


async def test_what_the_process_meets_is_raised_here(downloads: Downloads, hub: FakeHub) -> None:
    hub.faults.corrupts[WEIGHTS] = 9

    with pytest.raises(DownloadFailed, match="checksum"):
        await downloads.fetch(request(), ignore)

    offline = Downloads(home=downloads.cache.home, settings=DownloadSettings(is_offline=True))
    with pytest.raises(DownloadUnavailable, match="XINFERENCE_OFFLINE"):
        await offline.fetch(request(), ignore)


async def test_a_process_that_dies_says_where_to_look(downloads: Downloads, hub: FakeHub) -> None:
    hub.faults.holds[WEIGHTS] = [1000]
    fetching = asyncio.create_task(downloads.fetch(request(), ignore))
    await held(hub)
    (pid,) = downloads.pids

    psutil.Process(pid).kill()

    with pytest.raises(DownloadFailed, match=r"SIGKILL.*downloads\.log"):
        await fetching


async def test_the_progress_of_very_many_files_arrives(downloads: Downloads, hub: FakeHub) -> None:
    many = {f"shards/model-{number:05}-{'x' * 100}.safetensors": b"1" for number in range(700)}
    hub.add(MODEL_ID, {"config.json": b"{}", **many})
    hub.faults.sizes["config.json"] = 3  # so that it does not end
    told: list[DownloadProgress] = []

    with pytest.raises(DownloadFailed):
        await downloads.fetch(request(), told.append)

    assert len(told[-1].files) == 701
    assert len(json.dumps([one.file_name for one in told[-1].files])) > 64 * 1024


async def test_who_uses_a_model_is_known_while_it_does(downloads: Downloads) -> None:
    version = request().model_version
    with downloads.used(request(), "first"), downloads.used(request(), "second"):
        assert downloads.users_of(version) == ("first", "second")

    assert downloads.users_of(version) == ()


async def wait_for_part(downloads: Downloads, size_bytes: int) -> None:
    """Return when so much of the weights is on the disk."""
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while not any(
        part.stat().st_size >= size_bytes for part in downloads.cache.home.rglob("*.part")
    ):
        assert time.monotonic() < deadline, "it does not arrive"
        await asyncio.sleep(0.01)
