# SPDX-License-Identifier: Apache-2.0
"""`ModelCache`: the directories of a host that hold what was downloaded.

    <home>/cache/<hub>/<owner>--<name>[@<revision>]/     the repository's files, as they are there
        .xinference.json                                 what belongs to which variant
        .<file>.<content>.part                           one that has not arrived wholly
    <home>/cache/.locks/<hub>/<same name>.lock           held by whoever writes there

Invariant: a file has its own name only once it is whole and its checksum is right, and the list of
what is needed is written before the first of them. So what is complete needs no mark of its own.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self
from urllib.parse import quote

from xinference.errors import CacheInUse, InsufficientResources, InvalidRequest, ObjectNotFound
from xinference.protocol.downloads import CachedModel, DownloadRequest, HubSource, Removed

from .selection import RemoteFile, main_file_of

logger = logging.getLogger(__name__)

MANIFEST = ".xinference.json"
DISK_BLOCK_BYTES = 512
"""Of `st_blocks`, whatever the file system's are."""


class Busy(Exception):
    """Somebody else writes into the directory. Never leaves this package."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Need:
    """A variant and the files that it needs of its repository."""

    model_name: str
    model_type: str
    model_size_in_billions: str
    model_format: str
    quantization: str
    patterns: tuple[str, ...]
    files: tuple[str, ...]

    @classmethod
    def of(cls, request: DownloadRequest, files: Iterable[str]) -> Self:
        """Return what a request needs, now that the files are known."""
        return cls(
            model_name=request.model_name,
            model_type=request.model_type,
            model_size_in_billions=request.model_size_in_billions,
            model_format=request.model_format,
            quantization=request.quantization,
            patterns=request.patterns,
            files=tuple(files),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What belongs into a directory."""

    source: HubSource
    files: Mapping[str, RemoteFile]
    """By path; as they were listed when they were downloaded."""
    needs: Mapping[str, Need] = field(default_factory=dict)
    """By the version of the model."""

    def with_need(self, request: DownloadRequest, files: Sequence[RemoteFile]) -> "Manifest":
        """Return it with what a request needs."""
        need = Need.of(request, [file.path for file in files])
        return Manifest(
            source=self.source,
            files={**self.files, **{file.path: file for file in files}},
            needs={**self.needs, request.model_version: need},
        )

    def without(self, model_version: str) -> "Manifest":
        """Return it without a version, and without what that alone needs."""
        needs = {name: need for name, need in self.needs.items() if name != model_version}
        kept = {path for need in needs.values() for path in need.files}
        files = {path: file for path, file in self.files.items() if path in kept}
        return Manifest(source=self.source, files=files, needs=needs)

    def to_json(self) -> str:
        """Return it as `from_json` reads it."""
        plain = {
            "source": asdict(self.source),
            "files": {
                path: {"size_bytes": file.size_bytes, "checksum": file.checksum}
                for path, file in self.files.items()
            },
            "needs": {name: asdict(need) for name, need in self.needs.items()},
        }
        return json.dumps(plain, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Read one.

        Raises:
            ValueError, KeyError, TypeError, InvalidRequest: it is none.
        """
        plain = json.loads(text)
        return cls(
            source=HubSource(**plain["source"]),
            files={path: RemoteFile(path=path, **about) for path, about in plain["files"].items()},
            needs={
                name: Need(
                    **{
                        **need,
                        "patterns": tuple(need["patterns"]),
                        "files": tuple(need["files"]),
                    }
                )
                for name, need in plain["needs"].items()
            },
        )


def part_of(path: Path, file: RemoteFile) -> Path:
    """Return where a file is until it is whole.

    Why the content is in the name: what is left of an older version is no beginning of a newer.
    """
    content = hashlib.sha256(f"{file.checksum} {file.size_bytes}".encode()).hexdigest()[:16]
    return path.with_name(f".{path.name}.{content}.part")


def parts_of(path: Path) -> list[Path]:
    """Return all that is there of a file that is not whole, of whatever version."""
    prefix, suffix = f".{path.name}.", ".part"
    try:
        names = os.listdir(path.parent)  # noqa: PTH208  # a glob would read the name's brackets
    except OSError:
        return []
    return [
        path.with_name(name) for name in names if name.startswith(prefix) and name.endswith(suffix)
    ]


class ModelCache:
    """The downloaded models of a host. Processes may share one: they take its locks."""

    def __init__(self, home: Path) -> None:
        """Look after `<home>/cache`; nothing is made yet."""
        self.home = home
        self._root = home / "cache"

    def directory_of(self, source: HubSource) -> Path:
        """Return where the files of a repository lie; it may not exist."""
        return self._root / source.hub / _name_of(source)

    def find(self, request: DownloadRequest) -> str | None:
        """Return the path that a model is loaded from if all that it needs is here."""
        for source in request.sources:
            manifest = self.manifest(source)
            for need in () if manifest is None else manifest.needs.values():
                if need.patterns == request.patterns and self.is_complete(manifest, need):
                    assert manifest is not None
                    self._note_name(manifest, request, need)
                    return self.path_of(request, source, need.files)
        return None

    def path_of(self, request: DownloadRequest, source: HubSource, files: Iterable[str]) -> str:
        """Return what a model is loaded from: the directory, or its one file."""
        directory = self.directory_of(source)
        main = None if request.main_file is None else main_file_of(files, request.main_file)
        return str(directory if main is None else directory / main)

    def has_begun(self, source: HubSource) -> bool:
        """Return whether something of a repository is here."""
        return (self.directory_of(source) / MANIFEST).exists()

    def manifest(self, source: HubSource) -> Manifest | None:
        """Return what belongs into a directory; None if it is not known."""
        return _read_manifest(self.directory_of(source))

    def write_manifest(self, manifest: Manifest) -> None:
        """Write down what belongs into a directory. The caller holds its lock."""
        directory = self.directory_of(manifest.source)
        directory.mkdir(parents=True, exist_ok=True)
        path = directory / MANIFEST
        new = path.with_suffix(".new")
        new.write_text(manifest.to_json(), encoding="utf-8")
        new.replace(path)

    @contextlib.contextmanager
    def locked(self, source: HubSource, *, waits: bool) -> Iterator[None]:
        """Keep every other process of this host from writing there.

        Raises:
            Busy: one does, and `waits` is false.
        """
        path = self._root / ".locks" / source.hub / f"{_name_of(source)}.lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        # Why it is never removed: whoever waits on a removed file waits on nothing.
        with path.open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Busy from None
            yield

    def models(self) -> list[CachedModel]:
        """Return all that is kept, sorted by version."""
        manifests = [_read_manifest(path.parent) for path in self._root.glob(f"*/*/{MANIFEST}")]
        found = [
            self._cached(manifest, version)
            for manifest in manifests
            if manifest is not None
            for version in manifest.needs
        ]
        return sorted(found, key=lambda model: (model.model_version, model.path))

    def remove(self, model_version: str) -> Removed:
        """Remove what this version alone needs, from every hub it came from.

        Raises:
            ObjectNotFound: nothing of it is here.
            CacheInUse: it is being downloaded.
            InvalidRequest: it lies outside this cache. InsufficientResources: a file stays.
        """
        sources = [one.source for one in self.models() if one.model_version == model_version]
        if not sources:
            raise ObjectNotFound(kind="cached model", id=model_version)
        freed_bytes = 0
        for source in sources:
            try:
                with self.locked(source, waits=False):
                    freed_bytes += self._remove(source, model_version)
            except Busy:
                raise CacheInUse(model_version=model_version, users=["a download"]) from None
            except OSError as error:
                raise InsufficientResources(problem=f"Not all is removed: {error}") from error
        return Removed(model_version=model_version, freed_bytes=freed_bytes)

    def _remove(self, source: HubSource, model_version: str) -> int:
        manifest = self.manifest(source)
        if manifest is None or model_version not in manifest.needs:
            return 0
        directory = self.directory_of(source)
        if not directory.resolve().is_relative_to(self._root.resolve()):
            raise InvalidRequest(
                field="model_version",
                problem=f"lies in {directory.resolve()}, outside XINFERENCE_HOME; remove it there",
            )
        left = manifest.without(model_version)
        gone = self._on_disk(directory, manifest.files.keys() - left.files.keys())
        freed_bytes = _freed_by(gone)
        # Why first: what is interrupted here shows as incomplete, not as a model without files.
        if left.needs:
            self.write_manifest(left)
        for path in gone:
            path.unlink(missing_ok=True)
        if not left.needs:
            (directory / MANIFEST).unlink(missing_ok=True)
        _drop_empty_folders(directory)
        return freed_bytes

    def _cached(self, manifest: Manifest, version: str) -> CachedModel:
        need = manifest.needs[version]
        directory = self.directory_of(manifest.source)
        own = manifest.files.keys() - manifest.without(version).files.keys()
        own_paths = self._on_disk(directory, own)
        return CachedModel(
            model_version=version,
            model_name=need.model_name,
            model_type=need.model_type,
            model_size_in_billions=need.model_size_in_billions,
            model_format=need.model_format,
            quantization=need.quantization,
            source=manifest.source,
            path=str(directory),
            files=tuple(str(path) for path in own_paths),
            size_bytes=_size_of(self._on_disk(directory, need.files)),
            freed_bytes=_freed_by(own_paths),
            is_complete=self.is_complete(manifest, need),
        )

    def is_complete(self, manifest: Manifest | None, need: Need) -> bool:
        """Return whether every file that is needed is here, in its whole length."""
        if manifest is None:
            return False
        directory = self.directory_of(manifest.source)
        try:
            return all(
                (directory / path).stat().st_size == manifest.files[path].size_bytes
                for path in need.files
            )
        except (OSError, KeyError):
            return False

    def _note_name(self, manifest: Manifest, request: DownloadRequest, need: Need) -> None:
        """Let a model that shares another one's files be listed, too."""
        if request.model_version in manifest.needs:
            return
        files = [manifest.files[path] for path in need.files]
        # Why not waited for: it is a name, and a download that is under way may take hours.
        with contextlib.suppress(Busy, OSError), self.locked(manifest.source, waits=False):
            self.write_manifest(manifest.with_need(request, files))

    def _on_disk(self, directory: Path, names: Iterable[str]) -> list[Path]:
        """Return what is there of these files, whole or not."""
        found = []
        for name in sorted(names):
            path = directory / name
            if path.is_symlink() or path.exists():
                found.append(path)
            found += parts_of(path)
        return found


def _name_of(source: HubSource) -> str:
    """Return the name of a repository's directory, and of no other's."""
    # Why no folder for the revision: code in a repository is cached by the name of its folder.
    name = source.model_id.replace("/", "--")
    return name if source.revision is None else f"{name}@{quote(source.revision, safe='')}"


def _read_manifest(directory: Path) -> Manifest | None:
    try:
        return Manifest.from_json((directory / MANIFEST).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, InvalidRequest) as error:
        logger.warning("What is in %s is not known: %s", directory, error)
        return None


def _size_of(paths: Iterable[Path]) -> int:
    """Return the bytes on disk; one file under two names counts once, a link as a link."""
    found = {(stat.st_dev, stat.st_ino): stat.st_blocks for stat in _stats(paths)}
    return sum(found.values()) * DISK_BLOCK_BYTES


def _freed_by(paths: Iterable[Path]) -> int:
    """Return the bytes on disk that are free once these names are gone.

    A file that has another name elsewhere stays, and frees nothing.
    """
    found: dict[tuple[int, int], tuple[int, int, int]] = {}
    for stat in _stats(paths):
        key = (stat.st_dev, stat.st_ino)
        _, _, seen = found.get(key, (0, 0, 0))
        found[key] = (stat.st_blocks, stat.st_nlink, seen + 1)
    blocks = sum(blocks for blocks, links, seen in found.values() if seen >= links)
    return blocks * DISK_BLOCK_BYTES


def _stats(paths: Iterable[Path]) -> Iterator[os.stat_result]:
    for path in paths:
        with contextlib.suppress(OSError):
            yield path.lstat()


def _drop_empty_folders(directory: Path) -> None:
    for folder, _, _ in os.walk(directory, topdown=False):
        with contextlib.suppress(OSError):  # it is not empty
            os.rmdir(folder)  # noqa: PTH106


def as_request(plain: Mapping[str, Any]) -> DownloadRequest:
    """Read what `dataclasses.asdict` made of a request, from JSON too."""
    sources = tuple(HubSource(**source) for source in plain["sources"])
    return DownloadRequest(
        **{**plain, "sources": sources, "patterns": tuple(plain["patterns"])},
    )
