# SPDX-License-Identifier: Apache-2.0
"""What is to be downloaded, how far it is, and what is kept of it.

A `DownloadRequest` is made by whoever knows the model and carried out on the host that needs its
files. It names hubs and patterns, no directory: where files lie is for each host to know.
"""

import re
from dataclasses import dataclass, field
from enum import StrEnum

from xinference.errors import InvalidRequest
from xinference.identifiers import NodeId

HUGGINGFACE, MODELSCOPE = "huggingface", "modelscope"
HUBS = (HUGGINGFACE, MODELSCOPE)
"""Hubs that files are downloaded from, the preferred one first."""

_MODEL_ID = re.compile(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", re.ASCII)
_REVISION = re.compile(r"[\w./+-]{1,200}", re.ASCII)


@dataclass(frozen=True, slots=True, kw_only=True)
class HubSource:
    """A repository of a hub, at one revision."""

    hub: str
    """One of `HUBS`."""
    model_id: str
    """As "Qwen/Qwen3-0.6B"."""
    revision: str | None = None
    """A branch, tag or commit. None: the hub's default branch."""

    def __post_init__(self) -> None:
        if self.hub not in HUBS:
            raise InvalidRequest(
                field="model_hub", problem=f"must be one of {', '.join(HUBS)}, got {self.hub!r}"
            )
        if not _MODEL_ID.fullmatch(self.model_id) or ".." in self.model_id:
            raise InvalidRequest(
                field="model_id",
                problem=f"must be as 'owner/name', got {self.model_id[:200]!r}",
            )
        if self.revision is not None and (
            not _REVISION.fullmatch(self.revision) or ".." in self.revision
        ):
            raise InvalidRequest(
                field="model_revision",
                problem=f"must be a branch, tag or commit, got {self.revision[:200]!r}",
            )

    def __str__(self) -> str:
        return self.model_id if self.revision is None else f"{self.model_id}@{self.revision}"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadRequest:
    """The files that one variant of a model needs."""

    model_version: str
    """The variant in one word, as "qwen3--0_6B--pytorch--none": what removes it again."""
    model_name: str
    model_type: str = "LLM"
    model_size_in_billions: str = ""
    model_format: str = "pytorch"
    quantization: str = "none"
    sources: tuple[HubSource, ...]
    """Repositories that hold the same files, the preferred one first."""
    patterns: tuple[str, ...] = ()
    """Globs of the files that are needed; each has to match. "*" matches "/" too. Empty: what
    `transformers` reads, the weights in one format."""
    main_file: str | None = None
    """A glob of the file that the model is loaded from, where that is one file, such as GGUF: the
    first of those it matches. None: it is loaded from their directory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileProgress:
    """How much of one file is there."""

    file_name: str
    """Its path in the repository."""
    size_bytes: int
    downloaded_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadProgress:
    """How far a download is."""

    files: tuple[FileProgress, ...] = ()
    info: str = ""
    """What it does now, in words."""

    @property
    def fraction(self) -> float:
        """From 0 to 1, by bytes."""
        total = sum(file.size_bytes for file in self.files)
        return sum(file.downloaded_bytes for file in self.files) / total if total else 0.0


class DownloadStage(StrEnum):
    """Of a download that was asked for without a launch."""

    PENDING = "pending"
    DOWNLOADING = "downloading"
    COMPLETED = "completed"
    CANCELLED = "cancelled"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadStatus:
    """A snapshot of such a download."""

    stage: DownloadStage
    progress: DownloadProgress = field(default_factory=DownloadProgress)
    error_message: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class CachedModel:
    """What a host keeps of one variant."""

    model_version: str
    model_name: str
    model_type: str
    model_size_in_billions: str
    model_format: str
    quantization: str
    source: HubSource
    path: str
    """The directory; other variants of the same repository may be in it."""
    files: tuple[str, ...]
    """Full paths of those of its files that no other variant needs: what a removal removes."""
    size_bytes: int
    """On disk, of all its files."""
    freed_bytes: int
    """On disk, what a removal frees."""
    is_complete: bool
    """False: a download was interrupted, or is under way."""
    used_by: tuple[str, ...] = ()
    """The models that run from it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeptModels:
    """What the hosts of a cluster keep."""

    models: dict[NodeId, list[CachedModel]]
    unanswered: tuple[NodeId, ...] = ()
    """Workers that did not say in time; what they keep is not among it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What a removal did."""

    model_version: str
    freed_bytes: int
    unanswered: tuple[NodeId, ...] = ()
    """Workers that did not say in time; what they kept of it they may still keep."""
