# SPDX-License-Identifier: Apache-2.0
"""A body of the Responses API → `GenerationRequest`. Pure; raises `InvalidRequest` alone."""

from typing import Any

from xinference.api.openai.tier import priority_of
from xinference.api.structures import ANY_OBJECT, check_tools, json_grammar
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    ChatPrompt,
    GenerationRequest,
    Grammar,
    Message,
    SamplingParams,
    ToolChoice,
)

from .schema import (
    AllowedTools,
    FunctionTool,
    InputTokensRequest,
    NamedTool,
    ResponsePrompt,
    ResponseRequest,
    TextFormat,
)


def response_request(
    body: ResponseRequest, messages: tuple[Message, ...], request_id: RequestId
) -> GenerationRequest:
    """Return what a body asks for.

    Args:
        messages: those of the conversation, without the instructions.
    """
    if body.stream_options is not None and not body.stream:
        raise InvalidRequest(field="stream_options", problem="is only for requests with stream")
    return GenerationRequest(
        request_id=request_id,
        prompt=_prompt(body, messages),
        sampling=SamplingParams(
            max_tokens=body.max_output_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            top_k=body.top_k,
            seed=body.seed,
            logprobs=_logprobs(body),
            grammar=_grammar(body.text.format if body.text is not None else None),
        ),
        priority=priority_of(body.service_tier, body.priority),
        fairness_key=body.user or body.safety_identifier or "",
        cache_salt=body.cache_salt or "",
    )


def count_request(
    body: InputTokensRequest, messages: tuple[Message, ...], request_id: RequestId
) -> GenerationRequest:
    """Return what tells how long the prompt of a body is."""
    return GenerationRequest(request_id=request_id, prompt=_prompt(body, messages), count_only=True)


def _prompt(body: ResponsePrompt, messages: tuple[Message, ...]) -> ChatPrompt:
    choice = ToolChoice.AUTO
    named: str | None = None
    allowed: tuple[str, ...] | None = None
    match body.tool_choice:
        case NamedTool(name=name):
            choice, named = ToolChoice.REQUIRED, name
        case AllowedTools(mode=mode, tools=given):
            choice, allowed = ToolChoice(mode), tuple(dict.fromkeys(tool.name for tool in given))
        case str() as word:
            choice = ToolChoice(word)
    tools = tuple(_tool(tool) for tool in body.tools or ())
    chosen = (named,) if named is not None else allowed or ()
    check_tools(tools, is_required=choice is ToolChoice.REQUIRED, chosen=chosen)
    if body.instructions is not None:
        messages = (Message(role="system", content=body.instructions), *messages)
    return ChatPrompt(
        messages=messages,
        tools=tools,
        tool_choice=choice,
        tool_name=named,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        enable_thinking=body.enable_thinking,
        allowed_tools=allowed,
        reasoning_effort=body.reasoning.effort if body.reasoning is not None else None,
    )


def _logprobs(body: ResponseRequest) -> int | None:
    """Return how many of the likeliest tokens to tell in each place; None: no logprobs at all."""
    is_wanted = body.top_logprobs or "message.output_text.logprobs" in (body.include or ())
    return body.top_logprobs or 0 if is_wanted else None


def _tool(tool: FunctionTool) -> dict[str, Any]:
    """Return a function as the chats, and so the templates, describe it."""
    function = {
        "name": tool.name,
        "description": tool.description,
        "parameters": tool.parameters,
        "strict": tool.strict,
    }
    known = {name: value for name, value in function.items() if value is not None}
    return {"type": "function", "function": known}


def _grammar(given: TextFormat | None) -> Grammar | None:
    if given is None:
        return None
    for name, value in (("schema", given.definition), ("name", given.name)):
        if (value is None) == (given.type == "json_schema"):
            raise InvalidRequest(
                field=f"text.format.{name}",
                problem="goes with the type json_schema, and only with it",
            )
    if given.definition is not None:
        return json_grammar(given.definition, field="text.format.schema")
    return None if given.type == "text" else json_grammar(ANY_OBJECT, field="text.format")
