# SPDX-License-Identifier: Apache-2.0
"""Choosing a variant: what is asked for is what is chosen, or the refusal helps."""

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xinference.catalog.builtin_families import builtin_families
from xinference.catalog.family import ModelFamily, Variant, parse_size, size_text
from xinference.catalog.matching import (
    ENGINES,
    Wish,
    engine_named,
    match,
    parameter_objects,
)
from xinference.catalog.runnable import refusal
from xinference.catalog.schema import FORMATS, near_names, parse_family
from xinference.errors import InvalidRequest, UnsupportedVariant

from .registration import outcome_of, spec, text_of

FAMILIES = builtin_families()
LISTED = [(family, variant) for family in FAMILIES.values() for variant in family.variants]


def wish(
    size: str | None = None, model_format: str | None = None, quantization: str | None = None
) -> Wish:
    return Wish.of(size=size, model_format=model_format, quantization=quantization)


def wish_for(variant: Variant) -> Wish:
    return wish(size_text(variant.size), variant.model_format, variant.quantization)


@settings(deadline=None)
@given(st.sampled_from(LISTED))
def test_asking_for_a_listed_variant_gives_it_or_says_why_it_cannot_run(
    listed: tuple[ModelFamily, Variant],
) -> None:
    family, variant = listed
    reason = refusal(family, variant)

    outcome = outcome_of(lambda: match(family, wish_for(variant)))

    if isinstance(outcome, Variant):
        assert reason is None
        assert str(outcome) == str(variant)
    else:
        assert isinstance(outcome, UnsupportedVariant)
        assert outcome.problem == reason


@settings(deadline=None)
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    size=st.none() | st.sampled_from(["0_5", "0.5", "4", "7", "7.0", "72", "999"]),
    model_format=st.none() | st.sampled_from([*FORMATS, "PyTorch", "zip"]),
    quantization=st.none() | st.sampled_from(["none", "None", "Int4", "int8", "q4_0"]),
)
def test_any_wish_gives_what_fits_it_or_a_refusal_with_variants_that_can_be_launched(
    family: str, size: str | None, model_format: str | None, quantization: str | None
) -> None:
    asked = wish(size, model_format, quantization)

    outcome = outcome_of(lambda: match(FAMILIES[family], asked))

    if isinstance(outcome, Variant):
        assert asked.num_misses(outcome) == 0
        assert refusal(FAMILIES[family], outcome) is None
    else:
        assert isinstance(outcome, UnsupportedVariant)
        assert outcome.problem
        assert set(outcome.suggestions) <= {str(one) for one in FAMILIES[family].variants}


@settings(deadline=None)
@given(st.decimals(min_value=0, max_value=999_999, places=6))
def test_a_size_is_read_as_it_is_spelled(size: Decimal) -> None:
    assert parse_size(size_text(size)) == size
    assert parse_size(str(size)) == size


@pytest.mark.parametrize("text", ["", "7B", "-1", "1e3", ".5", "5.", "1_2_3", "٤", " 4", "nan"])
def test_what_is_no_size_is_not_read_as_one(text: str) -> None:
    assert parse_size(text) is None


@pytest.mark.parametrize("size", ["0_5", "0.5", "0.50"])
def test_the_decimal_point_may_be_written_either_way(size: str) -> None:
    assert match(FAMILIES["qwen1.5-chat"], wish(size)).model_id == "Qwen/Qwen1.5-0.5B-Chat"


def test_nothing_asked_for_gives_the_first_variant_that_runs() -> None:
    specs = [
        spec(model_format="ggufv2", quantization="q4_0"),
        spec(quantization="8-bit"),
        spec(model_size_in_billions=3),
        spec(model_size_in_billions=1),
    ]
    family = parse_family(text_of(model_specs=specs), is_builtin=False)

    assert match(family, wish()).size == 3


def test_letter_case_does_not_matter() -> None:
    chosen = match(FAMILIES["qwen1.5-chat"], wish("4", "PyTorch", "None"))

    assert chosen.model_id == "Qwen/Qwen1.5-4B-Chat"


def test_a_size_that_is_not_there_is_named_with_the_nearest_first() -> None:
    with pytest.raises(UnsupportedVariant) as caught:
        match(FAMILIES["qwen1.5-chat"], wish("13", "pytorch", "none"))

    assert caught.value.problem == "there is no variant of 13B"
    assert caught.value.suggestions[:2] == ["14B pytorch", "7B pytorch"]


def test_a_combination_that_is_not_there_is_named_whole() -> None:
    with pytest.raises(UnsupportedVariant) as caught:
        match(FAMILIES["qwen1.5-chat"], wish("32", "gptq", "Int8"))

    assert caught.value.problem == (
        "there is no variant of 32B in format gptq with quantization int8"
    )


def test_a_format_that_needs_another_library_names_it() -> None:
    with pytest.raises(UnsupportedVariant) as caught:
        match(FAMILIES["qwen2.5-instruct"], wish("7", "gptq", "Int4"))

    assert "needs gptqmodel" in caught.value.problem
    assert "7B pytorch" in caught.value.suggestions


def test_a_pytorch_model_quantized_at_load_is_refused_by_name() -> None:
    family = parse_family(
        text_of(model_specs=[spec(quantization=["8-bit", "none"])]), is_builtin=False
    )

    with pytest.raises(UnsupportedVariant) as caught:
        match(family, wish(quantization="8-bit"))

    assert "bitsandbytes" in caught.value.problem


def test_a_size_that_is_no_number_is_an_invalid_request() -> None:
    with pytest.raises(InvalidRequest) as caught:
        wish("7B")

    assert caught.value.field == "model_size_in_billions"


@pytest.mark.parametrize("name", [None, "transformers", "Transformers", "TRANSFORMERS"])
def test_the_engine_is_known_in_any_letter_case(name: str | None) -> None:
    assert engine_named(name) == "Transformers"


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        ("vllm", "vLLM"),
        ("LLAMA.CPP", "llama.cpp"),
        ("tensorrt-llm", "TRT-LLM"),
        ("sglang", "SGLang"),
    ],
)
def test_an_engine_that_is_a_server_is_known_by_its_names(name: str, engine: str) -> None:
    assert engine_named(name) == engine


@settings(deadline=None)
@given(st.sampled_from(LISTED), st.sampled_from(ENGINES))
def test_every_engine_runs_a_listed_variant_or_says_why_not(
    listed: tuple[ModelFamily, Variant], engine: str
) -> None:
    family, variant = listed

    outcome = outcome_of(lambda: match(family, wish_for(variant), engine))

    if isinstance(outcome, Variant):
        assert (outcome.model_format == "ggufv2") is (engine == "llama.cpp")
    else:
        assert isinstance(outcome, UnsupportedVariant)
        assert outcome.problem


@pytest.mark.parametrize("name", ["mlx", "LMDEPLOY"])
def test_an_engine_of_another_version_is_refused_by_its_name(name: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine_named(name)

    assert caught.value.field == "model_engine"
    assert caught.value.problem.casefold().startswith(name.casefold())


def test_a_misspelt_engine_is_refused_with_the_right_one() -> None:
    with pytest.raises(InvalidRequest) as caught:
        engine_named("transformer")

    assert "did you mean Transformers" in caught.value.problem


def test_a_family_that_transformers_cannot_run_says_why() -> None:
    family = parse_family(
        text_of(model_specs=[spec(model_format="ggufv2", quantization="q4_0")]), is_builtin=False
    )

    reason = parameter_objects(family)

    assert isinstance(reason, str)
    assert "llama.cpp" in reason


def test_parameter_objects_have_the_quantizations_of_each_format_and_size() -> None:
    objects = parameter_objects(FAMILIES["qwen1.5-chat"])

    assert {
        "model_name": "qwen1.5-chat",
        "model_format": "pytorch",
        "model_size_in_billions": 4,
        "quantizations": ["none"],
    } in objects
    assert len(objects) == 8


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("qwen1.5-caht", "qwen1.5-chat"),
        ("QWEN1.5-CHAT", "qwen1.5-chat"),
        ("qwen3-instruct", "Qwen3-Instruct"),
        ("llama3.1-instruct", "llama-3.1-instruct"),
        ("gpt2", "gpt-2"),
    ],
)
def test_a_near_miss_suggests_the_family(wrong: str, right: str) -> None:
    assert near_names(wrong, FAMILIES)[0] == right
