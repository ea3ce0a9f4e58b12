# SPDX-License-Identifier: Apache-2.0
"""The document that describes the routes, and the page made of it."""

from collections.abc import Iterator
from typing import Any

import httpx

from xinference.api.errors import STATUS
from xinference.api.openapi import MEANINGS


def references_in(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"]
        for inner in value.values():
            yield from references_in(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from references_in(inner)


async def test_every_reference_of_the_document_leads_somewhere(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()

    known = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert set(references_in(document)) <= known


async def test_every_operation_says_how_it_fails(http: httpx.AsyncClient) -> None:
    document = (await http.get("/openapi.json")).json()

    for operations in document["paths"].values():
        for operation in operations.values():
            assert "default" in operation["responses"]
            # FastAPI would use it for a malformed request, which is a 400 here.
            unprocessable = operation["responses"].get("422", {"description": MEANINGS[422]})
            assert unprocessable["description"] == MEANINGS[422]
            assert operation["description"]


async def test_a_body_in_the_document_is_closed_and_names_what_is_refused(
    http: httpx.AsyncClient,
) -> None:
    schemas = (await http.get("/openapi.json")).json()["components"]["schemas"]

    assert schemas["ChatRequest"]["additionalProperties"] is False
    assert schemas["ChatRequest"]["properties"]["length_penalty"]["enum"] == [1, None]
    assert "max_num_seqs" in schemas["LaunchRequest"]["properties"]


async def test_the_page_shows_every_route_and_needs_nothing_from_elsewhere(
    http: httpx.AsyncClient,
) -> None:
    page = (await http.get("/docs")).text
    document = (await http.get("/openapi.json")).json()

    for path in document["paths"]:
        assert path in page
    assert "src=" not in page
    assert "http://gateway/v1" in page


def test_every_status_that_an_error_has_is_explained() -> None:
    assert set(STATUS.values()) - {500} <= MEANINGS.keys()
