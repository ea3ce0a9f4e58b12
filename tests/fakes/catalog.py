# SPDX-License-Identifier: Apache-2.0
"""`FakeCatalog`: one family that every replica can be, real or fake, and registrations."""

import json
from dataclasses import dataclass, replace
from typing import Any

from xinference.errors import (
    FamilyNotFound,
    InvalidRequest,
    ModelAlreadyExists,
    UnsupportedVariant,
)
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import LaunchSpec, ModelDescription, ModelSource
from xinference.protocol.downloads import HUGGINGFACE, HubSource
from xinference.protocol.repositories import CardRequest, RepositoryCard

FAMILY = "xinference-guide"


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeResolved:
    description: ModelDescription
    source: ModelSource
    abilities: tuple[str, ...]


class FakeCatalog:
    """Keeps what `catalog.Catalog` promises the supervisor."""

    def __init__(self) -> None:
        self._families: dict[str, dict[str, Any]] = {
            FAMILY: {"model_name": FAMILY, "is_builtin": True}
        }

    def card_wanted(self, spec: LaunchSpec) -> CardRequest | None:
        if not spec.names_repository:
            return None
        source = HubSource(hub=HUGGINGFACE, model_id=spec.model_name)
        return CardRequest(model_id=spec.model_name, sources=(source,))

    def resolve(self, spec: LaunchSpec, card: RepositoryCard | None = None) -> FakeResolved:
        if card is not None:
            spec = replace(spec, model_name=FAMILY)
        self.family(spec.model_type, spec.model_name)
        if spec.model_format not in {None, "pytorch"}:
            raise UnsupportedVariant(
                family=spec.model_name,
                problem=f"there is no format {spec.model_format}",
                suggestions=["pytorch"],
            )
        return FakeResolved(
            description=ModelDescription(
                model_uid=ModelUid(spec.model_uid or spec.model_name),
                model_type=spec.model_type,
                model_name=spec.model_name,
                model_engine="transformers",
                model_format="pytorch",
                model_size_in_billions="0_01",
                quantization="none",
                model_family=spec.model_name,
                model_lang=("en",),
                model_ability=("chat", "generate"),
                model_description="",
                model_hub="",
                revision=None,
                context_length=1024,
                replica=1,
            ),
            source=ModelSource(path=spec.model_path or "package:guide"),
            abilities=("chat", "generate"),
        )

    def families(self, model_type: str) -> list[dict[str, Any]]:
        self._check_type(model_type)
        return [self._families[name] for name in sorted(self._families)]

    def family(self, model_type: str, name: str) -> dict[str, Any]:
        self._check_type(model_type)
        if name not in self._families:
            raise FamilyNotFound(family=name, suggestions=[FAMILY])
        return self._families[name]

    def register(self, model_type: str, text: str, persist: bool) -> None:
        self._check_type(model_type)
        try:
            family = json.loads(text)
        except ValueError as error:
            raise InvalidRequest(field="model", problem=str(error)) from error
        if not isinstance(family, dict) or "model_name" not in family:
            raise InvalidRequest(field="model_name", problem="is missing")
        if family["model_name"] in self._families:
            raise ModelAlreadyExists(name=family["model_name"])
        self._families[family["model_name"]] = {**family, "is_builtin": False}

    def unregister(self, model_type: str, name: str) -> None:
        if self.family(model_type, name)["is_builtin"]:
            raise InvalidRequest(field="model_name", problem=f"{name} is built in")
        del self._families[name]

    def engines(self, model_type: str, name: str) -> dict[str, Any]:
        self.family(model_type, name)
        return {"Transformers": [{"model_format": "pytorch"}]}

    def fitting(self, spec: LaunchSpec, room_bytes: int) -> list[str]:
        self.family(spec.model_type, spec.model_name)
        return []

    @staticmethod
    def _check_type(model_type: str) -> None:
        if model_type != "LLM":
            raise InvalidRequest(field="model_type", problem=f"{model_type} is unknown")
