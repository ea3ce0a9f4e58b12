# SPDX-License-Identifier: Apache-2.0
"""What is logged of each request, where somebody wants that: a line, or what was asked as well.

    none      nothing; what fails by no fault of the caller's is logged anyhow
    summary   method, path, status and time
    prompts   the body, too, of what asks a model: what people write to it is in the log then

Bodies of other routes are never logged: they hold keys and the environments of processes.
"""

import logging
import time

from starlette.types import Message, Receive, Scope

from .access import ACCESS, INVOKE

logger = logging.getLogger(__name__)

MAX_BODY_BYTES = 16 * 1024
"""Of a body, the beginning."""

_STATE = "xinference.request_log"
"""In an ASGI scope: when the request came, and what was heard of its body."""


class RequestLog:
    """Notes requests; the id of each is in the line by itself."""

    def __init__(self, what: str) -> None:
        """Log `none`, a `summary` or `prompts`."""
        assert what in ("none", "summary", "prompts"), what
        self._is_on = what != "none"
        self._hears = what == "prompts"

    def begin(self, scope: Scope, receive: Receive) -> Receive:
        """Note that a request came; return what its body is to be read from."""
        if not self._is_on:
            return receive
        heard = bytearray()
        scope[_STATE] = (time.monotonic(), heard)
        if not self._hears:
            return receive

        async def overheard() -> Message:
            message = await receive()
            if message["type"] == "http.request" and len(heard) < MAX_BODY_BYTES:
                heard.extend(message.get("body", b"")[: MAX_BODY_BYTES - len(heard)])
            return message

        return overheard

    def end(self, scope: Scope, status: int) -> None:
        """Log a request that is over; a `status` of 0: its caller left before there was one."""
        if not self._is_on:
            return
        began, heard = scope[_STATE]
        seconds = time.monotonic() - began
        method = scope["method"]
        line = f"{method} {scope['path']} {status or 499} in {seconds:.3f} s"
        route = getattr(scope.get("route"), "path", None)
        if heard and ACCESS.get(f"{method} {route}") is INVOKE:
            line += f": {heard.decode(errors='replace')}"
        logger.info("%s", line)
