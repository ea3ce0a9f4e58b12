# SPDX-License-Identifier: Apache-2.0
"""The data: every built-in family is well formed, and says what its makers say."""

import json
import re
import time
from pathlib import Path

import pytest

from xinference.catalog import Catalog, directory_of, registry
from xinference.catalog.family import ModelFamily
from xinference.catalog.matching import Wish, match, parameter_objects
from xinference.catalog.schema import CARRIED_FIELDS, FIELDS, SPEC_FIELDS, parse_family

FILES = sorted((Path(registry.__file__).parent / "builtin").glob("*.json"))
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@pytest.fixture(scope="module")
def families() -> dict[str, ModelFamily]:
    return registry.builtin_families()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_holds_the_one_family_it_is_named_after(file: Path) -> None:
    family = parse_family(file.read_text(encoding="utf-8"), is_builtin=True)

    assert family.model_name == file.stem


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_file_says_all_that_users_are_shown(file: Path) -> None:
    given = json.loads(file.read_text(encoding="utf-8"))

    assert given["version"] == 2
    assert set(given) <= {*FIELDS, *CARRIED_FIELDS}
    assert all(set(spec) <= set(SPEC_FIELDS) for spec in given["model_specs"])
    assert given["model_description"].endswith(".")
    assert given["context_length"] >= 1024
    assert given["model_lang"]
    assert given["architectures"]
    assert all(name.endswith(("ForCausalLM", "LMHeadModel")) for name in given["architectures"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_abilities_come_with_what_they_need(file: Path) -> None:
    family = parse_family(file.read_text(encoding="utf-8"), is_builtin=True)
    abilities = set(family.model_ability)

    assert ("tools" in abilities) == (family.tool_parser is not None)
    assert ("reasoning" in abilities) == (family.reasoning_start_tag is not None)
    assert (family.reasoning_start_tag is None) == (family.reasoning_end_tag is None)
    assert "hybrid" not in abilities or "reasoning" in abilities


def test_every_hub_id_has_an_owner_and_a_name(families: dict[str, ModelFamily]) -> None:
    for family in families.values():
        for variant in family.variants:
            assert (variant.model_id is None) == (variant.model_hub == "package"), variant
            assert variant.model_id is None or HUB_ID.fullmatch(variant.model_id), variant


def test_no_variant_is_there_twice(families: dict[str, ModelFamily]) -> None:
    for family in families.values():
        keys = [
            (one.model_format, one.size, one.quantization, one.model_hub) for one in family.variants
        ]
        assert len(keys) == len(set(keys)), family.model_name


def test_a_hub_id_names_the_size_it_stands_for(families: dict[str, ModelFamily]) -> None:
    named_otherwise = {"gpt-2", "mixtral-instruct-v0.1", "opt", "mistral-nemo-instruct"}
    for family in families.values():
        if family.model_name in named_otherwise or family.model_name.startswith("phi-3-mini"):
            continue
        for variant in family.variants:
            if variant.model_id is not None:
                size = f"{variant.size.normalize():f}".lower() + "b"
                assert f"-{size}" in variant.model_id.lower(), (family.model_name, variant.model_id)


def test_every_family_can_be_launched_from_files_with_transformers(
    families: dict[str, ModelFamily],
) -> None:
    for family in families.values():
        assert isinstance(parameter_objects(family), list), family.model_name


def test_the_variant_that_is_launched_unasked_is_the_smallest(
    families: dict[str, ModelFamily],
) -> None:
    for family in families.values():
        assert match(family, Wish()).size == min(variant.size for variant in family.variants)


def test_qwen15_chat_has_the_sizes_its_makers_published(families: dict[str, ModelFamily]) -> None:
    published = {
        size: variant.model_id
        for variant in families["qwen1.5-chat"].variants
        if variant.model_format == "pytorch" and variant.model_hub == "huggingface"
        for size in [str(variant.size)]
    }

    assert list(published) == ["0.5", "1.8", "4", "7", "14", "32", "72", "110"]
    assert published["4"] == "Qwen/Qwen1.5-4B-Chat"
    assert published["0.5"] == "Qwen/Qwen1.5-0.5B-Chat"


def test_a_dozen_chat_families_are_there(families: dict[str, ModelFamily]) -> None:
    chat = [name for name, family in families.items() if "chat" in family.model_ability]

    assert len(chat) >= 12


def test_the_guide_is_described_as_its_files_are() -> None:
    config_file = directory_of("package:guide") / "config.json"
    config = json.loads(config_file.read_text(encoding="utf-8"))

    guide = registry.builtin_families()["xinference-guide"]

    assert guide.context_length == config["max_position_embeddings"]
    assert list(guide.architectures) == config["architectures"]


def test_the_families_load_in_fifty_milliseconds(tmp_path: Path) -> None:
    def seconds() -> float:
        start = time.perf_counter()
        Catalog.load(tmp_path)
        return time.perf_counter() - start

    # Why the best of ten: the machine is busy with other tests.
    assert min(seconds() for _ in range(10)) < 0.05
