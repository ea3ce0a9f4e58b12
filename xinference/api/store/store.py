# SPDX-License-Identifier: Apache-2.0
"""`Store`: all that the gateways of a home keep for their callers."""

import asyncio
import logging
import time
from pathlib import Path

from xinference.errors import StoreUnavailable

from .answers import Answers
from .batches import Batches
from .database import Database
from .files import Files
from .limits import StoreLimits

logger = logging.getLogger(__name__)

PURGE_SECONDS = 60.0


class Store:
    """What is kept, by kind."""

    def __init__(self, path: Path | None = None, limits: StoreLimits | None = None) -> None:
        """Take the file, which is opened when it is first needed. None: in memory."""
        self._database = Database(path)
        self.limits = limits or StoreLimits()
        self.answers = Answers(self._database, self.limits)
        self.files = Files(self._database, self.limits)
        self.batches = Batches(self._database)

    async def keep_within_limits(self) -> None:
        """Remove, now and then, what is old or too much; runs until it is cancelled."""
        while True:
            await asyncio.sleep(PURGE_SECONDS)
            try:
                await self.purge()
            except StoreUnavailable as error:
                logger.warning("%s", error)

    async def purge(self) -> None:
        """Remove what is old or too much.

        Raises:
            StoreUnavailable
        """
        await self.answers.purge()
        await self.files.purge()
        await self.batches.purge(older_than_ts=int(time.time() - self.limits.batch_days * 86400))

    async def aclose(self) -> None:
        """Finish what was asked, and close the file."""
        await self._database.aclose()
