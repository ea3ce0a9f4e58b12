# SPDX-License-Identifier: Apache-2.0
"""Server-sent events in, JSON objects out; and what a server says when it refuses."""

import json
from collections.abc import AsyncIterator
from typing import Any

import httpx

from xinference.errors import InternalError, InvalidRequest, ModelOverloaded, XinferenceError

MAX_ERROR_CHARS = 500


async def chunks(response: httpx.Response) -> AsyncIterator[dict[str, Any]]:
    """Yield the objects of a streamed answer; of one that is not streamed, the only one.

    Raises:
        ValueError: the server speaks no JSON.
        httpx.TransportError: the connection was lost.
    """
    if "text/event-stream" not in response.headers.get("content-type", ""):
        yield json.loads(await response.aread())
        return
    async for line in response.aiter_lines():
        field, _, value = line.partition(":")
        value = value.strip()
        if field == "error":
            yield {"error": json.loads(value)}
        elif field == "data" and value != "[DONE]":
            yield json.loads(value)


def refusal(status: int, said: Any, *, model_name: str) -> XinferenceError:
    """Return the error of what a server refused or failed.

    Args:
        status: of the answer, or the code in an error that came in a stream.
        said: its body, or the error in the stream.
        model_name: for messages.
    """
    error = said.get("error", said) if isinstance(said, dict) else said
    text = error.get("message", error) if isinstance(error, dict) else error
    problem = str(text)[:MAX_ERROR_CHARS]
    if status == 429:
        return ModelOverloaded(model=model_name, num_waiting=0, retry_after_seconds=1)
    if 400 <= status < 500 and status not in (401, 403, 404):
        return InvalidRequest(field="", problem=f"the engine refuses it: {problem}")
    return InternalError(where="the engine's server", problem=f"{status}: {problem}")
