# SPDX-License-Identifier: Apache-2.0
"""A whole download: find the hub, see that the disk is large enough, fetch what is missing.

Blocking, and made for a process of its own, which is killed to cancel it and ends when it has
failed: nothing here has to be undone. What was fetched stays and is gone on with.
"""

import logging
import shutil
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from pathlib import Path

import httpx

from xinference.errors import DiskFull, DownloadFailed, DownloadUnavailable, RepositoryNotFound
from xinference.protocol.downloads import (
    DownloadProgress,
    DownloadRequest,
    FileProgress,
    HubSource,
)
from xinference.settings import DownloadSettings

from .cache import Busy, Manifest, ModelCache, part_of
from .hubs import Hub, Listing, hubs_of
from .selection import RemoteFile, needed_files
from .transfer import Transfer, is_out_of_space

logger = logging.getLogger(__name__)

TELL_SECONDS = 0.5
LIST_DELAY_SECONDS = 0.5

Tell = Callable[[DownloadProgress], None]


def download(
    request: DownloadRequest, *, cache: ModelCache, settings: DownloadSettings, tell: Tell
) -> str:
    """Have all that a model needs on this host; return the path that it is loaded from.

    What is complete already is used as it is, and no hub is asked.

    Args:
        tell: is called now and then, on this thread, with how far it is.

    Raises:
        DownloadUnavailable: it is not here, and no hub may be asked.
        DownloadFailed: no hub has it (`RepositoryNotFound`), or it does not arrive.
        DiskFull
    """
    found = cache.find(request)
    if found is not None:
        return found
    if settings.offline_by is not None:
        raise DownloadUnavailable(
            family=request.model_name,
            model_id=", ".join(dict.fromkeys(str(one) for one in request.sources)),
            problem=f"{settings.offline_by} is set on this worker, so no hub is asked",
        )
    tell(DownloadProgress(info="asking the hub for its files"))
    with new_client(settings) as client:
        hub, listing = first_answer(
            client, request.sources, cache, settings, model=request.model_name
        )
        try:
            with cache.locked(listing.source, waits=False):
                return _fill(client, hub, listing, request, cache, settings, tell)
        except Busy:
            tell(DownloadProgress(info="another process downloads it; waiting for that"))
        with cache.locked(listing.source, waits=True):
            found = cache.find(request)
            return found or _fill(client, hub, listing, request, cache, settings, tell)


def new_client(settings: DownloadSettings) -> httpx.Client:
    """Return what asks hubs."""
    return httpx.Client(
        follow_redirects=True,
        timeout=httpx.Timeout(settings.stall_seconds, connect=settings.hub_timeout_seconds),
        limits=httpx.Limits(max_connections=settings.num_workers + 1),
    )


def first_answer(
    client: httpx.Client,
    sources: Sequence[HubSource],
    cache: ModelCache,
    settings: DownloadSettings,
    *,
    model: str,
) -> tuple[Hub, Listing]:
    """Return the first hub that lists the files, and its list.

    Args:
        model: as errors name it.

    Raises:
        RepositoryNotFound: each says that it does not have them.
        DownloadFailed: none lists them; it says why of each.
    """
    hubs = hubs_of(settings)
    asked = ordered(sources, cache, settings)
    for number in range(1, settings.max_attempts + 1):
        problems: list[str] = []
        may_pass, is_nowhere = False, True
        for source in asked:
            try:
                return hubs[source.hub], hubs[source.hub].list_files(client, source)
            except DownloadFailed as refusal:
                is_nowhere = is_nowhere and isinstance(refusal, RepositoryNotFound)
                problems.append(f"{source.hub}: {refusal.problem}")
            except httpx.HTTPError as error:
                may_pass, is_nowhere = True, False
                problems.append(f"{source.hub} does not answer ({_words_of(error)})")
            except (KeyError, TypeError, ValueError) as error:
                is_nowhere = False
                problems.append(f"{source.hub} does not answer as a hub does ({error!r})")
        if not may_pass or number == settings.max_attempts:
            break
        time.sleep(LIST_DELAY_SECONDS * number)
    kind = RepositoryNotFound if is_nowhere else DownloadFailed
    raise kind(model=model, problem="; ".join(problems))


def _words_of(error: httpx.HTTPError) -> str:
    if isinstance(error, httpx.HTTPStatusError):
        return f"{error.request.url.host} says {error.response.status_code}"
    return str(error) or type(error).__name__


def ordered(
    sources: Sequence[HubSource], cache: ModelCache, settings: DownloadSettings
) -> list[HubSource]:
    """Return the repositories in the order in which they are asked.

    A hub that the settings name is the only one, where it has the model. Otherwise one comes first
    that something was downloaded from already: that is gone on with.
    """
    named = [source for source in sources if source.hub == settings.model_src]
    return named or sorted(sources, key=lambda source: not cache.has_begun(source))


def _fill(
    client: httpx.Client,
    hub: Hub,
    listing: Listing,
    request: DownloadRequest,
    cache: ModelCache,
    settings: DownloadSettings,
    tell: Tell,
) -> str:
    """Fetch what is missing into a directory whose lock is held."""
    files = needed_files(listing.files, request.patterns, model=request.model_name)
    directory = cache.directory_of(listing.source)
    before = cache.manifest(listing.source)
    missing = [file for file in files if not _is_there(directory, file, before)]
    _check_room(directory, missing, request)
    known = before or Manifest(source=listing.source, files={})
    for file in missing:
        # What has the name is of an older version.
        (directory / file.path).unlink(missing_ok=True)
    cache.write_manifest(known.with_need(request, files))
    done = {file.path: file.size_bytes for file in files}
    done |= {file.path: _part_bytes(directory, file) for file in missing}

    def told() -> DownloadProgress:
        return DownloadProgress(
            files=tuple(
                FileProgress(
                    file_name=file.path,
                    size_bytes=file.size_bytes,
                    downloaded_bytes=min(done[file.path], file.size_bytes),
                )
                for file in files
            ),
            info=f"from {listing.source.hub}",
        )

    tell(told())
    transfer = Transfer(
        client,
        headers=hub.headers,
        max_attempts=settings.max_attempts,
        model=request.model_name,
    )

    def fetch(file: RemoteFile) -> None:
        def on_bytes(number: int) -> None:
            done[file.path] = number

        url = hub.url_of(listing, file.path)
        transfer.fetch(url, file, directory / file.path, on_bytes)

    try:
        _all_of(fetch, missing, transfer, settings.num_workers, lambda: tell(told()))
    except OSError as error:
        if is_out_of_space(error):
            _check_room(directory, missing, request, is_full=True)
        raise DownloadFailed(
            model=request.model_name, problem=f"it cannot be written: {error}"
        ) from error
    tell(told())
    return cache.path_of(request, listing.source, [file.path for file in files])


def _all_of(
    fetch: Callable[[RemoteFile], None],
    files: Sequence[RemoteFile],
    transfer: Transfer,
    num_workers: int,
    on_tick: Callable[[], None],
) -> None:
    """Fetch files, some at once, and tick meanwhile; the first failure ends the others."""
    threads = ThreadPoolExecutor(num_workers, thread_name_prefix="download")
    pending: set[Future[None]] = {threads.submit(fetch, file) for file in files}
    try:
        while pending:
            ended, pending = wait(pending, TELL_SECONDS, return_when=FIRST_EXCEPTION)
            on_tick()
            for one in ended:
                one.result()
    finally:
        transfer.stop()
        # Why not waited for: one that is sent nothing notices at its timeout, and the process ends.
        threads.shutdown(wait=False, cancel_futures=True)


def _is_there(directory: Path, file: RemoteFile, manifest: Manifest | None) -> bool:
    """Return whether a file is there as the hub has it now."""
    known = None if manifest is None else manifest.files.get(file.path)
    if known is None or (known.size_bytes, known.checksum) != (file.size_bytes, file.checksum):
        return False
    try:
        return (directory / file.path).stat().st_size == file.size_bytes
    except OSError:
        return False


def _part_bytes(directory: Path, file: RemoteFile) -> int:
    try:
        return part_of(directory / file.path, file).stat().st_size
    except OSError:
        return 0


def _check_room(
    directory: Path,
    missing: Sequence[RemoteFile],
    request: DownloadRequest,
    *,
    is_full: bool = False,
) -> None:
    """Raise `DiskFull` if what is missing does not fit, or if a write has failed for that."""
    directory.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(directory).free
    required = sum(
        max(0, file.size_bytes - _part_bytes(directory, file))
        for file in missing
        if not is_full or not (directory / file.path).exists()
    )
    if is_full or required > free:
        raise DiskFull(
            model=request.model_name,
            directory=str(directory),
            required_bytes=required,
            available_bytes=free,
        )
