# SPDX-License-Identifier: Apache-2.0
"""The JSON of a response: whole, or the events that tell how it comes about.

Both are made by one `Output`, which takes the deltas one after the other. An event has a type, a
number and what it is about; the events of an item come between its `added` and its `done`.
"""

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import orjson

from xinference.api.error_shapes import openai_body
from xinference.api.errors import told
from xinference.api.generation import AnswerForm
from xinference.api.openai.form import with_top
from xinference.api.openai.obfuscation import padding
from xinference.api.openai.tier import served_as
from xinference.errors import XinferenceError
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
    Usage,
)

from .items import ID_PREFIXES, output_text, reasoning_content, sealed
from .schema import ResponseRequest

Event = dict[str, Any]

DELTA_EVENTS = {
    "message": "response.output_text",
    "reasoning": "response.reasoning_text",
    "function_call": "response.function_call_arguments",
}


FIELD_NAMES: Mapping[str, str] = {
    "max_tokens": "max_output_tokens",
    "messages": "input",
    "reasoning_effort": "reasoning.effort",
}
"""What a replica may refuse, in the words of this API."""


class Output:
    """The items of an answer, while its deltas are taken."""

    def __init__(self, response_id: str, *, seal_thoughts: bool) -> None:
        self._suffix = response_id.partition("_")[2]
        self._seal_thoughts = seal_thoughts
        self._items: list[dict[str, Any]] = []
        self._open: dict[str, Any] | None = None
        self._pieces: list[str] = []
        self._logprobs: list[dict[str, Any]] = []

    @property
    def items(self) -> list[dict[str, Any]]:
        """The items that are whole, or were cut."""
        return self._items

    def take(self, delta: Delta) -> list[Event]:
        """Take the next delta; return what happens with it."""
        match delta:
            case TextDelta(text=text, logprobs=logprobs):
                return self._add("message", text, logprobs)
            case ReasoningDelta(text=text):
                return self._add("reasoning", text)
            case ToolCallArguments(text=text):
                return self._add("function_call", text)
            case ToolCallStart(call_id=call_id, name=name):
                about = {"arguments": "", "call_id": call_id, "name": name}
                return [*self.close("completed"), *self._begin("function_call", about)]

    def close(self, status: str) -> list[Event]:
        """End the item that is being written, if there is one."""
        if self._open is None:
            return []
        item, text = self._open, "".join(self._pieces)
        kind = item["type"]
        where = self._where()
        done = {"type": f"{DELTA_EVENTS[kind]}.done", **where}
        item["status"] = status
        if kind == "function_call":
            item["arguments"] = done["arguments"] = text
            events = [done]
        else:
            part = _part(kind, text, self._logprobs)
            item["content"] = [part]
            done["text"] = text
            events = [done, {"type": "response.content_part.done", **where, "part": part}]
        if kind == "message":
            done["logprobs"] = self._logprobs
        if kind == "reasoning" and self._seal_thoughts:
            item["encrypted_content"] = sealed(text)
        self._items.append(item)
        self._open, self._pieces, self._logprobs = None, [], []
        index = where["output_index"]
        ended = {"type": "response.output_item.done", "output_index": index, "item": item}
        return [*events, ended]

    def _add(self, kind: str, text: str, logprobs: Sequence[TokenLogprob] = ()) -> list[Event]:
        if not text and not logprobs:
            return []
        events: list[Event] = []
        if self._open is None or self._open["type"] != kind:
            about = {"role": "assistant", "content": []}
            if kind == "reasoning":
                about = reasoning_content("")
            events = [*self.close("completed"), *self._begin(kind, about)]
        self._pieces.append(text)
        told_logprobs = [with_top(one) for one in logprobs]
        self._logprobs += told_logprobs
        event = {"type": f"{DELTA_EVENTS[kind]}.delta", **self._where(), "delta": text}
        if kind == "message":
            event["logprobs"] = told_logprobs
        return [*events, event]

    def _begin(self, kind: str, about: dict[str, Any]) -> list[Event]:
        index = len(self._items)
        self._open = {
            "id": f"{ID_PREFIXES[kind]}_{self._suffix}{index:04x}",
            "type": kind,
            "status": "in_progress",
            **about,
        }
        added = {"type": "response.output_item.added", "output_index": index, "item": self._open}
        # Why a copy: the item changes before the event is written.
        events: list[Event] = [{**added, "item": dict(self._open)}]
        if kind != "function_call":
            part = _part(kind, "", [])
            events.append({"type": "response.content_part.added", **self._where(), "part": part})
        return events

    def _where(self) -> dict[str, Any]:
        assert self._open is not None
        where = {"item_id": self._open["id"], "output_index": len(self._items)}
        return where if self._open["type"] == "function_call" else {**where, "content_index": 0}


def _part(kind: str, text: str, logprobs: list[dict[str, Any]]) -> dict[str, Any]:
    if kind == "message":
        return output_text(text, logprobs)
    return {"type": "reasoning_text", "text": text}


class ResponseForm(AnswerForm):
    """Writes the answer of one request."""

    field_names: ClassVar[Mapping[str, str]] = FIELD_NAMES

    def __init__(self, body: ResponseRequest, response_id: str) -> None:
        self._about = _about(body, response_id)
        self._response_id = response_id
        self._seal_thoughts = "reasoning.encrypted_content" in (body.include or ())
        self._output = self._new_output()
        options = body.stream_options
        self._is_padded = options is not None and bool(options.include_obfuscation)
        self._num_events = 0
        self._completed_at: int | None = None

    def opening(self, accepted: Accepted) -> bytes:
        """Return the two events that come before all items."""
        response = self._response("in_progress", [])
        return self._written(
            [
                {"type": "response.created", "response": response},
                {"type": "response.in_progress", "response": response},
            ]
        )

    def delta(self, delta: Delta) -> bytes:
        """Return what happens with a delta."""
        return self._written(self._output.take(delta))

    def ending(self, finished: Finished) -> bytes:
        """Return how the last item ends, and the whole response."""
        events = self._output.close(_item_status(finished))
        response = self._ended(self._output, finished)
        return self._written(
            [*events, {"type": f"response.{response['status']}", "response": response}]
        )

    def failure(self, error: XinferenceError) -> bytes:
        """Return the events of a failure.

        Why two: `response.failed` is what readers of the events look for, and a client of
        OpenAI's raises an exception for nothing but an `error` at the top.
        """
        self._output.close("incomplete")
        body = openai_body(told(error), "")
        about = body["error"]
        failed = self._response("failed", self._output.items)
        is_ours = about["type"] == "server_error"
        failed["error"] = {
            "code": "server_error" if is_ours else "invalid_prompt",
            "message": about["message"],
        }
        return self._written(
            [
                {"type": "response.failed", "response": failed},
                {
                    "type": "error",
                    "code": about["code"],
                    "message": about["message"],
                    "param": about["param"],
                    **body,
                },
            ]
        )

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the response in one piece."""
        output = self._new_output()
        for delta in deltas:
            output.take(delta)
        output.close(_item_status(finished))
        return orjson.dumps(self._ended(output, finished))

    def _new_output(self) -> Output:
        return Output(self._response_id, seal_thoughts=self._seal_thoughts)

    def _ended(self, output: Output, finished: Finished) -> dict[str, Any]:
        is_cut = finished.reason is FinishReason.LENGTH
        response = self._response("incomplete" if is_cut else "completed", output.items)
        if is_cut:
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        else:
            # Invariant: a response that is stored while it is streamed says the same both times.
            self._completed_at = self._completed_at or int(time.time())
            response["completed_at"] = self._completed_at
        response["usage"] = _usage(finished.usage)
        return response

    def _response(self, status: str, output: list[dict[str, Any]]) -> dict[str, Any]:
        return {**self._about, "status": status, "output": output}

    def _written(self, events: Iterable[Event]) -> bytes:
        lines: list[bytes] = []
        for event in events:
            event["sequence_number"] = self._num_events
            self._num_events += 1
            if self._is_padded and "delta" in event:
                event["obfuscation"] = padding(event["delta"])
            lines.append(b"event: %b\ndata: %b\n\n" % (event["type"].encode(), orjson.dumps(event)))
        return b"".join(lines)


def _item_status(finished: Finished) -> str:
    return "incomplete" if finished.reason is FinishReason.LENGTH else "completed"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.num_prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.num_cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.num_completion_tokens,
        "output_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
    }


def _about(body: ResponseRequest, response_id: str) -> dict[str, Any]:
    """Return what a response says of its request."""
    shown = {"metadata", "reasoning", "text", "tool_choice", "tools"}
    given = body.model_dump(by_alias=True, exclude_none=True, include=shown)
    tools = [
        {"description": None, "parameters": None, "strict": False} | tool
        for tool in given.get("tools", ())
    ]
    return {
        "id": response_id,
        "object": "response",
        "created_at": int(time.time()),
        "completed_at": None,
        "status": None,
        "background": False,
        "error": None,
        "incomplete_details": None,
        "instructions": body.instructions,
        "max_output_tokens": body.max_output_tokens,
        "max_tool_calls": None,
        "metadata": given.get("metadata", {}),
        "model": body.model,
        "output": [],
        "parallel_tool_calls": body.parallel_tool_calls is not False,
        "previous_response_id": body.previous_response_id,
        "prompt_cache_key": body.prompt_cache_key,
        "reasoning": {"effort": None, "summary": None} | given.get("reasoning", {}),
        "safety_identifier": body.safety_identifier,
        "service_tier": served_as(body.service_tier),
        "store": body.store is not False,
        "temperature": body.temperature,
        "text": {"format": {"type": "text"}} | given.get("text", {}),
        "tool_choice": given.get("tool_choice", "auto"),
        "tools": tools,
        "top_logprobs": body.top_logprobs or 0,
        "top_p": body.top_p,
        "truncation": "disabled",
        "usage": None,
        "user": body.user,
    }
