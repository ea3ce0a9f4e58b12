# SPDX-License-Identifier: Apache-2.0
"""OpenAI bodies → `GenerationRequest`. Pure; raises `InvalidRequest` alone."""

from typing import Any

import orjson

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
)

from .schema import ChatMessage, ChatRequest, CompletionRequest, SharedParameters

ROLES = {"developer": "system"}
"""Roles that templates do not know, and what they are to them."""

MAX_TEMPLATE_DEPTH = 8
MAX_TEMPLATE_BYTES = 16 * 2**10


def chat_request(body: ChatRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a chat body asks for."""
    prompt = ChatPrompt(
        messages=tuple(_message(message) for message in body.messages),
        template_options=_template_options(body.chat_template_kwargs),
    )
    if body.top_logprobs is not None and not body.logprobs:
        raise InvalidRequest(field="top_logprobs", problem="is only for requests with logprobs")
    return _request(
        body,
        prompt,
        request_id,
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )


def completion_request(body: CompletionRequest, request_id: RequestId) -> GenerationRequest:
    """Return what a completion body asks for."""
    return _request(
        body,
        _prompt(body.prompt),
        request_id,
        max_tokens=body.max_tokens,
        logprobs=body.logprobs,
        echo=bool(body.echo),
    )


def wants_usage(body: SharedParameters) -> bool:
    """Return whether a stream ends with a chunk that has the usage."""
    return bool(body.stream_options and body.stream_options.include_usage)


def _request(
    body: SharedParameters,
    prompt: Prompt,
    request_id: RequestId,
    *,
    max_tokens: int | None,
    logprobs: int | None,
    echo: bool = False,
) -> GenerationRequest:
    if wants_usage(body) and not body.stream:
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
        seed=body.seed,
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
    return GenerationRequest(request_id=request_id, prompt=prompt, sampling=sampling)


def _message(message: ChatMessage) -> Message:
    content = message.content
    if not isinstance(content, str):
        content = "".join(part.text for part in content)
    return Message(role=ROLES.get(message.role, message.role), content=content)


def _prompt(given: str | list[int] | list[str] | list[list[int]]) -> Prompt:
    """Return the one prompt; `[x]` is `x` unless x is a token id."""
    match given:
        case str():
            return TextPrompt(text=given)
        case [str(text)]:
            return TextPrompt(text=text)
        case [list(token_ids)]:
            return TokenPrompt(token_ids=tuple(token_ids))
        case _:
            return TokenPrompt(token_ids=tuple(given))  # type: ignore[arg-type]  # the schema left nothing else


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
    if _is_deeper(given, MAX_TEMPLATE_DEPTH) or len(orjson.dumps(given)) > MAX_TEMPLATE_BYTES:
        raise InvalidRequest(
            field=field,
            problem=f"must be at most {MAX_TEMPLATE_DEPTH} levels deep "
            f"and {MAX_TEMPLATE_BYTES} bytes long",
        )
    return given


def _is_deeper(value: object, levels: int) -> bool:
    """Return whether `value` nests in more than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(_is_deeper(item, levels - 1) for item in inner))
