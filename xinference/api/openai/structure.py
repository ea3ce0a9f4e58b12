# SPDX-License-Identifier: Apache-2.0
"""What a body says of the answer's structure → one `Grammar`. Pure; raises `InvalidRequest`."""

from typing import Any

import orjson

from xinference.api.structures import ANY_OBJECT, json_grammar
from xinference.errors import InvalidRequest
from xinference.protocol.generation import Grammar, GrammarKind

from .schema import GuidedParameters, ResponseFormat, SharedParameters


def grammar_of(body: SharedParameters) -> Grammar | None:
    """Return what the answer is to be held to; None if anything goes.

    Raises:
        InvalidRequest: a schema is missing, is no JSON or is too deep, or there are two grammars.
    """
    found = [*_of_format(body.response_format), *_of_guided(body, "")]
    if body.extra_body is not None:
        found += _of_guided(body.extra_body, "extra_body.")
    if len(found) > 1:
        raise InvalidRequest(
            field=found[1].field, problem=f"cannot be combined with {found[0].field}"
        )
    return found[0] if found else None


def _of_format(given: ResponseFormat | None) -> list[Grammar]:
    field = "response_format"
    if given is None:
        return []
    if (given.json_schema is None) == (given.type == "json_schema"):
        raise InvalidRequest(
            field=f"{field}.json_schema", problem="goes with the type json_schema, and only with it"
        )
    if given.json_schema is not None:
        return [json_grammar(given.json_schema.definition, field=f"{field}.json_schema.schema")]
    return [] if given.type == "text" else [json_grammar(ANY_OBJECT, field=field)]


def _of_guided(given: GuidedParameters, prefix: str) -> list[Grammar]:
    found: list[Grammar] = []
    if given.guided_json is not None:
        found.append(json_grammar(_parsed(given.guided_json, prefix), field=f"{prefix}guided_json"))
    if given.guided_json_object:
        found.append(json_grammar(ANY_OBJECT, field=f"{prefix}guided_json_object"))
    if given.guided_choice is not None:
        text = orjson.dumps(given.guided_choice).decode()
        found.append(Grammar(kind=GrammarKind.CHOICE, text=text, field=f"{prefix}guided_choice"))
    for name, kind, written in (
        ("guided_regex", GrammarKind.REGEX, given.guided_regex),
        ("guided_grammar", GrammarKind.GRAMMAR, given.guided_grammar),
    ):
        if written is not None:
            found.append(Grammar(kind=kind, text=written, field=prefix + name))
    return found


def _parsed(given: dict[str, Any] | str, prefix: str) -> dict[str, Any]:
    field = f"{prefix}guided_json"
    if isinstance(given, str):
        try:
            given = orjson.loads(given)
        except orjson.JSONDecodeError as error:
            raise InvalidRequest(field=field, problem=f"is not JSON: {error}") from None
    if not isinstance(given, dict):
        raise InvalidRequest(field=field, problem="must be an object")
    return given
