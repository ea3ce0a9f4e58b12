# SPDX-License-Identifier: Apache-2.0
"""One question to many workers at once. A silent one costs the others nothing but its deadline."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from xinference.errors import InvalidRequest, PeerUnreachable
from xinference.identifiers import NodeId

from .control_bus import ControlBus, Endpoint
from .placement import is_at


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """What workers said."""

    by_node: dict[NodeId, Any]
    unanswered: tuple[NodeId, ...]
    """Those that did not say in time, or are gone."""


def nodes_at(
    joined: Sequence[NodeId], name: str | None, *, field: str = "worker_ip"
) -> list[NodeId]:
    """Return the workers that are named; None names all of them.

    Raises:
        InvalidRequest: there is none of this name; `field` is what asked for it.
    """
    nodes = [node for node in joined if is_at(node, name)]
    if not nodes and name is not None:
        problem = f"no worker is at {name}; workers: {', '.join(joined) or 'none'}"
        raise InvalidRequest(field=field, problem=problem)
    return nodes


async def ask_each(
    bus: ControlBus,
    nodes: Sequence[NodeId],
    actor: str,
    method: str,
    *arguments: object,
    returns: Any = None,
    timeout_seconds: float,
) -> Answers:
    """Ask an actor of each node, all at once.

    Raises:
        XinferenceError: one refused; the others have done what they were asked.
    """
    asking = [
        bus.call(
            Endpoint(node, actor),
            method,
            *arguments,
            returns=returns,
            timeout_seconds=timeout_seconds,
        )
        for node in nodes
    ]
    answers = await asyncio.gather(*asking, return_exceptions=True)
    by_node: dict[NodeId, Any] = {}
    unanswered: list[NodeId] = []
    for node, answer in zip(nodes, answers, strict=True):
        if isinstance(answer, PeerUnreachable):
            unanswered.append(node)
        elif isinstance(answer, BaseException):
            raise answer
        else:
            by_node[node] = answer
    return Answers(by_node=by_node, unanswered=tuple(unanswered))


def unreachable(nodes: Sequence[NodeId], problem: str) -> PeerUnreachable:
    """Return the error for workers that did not answer."""
    return PeerUnreachable(peer=f"worker {', '.join(nodes)}", problem=problem)
