# SPDX-License-Identifier: Apache-2.0
"""One platform with the guide model on it, shared by the tests of a file that leave it as it is."""

import json
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.e2e.platform import Platform, started

GUIDE = "xinference-guide"

collect_ignore = ["foreign"]
"""Its suites run in another environment, started by `test_foreign_clients.py`."""


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


@pytest.fixture(scope="module")
def reciter(platform: Platform, tmp_path_factory: pytest.TempPathFactory) -> Platform:
    """A running platform whose reciting model is ready."""
    # Why here: it imports torch, which the other files can do without.
    from tests.e2e.reciting_model import NAME, registration, save_reciting_model

    family = registration(save_reciting_model(tmp_path_factory.mktemp(NAME)))
    body = {"model": json.dumps(family), "persist": False}
    url = f"{platform.endpoint}/v1/model_registrations/LLM"
    httpx.post(url, json=body, timeout=30).raise_for_status()
    launch = {"model_name": NAME, "model_uid": NAME, "model_engine": "transformers"}
    httpx.post(f"{platform.endpoint}/v1/models", json=launch, timeout=90).raise_for_status()
    return platform
