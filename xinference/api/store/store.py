# SPDX-License-Identifier: Apache-2.0
"""`Store`: all that the gateways of a home keep for their callers."""

import asyncio
import logging
from pathlib import Path

from xinference.errors import StoreUnavailable

from .answers import Answers
from .database import Database
from .limits import StoreLimits

logger = logging.getLogger(__name__)

PURGE_SECONDS = 60.0


class Store:
    """What is kept, by kind."""

    def __init__(self, path: Path | None = None, limits: StoreLimits | None = None) -> None:
        """Take the file, which is opened when it is first needed. None: in memory."""
        self._database = Database(path)
        self.answers = Answers(self._database, limits or StoreLimits())

    async def keep_within_limits(self) -> None:
        """Remove, now and then, what is old or too much; runs until it is cancelled."""
        while True:
            await asyncio.sleep(PURGE_SECONDS)
            try:
                await self.answers.purge()
            except StoreUnavailable as error:
                logger.warning("%s", error)

    async def aclose(self) -> None:
        """Finish what was asked, and close the file."""
        await self._database.aclose()
