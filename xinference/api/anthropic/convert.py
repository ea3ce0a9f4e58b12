# SPDX-License-Identifier: Apache-2.0
"""Anthropic bodies → `GenerationRequest`. Pure; raises `InvalidRequest` alone."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import orjson

from xinference.api.structures import MAX_SCHEMA_DEPTH, check_tools, is_deeper, json_grammar
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    ChatPrompt,
    GenerationRequest,
    Grammar,
    Message,
    SamplingParams,
    ToolCall,
    ToolChoice,
)

from .schema import (
    Block,
    CountTokensRequest,
    MessagesRequest,
    PromptParameters,
    TextBlock,
    ThinkingBlock,
    ToolChoiceParameter,
    ToolResultBlock,
    ToolUseBlock,
    TurnMessage,
)

BLOCKS_OF = {
    "user": ("text", "tool_result"),
    "assistant": ("text", "thinking", "tool_use"),
    "system": ("text",),
}
TOOL_CHOICES = {
    "auto": ToolChoice.AUTO,
    "any": ToolChoice.REQUIRED,
    "tool": ToolChoice.REQUIRED,
    "none": ToolChoice.NONE,
}
BETWEEN_TURNS = "\n\n"
"""Between the texts of neighbours that become one turn."""


def messages_request(body: MessagesRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a body of the Messages API asks for."""
    if body.messages[-1].role == "assistant":
        raise InvalidRequest(
            field="messages",
            problem="must not end with an assistant's turn: no answer can be begun for the model",
        )
    sampling = SamplingParams(
        max_tokens=body.max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(body.stop_sequences or ()),
        grammar=_grammar(body),
    )
    user = body.metadata.user_id if body.metadata else None
    return GenerationRequest(
        request_id=request_id, prompt=_prompt(body), sampling=sampling, fairness_key=user or ""
    )


def count_request(body: CountTokensRequest, request_id: RequestId) -> GenerationRequest:
    """Return what tells how long the prompt of a body is."""
    return GenerationRequest(request_id=request_id, prompt=_prompt(body), count_only=True)


def _prompt(body: PromptParameters) -> ChatPrompt:
    choice = body.tool_choice or ToolChoiceParameter(type="auto", name=None)
    return ChatPrompt(
        messages=tuple(_messages(body)),
        tools=_tools(body, choice),
        tool_choice=TOOL_CHOICES[choice.type],
        tool_name=choice.name,
        parallel_tool_calls=not choice.disable_parallel_tool_use,
        enable_thinking=_enable_thinking(body),
        thinking_budget=_thinking_budget(body),
        reasoning_effort=body.output_config.effort if body.output_config else None,
    )


def _grammar(body: PromptParameters) -> Grammar | None:
    wanted = body.output_config and body.output_config.format
    return json_grammar(wanted.definition, field="output_config.format.schema") if wanted else None


def _enable_thinking(body: PromptParameters) -> bool | None:
    if body.thinking is None or body.thinking.type == "adaptive":
        return None
    return body.thinking.type == "enabled"


def _thinking_budget(body: PromptParameters) -> int | None:
    thinking = body.thinking
    if thinking is None:
        return None
    if (thinking.type == "enabled") != (thinking.budget_tokens is not None):
        raise InvalidRequest(
            field="thinking.budget_tokens", problem="goes with the type enabled, and only with it"
        )
    return thinking.budget_tokens


def _tools(body: PromptParameters, choice: ToolChoiceParameter) -> tuple[dict[str, Any], ...]:
    """Return the tools as OpenAI describes them; they must be what the choice needs."""
    functions: list[dict[str, Any]] = [
        {
            "name": tool.name,
            **({"description": tool.description} if tool.description is not None else {}),
            "parameters": tool.input_schema,
            **({"strict": True} if tool.strict else {}),
        }
        for tool in body.tools or ()
    ]
    tools = tuple({"type": "function", "function": function} for function in functions)
    check_tools(tools)
    if (choice.type == "tool") != (choice.name is not None):
        raise InvalidRequest(
            field="tool_choice.name", problem="goes with the type tool, and only with it"
        )
    if choice.name is not None and choice.name not in {one["name"] for one in functions}:
        raise InvalidRequest(
            field="tool_choice.name", problem=f"{choice.name!r} is none of the tools"
        )
    if choice.type == "any" and not tools:
        raise InvalidRequest(field="tool_choice", problem="there are no tools to call")
    return tools


def _messages(body: PromptParameters) -> list[Message]:
    """Return the turns, the system's first; neighbours of one role are one turn."""
    messages: list[Message] = []
    system = _text(body.system)
    if system:
        messages.append(Message(role="system", content=system))
    called: dict[str, str] = {}
    for position, turn in enumerate(body.messages):
        for message in _parts(turn, f"messages[{position}]", called):
            called |= {call.call_id: call.name for call in message.tool_calls}
            if messages and messages[-1].role == message.role in ("user", "assistant"):
                messages[-1] = _joined(messages[-1], message)
            else:
                messages.append(message)
    return messages


def _parts(turn: TurnMessage, where: str, called: dict[str, str]) -> Iterator[Message]:
    """Yield the messages of one turn: a user's may be results of calls, and then a text.

    Args:
        called: the names of the functions called before, by the ids of the calls.
    """
    if isinstance(turn.content, str):
        yield Message(role=turn.role, content=turn.content)
        return
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[ToolCall] = []
    for position, block in enumerate(turn.content):
        place = f"{where}.content[{position}]"
        _check_role(block, turn, place)
        match block:
            case TextBlock():
                texts.append(block.text)
            case ThinkingBlock():
                thoughts.append(block.thinking)
            case ToolUseBlock():
                calls.append(_call(block, place))
            case ToolResultBlock():
                if texts:
                    raise InvalidRequest(field=place, problem="results come before a turn's text")
                yield _result(block, place, called)
    if texts or turn.role == "assistant":
        yield Message(
            role=turn.role,
            content="".join(texts) if texts or not calls else None,
            tool_calls=tuple(calls),
            reasoning_content="".join(thoughts) or None,
        )


def _check_role(block: Block, turn: TurnMessage, place: str) -> None:
    if block.type not in BLOCKS_OF[turn.role]:
        allowed = ", ".join(BLOCKS_OF[turn.role])
        raise InvalidRequest(
            field=f"{place}.type",
            problem=f"must be one of {allowed} in a turn of the role {turn.role}, got {block.type}",
        )


def _call(block: ToolUseBlock, place: str) -> ToolCall:
    if is_deeper(block.input, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(
            field=f"{place}.input", problem=f"must be at most {MAX_SCHEMA_DEPTH} levels deep"
        )
    return ToolCall(call_id=block.id, name=block.name, arguments=orjson.dumps(block.input).decode())


def _result(block: ToolResultBlock, place: str, called: dict[str, str]) -> Message:
    if block.tool_use_id not in called:
        raise InvalidRequest(
            field=f"{place}.tool_use_id", problem="is the id of no tool_use of an earlier turn"
        )
    text = _text(block.content)
    return Message(
        role="tool",
        content=f"Error: {text}" if block.is_error else text,
        tool_call_id=block.tool_use_id,
        # Why: some templates show a result under the name of the function.
        name=called[block.tool_use_id],
    )


def _text(content: str | list[TextBlock] | None) -> str:
    if isinstance(content, list):
        return "".join(block.text for block in content)
    return content or ""


def _joined(first: Message, second: Message) -> Message:
    texts = [one for one in (first.content, second.content) if one]
    thoughts = [one for one in (first.reasoning_content, second.reasoning_content) if one]
    calls = first.tool_calls + second.tool_calls
    return replace(
        first,
        content=BETWEEN_TURNS.join(texts) if texts or not calls else None,
        tool_calls=calls,
        reasoning_content=BETWEEN_TURNS.join(thoughts) or None,
    )
