# SPDX-License-Identifier: Apache-2.0
"""`doc/schemas` says what the catalogue reads."""

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from xinference.catalog import registry
from xinference.catalog.builtin_families import builtin_encoders, builtin_families
from xinference.catalog.encoder_family import EMBEDDING, RERANK, parse_encoder_family
from xinference.catalog.json_schema import family_schema, text_of
from xinference.catalog.schema import parse_family

from .registration import outcome_of, registration, spec

TYPES = ("LLM", EMBEDDING, RERANK)
BUILTIN = Path(registry.__file__).parent / "builtin"
SCHEMAS = Path(__file__).parents[2] / "doc" / "schemas"


def validator_of(model_type: str) -> Draft202012Validator:
    Draft202012Validator.check_schema(family_schema(model_type))
    return Draft202012Validator(family_schema(model_type))


@pytest.mark.parametrize("model_type", TYPES)
def test_the_files_of_the_manual_are_up_to_date(model_type: str) -> None:
    there = (SCHEMAS / f"{model_type}.json").read_text(encoding="utf-8")

    assert there == text_of(model_type), "python -m xinference.catalog.json_schema doc/schemas"


@pytest.mark.parametrize("model_type", TYPES)
def test_every_built_in_file_and_what_is_shown_of_it_is_valid(model_type: str) -> None:
    validator = validator_of(model_type)
    files = BUILTIN if model_type == "LLM" else BUILTIN / model_type
    shown: list[Any] = [json.loads(one.read_text(encoding="utf-8")) for one in files.glob("*.json")]
    families = builtin_families() if model_type == "LLM" else builtin_encoders(model_type)
    # Why not all: what is shown has one spec for each hub and quantization, which is a lot.
    shown += [family.to_json() for family in list(families.values())[::10]]

    problems = [(one["model_name"], error.message) for one in shown
                for error in validator.iter_errors(one)]  # fmt: skip

    assert shown
    assert not problems


@pytest.mark.parametrize(
    ("changes", "is_valid"),
    [
        ({}, True),
        ({"context_length": None}, True),
        ({"tool_parser": "", "stop": ["END"], "updated_at": 1}, True),
        ({"model_specs": [spec(quantization=["none"], model_size_in_billions="0_5")]}, True),
        ({"model_name": None}, False),
        ({"model_name": "a b"}, False),
        ({"context_lenght": 1}, False),
        ({"context_length": 0}, False),
        ({"model_ability": []}, False),
        ({"model_ability": ["sing"]}, False),
        ({"tool_parser": "mine"}, False),
        ({"prompt_style": {}}, False),
        ({"model_specs": []}, False),
        ({"model_specs": [spec(model_format="ggmlv3")]}, False),
        ({"model_specs": [spec(model_size_in_billions="big")]}, False),
        ({"model_specs": [spec(model_size_in_billions=None)]}, False),
        ({"model_specs": [spec(model_src={"mine": {"model_id": "a/b"}})]}, False),
    ],
)
def test_the_schema_and_the_reader_agree(changes: dict[str, Any], is_valid: bool) -> None:
    given = registration(**changes)

    read = outcome_of(lambda: parse_family(json.dumps(given), is_builtin=False))

    assert validator_of("LLM").is_valid(given) is is_valid
    assert isinstance(read, Exception) is not is_valid


@pytest.mark.parametrize(
    ("model_type", "changes", "is_valid"),
    [
        (EMBEDDING, {"dimensions": 8}, True),
        (EMBEDDING, {}, False),
        (EMBEDDING, {"dimensions": 8, "prompts": {"query": 1}}, False),
        (RERANK, {}, True),
        (RERANK, {"type": "best"}, False),
        (RERANK, {"template": {"query": "{query}"}}, False),
    ],
)
def test_so_do_those_of_models_that_embed_and_rerank(
    model_type: str, changes: dict[str, Any], is_valid: bool
) -> None:
    given = {"model_name": "mine", "max_tokens": 64, "model_specs": [spec()], **changes}

    read = outcome_of(lambda: parse_encoder_family(json.dumps(given), model_type, is_builtin=False))

    assert validator_of(model_type).is_valid(given) is is_valid
    assert isinstance(read, Exception) is not is_valid
