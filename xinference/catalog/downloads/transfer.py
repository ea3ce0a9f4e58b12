# SPDX-License-Identifier: Apache-2.0
"""One file from a URL to a path: resumed where it stopped, whole, and with the right checksum."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import BinaryIO

import httpx

from xinference.errors import DownloadFailed

from .cache import part_of, parts_of
from .selection import RemoteFile

CHUNK_BYTES = 1 << 20
PROGRESS_BYTES = 1 << 20
"""An attempt that brought so much was none in vain."""
FIRST_DELAY_SECONDS = 0.25
MAX_DELAY_SECONDS = 10.0
_PASSES = frozenset({408, 425, 429, 500, 502, 503, 504})
"""Statuses that a later attempt may not meet."""

OnBytes = Callable[[int], None]
"""Is told how many bytes of the file are there."""


class Stopped(Exception):
    """Another file failed, so this one is not gone on with. Never leaves this package."""


class _Interrupted(Exception):
    """This attempt ended before the file did; another may go on."""


class Transfer:
    """Fetches files. Threads may share one; `stop` ends what they do."""

    def __init__(
        self, client: httpx.Client, *, headers: Mapping[str, str], max_attempts: int, model: str
    ) -> None:
        """Fetch with a client.

        Args:
            max_attempts: so many in a row that bring nothing, or the wrong bytes, are the last.
            model: as errors name it.
        """
        self._client = client
        self._headers = dict(headers)
        self._max_attempts = max_attempts
        self._model = model
        self._is_stopping = threading.Event()

    def stop(self) -> None:
        """Let every `fetch` raise `Stopped` soon."""
        self._is_stopping.set()

    def fetch(self, url: str, file: RemoteFile, path: Path, on_bytes: OnBytes) -> None:
        """Bring a file to `path`; go on with what an earlier attempt has left.

        Raises:
            DownloadFailed: it does not arrive, or not as the hub says it is. What did arrive is
                kept, unless it is wrong.
            OSError: it cannot be written. Stopped
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        part = part_of(path, file)
        num_failures = num_wrong = 0
        while True:
            before = _size_of(part)
            try:
                is_right = self._attempt(url, file, part, on_bytes)
            except _Interrupted as interruption:
                has_gained = _size_of(part) - before >= PROGRESS_BYTES
                num_failures = 1 if has_gained else num_failures + 1
                if num_failures >= self._max_attempts:
                    raise DownloadFailed(
                        model=self._model,
                        problem=f"{file.path} ended at {_size_of(part):,} of {file.size_bytes:,} "
                        f"bytes, {num_failures} times in a row: {interruption}. What has arrived "
                        "is kept; the same launch or download goes on from there",
                    ) from interruption
                self._pause(num_failures)
                continue
            if is_right:
                part.replace(path)
                for older in parts_of(path):
                    older.unlink(missing_ok=True)
                return
            part.unlink()
            num_wrong += 1
            if num_wrong >= self._max_attempts:
                raise DownloadFailed(
                    model=self._model,
                    problem=f"{file.path} arrived {num_wrong} times with another checksum than the "
                    f"hub tells ({file.checksum}); what is between here and the hub changes it",
                )

    def _attempt(self, url: str, file: RemoteFile, part: Path, on_bytes: OnBytes) -> bool:
        """Bring the rest of a file; return whether its content is right.

        Raises:
            _Interrupted, DownloadFailed, OSError, Stopped
        """
        with part.open("ab") as output:
            if output.tell() > file.size_bytes:
                output.truncate(0)
            digest = _Digest(file)
            done = self._reread(part, output.tell(), digest)
            on_bytes(done)
            if done < file.size_bytes:
                done = self._append(url, file, output, done, digest, on_bytes)
            if done < file.size_bytes:
                raise _Interrupted("the server sends less than it has told")
            # Why: a name that a power cut leaves on an empty file would say that it is whole.
            os.fsync(output.fileno())
        return done == file.size_bytes and digest.is_right

    def _append(
        self,
        url: str,
        file: RemoteFile,
        output: BinaryIO,
        done: int,
        digest: "_Digest",
        on_bytes: OnBytes,
    ) -> int:
        """Write what the server sends behind what is there; return how much that makes."""
        # Why identity: a compressed answer has other bytes, and no ranges of these.
        headers = {**self._headers, "Accept-Encoding": "identity"}
        if done:
            headers["Range"] = f"bytes={done}-"
        try:
            with self._client.stream("GET", url, headers=headers) as answer:
                self._check(answer, file)
                if done and not _goes_on_at(answer, done):
                    output.truncate(0)
                    digest.restart()
                    done = 0
                    if answer.status_code != 200:
                        raise _Interrupted("the server sends another part than the one asked for")
                # Why no size of the chunks: what does not fill one is lost with the connection.
                for chunk in answer.iter_raw():
                    if self._is_stopping.is_set():
                        raise Stopped
                    output.write(chunk)
                    # Why: what is told of is there, even if this process is killed now.
                    output.flush()
                    digest.update(chunk)
                    done += len(chunk)
                    on_bytes(done)
                    if done > file.size_bytes:
                        break
        except httpx.RequestError as error:
            raise _Interrupted(_words_of(error)) from error
        return done

    def _check(self, answer: httpx.Response, file: RemoteFile) -> None:
        if answer.status_code in _PASSES:
            raise _Interrupted(f"the server says {answer.status_code}")
        if answer.status_code not in (200, 206, 416):
            raise DownloadFailed(
                model=self._model,
                problem=f"{file.path}: {answer.url.host} says {answer.status_code} "
                f"{answer.headers.get('x-error-message', '')[:300]}".rstrip(),
            )

    def _reread(self, part: Path, size_bytes: int, digest: "_Digest") -> int:
        """Take what is there already into the checksum; return how much it is."""
        done = 0
        with part.open("rb") as there:
            while chunk := there.read(min(CHUNK_BYTES, size_bytes - done)):
                if self._is_stopping.is_set():
                    raise Stopped
                digest.update(chunk)
                done += len(chunk)
        return done

    def _pause(self, num_failures: int) -> None:
        delay = min(FIRST_DELAY_SECONDS * 2**num_failures, MAX_DELAY_SECONDS)
        if self._is_stopping.wait(delay):
            raise Stopped


class _Digest:
    """A checksum in the making, as the hub made its own."""

    def __init__(self, file: RemoteFile) -> None:
        self._file = file
        self.restart()

    def restart(self) -> None:
        kind, _, self._wanted = (self._file.checksum or "").partition(":")
        self._hash = hashlib.sha1(usedforsecurity=False) if kind == "git" else hashlib.sha256()
        if kind == "git":
            # That is how git names a content.
            self._hash.update(f"blob {self._file.size_bytes}\0".encode())

    def update(self, chunk: bytes) -> None:
        self._hash.update(chunk)

    @property
    def is_right(self) -> bool:
        return not self._wanted or self._hash.hexdigest() == self._wanted


def _goes_on_at(answer: httpx.Response, done: int) -> bool:
    said = answer.headers.get("content-range", "")
    return answer.status_code == 206 and said.startswith(f"bytes {done}-")


def _size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _words_of(error: httpx.RequestError) -> str:
    if isinstance(error, httpx.TimeoutException):
        return "the server sends nothing"
    return f"the connection is lost ({error or type(error).__name__})"


def is_out_of_space(error: OSError) -> bool:
    """Return whether a write failed because the disk, or what one may have of it, is full."""
    return error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
