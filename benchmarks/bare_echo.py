# SPDX-License-Identifier: Apache-2.0
"""The least that FastAPI can be asked to do: a chat route that counts, with no model and no checks.

    python -m benchmarks.bare_echo PORT

One uvicorn process with uvloop and httptools, as a gateway has. It is the yardstick of
`benchmarks/gateway.py`, and what LiteLLM's proxy has behind it there.
"""

import sys
from collections.abc import AsyncIterator
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from fastapi.responses import Response, StreamingResponse

app = FastAPI()


@app.post("/v1/chat/completions")
async def chat(body: dict[str, Any]) -> Any:
    """Count to `max_tokens`."""
    count = int(body.get("max_tokens") or 1)
    if body.get("stream"):
        return StreamingResponse(events(body["model"], count), media_type="text/event-stream")
    text = "".join(f" {number}" for number in range(1, count + 1))
    message = {"role": "assistant", "content": text}
    return {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": body["model"],
        "choices": [{"index": 0, "message": message, "finish_reason": "length"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": count, "total_tokens": count + 1},
    }


async def events(model: str, count: int) -> AsyncIterator[bytes]:
    """Yield a chunk for each number."""
    for number in range(1, count + 1):
        yield event(model, {"content": f" {number}"}, None)
    yield event(model, {}, "length")
    yield b"data: [DONE]\n\n"


def event(model: str, delta: dict[str, str], reason: str | None) -> bytes:
    """Return one chunk."""
    chunk = {
        "id": "chatcmpl-0",
        "object": "chat.completion.chunk",
        "created": 0,
        "model": model,
        "choices": [{"index": 0, "delta": delta, "finish_reason": reason}],
    }
    return b"data: " + orjson.dumps(chunk) + b"\n\n"


@app.get("/status")
async def status() -> Response:
    """Say that it runs."""
    return Response()


if __name__ == "__main__":
    uvicorn.run(
        app,
        port=int(sys.argv[1]),
        loop="uvloop",
        http="httptools",
        access_log=False,
        log_level="warning",
    )
