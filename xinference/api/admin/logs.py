# SPDX-License-Identifier: Apache-2.0
"""What models and hosts have logged: the last lines, what came since, or all that comes.

A cursor says how far every file was read, so that who asks again misses nothing and gets nothing
twice; the gateway keeps nothing. It is made here, and read as what anybody might have written.
"""

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import orjson
from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from xinference.api.answers import json_answer
from xinference.api.connection import wait_disconnected
from xinference.api.gateway import Gateway, gateway_of
from xinference.api.generation import STREAM_HEADERS
from xinference.api.openapi import refusals
from xinference.errors import InsufficientResources, InvalidRequest, XinferenceError
from xinference.identifiers import ModelUid, NodeId
from xinference.protocol.logs import (
    SUPERVISOR_NODE,
    LogBatch,
    LogLine,
    LogPosition,
    LogQuery,
)

from .schema import LogAnswer

MAX_LINES = 10_000
MAX_CURSOR_LEN = 32 * 1024
MAX_POSITIONS = 1024
POLL_SECONDS = 0.5
"""Between looks at logs that are followed."""
FOLLOW_SECONDS = 3600.0
"""After so long a stream ends, with a cursor to go on from."""
MAX_FOLLOWERS = 64
"""Of one gateway process; each costs a call of every worker now and then."""
DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"

router = APIRouter(tags=["Logs"], default_response_class=Response)

Uid = Annotated[str, Path(description="The uid of a model, also of one that runs no longer.")]
Replica = Annotated[int | None, Query(ge=0, description="Only this one.")]
Level = Annotated[
    Literal["DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL"],
    Query(description="The lowest level that is wanted."),
]
Lines = Annotated[int, Query(ge=0, le=MAX_LINES, description="The last ones; so many at most.")]
Follow = Annotated[
    bool,
    Query(description="Go on: a stream of server-sent events, each such an answer, for an hour."),
]
Cursor = Annotated[
    str | None,
    Query(max_length=MAX_CURSOR_LEN, description="Of an earlier answer: only what came since."),
]
WorkerOrSupervisor = Annotated[
    str, Query(description='A worker: its host, or "host:port"; or "supervisor".')
]
ANSWERS: dict[int | str, dict[str, Any]] = {
    200: {
        "model": LogAnswer,
        "content": {"text/event-stream": {}},
        "description": "Lines by their time; with `follow`, events of such.",
    },
    **refusals(400, 404, 503),
}


@router.get("/v1/models/{model_uid}/logs", responses=ANSWERS)
async def model_logs(
    request: Request,
    model_uid: Uid,
    lines: Lines = 100,
    level: Level = "DEBUG",
    replica: Replica = None,
    follow: Follow = False,
    cursor: Cursor = None,
) -> Response:
    """Return what the replicas of a model logged, on every worker, by its time."""
    query = LogQuery(
        model=ModelUid(model_uid),
        replica=replica,
        level=level,
        num_lines=lines,
        positions=_positions(cursor),
    )
    return await _answer(gateway_of(request), query, follow=follow)


@router.get("/v1/cluster/logs", responses=ANSWERS)
async def host_logs(
    request: Request,
    node: WorkerOrSupervisor = SUPERVISOR_NODE,
    lines: Lines = 100,
    level: Level = "DEBUG",
    follow: Follow = False,
    cursor: Cursor = None,
) -> Response:
    """Return what supervisor, worker, gateways and downloads of one host logged, by its time."""
    query = LogQuery(node=NodeId(node), level=level, num_lines=lines, positions=_positions(cursor))
    return await _answer(gateway_of(request), query, follow=follow)


async def _answer(gateway: Gateway, query: LogQuery, *, follow: bool) -> Response:
    first = await gateway.cluster.logs(query)
    if not follow:
        return json_answer(_item(first))
    if len(gateway.log_followers) >= MAX_FOLLOWERS:
        problem = f"{MAX_FOLLOWERS} logs are followed already; ask again with a cursor instead."
        raise InsufficientResources(problem=problem)
    return _FollowedLog(gateway, query, first)


class _FollowedLog(Response):
    """Sends what a log says, as it comes, until the client leaves or an hour is over."""

    def __init__(self, gateway: Gateway, query: LogQuery, first: LogBatch) -> None:
        self.background = None
        self._gateway = gateway
        self._query = query
        self._first = first
        # Why here: between this and the first byte another one might be let in.
        gateway.log_followers.add(self)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer; returns when the stream is over."""
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *STREAM_HEADERS]
        left = asyncio.create_task(wait_disconnected(receive), name="log follower leaves")
        try:
            await send({"type": "http.response.start", "status": 200, "headers": headers})
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(FOLLOW_SECONDS):
                    await self._follow(left, send)
            if not left.done():
                await send({"type": "http.response.body", "body": DONE, "more_body": False})
        finally:
            self._gateway.log_followers.discard(self)
            left.cancel()

    async def _follow(self, left: "asyncio.Task[None]", send: Send) -> None:
        loop = asyncio.get_running_loop()
        batch, told = self._first, None
        spoke_at = loop.time()
        while not left.done():
            if batch.lines or batch.silent != told:
                await send(_message(b"data: " + orjson.dumps(_item(batch)) + b"\n\n"))
                told, spoke_at = batch.silent, loop.time()
            elif loop.time() - spoke_at > self._gateway.keep_alive_seconds:
                await send(_message(KEEP_ALIVE))
                spoke_at = loop.time()
            await asyncio.wait({left}, timeout=POLL_SECONDS)
            batch = await self._next(batch)

    async def _next(self, batch: LogBatch) -> LogBatch:
        try:
            query = replace(self._query, positions=batch.positions)
            return await self._gateway.cluster.logs(query)
        except XinferenceError as error:
            # Why go on: a supervisor that is started again answers in a moment.
            silent = {SUPERVISOR_NODE: str(error)}
            return LogBatch(lines=(), positions=batch.positions, silent=silent)


def _message(body: bytes) -> dict[str, Any]:
    return {"type": "http.response.body", "body": body, "more_body": True}


def _item(batch: LogBatch) -> dict[str, Any]:
    return {
        "lines": [_line_item(line) for line in batch.lines],
        "silent": _silent_items(batch.silent),
        "cursor": _cursor(batch.positions),
    }


def _line_item(line: LogLine) -> dict[str, Any]:
    return {
        "time": line.time,
        "level": line.level,
        "node": line.node,
        "replica": line.replica,
        "process": line.process,
        "logger": line.logger,
        "request_id": line.request_id or None,
        "message": line.message,
    }


def _silent_items(silent: Mapping[NodeId, str]) -> list[dict[str, str]]:
    return [{"node": node, "problem": problem} for node, problem in silent.items()]


def _cursor(positions: Iterable[LogPosition]) -> str:
    rows = [[one.node, one.name, one.inode, one.offset] for one in positions]
    return base64.urlsafe_b64encode(orjson.dumps(rows)).decode()


def _positions(cursor: str | None) -> tuple[LogPosition, ...] | None:
    """Read what `_cursor` wrote.

    Raises:
        InvalidRequest: it is something else.
    """
    if cursor is None:
        return None
    try:
        rows = orjson.loads(base64.b64decode(cursor, altchars=b"-_", validate=True))
        found = tuple(
            LogPosition(node=NodeId(str(node)), name=str(name), inode=inode, offset=offset)
            for node, name, inode, offset in rows
        )
    except (binascii.Error, ValueError, TypeError):
        found = None
    if found is None or len(found) > MAX_POSITIONS or not all(map(_is_whole, found)):
        raise InvalidRequest(field="cursor", problem="is not the cursor of an earlier answer")
    return found


def _is_whole(position: LogPosition) -> bool:
    numbers = (position.inode, position.offset)
    return all(type(number) is int and 0 <= number < 2**63 for number in numbers)
