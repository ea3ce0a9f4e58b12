# SPDX-License-Identifier: Apache-2.0
"""The hubs: how each lists the files of a repository, and where a file of it is.

Both speak HTTP with ranges, so that is all that differs between them; `transfer` does the rest.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import quote, urlsplit

import httpx

from xinference.errors import DownloadFailed, RepositoryNotFound
from xinference.protocol.downloads import HUGGINGFACE, MODELSCOPE, HubSource
from xinference.settings import DownloadSettings

from .selection import RemoteFile

LIST_TIMEOUT_SECONDS = 15.0
_HASHES = {64: "sha256", 40: "git"}
"""What a hash of so many hexadecimal digits is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Listing:
    """A repository as it is now."""

    source: HubSource
    revision: str
    """What its files are asked for by: the commit where the hub tells one, so that none changes
    while they are downloaded."""
    files: tuple[RemoteFile, ...]


class Hub(Protocol):
    """A hub that is asked by HTTP."""

    @property
    def headers(self) -> Mapping[str, str]:
        """What every request to it has."""
        ...

    def list_files(self, client: httpx.Client, source: HubSource) -> Listing:
        """Return the files of a repository.

        Raises:
            RepositoryNotFound: it does not have it, as far as it tells us.
            DownloadFailed: it refuses us.
            httpx.TransportError, httpx.HTTPStatusError: it does not answer, or not now.
        """
        ...

    def url_of(self, listing: Listing, path: str) -> str:
        """Return where a file is."""
        ...


class HuggingFace:
    """Hugging Face, and what has its interface: mirrors, caches."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self.headers = _bearer(token)

    def list_files(self, client: httpx.Client, source: HubSource) -> Listing:
        """See `Hub`."""
        revision = source.revision or "main"
        url = f"{self._endpoint}/api/models/{source.model_id}/revision/{quote(revision, safe='')}"
        about = _json_of(_get(client, url, self, source, params={"blobs": "true"}), source)
        commit = about.get("sha") or revision
        bare = Listing(source=source, revision=commit, files=())
        files = tuple(
            _sibling(one) or self._look_at(client, bare, one["rfilename"])
            for one in about["siblings"]
        )
        return Listing(source=source, revision=commit, files=files)

    def url_of(self, listing: Listing, path: str) -> str:
        """See `Hub`."""
        revision = quote(listing.revision, safe="")
        return f"{self._endpoint}/{listing.source.model_id}/resolve/{revision}/{quote(path)}"

    def _look_at(self, client: httpx.Client, listing: Listing, path: str) -> RemoteFile:
        """Return a file of a hub whose lists have names alone."""
        answer = client.head(self.url_of(listing, path), headers=self.headers)
        _check(answer, listing.source)
        # Why the first that has it: the hub says it, and sends on to a storage that does not.
        told: dict[str, str] = {}
        for one in (*answer.history, answer):
            told = {**one.headers, **told}
        size = told.get("x-linked-size") or answer.headers["content-length"]
        etag = told.get("x-linked-etag") or told.get("etag") or ""
        return RemoteFile(path=path, size_bytes=int(size), checksum=_checksum(etag))


class ModelScope:
    """ModelScope."""

    def __init__(self, endpoint: str, token: str | None) -> None:
        self._endpoint = endpoint.rstrip("/")
        self.headers = _bearer(token)

    def list_files(self, client: httpx.Client, source: HubSource) -> Listing:
        """See `Hub`."""
        revision = source.revision or "master"
        url = f"{self._endpoint}/api/v1/models/{source.model_id}/repo/files"
        query = {"Revision": revision, "Recursive": "True"}
        about = _json_of(_get(client, url, self, source, params=query), source)
        if about.get("Success") is False:
            raise DownloadFailed(model=str(source), problem=str(about.get("Message"))[:300])
        files = tuple(
            RemoteFile(
                path=one["Path"],
                size_bytes=int(one["Size"]),
                checksum=_checksum(one.get("Sha256") or ""),
            )
            for one in about["Data"]["Files"]
            if one["Type"] != "tree"
        )
        return Listing(source=source, revision=revision, files=files)

    def url_of(self, listing: Listing, path: str) -> str:
        """See `Hub`."""
        where = f"Revision={quote(listing.revision, safe='')}&FilePath={quote(path, safe='')}"
        return f"{self._endpoint}/api/v1/models/{listing.source.model_id}/repo?{where}"


def hubs_of(settings: DownloadSettings) -> dict[str, Hub]:
    """Return the hubs as they are configured, by name."""
    return {
        HUGGINGFACE: HuggingFace(settings.hf_endpoint, settings.hf_token),
        MODELSCOPE: ModelScope(settings.modelscope_endpoint, settings.modelscope_token),
    }


def _bearer(token: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def _get(
    client: httpx.Client, url: str, hub: Hub, source: HubSource, *, params: Mapping[str, str]
) -> httpx.Response:
    answer = client.get(
        url, params=params, headers=dict(hub.headers), timeout=_list_timeout(client)
    )
    _check(answer, source)
    return answer


def _list_timeout(client: httpx.Client) -> httpx.Timeout:
    return httpx.Timeout(LIST_TIMEOUT_SECONDS, connect=client.timeout.connect)


def _check(answer: httpx.Response, source: HubSource) -> None:
    """Raise what a refusal means; one that may pass stays an `httpx.HTTPStatusError`."""
    if answer.status_code in (401, 403, 404):
        raise _refusal(answer, source)
    answer.raise_for_status()


def _refusal(answer: httpx.Response, source: HubSource) -> DownloadFailed:
    model = str(source)
    said = answer.headers.get("x-error-message", "")
    host = urlsplit(str(answer.url)).netloc
    match answer.headers.get("x-error-code"):
        case "RevisionNotFound":
            problem = f"{host} has no revision {source.revision} of {source.model_id}"
            return RepositoryNotFound(model=model, problem=problem)
        case "GatedRepo":
            problem = (
                f"{host} gives {source.model_id} to those alone who have accepted its terms; "
                "accept them there, and set HF_TOKEN on the worker to your token"
            )
            return DownloadFailed(model=model, problem=problem)
        case code if answer.status_code == 404 or code == "RepoNotFound":
            problem = f"{host} has no {source}, or none that is public; private ones need a token"
            return RepositoryNotFound(model=model, problem=problem)
    problem = f"{host} refuses {source} ({answer.status_code}{': ' if said else ''}{said[:300]})"
    return DownloadFailed(model=model, problem=problem)


def _json_of(answer: httpx.Response, source: HubSource) -> dict[str, Any]:
    try:
        about = answer.json()
    except ValueError:
        about = None
    if not isinstance(about, dict):
        host = urlsplit(str(answer.url)).netloc
        raise DownloadFailed(model=str(source), problem=f"{host} does not answer as a hub does")
    return about


def _sibling(one: Mapping[str, Any]) -> RemoteFile | None:
    """Return a file of Hugging Face's list; None if the list has no more than its name."""
    if one.get("size") is None:
        return None
    large = one.get("lfs") or {}
    checksum = large.get("sha256") or one.get("blobId") or ""
    return RemoteFile(
        path=one["rfilename"], size_bytes=int(one["size"]), checksum=_checksum(checksum)
    )


def _checksum(text: str) -> str | None:
    """Return what a hash, or an ETag that is one, says of the content."""
    digits = text.removeprefix("W/").strip('"').lower()
    kind = _HASHES.get(len(digits))
    return f"{kind}:{digits}" if kind and re.fullmatch("[0-9a-f]+", digits) else None
