# SPDX-License-Identifier: Apache-2.0
"""Registrations: what is accepted, what is filled in, and what is refused by name."""

import json
from decimal import Decimal
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xinference.catalog.builtin_families import builtin_families
from xinference.catalog.family import ModelFamily
from xinference.catalog.schema import inherit, parse_family
from xinference.errors import InvalidRequest

from .registration import outcome_of, registration, spec, text_of


@pytest.fixture(scope="module")
def builtin() -> dict[str, ModelFamily]:
    return builtin_families()


def parse(**changes: Any) -> ModelFamily:
    return parse_family(text_of(**changes), is_builtin=False)


def refused(**changes: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        parse(**changes)
    return caught.value


def test_what_is_left_out_gets_a_default() -> None:
    minimal = {
        "model_name": "mine",
        "model_ability": ["generate"],
        "model_specs": [
            {"model_format": "pytorch", "model_size_in_billions": "0_5", "model_uri": "/models/x"}
        ],
    }

    family = parse_family(json.dumps(minimal), is_builtin=False)

    assert family.model_lang == ("en",)
    assert family.model_family == "mine"
    assert family.context_length is None
    assert family.chat_template is None
    assert family.stop_token_ids == ()
    assert [variant.quantization for variant in family.variants] == ["none"]
    assert family.to_json()["context_length"] == 2048


def test_a_registration_in_the_documented_form_is_accepted_with_all_its_fields() -> None:
    family = parse_family(
        """
        {"version": 1, "context_length": 2048, "model_name": "custom-llama", "model_lang": ["en"],
         "model_ability": ["chat"], "model_family": "my-llama",
         "model_specs": [
           {"model_format": "pytorch", "model_size_in_billions": 7,
            "quantizations": ["4-bit", "8-bit", "none"], "model_id": "me/llama",
            "model_uri": "file:///path/to/llama"},
           {"model_format": "ggufv2", "model_size_in_billions": 7,
            "quantizations": ["q4_0", "q8_0"], "model_uri": "/path/to/gguf",
            "model_file_name_template": "llama.{quantization}.gguf"}],
         "chat_template": "{{ messages[0].content }}", "stop_token_ids": [2], "stop": ["</s>"]}
        """,
        is_builtin=False,
    )

    assert family.stop_token_ids == (2,)
    assert family.stop == ("</s>",)
    assert [(one.model_format, one.quantization) for one in family.variants] == [
        ("pytorch", "4-bit"),
        ("pytorch", "8-bit"),
        ("pytorch", "none"),
        ("ggufv2", "q4_0"),
        ("ggufv2", "q8_0"),
    ]
    assert family.variants[0].path == "/path/to/llama"
    assert family.variants[3].to_json()["model_file_name_template"] == "llama.{quantization}.gguf"


@pytest.mark.parametrize("size", [7, "7", "7_0", "7.0", 7.0])
def test_a_size_may_be_written_as_users_write_it(size: object) -> None:
    (variant,) = parse(model_specs=[spec(model_size_in_billions=size)]).variants

    assert variant.size == Decimal(7)
    assert variant.to_json()["model_size_in_billions"] == 7


def test_a_broken_size_is_shown_as_families_spell_it() -> None:
    (variant,) = parse(model_specs=[spec(model_size_in_billions=0.5)]).variants

    assert variant.to_json()["model_size_in_billions"] == "0_5"


@pytest.mark.parametrize(
    ("uri", "path"),
    [
        ("/models/mine", "/models/mine"),
        ("file:///models/mine", "/models/mine"),
        ("file:///models/my%20own", "/models/my own"),
        ("/models/100%25", "/models/100%25"),
    ],
)
def test_files_are_named_by_a_path_or_a_file_uri(uri: str, path: str) -> None:
    (variant,) = parse(model_specs=[spec(model_uri=uri)]).variants

    assert variant.path == path


@pytest.mark.parametrize(
    "uri", ["models/mine", "file://host/models", "s3://bucket/x", "https://x/y", "package:other"]
)
def test_files_that_are_not_a_local_path_are_refused(uri: str) -> None:
    error = refused(model_specs=[spec(), spec(model_uri=uri)])

    assert error.field == "model_specs[1].model_uri"


def test_a_misspelt_field_is_refused_with_the_right_one() -> None:
    error = refused(context_lenght=4096)

    assert error.field == "context_lenght"
    assert "did you mean context_length?" in error.problem


def test_a_misspelt_field_of_a_spec_is_refused_with_its_place() -> None:
    error = refused(model_specs=[spec(quantisation="none")])

    assert error.field == "model_specs[0].quantisation"
    assert "quantization" in error.problem


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"prompt_style": {"style_name": "MINE"}}, "prompt_style", "chat_template"),
        (
            {"model_specs": [spec(model_format="ggmlv3")]},
            "model_specs[0].model_format",
            "ggufv2",
        ),
        ({"model_ability": ["chat", "embed"]}, "model_ability", "embed"),
        ({"model_ability": ["chatt"]}, "model_ability", "chat"),
        ({"model_ability": ["tools"]}, "model_ability", "chat or generate"),
        ({"model_ability": None}, "model_ability", "needed"),
        ({"model_name": None}, "model_name", "needed"),
        ({"model_name": "a/b"}, "model_name", "a/b"),
        ({"model_name": ".."}, "model_name", ".."),
        ({"model_name": "a\0b"}, "model_name", "printable"),
        ({"model_name": "x" * 300}, "model_name", "200 bytes"),
        ({"version": 3}, "version", "1, 2"),
        ({"version": True}, "version", "1, 2"),
        ({"context_length": 0}, "context_length", "above 0"),
        ({"context_length": "4096"}, "context_length", "whole number"),
        ({"stop_token_ids": ["</s>"]}, "stop_token_ids", "list of token ids"),
        ({"stop_token_ids": [-1]}, "stop_token_ids", "list of token ids"),
        ({"stop": "</s>"}, "stop", "list of texts"),
        ({"tool_parser": "qwn"}, "tool_parser", "qwen"),
        ({"model_specs": []}, "model_specs", "at least one"),
        ({"model_specs": None}, "model_specs", "at least one"),
        ({"model_specs": [1]}, "model_specs", "objects"),
        ({"model_specs": [spec(model_uri=None)]}, "model_specs[0].model_uri", "needed"),
        ({"model_specs": [spec(model_format=None)]}, "model_specs[0].model_format", "needed"),
        (
            {"model_specs": [spec(model_size_in_billions=None)]},
            "model_specs[0].model_size_in_billions",
            "needed",
        ),
        (
            {"model_specs": [spec(model_size_in_billions="7B")]},
            "model_specs[0].model_size_in_billions",
            "7B",
        ),
        (
            {"model_specs": [spec(model_size_in_billions=True)]},
            "model_specs[0].model_size_in_billions",
            "True",
        ),
        ({"model_specs": [spec(model_hub="hugging")]}, "model_specs[0].model_hub", "huggingface"),
        (
            {"model_specs": [spec(model_format="gptq", quantization=None)]},
            "model_specs[0].quantization",
            "gptq",
        ),
        (
            {"model_specs": [spec(model_src={"huggingface": {"model_id": "a/b"}})]},
            "model_specs[0].quantization",
            "model_src",
        ),
    ],
)
def test_a_wrong_field_is_refused_by_name(changes: dict[str, Any], field: str, word: str) -> None:
    error = refused(**changes)

    assert error.field == field
    assert word in error.problem


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "[]",
        "null",
        "[" * 100_000,
        json.dumps(registration(updated_at=10**30)),
        json.dumps(registration(virtualenv={"packages": [float("nan")]})),
        json.dumps(registration(model_description="\ud800")),
        '{"a": "' + "x" * 1_000_000 + '"}',
    ],
    ids=["empty", "no json", "list", "null", "deep", "huge", "nan", "half pair", "long"],
)
def test_what_is_no_json_object_that_can_be_shown_again_is_refused(text: str) -> None:
    with pytest.raises(InvalidRequest):
        parse_family(text, is_builtin=False)


def test_null_and_blank_fields_count_as_left_out() -> None:
    blank = dict.fromkeys(
        ["model_description", "chat_template", "reasoning_start_tag", "tool_parser"], ""
    )
    nulls: dict[str, None] = dict.fromkeys(["stop", "stop_token_ids", "architectures"])
    given = {**registration(), **blank, **nulls}

    assert parse_family(json.dumps(given), is_builtin=False) == parse()


def test_what_is_shown_of_a_family_can_be_registered_again(builtin: dict[str, ModelFamily]) -> None:
    for family in builtin.values():
        shown = {**family.to_json(), "model_name": "copy"}

        again = parse_family(json.dumps(shown), is_builtin=False).to_json()

        assert again == {**shown, "is_builtin": False}


def test_a_family_without_a_template_takes_its_relatives_stop_tokens_and_parser(
    builtin: dict[str, ModelFamily],
) -> None:
    family = inherit(parse(model_family="qwen3", model_ability=["chat", "tools"]), builtin)

    assert family.stop_token_ids == builtin["qwen3"].stop_token_ids
    assert family.reasoning_start_tag == "<think>"
    assert family.tool_parser == "qwen"


def test_the_name_of_a_built_in_model_stands_for_its_template(
    builtin: dict[str, ModelFamily],
) -> None:
    family = inherit(parse(model_family="mine", chat_template="qwen1.5-chat"), builtin)

    assert family.chat_template == builtin["qwen1.5-chat"].chat_template
    assert family.stop_token_ids == builtin["qwen1.5-chat"].stop_token_ids


def test_stop_tokens_that_are_given_are_kept(builtin: dict[str, ModelFamily]) -> None:
    family = inherit(parse(stop_token_ids=[7], stop=["END"]), builtin)

    assert family.stop_token_ids == (7,)
    assert family.stop == ("END",)


def test_a_template_of_its_own_inherits_nothing(builtin: dict[str, ModelFamily]) -> None:
    family = inherit(parse(chat_template="{{ messages }}"), builtin)

    assert family.chat_template == "{{ messages }}"
    assert family.stop_token_ids == ()


def test_a_template_that_is_a_misspelt_name_is_refused(builtin: dict[str, ModelFamily]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        inherit(parse(chat_template="qwen1.5-caht"), builtin)

    assert caught.value.field == "chat_template"
    assert "qwen1.5-chat" in caught.value.problem


def test_tools_need_a_parser(builtin: dict[str, ModelFamily]) -> None:
    with pytest.raises(InvalidRequest) as caught:
        inherit(parse(model_family="mine", model_ability=["chat", "tools"]), builtin)

    assert caught.value.field == "tool_parser"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(field=st.sampled_from(sorted(registration())), value=JSON)
def test_any_value_of_any_field_is_accepted_or_refused_by_name(field: str, value: object) -> None:
    text = json.dumps({**registration(), field: value})

    outcome = outcome_of(lambda: parse_family(text, is_builtin=False))

    if not isinstance(outcome, ModelFamily):
        assert isinstance(outcome, InvalidRequest)
        assert outcome.field.startswith((field, "model"))


@settings(deadline=None)
@given(field=st.sampled_from(sorted(spec())), value=JSON)
def test_any_value_of_any_field_of_a_spec_is_accepted_or_refused(field: str, value: object) -> None:
    text = text_of(model_specs=[{**spec(), field: value}])

    outcome = outcome_of(lambda: parse_family(text, is_builtin=False))

    if not isinstance(outcome, ModelFamily):
        assert isinstance(outcome, InvalidRequest)
        assert outcome.field.startswith("model")
