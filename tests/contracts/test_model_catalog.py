# SPDX-License-Identifier: Apache-2.0
"""What the supervisor relies on in a catalogue: the real one and the fake of the tests."""

import json
from pathlib import Path

import pytest

from tests.fakes.catalog import FAMILY, FakeCatalog
from xinference.catalog import Catalog
from xinference.cluster.supervisor import ModelCatalog
from xinference.errors import (
    FamilyNotFound,
    InvalidRequest,
    ModelAlreadyExists,
    UnsupportedVariant,
)
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import LaunchSpec

MINE = json.dumps(
    {
        "version": 2,
        "model_name": "mine",
        "model_lang": ["en"],
        "model_ability": ["generate"],
        "model_specs": [
            {
                "model_format": "pytorch",
                "model_size_in_billions": 1,
                "quantization": "none",
                "model_uri": "file:///there/is/no/such/model",
            }
        ],
    }
)


@pytest.fixture(params=["fake", "real"])
def catalog(request: pytest.FixtureRequest, tmp_path: Path) -> ModelCatalog:
    return FakeCatalog() if request.param == "fake" else Catalog.load(tmp_path)


def spec(**changes: str) -> LaunchSpec:
    return LaunchSpec(
        **{"model_uid": ModelUid("u"), "model_name": FAMILY, "model_engine": "transformers"}
        | changes  # type: ignore[arg-type]
    )


def test_a_launch_is_resolved_to_files_and_abilities(catalog: ModelCatalog) -> None:
    resolved = catalog.resolve(spec())

    assert resolved.description.model_uid == "u"
    assert resolved.description.model_name == FAMILY
    assert resolved.source.path == "package:guide"
    assert "chat" in resolved.abilities


def test_what_there_is_not_is_refused(catalog: ModelCatalog) -> None:
    with pytest.raises(FamilyNotFound):
        catalog.resolve(spec(model_name="nobody-knows"))
    with pytest.raises(UnsupportedVariant):
        catalog.resolve(spec(model_format="gptq"))
    with pytest.raises(FamilyNotFound):
        catalog.family("LLM", "nobody-knows")
    with pytest.raises(FamilyNotFound):
        catalog.engines("LLM", "nobody-knows")
    with pytest.raises(InvalidRequest):
        catalog.families("smell")


def test_families_come_and_go(catalog: ModelCatalog) -> None:
    catalog.register("LLM", MINE, False)
    with pytest.raises(ModelAlreadyExists):
        catalog.register("LLM", MINE, False)
    assert catalog.family("LLM", "mine")["is_builtin"] is False
    assert "mine" in [family["model_name"] for family in catalog.families("LLM")]
    assert catalog.engines("LLM", "mine")

    catalog.unregister("LLM", "mine")

    with pytest.raises(FamilyNotFound):
        catalog.family("LLM", "mine")


def test_what_is_no_family_is_refused_and_what_is_built_in_stays(catalog: ModelCatalog) -> None:
    for text in ("{", "{}", "[]"):
        with pytest.raises(InvalidRequest):
            catalog.register("LLM", text, False)
    with pytest.raises(InvalidRequest):
        catalog.unregister("LLM", FAMILY)
    assert catalog.family("LLM", FAMILY)["is_builtin"] is True
