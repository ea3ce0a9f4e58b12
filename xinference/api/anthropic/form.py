# SPDX-License-Identifier: Apache-2.0
"""The JSON of an answer in Anthropic's protocol: whole, or event by event.

An answer is a list of blocks: text, thoughts and calls, in the order in which the model wrote
them. `_Blocks` says which delta begins a new one, for both ways of answering.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import orjson
from pydantic_core import from_json

from xinference.api.error_shapes import anthropic_body
from xinference.api.errors import told
from xinference.api.generation import AnswerForm
from xinference.errors import XinferenceError
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    ReasoningDelta,
    TextDelta,
    ToolCallStart,
    Usage,
)

FIELD_NAMES = {
    "enable_thinking": "thinking.type",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
    "thinking_budget": "thinking.budget_tokens",
}
STOP_REASONS = {
    FinishReason.STOP: "end_turn",
    FinishReason.TOOL_CALLS: "tool_use",
    FinishReason.LENGTH: "max_tokens",
}
PIECES = {
    "text": ("text_delta", "text"),
    "thinking": ("thinking_delta", "thinking"),
    "tool_use": ("input_json_delta", "partial_json"),
}
"""How a piece of each type of block is called, and the field that its text is in."""


class _Blocks:
    """Follows an answer through its blocks."""

    def __init__(self) -> None:
        self.index = -1
        """Of the block that is open."""
        self.kind = ""
        """Its type; empty before the first."""

    def opened_by(self, delta: Delta) -> dict[str, Any] | None:
        """Return the new block, still empty, that a delta begins; None: it goes on with the old."""
        block: dict[str, Any]
        match delta:
            case ToolCallStart(call_id=call_id, name=name):
                block = {"type": "tool_use", "id": call_id, "name": name, "input": {}}
            case TextDelta() if self.kind != "text":
                block = {"type": "text", "text": ""}
            case ReasoningDelta() if self.kind != "thinking":
                block = {"type": "thinking", "thinking": "", "signature": ""}
            case _:
                return None
        self.index += 1
        self.kind = block["type"]
        return block


class MessageForm(AnswerForm):
    """Writes the answer of one request."""

    field_names = FIELD_NAMES
    _ping: ClassVar[bytes] = b'event: ping\ndata: {"type":"ping"}\n\n'

    def __init__(self, asked: GenerationRequest, model: str, *, trace_id: str) -> None:
        """Take what was asked.

        Args:
            trace_id: of the request, which errors tell.
        """
        self._stop_sequences = asked.sampling.stop
        self._trace_id = trace_id
        self._about = {
            "id": f"msg_{asked.request_id}",
            "type": "message",
            "role": "assistant",
            "model": model,
        }
        self._blocks = _Blocks()
        self._before = b""
        """Of a piece of the open block: what is written before its text."""

    def opening(self, accepted: Accepted) -> bytes:
        """Return the start of the message; the cached tokens are known at its end."""
        usage = Usage(num_prompt_tokens=accepted.num_prompt_tokens, num_completion_tokens=0)
        message: dict[str, Any] = {
            **self._about,
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": _usage(usage),
        }
        return _event({"type": "message_start", "message": message})

    def delta(self, delta: Delta) -> bytes:
        """Return the piece, and before it the bounds of blocks, if it begins one."""
        if not isinstance(delta, ToolCallStart) and not delta.text:
            return b""
        bounds = self._open(delta)
        if isinstance(delta, ToolCallStart):
            return bounds
        return bounds + self._before + orjson.dumps(delta.text) + b"}}\n\n"

    def _open(self, delta: Delta) -> bytes:
        """Return the bounds of blocks that come before a delta; nothing within a block."""
        last = self._blocks.index
        block = self._blocks.opened_by(delta)
        if block is None:
            return b""
        index = self._blocks.index
        kind, field = PIECES[block["type"]]
        # Why: one piece is written per token, and all of it but the text is always the same.
        self._before = (
            "event: content_block_delta\n"
            f'data: {{"type":"content_block_delta","index":{index},'
            f'"delta":{{"type":"{kind}","{field}":'
        ).encode()
        start = {"type": "content_block_start", "index": index, "content_block": block}
        return _block_end(last) + _event(start)

    def ending(self, finished: Finished) -> bytes:
        """Return the end of the last block, and of the message."""
        end = {"type": "message_delta", "delta": self._end(finished)}
        end["usage"] = _usage(finished.usage)
        return _block_end(self._blocks.index) + _event(end) + _event({"type": "message_stop"})

    def failure(self, error: XinferenceError) -> bytes:
        """Return the event that Anthropic's clients raise."""
        return _named("error", anthropic_body(told(error), self._trace_id))

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the message in one piece."""
        blocks: list[dict[str, Any]] = []
        texts: list[list[str]] = []
        for delta in deltas:
            if not isinstance(delta, ToolCallStart) and not delta.text:
                continue
            block = self._blocks.opened_by(delta)
            if block is not None:
                blocks.append(block)
                texts.append([])
            if not isinstance(delta, ToolCallStart):
                texts[-1].append(delta.text)
        for block, pieces in zip(blocks, texts, strict=True):
            _fill(block, "".join(pieces))
        return orjson.dumps(
            {
                **self._about,
                "content": blocks,
                **self._end(finished),
                "usage": _usage(finished.usage),
            }
        )

    def keep_alive(self) -> bytes:
        """Return a ping, as Anthropic sends it."""
        return self._ping

    def _end(self, finished: Finished) -> dict[str, Any]:
        reason = STOP_REASONS[finished.reason]
        stop = finished.stop_string
        if stop is None or stop not in self._stop_sequences:
            return {"stop_reason": reason, "stop_sequence": None}
        return {"stop_reason": "stop_sequence", "stop_sequence": stop}


def _fill(block: dict[str, Any], text: str) -> None:
    if block["type"] != "tool_use":
        block[block["type"]] = text
    elif text:
        # Why partial: what `max_tokens` cut is told as far as it goes, as clients of a stream do.
        block["input"] = from_json(text, allow_partial=True)


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens - usage.num_cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": usage.num_cached_tokens,
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"thinking_tokens": usage.num_reasoning_tokens},
    }


def _block_end(index: int) -> bytes:
    return _event({"type": "content_block_stop", "index": index}) if index >= 0 else b""


def _event(content: dict[str, Any]) -> bytes:
    return _named(content["type"], content)


def _named(name: str, content: dict[str, Any]) -> bytes:
    return b"event: " + name.encode() + b"\ndata: " + orjson.dumps(content) + b"\n\n"
