# SPDX-License-Identifier: Apache-2.0
"""What a language model makes of a request's parameters before an engine sees them. Pure."""

from dataclasses import replace

from xinference.errors import ContextLengthExceeded, InvalidRequest
from xinference.protocol.generation import MAX_STOP_STRINGS, GenerationRequest, SamplingParams


def within_total(
    request: GenerationRequest, num_prompt_tokens: int, context_length: int
) -> SamplingParams:
    """Return the parameters, with an answer that ends where the request's total does.

    Raises:
        InvalidRequest: the total is more than the model's context.
        ContextLengthExceeded: the prompt leaves no room.
    """
    total = request.max_total_tokens
    if total is None:
        return request.sampling
    if total > context_length:
        raise InvalidRequest(
            field="max_total_tokens",
            problem=f"must be at most the model's context, {context_length}, got {total}",
        )
    max_tokens = request.sampling.max_tokens
    room = total - num_prompt_tokens
    if room < 1:
        raise ContextLengthExceeded(
            num_prompt_tokens=num_prompt_tokens,
            max_tokens=max_tokens or 1,
            max_model_len=total,
        )
    return replace(request.sampling, max_tokens=min(max_tokens or room, room))


def with_own_stops(
    sampling: SamplingParams, stop: tuple[str, ...], stop_token_ids: tuple[int, ...]
) -> SamplingParams:
    """Add what the family stops at to what the request does, if it heeds it.

    Raises:
        InvalidRequest: together they are too many.
    """
    if sampling.ignore_eos:
        return sampling
    stops = tuple(dict.fromkeys((*sampling.stop, *stop)))
    if len(stops) > MAX_STOP_STRINGS:
        raise InvalidRequest(
            field="stop",
            problem=f"with the {len(stop)} of the model itself these are more "
            f"than {MAX_STOP_STRINGS}",
        )
    token_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *stop_token_ids)))
    return replace(sampling, stop=stops, stop_token_ids=token_ids)
