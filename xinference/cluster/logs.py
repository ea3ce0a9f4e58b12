# SPDX-License-Identifier: Apache-2.0
"""The logs of the cluster's hosts, read where they are and merged by their time.

`LogActor` is one host's, beside its worker or supervisor; `LogsActor` is the supervisor's, and asks
those. Neither keeps anything: who follows a log says how far it was read.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from xinference.errors import PeerUnreachable
from xinference.identifiers import ModelUid, NodeId
from xinference.protocol.logs import SUPERVISOR_NODE, LogBatch, LogLine, LogPosition, LogQuery

from .control_bus import ControlBus, Endpoint, remote
from .every_worker import nodes_at
from .log_files import last_lines, read_logs
from .worker import LOG

logger = logging.getLogger(__name__)

CALL_TIMEOUT_SECONDS = 3.0
"""Who does not answer by then is named, and the lines of the others come."""
MAX_READERS = 4
"""Threads of a host that read logs at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLog:
    """What one host answers."""

    lines: tuple[LogLine, ...]
    positions: tuple[LogPosition, ...]


class LogActor:
    """The logs of one host. Its methods interleave at awaits."""

    def __init__(self, home: Path, *, node: NodeId) -> None:
        """Read below `home`.

        Args:
            node: what this host is called in the lines.
        """
        self._home = home
        self._node = node
        self._readers = asyncio.Semaphore(MAX_READERS)

    @remote
    async def read(self, query: LogQuery) -> HostLog:
        """Return the lines of a log that are on this host, by their time."""
        async with self._readers:
            lines, positions = await asyncio.to_thread(
                read_logs, self._home, query, node=self._node
            )
        return HostLog(lines=tuple(lines), positions=tuple(positions))


class LogsActor:
    """The logs of all hosts. Keeps nothing: every answer is asked for."""

    def __init__(
        self,
        *,
        bus: ControlBus,
        own: LogActor,
        nodes: Callable[[], list[NodeId]],
        check_model: Callable[[ModelUid], object],
    ) -> None:
        """Ask the workers.

        Args:
            own: of the supervisor's host.
            nodes: returns the workers that have joined.
            check_model: raises `ModelNotFound` for a model that there is not.
        """
        self._bus = bus
        self._own = own
        self._nodes = nodes
        self._check_model = check_model

    @remote
    async def read(self, query: LogQuery) -> LogBatch:
        """Return the lines of a log, by their time, and who did not answer.

        Raises:
            ModelNotFound: there is neither such a model nor a log of one.
            InvalidRequest: no such worker has joined.
        """
        nodes = self._asked(query)
        answers = await asyncio.gather(*(self._read(node, query) for node in nodes))
        logs: dict[NodeId, HostLog] = {}
        silent: dict[NodeId, str] = {}
        for node, answer in zip(nodes, answers, strict=True):
            if isinstance(answer, HostLog):
                logs[node] = answer
            else:
                silent[node] = answer.problem
        positions = [one for log in logs.values() for one in log.positions]
        if query.positions is None and query.model is not None and not positions and not silent:
            self._check_model(query.model)
        for position in query.positions or ():
            if position.node not in logs:
                # Why kept: it may be back at the next look.
                positions.append(position)
                silent.setdefault(position.node, "it has left the cluster")
        lines = sorted(
            (line for log in logs.values() for line in log.lines), key=lambda line: line.time
        )
        if query.positions is None:
            lines = last_lines(lines, query.num_lines)
        return LogBatch(lines=tuple(lines), positions=tuple(positions), silent=silent)

    def _asked(self, query: LogQuery) -> list[NodeId]:
        if query.node == SUPERVISOR_NODE:
            return [SUPERVISOR_NODE]
        return nodes_at(self._nodes(), query.node, field="node")

    async def _read(self, node: NodeId, query: LogQuery) -> HostLog | PeerUnreachable:
        # Why its own alone: with a thousand hosts, each would be sent the positions of all.
        if query.positions is not None:
            own = tuple(one for one in query.positions if one.node == node)
            query = replace(query, positions=own)
        if node == SUPERVISOR_NODE:
            return await self._own.read(query)
        try:
            answer: HostLog = await self._bus.call(
                Endpoint(node, LOG),
                "read",
                query,
                returns=HostLog,
                timeout_seconds=CALL_TIMEOUT_SECONDS,
            )
        except PeerUnreachable as unreachable:
            logger.debug("No log of %s: %s", node, unreachable)
            return unreachable
        return answer
