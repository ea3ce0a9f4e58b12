# SPDX-License-Identifier: Apache-2.0
"""Launches of GGUF files that name no family: by path, and by the id of a repository."""

from collections.abc import Callable
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import pytest

from tests.catalog.downloads.conftest import Host, host, hub
from tests.fakes.hub import FakeHub
from tests.gguf_tiny import DIM, NUM_KV_HEADS, NUM_LAYERS, VOCAB_SIZE, save_gguf
from xinference.catalog import Catalog
from xinference.catalog.downloads.card import read_card
from xinference.catalog.gguf_head import NotGguf, documents_of, quantizations_of
from xinference.catalog.memory import OVERHEAD_BYTES
from xinference.errors import DownloadFailed, InvalidRequest, UnsupportedVariant
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.downloads import DownloadRequest
from xinference.protocol.repositories import CardRequest, RepositoryCard

__all__ = ["host", "hub"]
"""Fixtures of the downloads' tests."""
ID = "owner/Tiny-GGUF"
ENGINE = "llama.cpp"


@pytest.fixture
def catalog(tmp_path: Path) -> Catalog:
    return Catalog.load(tmp_path / "home")


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_gguf(tmp_path_factory.mktemp("model") / "Tiny-Chat.Q8_0.gguf")


def launch(name: str = "", **fields: object) -> LaunchSpec:
    return LaunchSpec(model_name=name, model_engine=ENGINE, **fields)  # type: ignore[arg-type]  # its own


def test_the_head_says_what_a_config_would(file: Path) -> None:
    with file.open("rb") as opened:
        documents = documents_of(opened.read)

    config = documents["config.json"]
    assert config["model_type"] == "llama"
    assert config["max_position_embeddings"] == 512
    assert config["num_hidden_layers"] == NUM_LAYERS
    assert (config["hidden_size"], config["vocab_size"]) == (DIM, VOCAB_SIZE)
    assert config["num_key_value_heads"] == NUM_KV_HEADS
    assert "messages" in documents["tokenizer_config.json"]["chat_template"]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda data: b"GGML" + data[4:], "does not begin"),
        (lambda data: data[:4] + b"\x09" + data[5:], "version is 9"),
        (lambda data: data[:500], "ends before its head does"),
        (lambda data: data[:16] + b"\xff" * 8 + data[24:], "of something"),
    ],
)
def test_bytes_that_are_none_are_refused(
    file: Path, damage: Callable[[bytes], bytes], words: str
) -> None:
    with pytest.raises(NotGguf, match=words):
        documents_of(BytesIO(damage(file.read_bytes())).read)


def test_quantizations_are_read_from_the_names_of_files() -> None:
    names = (
        *("a-Q4_K_M.gguf", "a.IQ2_XS.gguf", "BF16/a-BF16-00002-of-00002.gguf"),
        *("BF16/a-BF16-00001-of-00002.gguf", "mmproj-a-f16.gguf", "README.md", "odd.gguf"),
        *("a-UD-Q2_K_XL.gguf", "b-Q4_K_M.gguf"),
    )

    assert quantizations_of(dict.fromkeys(names, 1)) == {
        "Q4_K_M": ["a-Q4_K_M.gguf"],
        "b-Q4_K_M": ["b-Q4_K_M.gguf"],
        "IQ2_XS": ["a.IQ2_XS.gguf"],
        "BF16": ["BF16/a-BF16-00001-of-00002.gguf", "BF16/a-BF16-00002-of-00002.gguf"],
        "UD-Q2_K_XL": ["a-UD-Q2_K_XL.gguf"],
        "none": ["odd.gguf"],
    }


def test_a_file_alone_says_what_the_model_is(catalog: Catalog, file: Path) -> None:
    of_file = catalog.resolve(launch(model_path=str(file)))
    of_directory = catalog.resolve(launch(model_path=str(file.parent)))

    described = of_file.description
    assert (described.model_name, described.model_format) == ("Tiny-Chat.Q8_0", "ggufv2")
    assert (described.quantization, described.context_length) == ("Q8_0", 512)
    assert of_file.abilities == ("chat",)
    assert of_file.source.path == str(file)
    assert of_directory.source.path == str(file.parent)
    assert replace(of_directory.description, model_uid=described.model_uid) == replace(
        described, model_name=file.parent.name, model_family=file.parent.name
    )
    assert 0 < described.memory_bytes - OVERHEAD_BYTES < 100_000_000


def test_files_that_cannot_be_read_or_chosen_from_are_refused(
    catalog: Catalog, file: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(b"no")
    two = tmp_path / "two"
    two.mkdir()
    for name in ("a-Q4_0.gguf", "a-Q8_0.gguf"):
        (two / name).write_bytes(file.read_bytes())

    with pytest.raises(InvalidRequest, match="model_path: it ends before"):
        catalog.resolve(launch(model_path=str(broken)))
    with pytest.raises(InvalidRequest, match="give one of the files"):
        catalog.resolve(launch(model_path=str(two)))
    with pytest.raises(UnsupportedVariant, match=r"is for the engine llama\.cpp"):
        catalog.resolve(LaunchSpec(model_name="", model_path=str(file)))
    with pytest.raises(InvalidRequest, match="served as LLM alone"):
        catalog.resolve(LaunchSpec(model_name="", model_type="embedding", model_path=str(file)))


@pytest.fixture
def repository(hub: FakeHub, file: Path) -> FakeHub:
    data = file.read_bytes()
    names = (
        *("tiny-Q8_0.gguf", "tiny-Q4_K_M.gguf", "mmproj-f16.gguf"),
        *("tiny-F16-00001-of-00002.gguf", "tiny-F16-00002-of-00002.gguf"),
    )
    hub.add(ID, dict.fromkeys(names, data) | {"README.md": b"# Tiny"})
    return hub


def card_of(host: Host, wanted: CardRequest | None, **settings: object) -> RepositoryCard:
    assert wanted is not None
    changed = replace(host.settings, **settings)  # type: ignore[arg-type]  # its own fields
    return read_card(wanted, cache=host.cache, settings=changed, directory=host.home / "way")


def download_of(catalog: Catalog, spec: LaunchSpec, card: RepositoryCard) -> DownloadRequest:
    request = catalog.resolve(spec, card).source.download
    assert request is not None
    return request


def test_of_a_repository_the_head_is_read_and_one_quantization_downloaded(
    catalog: Catalog, host: Host, repository: FakeHub
) -> None:
    spec = launch(ID)
    card = card_of(host, catalog.card_wanted(spec))

    usual = download_of(catalog, spec, card)
    parts = download_of(catalog, launch(ID, quantization="f16"), card)

    assert catalog.resolve(spec, card).abilities == ("chat",)
    assert (usual.quantization, usual.patterns) == ("Q4_K_M", ("tiny-Q4_K_M.gguf",))
    assert parts.patterns == ("tiny-F16-00001-of-00002.gguf", "tiny-F16-00002-of-00002.gguf")
    assert parts.main_file == "tiny-F16-00001-of-00002.gguf"
    with pytest.raises(UnsupportedVariant, match="no variant with quantization q2_k"):
        catalog.resolve(launch(ID, quantization="Q2_K"), card)


def test_what_was_downloaded_of_it_is_launched_again_without_a_hub(
    catalog: Catalog, host: Host, repository: FakeHub
) -> None:
    spec = launch(ID, quantization="Q8_0")
    path = host.download(download_of(catalog, spec, card_of(host, catalog.card_wanted(spec))))
    assert path.name == "tiny-Q8_0.gguf"
    repository.start_afresh()

    for wanted in (spec, launch(ID)):
        again = card_of(host, catalog.card_wanted(wanted), is_offline=True)
        assert host.cache.find(download_of(catalog, wanted, again)) == str(path)
    other = card_of(host, catalog.card_wanted(launch(ID, quantization="Q4_K_M")))

    assert len(other.sizes) == 5
    assert len(repository.listed) == 1


def test_a_repository_of_broken_files_is_refused(
    catalog: Catalog, host: Host, hub: FakeHub
) -> None:
    hub.add(ID, {"x-Q4_0.gguf": b"GGUF"})

    with pytest.raises(DownloadFailed, match="its GGUF file: it ends"):
        card_of(host, catalog.card_wanted(launch(ID)))
