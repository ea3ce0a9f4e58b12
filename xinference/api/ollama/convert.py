# SPDX-License-Identifier: Apache-2.0
"""Ollama bodies → `GenerationRequest`. Pure; raises `InvalidRequest` alone."""

import re
from typing import Any

import orjson

from xinference.api.structures import (
    ANY_OBJECT,
    MAX_SCHEMA_DEPTH,
    check_tools,
    is_deeper,
    json_grammar,
)
from xinference.errors import InvalidRequest
from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.generation import (
    ChatPrompt,
    GenerationRequest,
    Grammar,
    Message,
    Prompt,
    SamplingParams,
    TextPrompt,
    ToolCall,
)

from .schema import (
    OllamaChatRequest,
    OllamaGenerateRequest,
    OllamaMessage,
    OllamaOptions,
    OllamaParameters,
    OllamaToolCall,
)

_ZERO = re.compile(r"0*\.?0*(ns|us|µs|ms|s|m|h)?")

OWNERS = {
    "thinking": "assistant",
    "tool_calls": "assistant",
    "tool_name": "tool",
    "tool_call_id": "tool",
}
"""Fields of a message that only one role may have; in another's they would be ignored."""


def model_of(name: str) -> ModelUid:
    """Return the model that a client means: Ollama's add a tag to names that have none."""
    return ModelUid(name.removesuffix(":latest"))


def chat_request(body: OllamaChatRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a chat asks for."""
    tools = tuple(
        tool.model_dump(exclude_unset=True, exclude_none=True) for tool in body.tools or ()
    )
    check_tools(tools)
    prompt = ChatPrompt(
        messages=_messages(body.messages or []),
        tools=tools,
        **_thinking(body),
    )
    return _request(body, prompt, request_id)


def generate_request(body: OllamaGenerateRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a prompt asks for."""
    text = body.prompt or ""
    if body.raw:
        for field in ("system", "think"):
            if getattr(body, field):
                raise InvalidRequest(field=field, problem="is only for requests without raw")
        return _request(body, TextPrompt(text=text), request_id)
    system = [Message(role="system", content=body.system)] if body.system else []
    prompt = ChatPrompt(
        messages=(*system, Message(role="user", content=text)),
        **_thinking(body),
    )
    return _request(body, prompt, request_id)


def check_keep_alive(given: float | str | None) -> None:
    """Refuse to unload a model with a request: who wants its end has a route for that."""
    if given == 0 or (isinstance(given, str) and _ZERO.fullmatch(given.strip())):
        raise InvalidRequest(
            field="keep_alive",
            problem="0 would end the model for everybody; terminate it by DELETE /v1/models/{uid}",
        )


def _request(body: OllamaParameters, prompt: Prompt, request_id: RequestId) -> GenerationRequest:
    check_keep_alive(body.keep_alive)
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest(field="top_logprobs", problem="is only for requests with logprobs")
    options = body.options or OllamaOptions.model_construct()
    stop = [options.stop] if isinstance(options.stop, str) else options.stop or []
    sampling = SamplingParams(
        max_tokens=_num_predict(options.num_predict),
        temperature=options.temperature,
        top_p=options.top_p,
        top_k=options.top_k,
        min_p=options.min_p,
        typical_p=options.typical_p,
        repetition_penalty=options.repeat_penalty,
        presence_penalty=options.presence_penalty or 0.0,
        frequency_penalty=options.frequency_penalty or 0.0,
        seed=options.seed,
        stop=tuple(stop),
        grammar=_grammar(body.format),
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        max_total_tokens=options.num_ctx,
    )


def _num_predict(given: int | None) -> int | None:
    if given == 0:
        raise InvalidRequest(field="options.num_predict", problem="must be at least 1, or below 0")
    return given if given is not None and given > 0 else None


def _grammar(given: str | dict[str, Any] | None) -> Grammar | None:
    if isinstance(given, dict):
        return json_grammar(given, field="format")
    return json_grammar(ANY_OBJECT, field="format") if given == "json" else None


def _thinking(body: OllamaParameters) -> dict[str, Any]:
    if isinstance(body.think, str):
        return {"reasoning_effort": body.think}
    return {"enable_thinking": body.think}


def _messages(given: list[OllamaMessage]) -> tuple[Message, ...]:
    """Return the turns; calls without ids get some, and results find theirs."""
    messages: list[Message] = []
    open_calls: list[tuple[OllamaToolCall, ToolCall]] = []
    num_calls = 0
    for position, message in enumerate(given):
        where = f"messages[{position}]"
        _check_role(message, where)
        if message.role == "tool":
            call = _answered(message, open_calls, where)
            messages.append(_result(message, call))
            continue
        calls = [
            _call(call, num_calls + index, f"{where}.tool_calls[{index}]")
            for index, call in enumerate(message.tool_calls or ())
        ]
        num_calls += len(calls)
        open_calls += zip(message.tool_calls or (), calls, strict=True)
        messages.append(
            Message(
                role=message.role,
                content=message.content or (None if calls else ""),
                tool_calls=tuple(calls),
                reasoning_content=message.thinking or None,
            )
        )
    return tuple(messages)


def _check_role(message: OllamaMessage, where: str) -> None:
    for field, role in OWNERS.items():
        if getattr(message, field) and message.role != role:
            raise InvalidRequest(
                field=f"{where}.{field}", problem=f"is only for messages of the role {role}"
            )


def _call(call: OllamaToolCall, number: int, where: str) -> ToolCall:
    arguments = call.function.arguments
    if is_deeper(arguments, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(
            field=f"{where}.function.arguments",
            problem=f"must be at most {MAX_SCHEMA_DEPTH} levels deep",
        )
    # Why nine digits: some models' templates take ids of that length only.
    call_id = call.id or f"{number:09d}"
    return ToolCall(
        call_id=call_id, name=call.function.name, arguments=orjson.dumps(arguments).decode()
    )


def _answered(
    message: OllamaMessage, open_calls: list[tuple[OllamaToolCall, ToolCall]], where: str
) -> ToolCall:
    """Take the call that a result belongs to from the open ones, which are as given and as read."""
    # Why a call without an id has any: LiteLLM leaves ids out of calls, but not out of results.
    fitting = [
        (given, call)
        for given, call in open_calls
        if message.tool_name in (None, call.name)
        and (message.tool_call_id is None or given.id in (None, message.tool_call_id))
    ]
    if fitting:
        found = min(fitting, key=lambda one: one[0].id != message.tool_call_id)
        open_calls.remove(found)
        return found[1]
    field = "tool_call_id" if message.tool_call_id else "tool_name"
    raise InvalidRequest(
        field=f"{where}.{field}", problem="is that of no call of an earlier turn without a result"
    )


def _result(message: OllamaMessage, call: ToolCall) -> Message:
    return Message(
        role="tool", content=message.content or "", tool_call_id=call.call_id, name=call.name
    )
