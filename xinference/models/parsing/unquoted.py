# SPDX-License-Identifier: Apache-2.0
"""Arguments in forms that do not quote texts as JSON does, so that no JSON Schema describes them.

Out of the schema of a function's parameters come rules for its arguments in tags (GLM-4.5) or in
Gemma's notation. What a rule cannot say is refused for a strict function, and passed over for
any other. Pure; raises `InvalidRequest` alone.
"""

import json
import re
from collections.abc import Mapping
from typing import Any

from xinference.errors import InvalidRequest

from .lark import TEXT, Function, Lark, literal

Schema = Mapping[str, Any]

MAX_REFERENCES = 32
"""That lead to each other without a schema between them."""

_SAY_NOTHING = frozenset({"title", "description", "default", "examples", "deprecated", "$comment"})
_NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
_DEFINITIONS = ("$defs", "definitions")
_BARE_KEY = re.compile(r"[^\s:,{}\[\]<>\"]{1,200}")
_KEY = r"/[A-Za-z_][A-Za-z0-9_.-]{0,63}/"


class Unquoted:
    """The schema of one function's parameters."""

    def __init__(self, lark: Lark, function: Function) -> None:
        self.lark = lark
        self._function = function
        self._root: Schema = function.parameters

    def properties(self, schema: Schema) -> dict[str, tuple[Schema, bool]]:
        """Return the properties of an object in their order, and whether each is required."""
        given = schema.get("properties") or {}
        required = schema.get("required") or ()
        names = dict.fromkeys([*given, *required])
        return {name: (_schema(given.get(name, {})), name in required) for name in names}

    def is_open(self, schema: Schema) -> bool:
        """Return whether an object may have properties that are not named."""
        return not schema.get("properties") and schema.get("additionalProperties") is not False

    def arguments(self) -> Schema:
        """Return the schema of all arguments, an object."""
        schema = self.resolved(self._root)
        known = ("type", "properties", "required", "additionalProperties", *_DEFINITIONS)
        self.check(schema, *known)
        return schema

    def resolved(self, schema: Schema) -> Schema:
        """Return what a schema refers to, if it does."""
        for _ in range(MAX_REFERENCES):
            reference = schema.get("$ref")
            if reference is None:
                return schema
            schema = self._referred(reference)
        raise self.refusal("its references lead to nothing but each other")

    def json(self, schema: Schema) -> str:
        """Return a value of this schema, as JSON."""
        definitions = {name: self._root[name] for name in _DEFINITIONS if name in self._root}
        return self.lark.json({**definitions, **schema}, strict=self._function.strict)

    def text_until(self, end: str, schema: Schema) -> str:
        """Return a text of this schema as it stands, and what ends it."""
        self.check(schema, "type", "enum", "const", "minLength", "maxLength")
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        marker = self.lark.marker(end)
        if values is not None:
            texts = [literal(value) for value in values if isinstance(value, str) and value]
            ways = self.lark.one_of(texts) if texts else ""
            return f"{ways}{'?' if '' in values else ''} {marker}"
        at_least, at_most = schema.get("minLength", 0), schema.get("maxLength", "")
        if not at_least and at_most == "":
            return self.lark.until(end, TEXT)
        # Why without the marker: spelled, it would end the text too early.
        marker_inside = re.escape(end).replace("/", r"\/")
        inside = f"/(?s:.*){marker_inside}(?s:.*)/"
        bounded = self.lark.terminal(f"/(?s:.{{{at_least},{at_most}}})/ & ~{inside}")
        return f"{bounded} {marker}"

    def check(self, schema: Schema, *known: str) -> None:
        """Refuse a keyword of a strict function that no rule says."""
        if self._function.strict:
            for keyword in schema:
                if keyword not in known and keyword not in _SAY_NOTHING:
                    raise self.refusal(f"{keyword!r} cannot be followed")

    def refusal(self, problem: str) -> InvalidRequest:
        """Return the error that says what is wrong with the parameters."""
        return InvalidRequest(
            field="tools",
            problem=f"the parameters of {self._function.name}: {problem} "
            "in the form in which this model writes calls",
        )

    def _referred(self, reference: Any) -> Schema:
        found: Any = self._root
        for part in str(reference).removeprefix("#").split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            found = found.get(name) if isinstance(found, Mapping) else None
        if not isinstance(found, Mapping) or not str(reference).startswith("#"):
            raise self.refusal(f"the reference {str(reference)[:60]!r}")
        return found


class Notation:
    """Gemma's: {name:value,…}, [value,…], texts in quotes of its own, the rest as JSON."""

    def __init__(self, lark: Lark, function: Function, quote: str) -> None:
        self._lark = lark
        self._quote = quote
        self._schema = Unquoted(lark, function)
        self._function = function

    def arguments(self) -> str:
        """Return the arguments, an object."""
        return self._object(self._schema.arguments())

    def _value(self, schema: Schema) -> str:
        reference = schema.get("$ref")
        if reference is None:
            return self._of_kind(schema)
        name = f"{self._function.name} {reference}"
        return self._lark.recursive(name, lambda: self._of_kind(self._schema.resolved(schema)))

    def _of_kind(self, schema: Schema) -> str:
        check = self._schema.check
        kind = schema.get("type")
        values = [schema["const"]] if "const" in schema else schema.get("enum")
        union = schema.get("anyOf") or schema.get("oneOf")
        if values is not None:
            check(schema, "const", "enum", "type")
            return self._lark.one_of(self._plain(value) for value in values)
        if union:
            check(schema, "anyOf", "oneOf")
            return self._lark.one_of(self._value(_schema(one)) for one in union)
        if isinstance(kind, list):
            return self._lark.one_of(self._value({**schema, "type": one}) for one in kind)
        kind = kind or (
            "object" if "properties" in schema else "array" if "items" in schema else ""
        )
        match kind:
            case "object":
                check(schema, "type", "properties", "required", "additionalProperties")
                return self._object(schema)
            case "array":
                check(schema, "type", "items", "minItems", "maxItems")
                return self._array(schema)
            case "string":
                return f"{self._lark.marker(self._quote)} {self._text(schema)}"
            case "integer" | "number" | "boolean" | "null":
                return self._schema.json(schema)
        check(schema)
        return self._anything()

    def _text(self, schema: Schema) -> str:
        return self._schema.text_until(self._quote, schema)

    def _object(self, schema: Schema) -> str:
        if self._schema.is_open(schema):
            pair = self._lark.rule(f'{self._lark.terminal(_KEY)} ":" {self._anything()}')
            return self._lark.rule(f'"{{" ({pair} ("," {pair})*)? "}}"')
        ways: list[str] = []
        rest = ""
        is_needed = False
        for name, (inner, is_required) in reversed(self._schema.properties(schema).items()):
            if not _BARE_KEY.fullmatch(name):
                raise self._schema.refusal(f"the name {name[:60]!r} cannot be written")
            pair = self._lark.rule(f"{literal(f'{name}:')} {self._value(inner)}")
            first = f"{pair} {rest}".strip()
            # Why: what is required is the first, or comes after one of those before it.
            ways = [first] if is_required else [first, *ways]
            is_needed |= is_required
            rest = self._lark.rule(f'("," {pair}){"" if is_required else "?"} {rest}'.strip())
        pairs = f"({' | '.join(ways)}){'' if is_needed else '?'}" if ways else ""
        return self._lark.rule(f'"{{" {pairs} "}}"')

    def _array(self, schema: Schema) -> str:
        item = self._lark.rule(self._value(_schema(schema.get("items", {}))))
        at_least, at_most = schema.get("minItems", 0), schema.get("maxItems")
        if at_most == 0:
            return '"[" "]"'
        most = "" if at_most is None else at_most - 1
        others = "" if most == 0 else f' ("," {item}){{{max(0, at_least - 1)},{most}}}'
        return self._lark.rule(f'"[" ({item}{others}){"" if at_least else "?"} "]"')

    def _anything(self) -> str:
        def body() -> str:
            text = f"{self._lark.marker(self._quote)} {self._lark.until(self._quote)}"
            key = self._lark.terminal(_KEY)
            anything = self._anything()
            pair = f'{key} ":" {anything}'
            plain = self._lark.json({"type": ["number", "boolean", "null"]})
            items = f'"[" ({anything} ("," {anything})*)? "]"'
            return f'{text} | {plain} | {items} | "{{" ({pair} ("," {pair})*)? "}}"'

        return self._lark.recursive("anything", body)

    def _plain(self, value: Any) -> str:
        if isinstance(value, str):
            quote = self._lark.marker(self._quote)
            return f"{quote} {literal(value)} {quote}" if value else f"{quote} {quote}"
        if isinstance(value, list):
            items = ' "," '.join(self._plain(one) for one in value)
            return f'"[" {items} "]"'
        if isinstance(value, dict):
            pairs = ' "," '.join(
                f"{literal(f'{key}:')} {self._plain(one)}" for key, one in value.items()
            )
            return f'"{{" {pairs} "}}"'
        return literal(json.dumps(value))


def _schema(given: Any) -> Schema:
    """Return a schema as an object; true is one that takes everything."""
    return given if isinstance(given, Mapping) else {}
