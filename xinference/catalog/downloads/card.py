# SPDX-License-Identifier: Apache-2.0
"""A repository's small files, read from this host's cache or from a hub.

Blocking, as `download`. Nothing of it is kept: it is a few hundred kilobytes, and a launch that
follows fetches them with the rest.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any

import httpx

from xinference.catalog.gguf_head import NotGguf, documents_of, is_model
from xinference.catalog.gguf_head import Read as ReadBytes
from xinference.catalog.sources import GGUF
from xinference.errors import DownloadFailed, DownloadUnavailable, InvalidRequest
from xinference.protocol.downloads import HubSource
from xinference.protocol.repositories import CardRequest, RepositoryCard
from xinference.settings import DownloadSettings

from .cache import ModelCache
from .download import first_answer, new_client
from .hubs import Hub, Listing
from .selection import RemoteFile, needed_files
from .transfer import Transfer

CONFIG, TEMPLATE = "config.json", "chat_template.jinja"
DOCUMENTS: Mapping[str, tuple[str, ...] | None] = {
    CONFIG: None,
    "tokenizer_config.json": ("chat_template", "model_max_length"),
    "chat_template.json": None,
    "sentence_bert_config.json": None,
    "1_Pooling/config.json": None,
}
"""What is read, and what of it is kept; None: all. The rest of a tokenizer's may be megabytes."""
MAX_FILE_BYTES = 32 * 2**20
MAX_CARD_BYTES = 2 * 2**20

_INSTEAD = {
    "adapter_config.json": "it is an adapter of another model",
    "model_index.json": "it is a pipeline of several models, which makes pictures or sound",
    "params.json": "its files are in the form of its makers",
}

Read = Callable[[RemoteFile], bytes]
Front = AbstractContextManager[ReadBytes]
"""A file that is open to be read from its front."""


def read_card(
    request: CardRequest, *, cache: ModelCache, settings: DownloadSettings, directory: Path
) -> RepositoryCard:
    """Return what a repository says of its model; what is wholly in the cache asks no hub.

    Args:
        directory: for files on their way; the caller removes it.

    Raises:
        DownloadUnavailable: it is not here, and no hub may be asked.
        DownloadFailed: no hub has it, or it does not arrive.
        InvalidRequest: it holds no model that can be launched by its id.
    """
    for source in request.sources:
        files = _files_in_cache(cache, source, request.quantization)
        if files:
            kept = cache.directory_of(source)
            if _is_gguf(files):
                return _gguf_card(source, files, partial(_front_here, kept))
            return _card(source, files, _reader(kept))
    if settings.offline_by is not None:
        raise DownloadUnavailable(
            family=request.model_id,
            model_id=request.model_id,
            problem=f"{settings.offline_by} is set on this worker, so no hub is asked",
        )
    with new_client(settings) as client:
        hub, listing = first_answer(
            client, request.sources, cache, settings, model=request.model_id
        )
        if _is_gguf(listing.files):
            ggufs = [file for file in listing.files if file.path.endswith(".gguf")]
            front = partial(_front_of, client, hub, listing)
            return _gguf_card(listing.source, ggufs, front)
        _check_kind(listing.files, listing.source)
        files = needed_files(listing.files, (), model=request.model_id)
        transfer = Transfer(
            client,
            headers=hub.headers,
            max_attempts=settings.max_attempts,
            model=request.model_id,
        )

        def read(file: RemoteFile) -> bytes:
            path = directory / file.path
            transfer.fetch(hub.url_of(listing, file.path), file, path, lambda _: None)
            return path.read_bytes()

        return _card(listing.source, files, read)


def _reader(directory: Path) -> Read:
    return lambda file: (directory / file.path).read_bytes()


def _files_in_cache(
    cache: ModelCache, source: HubSource, quantization: str | None
) -> Sequence[RemoteFile]:
    """Return the files of a repository if all of them are here that a model needs."""
    manifest = cache.manifest(source)
    if manifest is None:
        return ()
    for need in manifest.needs.values():
        is_whole = not need.patterns and CONFIG in need.files
        is_wanted = need.model_format == GGUF and (
            quantization is None or quantization.casefold() == need.quantization.casefold()
        )
        if (is_whole or is_wanted) and cache.is_complete(manifest, need):
            return [manifest.files[path] for path in need.files]
    return ()


def _is_gguf(files: Sequence[RemoteFile]) -> bool:
    """Return whether a model comes as GGUF files alone."""
    suffixes = {PurePosixPath(file.path).suffix for file in files}
    return ".gguf" in suffixes and not suffixes & {".safetensors", ".bin"}


def _gguf_card(
    source: HubSource, files: Sequence[RemoteFile], front_of: Callable[[RemoteFile], Front]
) -> RepositoryCard:
    heads = [file for file in files if is_model(file.path)]
    try:
        with front_of(min(heads, key=lambda file: file.size_bytes, default=files[0])) as read:
            documents = documents_of(read)
    except NotGguf as error:
        raise DownloadFailed(model=str(source), problem=f"its GGUF file: {error}") from error
    return RepositoryCard(
        source=source,
        documents=documents,
        sizes={file.path: file.size_bytes for file in files},
        is_gguf=True,
    )


@contextmanager
def _front_here(directory: Path, file: RemoteFile) -> Iterator[ReadBytes]:
    with (directory / file.path).open("rb") as opened:
        yield opened.read


@contextmanager
def _front_of(
    client: httpx.Client, hub: Hub, listing: Listing, file: RemoteFile
) -> Iterator[ReadBytes]:
    """Open a file on a hub to be read from its front; what is not read is not sent."""
    headers = {**hub.headers, "Accept-Encoding": "identity"}
    try:
        with client.stream("GET", hub.url_of(listing, file.path), headers=headers) as answer:
            answer.raise_for_status()
            yield _Chunks(answer.iter_raw()).read
    except httpx.HTTPError as error:
        problem = f"{file.path} cannot be read from {listing.source.hub}: {error!r}"
        raise DownloadFailed(model=str(listing.source), problem=problem) from error


class _Chunks:
    """Chunks of any size, read by numbers of bytes."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._there = b""

    def read(self, num_bytes: int) -> bytes:
        """Return so many bytes more, or fewer at the end."""
        parts, left = [self._there], num_bytes - len(self._there)
        while left > 0 and (chunk := next(self._chunks, b"")):
            parts.append(chunk)
            left -= len(chunk)
        there = b"".join(parts)
        self._there = there[num_bytes:]
        return there[:num_bytes]


def _check_kind(files: Sequence[RemoteFile], source: HubSource) -> None:
    """Refuse a repository that does not say what its model is."""
    names = {file.path for file in files}
    if CONFIG in names:
        return
    what = next((words for name, words in _INSTEAD.items() if name in names), "")
    raise InvalidRequest(
        field="model_name",
        problem=f"{source} on {source.hub} has no {CONFIG}{': ' if what else ''}{what}",
    )


def _card(source: HubSource, files: Sequence[RemoteFile], read: Read) -> RepositoryCard:
    there = {file.path: file for file in files}
    documents = {
        name: _kept(_document(read(_small(there[name], source))), keys)
        for name, keys in DOCUMENTS.items()
        if name in there
    }
    template = None
    if TEMPLATE in there:
        template = read(_small(there[TEMPLATE], source)).decode("utf-8", errors="replace")
    if len(json.dumps(documents)) + len(template or "") > MAX_CARD_BYTES:
        raise DownloadFailed(model=str(source), problem=f"its {CONFIG} is too large to be one")
    return RepositoryCard(
        source=source,
        documents={name: document for name, document in documents.items() if document is not None},
        chat_template=template,
        sizes={file.path: file.size_bytes for file in files},
    )


def _small(file: RemoteFile, source: HubSource) -> RemoteFile:
    if file.size_bytes > MAX_FILE_BYTES:
        raise DownloadFailed(
            model=str(source), problem=f"its {file.path} has {file.size_bytes:,} bytes"
        )
    return file


def _document(content: bytes) -> dict[str, Any] | None:
    """Return the object that a JSON file is; None if it is none."""
    try:
        given = json.loads(content)
    except (ValueError, RecursionError):
        return None
    return given if isinstance(given, dict) else None


def _kept(document: dict[str, Any] | None, keys: tuple[str, ...] | None) -> dict[str, Any] | None:
    if document is None or keys is None:
        return document
    return {key: document[key] for key in keys if key in document}
