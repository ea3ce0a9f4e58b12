# SPDX-License-Identifier: Apache-2.0
"""What a body says of the answer's structure, and what the model is asked then."""

import json
from typing import Any

import httpx
import openai
import pytest

from tests.fakes.cluster import FakeCluster
from xinference.errors import InvalidRequest
from xinference.protocol.generation import MAX_GRAMMAR_CHARS, Grammar, GrammarKind

from .conftest import MESSAGES, chat, completion
from .test_clients import with_openai

ROUTES = {"/v1/chat/completions": chat, "/v1/completions": completion}
INTEGER = {"type": "integer"}


def schema_format(schema: Any = INTEGER, **more: Any) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


def nested(levels: int) -> dict[str, Any]:
    return {"items": nested(levels - 1)} if levels else {}


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("given", "kind", "text", "field"),
    [
        (
            {"response_format": {"type": "json_object"}},
            "json_schema",
            {"type": "object"},
            "response_format",
        ),
        (
            {"response_format": schema_format(strict=True)},
            "json_schema",
            INTEGER,
            "response_format.json_schema.schema",
        ),
        (
            {"response_format": schema_format(strict=False, description="x")},
            "json_schema",
            INTEGER,
            "response_format.json_schema.schema",
        ),
        ({"guided_json": INTEGER}, "json_schema", INTEGER, "guided_json"),
        ({"guided_json": '{"type": "integer"}'}, "json_schema", INTEGER, "guided_json"),
        ({"guided_json_object": True}, "json_schema", {"type": "object"}, "guided_json_object"),
        ({"guided_choice": ["a", "ö"]}, "choice", ["a", "ö"], "guided_choice"),
        (
            {"extra_body": {"guided_json": INTEGER}},
            "json_schema",
            INTEGER,
            "extra_body.guided_json",
        ),
    ],
)
async def test_a_structure_reaches_the_model(
    http: httpx.AsyncClient,
    cluster: FakeCluster,
    route: str,
    stream: bool,
    given: dict[str, Any],
    kind: str,
    text: Any,
    field: str,
) -> None:
    answer = await http.post(route, json=ROUTES[route](stream=stream, **given))

    assert answer.status_code == 200
    grammar = cluster.requests[0].sampling.grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text), grammar.field) == (kind, text, field)


@pytest.mark.parametrize("name", ["guided_regex", "guided_grammar"])
@pytest.mark.parametrize("prefix", ["", "extra_body."])
async def test_a_regex_and_a_grammar_go_as_they_are(
    http: httpx.AsyncClient, cluster: FakeCluster, name: str, prefix: str
) -> None:
    given = {name: r"\d+ä"}

    await http.post(
        "/v1/completions", json=completion(**({"extra_body": given} if prefix else given))
    )

    assert cluster.requests[0].sampling.grammar == Grammar(
        kind=GrammarKind(name.removeprefix("guided_")), text=r"\d+ä", field=prefix + name
    )


@pytest.mark.parametrize(
    "given",
    [
        {"response_format": {"type": "text"}},
        {"response_format": None},
        {"guided_json_object": False},
        {"extra_body": {}},
        {"extra_body": {"guided_json_object": False, "guided_decoding_backend": "auto"}},
        {"guided_decoding_backend": "guidance"},
    ],
)
async def test_what_asks_for_no_structure_is_no_grammar(
    http: httpx.AsyncClient, cluster: FakeCluster, given: dict[str, Any]
) -> None:
    assert (await http.post("/v1/chat/completions", json=chat(**given))).status_code == 200
    assert cluster.requests[0].sampling.grammar is None


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"response_format": "json"}, "response_format"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        (
            {"response_format": {**schema_format(), "type": "json_object"}},
            "response_format.json_schema",
        ),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "n"}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": schema_format(name="a b")}, "response_format.json_schema.name"),
        ({"response_format": schema_format(schem={})}, "response_format.json_schema.schem"),
        ({"response_format": schema_format([1])}, "response_format.json_schema.schema"),
        ({"response_format": schema_format(nested(70))}, "response_format.json_schema.schema"),
        ({"guided_json": "{"}, "guided_json"),
        ({"guided_json": "[]"}, "guided_json"),
        ({"guided_json": 7}, "guided_json"),
        ({"guided_json": json.dumps(nested(70))}, "guided_json"),
        ({"guided_json_object": 1}, "guided_json_object"),
        ({"guided_regex": ""}, "guided_regex"),
        ({"guided_regex": "a" * (MAX_GRAMMAR_CHARS + 1)}, "guided_regex"),
        ({"guided_choice": []}, "guided_choice"),
        ({"guided_choice": [1]}, "guided_choice[0]"),
        ({"guided_grammar": 5}, "guided_grammar"),
        ({"guided_whitespace_pattern": " *"}, "guided_whitespace_pattern"),
        ({"guided_decoding_backend": "outlines"}, "guided_decoding_backend"),
        (
            {"extra_body": {"guided_whitespace_pattern": " *"}},
            "extra_body.guided_whitespace_pattern",
        ),
        ({"extra_body": {"temperature": 1}}, "extra_body.temperature"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "guided_regex"),
        ({"guided_regex": "a", "response_format": {"type": "json_object"}}, "guided_regex"),
        ({"guided_regex": "a", "extra_body": {"guided_regex": "a"}}, "extra_body.guided_regex"),
    ],
)
async def test_a_bad_structure_is_refused_by_name(
    http: httpx.AsyncClient, cluster: FakeCluster, given: dict[str, Any], named: str
) -> None:
    answer = await http.post("/v1/chat/completions", json=chat(**given))

    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == named
    assert cluster.requests == []


async def test_openais_client_asks_for_its_own_schemas(port: int, cluster: FakeCluster) -> None:
    import pydantic

    class Event(pydantic.BaseModel):
        name: str
        guests: list[str]

    def use(client: openai.OpenAI) -> None:
        with pytest.raises(pydantic.ValidationError):  # the fake answers in prose
            client.chat.completions.parse(model="guide", messages=MESSAGES, response_format=Event)

    await with_openai(port, use)

    grammar = cluster.requests[0].sampling.grammar
    assert grammar is not None
    assert json.loads(grammar.text)["required"] == ["name", "guests"]


def test_a_grammar_has_a_size() -> None:
    with pytest.raises(InvalidRequest) as refused:
        Grammar(kind=GrammarKind.REGEX, text="a" * (MAX_GRAMMAR_CHARS + 1), field="guided_regex")

    assert refused.value.field == "guided_regex"
