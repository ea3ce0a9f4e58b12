# SPDX-License-Identifier: Apache-2.0
"""A stand-in hub with one model, and a home to download it to."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

import pytest

from tests.fakes.hub import FakeHub, serving
from xinference.catalog.downloads.cache import ModelCache
from xinference.catalog.downloads.download import download
from xinference.protocol.downloads import DownloadProgress, DownloadRequest, HubSource
from xinference.settings import DownloadSettings

MODEL_ID = "owner/tiny"
WEIGHTS = "model.safetensors"


def files() -> dict[str, bytes]:
    random = Random(7)
    return {
        "config.json": b'{"model_type": "llama"}',
        "tokenizer.json": b"{}" * 600,
        WEIGHTS: random.randbytes(3_000_000),
        "pytorch_model.bin": random.randbytes(2000),
        "1_Pooling/config.json": b"{}",
        "empty.txt": b"",
        "README.md": b"# Tiny",
    }


NEEDED = {"config.json", "tokenizer.json", WEIGHTS, "1_Pooling/config.json", "empty.txt"}


def request(**changes: object) -> DownloadRequest:
    plain = DownloadRequest(
        model_version="tiny--1B--pytorch--none",
        model_name="tiny",
        model_size_in_billions="1",
        sources=(HubSource(hub="huggingface", model_id=MODEL_ID),),
    )
    return replace(plain, **changes)  # type: ignore[arg-type]  # its own fields


@dataclass
class Host:
    """A host that downloads, in this process."""

    home: Path
    settings: DownloadSettings
    told: list[DownloadProgress] = field(default_factory=list)

    @property
    def cache(self) -> ModelCache:
        return ModelCache(self.home)

    def download(self, wanted: DownloadRequest | None = None, **settings: object) -> Path:
        changed = replace(self.settings, **settings)  # type: ignore[arg-type]  # its own fields
        path = download(
            wanted or request(), cache=self.cache, settings=changed, tell=self.told.append
        )
        return Path(path)


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with serving() as served:
        served.add(MODEL_ID, files())
        yield served


@pytest.fixture
def host(hub: FakeHub, tmp_path: Path) -> Host:
    settings = DownloadSettings(
        hf_endpoint=hub.endpoint,
        modelscope_endpoint=hub.endpoint,
        stall_seconds=10.0,
        max_attempts=2,
    )
    return Host(tmp_path / "home", settings)
