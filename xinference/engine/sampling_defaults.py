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
    min_p: float | None
    typical_p: float | None
    repetition_penalty: float | None


def generation_defaults(settings: GenerationSettings) -> SamplingParams:
    """Return the sampling parameters of a request that sets none.

    They are the model's own if its generation config samples; greedy if it says that it does
    not; and plain sampling (temperature 1, nothing cut off) if it says nothing. The repetition
    penalty is no matter of sampling: it holds in any case.
    """
    own = SamplingParams(
        repetition_penalty=_positive(settings.repetition_penalty),
        temperature=0.0 if settings.do_sample is False else None,
    )
    if settings.do_sample:
        own = replace(
            own,
            temperature=settings.temperature,
            top_p=settings.top_p,
            top_k=settings.top_k,
            min_p=settings.min_p,
            typical_p=settings.typical_p,
        )
    return resolve_sampling(own, SamplingParams())


def resolve_sampling(given: SamplingParams, defaults: SamplingParams) -> SamplingParams:
    """Return `given` with what it leaves open filled in from `defaults`, else neutral.

    A request that names only a temperature still gets the model's top_p and top_k. `max_tokens`
    and `seed` stay open: the context and a random number settle them at submission.
    """
    return replace(
        given,
        temperature=_first(given.temperature, defaults.temperature, 1.0),
        top_p=_first(given.top_p, defaults.top_p, 1.0),
        top_k=int(_first(given.top_k, defaults.top_k, 0)),
        min_p=_first(given.min_p, defaults.min_p, 0.0),
        typical_p=_first(given.typical_p, defaults.typical_p, 1.0),
        repetition_penalty=_first(given.repetition_penalty, defaults.repetition_penalty, 1.0),
    )


def _first(given: float | None, default: float | None, neutral: float) -> float:
    if given is not None:
        return given
    return neutral if default is None else float(default)


def _positive(value: float | None) -> float | None:
    """Return None for what some configs write for "no penalty"."""
    return value if value is not None and value > 0 else None
