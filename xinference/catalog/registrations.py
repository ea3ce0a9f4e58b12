# SPDX-License-Identifier: Apache-2.0
"""Registered families as files: one JSON document each, under one directory.

A file is whole or absent whatever happens to the process or the machine: it is written beside
its place, flushed to the disk and renamed. Only files of this directory are read or removed.
Names come checked, by `identifiers.family_name`: none has a slash. What is in a document is the
business of `schema`; this module moves text.
"""

import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from xinference.errors import InsufficientResources

logger = logging.getLogger(__name__)

_SUFFIX = ".json"


class Registrations:
    """The directory of one model type. Nobody else writes there; it is made on the first write."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load(self) -> Iterator[tuple[str, str]]:
        """Yield the name and text of each document. One that cannot be read is logged and left.

        What an interrupted `save` left behind is removed.
        """
        for unfinished in self._directory.glob(".*.tmp"):
            with suppress(OSError):
                unfinished.unlink()
        for path in sorted(self._directory.glob(f"*{_SUFFIX}")):
            try:
                yield path.name.removesuffix(_SUFFIX), path.read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                logger.error("Registration %s cannot be read and is skipped: %s", path, error)

    def path_of(self, name: str) -> Path:
        """Return the file of a family; it may not exist."""
        return self._directory / f"{name}{_SUFFIX}"

    def save(self, name: str, text: str) -> None:
        """Write the document of a family. On an error nothing has changed.

        Raises:
            InsufficientResources: the disk is full or not writable.
        """
        path = self.path_of(name)
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
            # Why mkstemp: the name is new and the mode is 0600 from the first byte.
            handle, temporary = tempfile.mkstemp(dir=self._directory, prefix=".", suffix=".tmp")
            try:
                with os.fdopen(handle, "w", encoding="utf-8") as file:
                    file.write(text)
                    file.flush()
                    os.fsync(file.fileno())
                Path(temporary).replace(path)
            except BaseException:
                with suppress(OSError):
                    Path(temporary).unlink()
                raise
            self._sync_directory()
        except OSError as error:
            raise InsufficientResources(
                problem=f"The registration of {name} could not be kept in {path}: {error.strerror}"
            ) from error

    def remove(self, name: str) -> None:
        """Remove the document of a family; one that is gone already is fine.

        Raises:
            InsufficientResources: it cannot be removed.
        """
        path = self.path_of(name)
        try:
            path.unlink(missing_ok=True)
            self._sync_directory()
        except OSError as error:
            raise InsufficientResources(
                problem=f"The registration {path} could not be removed: {error.strerror}"
            ) from error

    def _sync_directory(self) -> None:
        # Why: a rename is on the disk only when its directory is.
        directory = os.open(self._directory, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
