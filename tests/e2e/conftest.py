# SPDX-License-Identifier: Apache-2.0
"""One platform with the guide model on it, shared by the tests of a file that leave it as it is."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.platform import Platform, started

GUIDE = "xinference-guide"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    """A running platform without a model."""
    with started(tmp_path_factory.mktemp("home")) as running:
        yield running


@pytest.fixture(scope="module")
def guide(platform: Platform) -> Platform:
    """A running platform whose guide model is ready, in fp32 as it is by default."""
    launch_guide(platform)
    return platform


def launch_guide(platform: Platform, **options: object) -> None:
    """Launch the guide model; return when it is ready."""
    body = {"model_name": GUIDE, "model_engine": "transformers", **options}
    httpx.post(f"{platform.endpoint}/v1/models", json=body, timeout=90).raise_for_status()


@pytest.fixture(scope="session")
def guide_files() -> Path:
    """The files of the guide model, to be used as somebody's own model."""
    import xinference.catalog

    return Path(xinference.catalog.__file__).parent / "guide"
