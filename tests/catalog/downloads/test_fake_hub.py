# SPDX-License-Identifier: Apache-2.0
"""The stand-in hub speaks what Hugging Face's own library understands."""

from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from tests.catalog.downloads.conftest import MODEL_ID, WEIGHTS, files
from tests.fakes.hub import FakeHub


@pytest.fixture(autouse=True)
def may_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test run keeps the library from asking the real hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


def test_the_hub_s_own_library_downloads_from_it(hub: FakeHub, tmp_path: Path) -> None:
    path = huggingface_hub.snapshot_download(
        MODEL_ID, endpoint=hub.endpoint, cache_dir=tmp_path, max_workers=1, token=False
    )

    found = {name: (Path(path) / name).read_bytes() for name in files()}
    assert found == files()


def test_the_hub_s_own_library_reads_the_list_that_we_read(hub: FakeHub) -> None:
    about = huggingface_hub.HfApi(endpoint=hub.endpoint, token=False).model_info(
        MODEL_ID, files_metadata=True
    )

    sizes = {one.rfilename: one.size for one in about.siblings}
    assert sizes == {name: len(content) for name, content in files().items()}
    (large,) = [one.lfs for one in about.siblings if one.rfilename == WEIGHTS]
    assert large.size == len(files()[WEIGHTS])
