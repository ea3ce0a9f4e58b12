# SPDX-License-Identifier: Apache-2.0
"""Repositories that a launch names and the catalogue does not know: what is in them is asked of a
worker, which is where hubs are reached from, and the catalogue decides by that."""

import asyncio
from collections.abc import Callable, Sequence
from typing import Protocol

from xinference.errors import (
    DownloadFailed,
    DownloadUnavailable,
    InsufficientResources,
    PeerUnreachable,
    XinferenceError,
)
from xinference.identifiers import NodeId
from xinference.protocol.deployment import LaunchSpec, ModelDescription, ModelSource
from xinference.protocol.repositories import CardRequest, RepositoryCard

from .control_bus import ControlBus, Endpoint
from .downloads import CARD_SECONDS
from .every_worker import nodes_at
from .worker import CACHE

CALL_SECONDS = CARD_SECONDS + 1.0
RESOLVE_SECONDS = CALL_SECONDS + 1.0
"""For all workers that are asked, one after the other."""


class ResolvedLaunch(Protocol):
    """What the catalogue makes of a launch."""

    @property
    def description(self) -> ModelDescription:
        """What it is."""
        ...

    @property
    def source(self) -> ModelSource:
        """Its files."""
        ...

    @property
    def abilities(self) -> tuple[str, ...]:
        """What it can do."""
        ...


class ResolvingCatalog(Protocol):
    """What resolving a launch needs of `catalog.Catalog`."""

    def card_wanted(self, spec: LaunchSpec) -> CardRequest | None:
        """Return what to read before a launch is resolved, if anything. In any thread."""
        ...

    def resolve(self, spec: LaunchSpec, card: RepositoryCard | None = None) -> ResolvedLaunch:
        """Decide what a launch runs, or raise. May be called from any thread."""
        ...


class Repositories:
    """Reads repositories through the workers. Keeps nothing."""

    def __init__(
        self, *, bus: ControlBus, catalog: ResolvingCatalog, nodes: Callable[[], list[NodeId]]
    ) -> None:
        """Ask the workers.

        Args:
            nodes: returns those that have joined.
        """
        self._bus = bus
        self._catalog = catalog
        self._nodes = nodes

    async def resolve(self, spec: LaunchSpec) -> ResolvedLaunch:
        """Decide what a launch runs; only one that names an unknown repository waits.

        Raises:
            InvalidRequest, FamilyNotFound, UnsupportedVariant, DownloadUnavailable,
            DownloadFailed, InsufficientResources, PeerUnreachable
        """
        # Why threads: of a launch by path the heads of large files are read, and for the id of a
        # repository every family.
        wanted = await asyncio.to_thread(self._catalog.card_wanted, spec)
        if wanted is None:
            return await asyncio.to_thread(self._catalog.resolve, spec)
        nodes = nodes_at(self._nodes(), spec.worker_ip)
        if not nodes:
            raise InsufficientResources(
                problem="No worker has joined this cluster: start xinference-worker."
            )
        try:
            async with asyncio.timeout(RESOLVE_SECONDS):
                card = await self._read(wanted, nodes)
        except TimeoutError:
            problem = "no worker could read it in time"
            raise DownloadFailed(model=spec.model_name, problem=problem) from None
        return await asyncio.to_thread(self._catalog.resolve, spec, card)

    async def _read(self, wanted: CardRequest, nodes: Sequence[NodeId]) -> RepositoryCard:
        """Ask one worker after the other until one can say.

        Raises:
            XinferenceError: why the last one cannot, or what another one found.
        """
        reason: XinferenceError | None = None
        for node in nodes:
            try:
                text: str = await self._bus.call(
                    Endpoint(node, CACHE),
                    "read_card",
                    wanted,
                    returns=str,
                    timeout_seconds=CALL_SECONDS,
                )
            except (DownloadUnavailable, PeerUnreachable) as error:
                # Another one may be online, or have it.
                reason = error
            else:
                return RepositoryCard.from_json(text)
        assert reason is not None
        raise reason
