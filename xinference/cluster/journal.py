# SPDX-License-Identifier: Apache-2.0
"""What a worker leaves to the next one: which processes of replicas run, and how to reach them.

One file per instance in a directory that outlives the worker's process but not its guardian's.
A worker that starts reads them and adopts what still runs.
"""

import contextlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from xinference.errors import XinferenceError
from xinference.identifiers import InstanceId
from xinference.protocol.deployment import ReplicaSpec

from .messages import LaunchId

logger = logging.getLogger(__name__)

SUFFIX = ".json"


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningReplica:
    """A replica's process that listens."""

    pid: int
    started_at: int
    """By `supervision.Platform.start_of`: tells it from a later process of the same number."""
    address: str
    launch_id: LaunchId
    spec: ReplicaSpec
    used_before: dict[int, int] = field(default_factory=dict)
    """By GPU: the bytes that were in use before; see `DeviceLedger.started`."""


class ReplicaJournal:
    """The files of one directory. Calls take well under a millisecond."""

    def __init__(self, directory: Path) -> None:
        """Use the directory; it must exist and be private."""
        self._directory = directory

    def write(self, running: RunningReplica) -> None:
        """Note a process, or note it anew.

        Raises:
            OSError
        """
        path = self._path(running.spec.instance)
        new = path.with_suffix(".new")
        new.write_bytes(msgspec.json.encode(running))
        new.replace(path)

    def forget(self, instance: InstanceId) -> None:
        """Remove an instance; nothing happens if there is none."""
        with contextlib.suppress(OSError):
            self._path(instance).unlink()

    def read(self) -> list[RunningReplica]:
        """Return what was noted; what cannot be read is logged and removed."""
        found = []
        for path in sorted(self._directory.glob(f"*{SUFFIX}")):
            try:
                found.append(msgspec.json.decode(path.read_bytes(), type=RunningReplica))
            except (OSError, msgspec.DecodeError, XinferenceError):
                logger.exception("The note of instance %s cannot be read", path.stem)
                path.unlink(missing_ok=True)
        return found

    def _path(self, instance: InstanceId) -> Path:
        return self._directory / f"{instance}{SUFFIX}"
