# SPDX-License-Identifier: Apache-2.0
"""What a request leaves open is settled here, from what the model's authors wrote. Pure.

In: a request's `SamplingParams` and the model's generation config. Out: a complete one.
"""

from dataclasses import replace
from typing import Protocol

from xinference.protocol.generation import SamplingParams


class GenerationSettings(Protocol):
    """The part of transformers' `GenerationConfig` that is read; None is "not written"."""

    do_sample: bool | None
    temperature: float | None
    top_p: float | None
    top_k: int | None


def generation_defaults(settings: GenerationSettings) -> SamplingParams:
    """Return the temperature, top_p and top_k of a request that sets none.

    They are the model's own if its generation config samples; greedy if it says that it does
    not; and plain sampling (temperature 1, nothing cut off) if it says nothing.
    """
    if settings.do_sample is False:
        return SamplingParams(temperature=0.0, top_p=1.0, top_k=0)
    own = settings if settings.do_sample else None
    temperature = None if own is None else own.temperature
    top_p = None if own is None else own.top_p
    top_k = None if own is None else own.top_k
    return SamplingParams(
        temperature=1.0 if temperature is None else float(temperature),
        top_p=1.0 if top_p is None else float(top_p),
        top_k=0 if top_k is None else int(top_k),
    )


def resolve_sampling(given: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """Return `given` with temperature, top_p and top_k filled in from `defaults`.

    A request that names only a temperature still gets the model's top_p and top_k. `max_tokens`
    and `seed` stay open: the context and a random number settle them at submission.
    """
    return replace(
        given,
        temperature=defaults.temperature if given.temperature is None else given.temperature,
        top_p=defaults.top_p if given.top_p is None else given.top_p,
        top_k=defaults.top_k if given.top_k is None else given.top_k,
    )
