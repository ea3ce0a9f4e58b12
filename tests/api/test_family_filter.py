# SPDX-License-Identifier: Apache-2.0
"""Searching the catalogue: pure, and over HTTP."""

import json
from typing import Any

import httpx
import pytest

from xinference.api.admin.family_filter import FamilyFilter


def spec(size: int | str, model_format: str = "pytorch", gib: int = 1) -> dict[str, Any]:
    return {
        "model_format": model_format,
        "model_size_in_billions": size,
        "quantization": "none",
        "memory_bytes": gib * 2**30,
    }


FAMILIES: list[dict[str, Any]] = [
    {
        "model_name": "llama-3.2-instruct",
        "model_description": "Small text models.",
        "model_lang": ["en", "de"],
        "model_ability": ["chat", "tools"],
        "model_specs": [spec(1, gib=3), spec(3, gib=7), spec(3, "ggufv2", gib=2)],
    },
    {
        "model_name": "qwen2.5",
        "model_description": "Pretrained.",
        "model_lang": ["en", "zh"],
        "model_ability": ["generate"],
        "model_specs": [spec("0_5"), spec(7, gib=15)],
    },
    {
        "model_name": "bge-m3",
        "language": ["zh"],
        "model_ability": ["embed"],
        "model_specs": [spec(0)],
    },
]


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({}, {"llama-3.2-instruct": 3, "qwen2.5": 2, "bge-m3": 1}),
        ({"words": ("small", "llama")}, {"llama-3.2-instruct": 3}),
        ({"abilities": frozenset({"chat", "tools"})}, {"llama-3.2-instruct": 3}),
        ({"abilities": frozenset({"chat", "vision"})}, {}),
        ({"languages": frozenset({"zh"})}, {"qwen2.5": 2, "bge-m3": 1}),
        ({"model_format": "ggufv2"}, {"llama-3.2-instruct": 1}),
        ({"min_size": 1.0, "max_size": 3.0}, {"llama-3.2-instruct": 3}),
        ({"max_size": 0.5}, {"qwen2.5": 1, "bge-m3": 1}),
        ({"min_size": 4.0}, {"qwen2.5": 1}),
        ({"room_bytes": 2 * 2**30}, {"llama-3.2-instruct": 1, "qwen2.5": 1, "bge-m3": 1}),
        ({"room_bytes": 0}, {}),
    ],
)
def test_what_is_asked_narrows_families_and_their_specs(
    asked: dict[str, Any], found: dict[str, int]
) -> None:
    families = FamilyFilter(**asked).applied_to(FAMILIES)

    assert {one["model_name"]: len(one["model_specs"]) for one in families} == found
    assert len(FAMILIES[0]["model_specs"]) == 3


async def test_the_list_is_narrowed_by_its_query(http: httpx.AsyncClient) -> None:
    route = "/v1/model_registrations/LLM"
    family = {**FAMILIES[0], "model_name": "mine", "version": 2}
    await http.post(route, json={"model": json.dumps(family), "persist": False})

    async def names(**params: Any) -> list[str]:
        answer = await http.get(route, params=params)
        assert answer.status_code == 200, answer.text
        return [one["model_name"] for one in answer.json()]

    assert "mine" in await names()
    assert await names(query="SMALL text") == ["mine"]
    assert await names(ability=["tools", "chat"], language="de") == ["mine"]
    assert await names(language="tlh") == []
    assert await names(model_format="ggufv2", min_size=3) == ["mine"]
    assert "mine" in await names(fits=True)
    refused = await http.get(route, params={"min_size": "big"})
    assert refused.status_code == 400
