# SPDX-License-Identifier: Apache-2.0
"""OpenAI bodies → `GenerationRequest`. Pure; raises `InvalidRequest` alone."""

from typing import Any

import orjson

from xinference.api.structures import check_tools, is_deeper
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    ChatPrompt,
    GenerationRequest,
    Message,
    Prompt,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    ToolCall,
    ToolChoice,
    new_seed,
)

from .schema import (
    AllowedToolChoice,
    ChatExtras,
    ChatMessage,
    ChatRequest,
    CompletionRequest,
    NamedToolChoice,
    SharedParameters,
)
from .structure import grammar_of
from .tier import priority_of

ROLES = {"developer": "system"}
"""Roles that templates do not know, and what they are to them."""

OWNERS = {"tool_calls": "assistant", "reasoning_content": "assistant", "tool_call_id": "tool"}
"""Fields of a message that only one role may have."""
MAX_TEMPLATE_DEPTH = 8
MAX_TEMPLATE_BYTES = 16 * 2**10


def chat_request(body: ChatRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a chat body asks for."""
    extras = body.extra_body
    template_options = _template_options(
        _given_once("chat_template_kwargs", body.chat_template_kwargs, extras)
    )
    tools = _tools(body)
    choice, allowed = _tool_choice(body.tool_choice)
    named = body.tool_choice if isinstance(body.tool_choice, NamedToolChoice) else None
    prompt = ChatPrompt(
        messages=_messages(body.messages),
        template_options=template_options,
        tools=tools,
        tool_choice=choice,
        tool_name=None if named is None else named.function.name,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        enable_thinking=_given_once("enable_thinking", body.enable_thinking, extras),
        allowed_tools=allowed,
        thinking_budget=_thinking_budget(body, template_options),
        reasoning_effort=body.reasoning_effort,
    )
    if body.top_logprobs and not body.logprobs:
        raise InvalidRequest(field="top_logprobs", problem="is only for requests with logprobs")
    return _request(
        body,
        prompt,
        request_id,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        priority=priority_of(body.service_tier, body.priority),
        fairness_key=body.user or body.safety_identifier or "",
    )


def completion_request(body: CompletionRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a completion body asks for."""
    first, *others = _prompts(body.prompt)
    return _request(
        body,
        first,
        request_id,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        priority=body.priority or 0,
        fairness_key=body.user or "",
        echo=bool(body.echo),
        more_prompts=tuple(others),
    )


def wants_usage(body: SharedParameters) -> bool:
    """Return whether a stream ends with a chunk that has the usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def wants_obfuscation(body: SharedParameters) -> bool:
    """Return whether the sizes of a stream's chunks are to tell nothing."""
    return bool(body.stream_options and body.stream_options.include_obfuscation)


def _request(
    body: SharedParameters,
    prompt: Prompt,
    request_id: RequestId,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    priority: int,
    fairness_key: str,
    echo: bool = False,
    more_prompts: tuple[TextPrompt | TokenPrompt, ...] = (),
) -> GenerationRequest:
    if (wants_usage(body) or wants_obfuscation(body)) and not body.stream:
        raise InvalidRequest(field="stream_options", problem="is only for requests with stream")
    n = body.n or 1
    if body.stream and (body.best_of or n) > n:
        raise InvalidRequest(
            field="best_of", problem=f"must be n, which is {n}, for a request with stream"
        )
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    sampling = SamplingParams(
        max_tokens=max_tokens,
        temperature=body.temperature,
        top_p=body.top_p,
        top_k=body.top_k,
        stop=tuple(stop),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        # Why here: whoever needs one later would have to make all of this again.
        seed=new_seed() if body.seed is None else body.seed,
        grammar=grammar_of(body),
        min_p=body.min_p,
        typical_p=body.typical_p,
        repetition_penalty=body.repetition_penalty,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias={int(token_id): bias for token_id, bias in (body.logit_bias or {}).items()},
        bad_words=tuple(body.bad_words or ()),
        min_tokens=body.min_tokens or 0,
        ignore_eos=bool(body.ignore_eos),
        include_stop_str_in_output=bool(body.include_stop_str_in_output),
        n=n,
        best_of=body.best_of,
        logprobs=logprobs,
        echo=echo,
    )
    return GenerationRequest(
        request_id=request_id,
        prompt=prompt,
        sampling=sampling,
        priority=priority,
        fairness_key=fairness_key,
        cache_salt=body.cache_salt or "",
        more_prompts=more_prompts,
    )


def _messages(given: list[ChatMessage]) -> tuple[Message, ...]:
    messages: list[Message] = []
    called: dict[str, str] = {}
    for position, message in enumerate(given):
        where = f"messages[{position}]"
        _check_role(message, where)
        calls: tuple[ToolCall, ...] = ()
        if message.tool_calls:
            calls = tuple(
                ToolCall(
                    call_id=call.id, name=call.function.name, arguments=call.function.arguments
                )
                for call in message.tool_calls
            )
            called |= {call.call_id: call.name for call in calls}
        name = message.name
        if message.role == "tool":
            # Why: some templates show a result under the name of the function.
            name = name or called.get(message.tool_call_id or "")
        messages.append(
            Message(
                role=ROLES.get(message.role, message.role),
                content=_content(message, where),
                tool_calls=calls,
                tool_call_id=message.tool_call_id,
                name=name,
                reasoning_content=message.reasoning_content or None,
            )
        )
    return tuple(messages)


def _check_role(message: ChatMessage, where: str) -> None:
    """Refuse what only another role may have; it would be ignored."""
    for field, role in OWNERS.items():
        if message.role != role and getattr(message, field):
            raise InvalidRequest(
                field=f"{where}.{field}", problem=f"is only for messages of the role {role}"
            )
    if message.role == "tool" and not message.tool_call_id:
        raise InvalidRequest(field=f"{where}.tool_call_id", problem="is needed")


def _content(message: ChatMessage, where: str) -> str | None:
    content = message.content
    if content is None and not message.tool_calls:
        raise InvalidRequest(field=f"{where}.content", problem="is needed")
    if isinstance(content, list):
        return "".join(part.text for part in content)
    return content


def _tools(body: ChatRequest) -> tuple[dict[str, Any], ...]:
    choice = body.tool_choice
    if not body.tools and choice is None:
        return ()
    tools = tuple(
        tool.model_dump(exclude_unset=True, exclude_none=True) for tool in body.tools or ()
    )
    chosen: tuple[str, ...] = ()
    if isinstance(choice, NamedToolChoice):
        chosen = (choice.function.name,)
    elif isinstance(choice, AllowedToolChoice):
        chosen = tuple(tool.function.name for tool in choice.allowed_tools.tools)
    check_tools(tools, is_required=choice == "required", chosen=chosen)
    return tools


def _tool_choice(
    choice: str | NamedToolChoice | AllowedToolChoice | None,
) -> tuple[ToolChoice, tuple[str, ...] | None]:
    """Return whether to call, and which tools a list of allowed ones has."""
    match choice:
        case NamedToolChoice():
            return ToolChoice.REQUIRED, None
        case AllowedToolChoice(allowed_tools=allowed):
            names = dict.fromkeys(tool.function.name for tool in allowed.tools)
            return ToolChoice(allowed.mode), tuple(names)
    return ToolChoice(choice or ToolChoice.AUTO), None


def _thinking_budget(body: ChatRequest, template_options: dict[str, Any]) -> int | None:
    """Return the one budget, of all the places where clients put it."""
    field = "thinking_budget"
    budget: int | None = None
    for name, given in (
        (field, _given_once(field, body.thinking_budget, body.extra_body)),
        (
            "thinking_token_budget",
            _given_once("thinking_token_budget", body.thinking_token_budget, body.extra_body),
        ),
        (f"chat_template_kwargs.{field}", template_options.get(field)),
    ):
        if given is None:
            continue
        if isinstance(given, bool) or not isinstance(given, int) or given < 0:
            raise InvalidRequest(field=name, problem="must be a whole number of at least 0")
        if budget is not None and given != budget:
            raise InvalidRequest(field=name, problem=f"differs from {field}; give one of them")
        budget = given
    return budget


def _given_once(field: str, given: Any, extras: ChatExtras | None) -> Any:
    """Return a parameter that may stand in the extra body as well, with the same value."""
    extra = None if extras is None else getattr(extras, field)
    if given is not None and extra is not None and given != extra:
        raise InvalidRequest(field=f"extra_body.{field}", problem=f"differs from {field}")
    return extra if given is None else given


def _prompts(
    given: str | list[int] | list[str] | list[list[int]],
) -> list[TextPrompt | TokenPrompt]:
    """Return the prompts; a list of numbers is one."""
    if isinstance(given, str):
        return [TextPrompt(text=given)]
    token_ids = tuple(one for one in given if isinstance(one, int))
    if token_ids:
        return [TokenPrompt(token_ids=token_ids)]
    return [
        TextPrompt(text=one) if isinstance(one, str) else TokenPrompt(token_ids=tuple(one))
        for one in given
        if not isinstance(one, int)
    ]


def _template_options(given: dict[str, Any] | str | None) -> dict[str, Any]:
    field = "chat_template_kwargs"
    if isinstance(given, str):
        try:
            given = orjson.loads(given)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(field=field, problem=f"is not JSON: {error}") from None
    if not given:
        return {}
    if not isinstance(given, dict):
        raise InvalidRequest(field=field, problem="must be an object")
    if is_deeper(given, MAX_TEMPLATE_DEPTH) or len(orjson.dumps(given)) > MAX_TEMPLATE_BYTES:
        raise InvalidRequest(
            field=field,
            problem=f"must be at most {MAX_TEMPLATE_DEPTH} levels deep "
            f"and {MAX_TEMPLATE_BYTES} bytes long",
        )
    return given
