# SPDX-License-Identifier: Apache-2.0
"""The JSON of an answer in OpenAI's protocol: whole, or chunk by chunk.

What differs between chats and completions is how one choice looks; they say it in four methods.
"""

import time
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import orjson

from xinference.identifiers import RequestId
from xinference.protocol.generation import FinishReason, Usage

DONE = b"data: [DONE]\n\n"


class Form(ABC):
    """Writes the answer of one request. The chunks are whole server-sent events."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(self, request_id: RequestId, model: str, *, with_usage: bool) -> None:
        self._with_usage = with_usage
        self._about = {
            "id": f"{self.id_prefix}-{request_id}",
            "created": int(time.time()),
            "model": model,
        }
        # Why: one chunk is written per token, and all of it but the text is always the same.
        # The text is the last NUL in it; a caller may have put one into the model's name.
        sample = self._chunk(self.piece("\0"))
        self._before, _, self._after = sample.rpartition(b'"\\u0000"')

    @abstractmethod
    def opening(self) -> bytes:
        """Return the chunk that comes before the first text; may be empty."""

    @abstractmethod
    def piece(self, text: str) -> dict[str, Any]:
        """Return what a streamed choice says of a piece of text."""

    @abstractmethod
    def last_piece(self) -> dict[str, Any]:
        """Return what the choice says that has the finish reason."""

    @abstractmethod
    def answer(self, text: str) -> dict[str, Any]:
        """Return what a whole choice says."""

    def delta(self, text: str) -> bytes:
        """Return the chunk of a piece of text."""
        return self._before + orjson.dumps(text) + self._after

    def ending(self, reason: FinishReason, usage: Usage) -> bytes:
        """Return what comes after the last text, `[DONE]` included."""
        chunks = self._chunk(self.last_piece(), reason)
        if self._with_usage:
            chunks += self._event([], _usage(usage))
        return chunks + DONE

    def whole(self, text: str, reason: FinishReason, usage: Usage) -> bytes:
        """Return the body of the answer in one piece."""
        choice = {"index": 0, **self.answer(text), "logprobs": None, "finish_reason": reason}
        return orjson.dumps(
            {
                **self._about,
                "object": self.whole_object,
                "choices": [choice],
                "usage": _usage(usage),
            }
        )

    def _chunk(self, piece: dict[str, Any], reason: FinishReason | None = None) -> bytes:
        return self._event([{"index": 0, **piece, "logprobs": None, "finish_reason": reason}], None)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        chunk = {**self._about, "object": self.chunk_object, "choices": choices}
        if self._with_usage:
            chunk["usage"] = usage
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
    }
