# SPDX-License-Identifier: Apache-2.0
"""What a repository says of its model, read from a stand-in hub or from the cache."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from tests.catalog.downloads.conftest import MODEL_ID, WEIGHTS, Host
from tests.fakes.hub import FakeHub
from xinference.catalog.downloads.card import read_card
from xinference.errors import DownloadFailed, DownloadUnavailable, InvalidRequest
from xinference.protocol.downloads import HUBS, HubSource
from xinference.protocol.repositories import CardRequest, RepositoryCard

TOKENIZER = {"chat_template": "{{ messages }}", "added_tokens_decoder": {"1": "x" * 100_000}}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    return tmp_path / "on the way"


def asked(model_id: str = MODEL_ID, *hubs: str) -> CardRequest:
    sources = tuple(HubSource(hub=hub, model_id=model_id) for hub in hubs or HUBS)
    return CardRequest(model_id=model_id, sources=sources)


def card_of(
    host: Host, directory: Path, wanted: CardRequest | None = None, **settings: object
) -> RepositoryCard:
    return read_card(
        wanted or asked(),
        cache=host.cache,
        settings=replace(host.settings, **settings),  # type: ignore[arg-type]  # its own fields
        directory=directory,
    )


def test_the_small_files_come_and_the_large_ones_are_named(
    hub: FakeHub, host: Host, directory: Path
) -> None:
    hub.repositories[MODEL_ID].files |= {
        "tokenizer_config.json": json.dumps(TOKENIZER).encode(),
        "chat_template.jinja": b"{{ tools }}",
    }

    card = card_of(host, directory)

    assert card.source == HubSource(hub="huggingface", model_id=MODEL_ID)
    assert card.documents["config.json"] == {"model_type": "llama"}
    assert card.documents["tokenizer_config.json"] == {"chat_template": "{{ messages }}"}
    assert card.chat_template == "{{ tools }}"
    assert card.sizes[WEIGHTS] == 3_000_000
    assert "pytorch_model.bin" not in card.sizes
    assert WEIGHTS not in {one.path for one in hub.asked}
    assert not list(host.home.rglob("*.json"))


def test_another_hub_is_asked_where_the_first_does_not_have_it(
    hub: FakeHub, host: Host, directory: Path
) -> None:
    card = card_of(host, directory, asked(MODEL_ID, "modelscope"))

    assert card.source.hub == "modelscope"
    assert hub.listed == [f"modelscope:{MODEL_ID}"]


def test_a_repository_that_is_nowhere_names_every_hub_that_was_asked(
    hub: FakeHub, host: Host, directory: Path
) -> None:
    with pytest.raises(DownloadFailed) as refused:
        card_of(host, directory, asked("nobody/nothing"))

    for word in ("nobody/nothing cannot be downloaded", "huggingface: 127.0.0.1", "modelscope: "):
        assert word in str(refused.value)


def test_what_was_downloaded_is_read_without_a_hub(
    hub: FakeHub, host: Host, directory: Path
) -> None:
    from_hub = card_of(host, directory)
    host.download()
    hub.faults.status = 500

    assert card_of(host, directory) == from_hub
    assert card_of(host, directory, is_offline=True) == from_hub


def test_offline_says_why_no_hub_is_asked(hub: FakeHub, host: Host, directory: Path) -> None:
    with pytest.raises(DownloadUnavailable, match="XINFERENCE_OFFLINE is set"):
        card_of(host, directory, is_offline=True)
    assert not hub.listed


def test_a_wrong_byte_is_fetched_again(hub: FakeHub, host: Host, directory: Path) -> None:
    hub.faults.corrupts["config.json"] = 1

    assert card_of(host, directory).documents["config.json"] == {"model_type": "llama"}


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("adapter_config.json", "adapter of another model"),
        ("model_index.json", "makes pictures"),
        ("README.md", r"has no config\.json$"),
    ],
)
def test_what_holds_no_model_of_its_own_is_refused_by_what_it_is(
    hub: FakeHub, host: Host, directory: Path, name: str, words: str
) -> None:
    hub.add("owner/other", {name: b"{}"})

    with pytest.raises(InvalidRequest, match=words):
        card_of(host, directory, asked("owner/other"))


def test_a_config_that_is_no_object_says_nothing(hub: FakeHub, host: Host, directory: Path) -> None:
    hub.add("owner/odd", {"config.json": b"[1]", WEIGHTS: b"0"})

    assert card_of(host, directory, asked("owner/odd")).documents == {}


def test_a_file_that_is_far_too_large_is_not_fetched(
    hub: FakeHub, host: Host, directory: Path
) -> None:
    hub.faults.sizes["config.json"] = 10**9

    with pytest.raises(DownloadFailed, match=r"config\.json has 1,000,000,000 bytes"):
        card_of(host, directory)
    assert not hub.asked
