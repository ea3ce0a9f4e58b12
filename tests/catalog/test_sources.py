# SPDX-License-Identifier: Apache-2.0
"""Where the files of a variant come from."""

import json
from dataclasses import replace

import pytest

from xinference.catalog.family import ModelFamily
from xinference.catalog.registry import builtin_families
from xinference.catalog.schema import parse_family
from xinference.catalog.sources import download_of
from xinference.errors import DownloadUnavailable, InvalidRequest, UnsupportedVariant
from xinference.protocol.downloads import DownloadRequest, HubSource


def request_of(family: ModelFamily, index: int, hub: str | None = None) -> DownloadRequest:
    return download_of(
        family.variants[index],
        family.variants,
        model_version="v",
        model_name=family.model_name,
        model_type="LLM",
        hub=hub,
    )


def family(**sources: dict[str, object]) -> ModelFamily:
    spec = {"model_format": "ggufv2", "model_size_in_billions": 7, "model_src": sources}
    text = {
        "version": 2,
        "model_name": "some-model",
        "model_lang": ["en"],
        "model_ability": ["generate"],
        "model_specs": [spec],
    }
    return parse_family(json.dumps(text), is_builtin=True)


PARTS = {
    "model_id": "owner/some-GGUF",
    "quantizations": ["q4_0", "q8_0"],
    "model_file_name_template": "some-{quantization}.gguf",
    "model_file_name_split_template": "some-{quantization}-{part}.gguf",
    "quantization_parts": {"q8_0": ["00001-of-00002", "00002-of-00002"]},
}


def test_a_variant_is_on_every_hub_that_has_it_the_first_one_preferred() -> None:
    qwen = builtin_families()["qwen2.5-instruct"]

    found = request_of(qwen, 1)

    assert [source.hub for source in found.sources] == ["huggingface", "modelscope"]
    assert {source.model_id for source in found.sources} == {"Qwen/Qwen2.5-0.5B-Instruct"}
    assert found.patterns == ()


def test_a_hub_that_was_asked_for_is_the_only_one() -> None:
    qwen = builtin_families()["qwen2.5-instruct"]

    found = request_of(qwen, 0, hub="modelscope")

    assert [source.hub for source in found.sources] == ["modelscope"]


def test_a_hub_without_the_variant_is_refused_with_those_that_have_it() -> None:
    only_there = family(huggingface=PARTS)

    with pytest.raises(UnsupportedVariant, match=r"not on modelscope.*Available: huggingface"):
        request_of(only_there, 0, hub="modelscope")


def test_a_variant_on_hubs_that_are_not_asked_is_unavailable() -> None:
    elsewhere = family(csghub=PARTS)

    with pytest.raises(DownloadUnavailable, match=r"csghub.*launch with model_path"):
        request_of(elsewhere, 0)


def test_of_quantizations_in_one_repository_the_files_of_one_are_named() -> None:
    both = family(huggingface=PARTS)

    whole, split = request_of(both, 0), request_of(both, 1)

    assert whole.patterns == ("some-q4_0.gguf",)
    assert whole.main_file == "some-q4_0.gguf"
    assert split.patterns == ("some-q8_0-00001-of-00002.gguf", "some-q8_0-00002-of-00002.gguf")
    assert split.main_file == "some-q8_0-00001-of-00002.gguf"


def test_a_repository_whose_files_have_other_names_is_no_equal() -> None:
    other = {**PARTS, "model_file_name_template": "other.{quantization}.gguf"}
    del other["model_file_name_split_template"]

    found = request_of(family(huggingface=PARTS, modelscope=other), 0)

    assert [source.hub for source in found.sources] == ["huggingface"]


@pytest.mark.parametrize("model_id", ["", "../..", "a/b/c", "a b", "/a", "a/.."])
def test_an_id_that_is_none_is_refused(model_id: str) -> None:
    with pytest.raises(InvalidRequest, match="model_id"):
        HubSource(hub="huggingface", model_id=model_id)


def test_a_revision_that_leads_elsewhere_is_refused() -> None:
    good = HubSource(hub="huggingface", model_id="a/b", revision="refs/pr/1")

    with pytest.raises(InvalidRequest, match="model_revision"):
        replace(good, revision="../../api")


def test_every_family_of_this_package_can_be_downloaded_or_needs_no_download() -> None:
    for found in builtin_families().values():
        for variant in found.variants:
            if variant.path is None:
                request = download_of(
                    variant,
                    found.variants,
                    model_version="v",
                    model_name=found.model_name,
                    model_type="LLM",
                    hub=None,
                )
                assert request.sources
