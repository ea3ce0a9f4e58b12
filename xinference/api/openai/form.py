# SPDX-License-Identifier: Apache-2.0
"""The JSON of an answer in OpenAI's protocol: whole, or chunk by chunk.

What differs between chats and completions is how one choice looks; they say it in four methods.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar

import orjson

from xinference.api.errors import error_event
from xinference.api.generation import AnswerForm
from xinference.errors import XinferenceError
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Delta,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
    Usage,
)

DONE = b"data: [DONE]\n\n"


class AnswerParts:
    """The deltas of an answer, put together."""

    def __init__(self, deltas: Iterable[Delta]) -> None:
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        for delta in deltas:
            self._add(delta)

    def _add(self, delta: Delta) -> None:
        match delta:
            case TextDelta(text=text):
                self._text.append(text)
            case ReasoningDelta(text=text):
                self._reasoning.append(text)
            case ToolCallStart():
                self._calls.append((delta, []))
            case ToolCallArguments(index=index, text=text):
                self._calls[index][1].append(text)

    @property
    def text(self) -> str:
        """What is said to the reader."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """What was thought before."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> list[tuple[ToolCallStart, str]]:
        """The calls, with their arguments."""
        return [(start, "".join(arguments)) for start, arguments in self._calls]


class Form(AnswerForm):
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
    def piece(self, text: str) -> dict[str, Any]:
        """Return what a streamed choice says of a piece of text."""

    @abstractmethod
    def last_piece(self) -> dict[str, Any]:
        """Return what the choice says that has the finish reason."""

    @abstractmethod
    def answer(self, parts: AnswerParts) -> dict[str, Any]:
        """Return what a whole choice says."""

    def other_piece(self, delta: Delta) -> dict[str, Any] | None:
        """Return what a streamed choice says of a delta that is not text; None: nothing."""
        return None

    def delta(self, delta: Delta) -> bytes:
        """Return the chunk of a delta; nothing if it says nothing."""
        if isinstance(delta, TextDelta):
            return self._before + orjson.dumps(delta.text) + self._after if delta.text else b""
        piece = self.other_piece(delta)
        return b"" if piece is None else self._chunk(piece)

    def ending(self, finished: Finished) -> bytes:
        """Return what comes after the last text, `[DONE]` included."""
        chunks = self._chunk(self.last_piece(), finished.reason)
        if self._with_usage:
            chunks += self._event([], _usage(finished.usage))
        return chunks + DONE

    def failure(self, error: XinferenceError) -> bytes:
        """Return the event of an error, after which there is no `[DONE]`."""
        return error_event(error)

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the body of the answer in one piece."""
        parts = AnswerParts(deltas)
        choice = {
            "index": 0,
            **self.answer(parts),
            "logprobs": None,
            "finish_reason": finished.reason,
        }
        return orjson.dumps(
            {
                **self._about,
                "object": self.whole_object,
                "choices": [choice],
                "usage": _usage(finished.usage),
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
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
    }
