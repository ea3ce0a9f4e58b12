# SPDX-License-Identifier: Apache-2.0
"""The items of a conversation ⇄ the messages that a model is shown. Pure; raises `InvalidRequest`.

Items are kept as JSON objects: those of the input as `kept_items` makes them, those of an answer
as they were sent.
"""

import base64
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from xinference.errors import InvalidRequest
from xinference.protocol.generation import Message, ToolCall

from .schema import (
    FunctionCallItem,
    FunctionOutputItem,
    InputItem,
    InputText,
    MessageItem,
    ReasoningItem,
)

ID_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
}
ROLES = {"developer": "system"}
"""Roles that templates do not know, and what they are to them."""


def kept_items(given: str | Sequence[InputItem]) -> list[dict[str, Any]]:
    """Return the items of an input, each with an id.

    Raises:
        InvalidRequest: an item cannot be read.
    """
    if isinstance(given, str):
        given = [MessageItem(role="user", content=given)]
    return [_kept(item, f"input[{position}]") for position, item in enumerate(given)]


def _kept(item: InputItem, where: str) -> dict[str, Any]:
    kept: dict[str, Any] = {
        "id": item.id or f"{ID_PREFIXES[item.type]}_{secrets.token_hex(24)}",
        "type": item.type,
        "status": item.status or "completed",
    }
    match item:
        case MessageItem(role=role, content=content):
            return kept | {"role": role, "content": _parts(content, is_output=role == "assistant")}
        case FunctionCallItem(call_id=call_id, name=name, arguments=arguments):
            return kept | {"call_id": call_id, "name": name, "arguments": arguments}
        case FunctionOutputItem(call_id=call_id, output=str(text)):
            return kept | {"call_id": call_id, "output": text}
        case FunctionOutputItem(call_id=call_id, output=output):
            return kept | {"call_id": call_id, "output": _parts(output, is_output=False)}
        case ReasoningItem():
            return kept | reasoning_content(_thought(item, where))
    raise AssertionError(f"no item of the type {item.type}")


def _parts(content: str | list[InputText], *, is_output: bool) -> list[dict[str, Any]]:
    texts = [content] if isinstance(content, str) else [part.text for part in content]
    return [output_text(text) if is_output else _input_text(text) for text in texts]


def _input_text(text: str) -> dict[str, Any]:
    return {"type": "input_text", "text": text}


def output_text(text: str, logprobs: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    """Return a piece of what a model says."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": [*logprobs]}


def reasoning_content(thought: str) -> dict[str, Any]:
    """Return what an item says of a thought: all of it; nobody sums it up."""
    content = [{"type": "reasoning_text", "text": thought}] if thought else []
    return {"summary": [], "content": content}


def sealed(thought: str) -> str:
    """Return a thought as `encrypted_content`: it can be sent back in place of the text.

    It is no secret: these models' thoughts are in the `content` of the item as well.
    """
    return base64.b64encode(thought.encode()).decode()


def _thought(item: ReasoningItem, where: str) -> str:
    if item.content:
        return "".join(part.text for part in item.content)
    if item.encrypted_content:
        try:
            return base64.b64decode(item.encrypted_content, validate=True).decode()
        except ValueError:  # binascii.Error, or a text that is not ASCII, or not UTF-8 inside
            raise InvalidRequest(
                field=f"{where}.encrypted_content", problem="does not come from this server"
            ) from None
    return "".join(part.text for part in item.summary or ())


def messages_of(
    before: Iterable[dict[str, Any]], items: Iterable[dict[str, Any]]
) -> tuple[Message, ...]:
    """Return the messages of a conversation.

    Args:
        before: the items of earlier turns.
        items: those of this one.

    Raises:
        InvalidRequest: an output belongs to no call.
    """
    turns = _Turns()
    for item in before:
        turns.add(item, "input")
    for position, item in enumerate(items):
        turns.add(item, f"input[{position}]")
    return turns.messages()


class _Turns:
    """Messages, while items are added to them.

    What a model thinks, says and calls in one turn are several items, but one message.
    """

    def __init__(self) -> None:
        self._messages: list[Message] = []
        self._thought: str | None = None
        self._called: dict[str, str] = {}

    def messages(self) -> tuple[Message, ...]:
        self._end_thought()
        return tuple(self._messages)

    def add(self, item: dict[str, Any], where: str) -> None:
        match item["type"]:
            case "reasoning":
                self._end_thought()
                self._thought = "".join(part["text"] for part in item["content"])
            case "message" if item["role"] == "assistant":
                self._say(_text(item["content"]))
            case "function_call":
                self._call(item)
            case "message":
                self._end_thought()
                role = ROLES.get(item["role"], item["role"])
                self._messages.append(Message(role=role, content=_text(item["content"])))
            case _:
                self._end_thought()
                self._messages.append(self._output(item, where))

    def _end_thought(self) -> None:
        """Make a message of a thought that nothing came of."""
        if self._thought is not None:
            self._say("")

    def _say(self, text: str, calls: tuple[ToolCall, ...] = ()) -> None:
        thought, self._thought = self._thought, None
        self._messages.append(
            Message(
                role="assistant",
                content=None if calls else text,
                tool_calls=calls,
                reasoning_content=thought or None,
            )
        )

    def _call(self, item: dict[str, Any]) -> None:
        call = ToolCall(call_id=item["call_id"], name=item["name"], arguments=item["arguments"])
        self._called[call.call_id] = call.name
        last = self._messages[-1] if self._messages else None
        if last is None or last.role != "assistant" or self._thought is not None:
            self._say("", (call,))
        else:
            self._messages[-1] = replace(last, tool_calls=(*last.tool_calls, call))

    def _output(self, item: dict[str, Any], where: str) -> Message:
        name = self._called.get(item["call_id"])
        if name is None:
            raise InvalidRequest(
                field=f"{where}.call_id", problem=f"there is no call {item['call_id']!r} before it"
            )
        output = item["output"]
        return Message(
            role="tool",
            content=output if isinstance(output, str) else _text(output),
            tool_call_id=item["call_id"],
            name=name,
        )


def _text(parts: Iterable[dict[str, Any]]) -> str:
    return "".join(part["text"] for part in parts)
