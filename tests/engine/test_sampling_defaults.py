# SPDX-License-Identifier: Apache-2.0
"""What a request leaves open comes from the model's authors."""

from dataclasses import replace

from transformers import GenerationConfig

from xinference.engine import generation_defaults, resolve_sampling
from xinference.protocol.generation import SamplingParams

NEUTRAL = SamplingParams(
    temperature=1.0, top_p=1.0, top_k=0, min_p=0.0, typical_p=1.0, repetition_penalty=1.0
)


def test_a_model_that_samples_gives_its_own_numbers() -> None:
    own = {"temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.1, "typical_p": 0.9}
    settings = GenerationConfig(do_sample=True, repetition_penalty=1.1, **own)

    assert generation_defaults(settings) == SamplingParams(repetition_penalty=1.1, **own)


def test_a_repetition_penalty_holds_for_greedy_models_too() -> None:
    settings = GenerationConfig(do_sample=False, repetition_penalty=1.2, top_p=0.5)

    expected = replace(NEUTRAL, temperature=0.0, repetition_penalty=1.2)
    assert generation_defaults(settings) == expected


def test_a_model_that_says_it_does_not_sample_is_greedy() -> None:
    assert generation_defaults(GenerationConfig(do_sample=False)).temperature == 0.0


def test_a_model_that_says_nothing_samples_plainly() -> None:
    settings = GenerationConfig(temperature=0.3, top_k=5)

    assert generation_defaults(settings) == NEUTRAL


def test_what_a_request_says_comes_first_and_the_rest_is_filled_in() -> None:
    defaults = SamplingParams(temperature=0.7, top_p=0.8, top_k=20)
    given = SamplingParams(temperature=0.0, seed=3, stop=("x",))

    resolved = resolve_sampling(given, defaults)

    assert resolved == replace(NEUTRAL, temperature=0.0, top_p=0.8, top_k=20, seed=3, stop=("x",))
