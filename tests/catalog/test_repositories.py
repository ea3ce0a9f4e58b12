# SPDX-License-Identifier: Apache-2.0
"""A launch by the id of a repository: by the catalogue, or by what its files say."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.models_tiny import make_model, make_tokenizer
from xinference.catalog import Catalog
from xinference.catalog.downloads.card import DOCUMENTS
from xinference.errors import DownloadUnavailable, InvalidRequest, UnsupportedVariant
from xinference.models.library_classes import classes_of
from xinference.protocol.deployment import EngineOptions, LaunchSpec
from xinference.protocol.downloads import HubSource
from xinference.protocol.repositories import CAUSAL, CLASSIFIER, ENCODER, RepositoryCard

ID = "Owner/My-Model-7B"
LLAMA = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "dtype": "bfloat16"}
TRUSTED = EngineOptions(trust_remote_code=True)


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.load(tmp_path / "home")


def card(config: dict[str, Any] | None = None, **fields: Any) -> RepositoryCard:
    config = LLAMA if config is None else config
    return RepositoryCard(
        source=HubSource(hub="huggingface", model_id=ID),
        documents={"config.json": config},
        **{
            "sizes": {"config.json": 1, "model.safetensors": 14_000_000_000},
            "classes": classes_of(str(config.get("model_type"))),
            **fields,
        },
    )


def card_of_directory(directory: Path) -> RepositoryCard:
    documents = {
        name: json.loads((directory / name).read_text(encoding="utf-8"))
        for name in DOCUMENTS
        if (directory / name).exists()
    }
    template = directory / "chat_template.jinja"
    files = [path for path in directory.rglob("*") if path.is_file()]
    return RepositoryCard(
        source=HubSource(hub="huggingface", model_id=ID),
        documents=documents,
        chat_template=template.read_text(encoding="utf-8") if template.exists() else None,
        sizes={str(path.relative_to(directory)): path.stat().st_size for path in files},
        classes=classes_of(documents["config.json"]["model_type"]),
    )


def launch(name: str = ID, **fields: Any) -> LaunchSpec:
    return LaunchSpec(model_name=name, **fields)


def test_only_an_unknown_repository_has_to_be_read(catalog: Catalog) -> None:
    wanted = catalog.card_wanted(launch())

    assert wanted is not None
    assert [source.hub for source in wanted.sources] == ["huggingface", "modelscope"]
    one = catalog.card_wanted(launch(download_hub="modelscope"))
    assert one is not None
    assert [source.hub for source in one.sources] == ["modelscope"]
    for known in ("Qwen/Qwen2.5-7B-Instruct", "qwen/qwen2.5-7b-INSTRUCT", "qwen2.5-instruct"):
        assert catalog.card_wanted(launch(known)) is None
    assert catalog.card_wanted(launch(model_path="/models/mine")) is None


def test_a_registered_family_is_used_by_its_id(catalog: Catalog) -> None:
    spec = {"model_format": "pytorch", "model_size_in_billions": 7, "model_id": ID}
    family = {"model_name": "mine", "model_ability": ["generate"], "model_specs": [spec]}
    catalog.register("LLM", json.dumps(family), False)

    assert catalog.card_wanted(launch()) is None
    assert catalog.resolve(launch()).description.model_name == "mine"


@pytest.mark.parametrize("name", ["a/b/c", "/a", "a/", "../a", "a b/c"])
def test_what_is_no_id_is_refused(catalog: Catalog, name: str) -> None:
    with pytest.raises(InvalidRequest, match="model_name"):
        catalog.card_wanted(launch(name))


def test_a_repository_is_what_the_same_files_are_in_a_directory(
    catalog: Catalog, tmp_path: Path
) -> None:
    directory = tmp_path / "My-Model-7B"
    make_model("qwen3").save_pretrained(directory)
    make_tokenizer().save_pretrained(directory)

    here = catalog.resolve(launch("", model_path=str(directory)))
    there = catalog.resolve(launch(), card_of_directory(directory))

    assert there.abilities == here.abilities == ("chat",)
    # The head of a file of weights is counted as weights.
    assert there.description.memory_bytes == pytest.approx(here.description.memory_bytes, rel=0.05)
    assert replace(
        there.description,
        memory_bytes=here.description.memory_bytes,
        model_hub="local",
        model_size_in_billions=here.description.model_size_in_billions,
    ) == here.description  # fmt: skip
    assert replace(there.source, path=str(directory), download=None) == here.source


def test_what_is_downloaded_is_the_repository_that_was_read(catalog: Catalog) -> None:
    resolved = catalog.resolve(launch(), card())

    assert resolved.description.model_name == "My-Model-7B"
    assert resolved.description.model_size_in_billions == "7"
    assert resolved.source.path == ""
    download = resolved.source.download
    assert download is not None
    assert download.sources == (HubSource(hub="huggingface", model_id=ID),)
    assert download.model_version == "Owner--My-Model-7B--7B--pytorch--none"
    assert resolved.description.memory_bytes > 14e9


def test_without_its_files_an_unknown_repository_is_not_resolved(catalog: Catalog) -> None:
    with pytest.raises(DownloadUnavailable, match="launch with model_path"):
        catalog.resolve(launch())


BROUGHT = {"auto_map": {"AutoModelForCausalLM": "modeling_own.OwnForCausalLM"}}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"model_type": "nobody_knows", "architectures": ["OwnForCausalLM"]}, "OwnForCausalLM"),
        ({"model_type": "nobody_knows", **BROUGHT}, "only with trust_remote_code"),
        ({"model_type": "vit", "architectures": ["ViTModel"]}, "no ViTModel that goes on"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "does not go on"),
        ({"model_type": "mamba", "architectures": ["MambaForCausalLM"]}, "more of the past"),
        ({**LLAMA, "vision_config": {}}, "takes pictures"),
        ({**LLAMA, "quantization_config": {"quant_method": "gptq", "bits": 4}}, "gptqmodel"),
    ],
)
def test_a_class_that_is_not_served_is_refused_before_its_weights_are_there(
    catalog: Catalog, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UnsupportedVariant, match=problem):
        catalog.resolve(launch(), card(config))


def test_code_that_comes_with_the_files_runs_for_those_who_trust_it(catalog: Catalog) -> None:
    config = {"model_type": "nobody_knows", "architectures": ["OwnForCausalLM"], **BROUGHT}

    assert catalog.resolve(launch(engine_options=TRUSTED), card(config)).abilities == ("generate",)


def test_a_model_with_packages_of_its_own_is_not_judged_by_the_hosts(catalog: Catalog) -> None:
    newer = launch(virtual_env_packages=("transformers>=9",))
    unknown = card({"model_type": "next_year", "architectures": ["NextYearForCausalLM"]})

    assert catalog.resolve(newer, unknown).abilities == ("generate",)
    assert catalog.resolve(launch(), replace(unknown, classes=None)).abilities == ("generate",)


def test_an_engine_that_is_a_server_judges_for_itself(catalog: Catalog) -> None:
    unknown = card({"model_type": "next_year", "architectures": ["NextYearForCausalLM"]})

    resolved = catalog.resolve(launch(model_engine="vLLM"), unknown)

    assert resolved.description.model_engine == "vLLM"


def test_a_model_that_embeds_is_recognised_and_asked_for_as_such(catalog: Catalog) -> None:
    config = {
        "model_type": "bert",
        "architectures": ["BertModel"],
        "hidden_size": 384,
        "max_position_embeddings": 512,
    }
    embedder = card(config, sizes={"modules.json": 1, "model.safetensors": 90_000_000})

    resolved = catalog.resolve(launch(model_type="embedding"), embedder)

    assert resolved.description.dimensions == 384
    with pytest.raises(InvalidRequest, match="a model that embeds"):
        catalog.resolve(launch(), embedder)
    with pytest.raises(InvalidRequest, match="do not say how the model reranks"):
        catalog.resolve(launch(model_type="rerank"), embedder)
    unknown = replace(embedder, documents={"config.json": {**config, "model_type": "new"}})
    with pytest.raises(UnsupportedVariant, match="that makes vectors"):
        catalog.resolve(launch(model_type="embedding"), replace(unknown, classes=classes_of("new")))


def test_the_library_is_asked_by_type() -> None:
    llama = classes_of("llama")

    assert llama is not None
    assert llama[CAUSAL] == ("LlamaForCausalLM",)
    assert llama[CLASSIFIER] == ("LlamaForSequenceClassification",)
    assert classes_of("nobody_knows") == {CAUSAL: (), ENCODER: (), CLASSIFIER: ()}
