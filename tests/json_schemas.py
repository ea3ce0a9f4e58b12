# SPDX-License-Identifier: Apache-2.0
"""JSON Schemas for tests: bounded ones, of which every answer ends soon, and unbounded ones."""

from typing import Any

Schema = dict[str, Any]


def record(properties: Schema, **more: Any) -> Schema:
    """Return an object with exactly these properties, all of them required."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
        **more,
    }


DIGIT = {"type": "integer", "minimum": 0, "maximum": 9}
WORD = {"type": "string", "minLength": 1, "maxLength": 4}
POINT = record({"x": DIGIT, "y": DIGIT})

BOUNDED: dict[str, Schema] = {
    "boolean": {"type": "boolean"},
    "integer range": {"type": "integer", "minimum": -20, "maximum": 1000},
    "exclusive range": {"type": "integer", "exclusiveMinimum": 3, "exclusiveMaximum": 6},
    "enum": {"enum": ["red", "green", 3, None, {"a": [1, 2]}]},
    "constant": record({"kind": {"const": "point"}, "at": POINT}),
    "short text": {"type": "string", "maxLength": 6},
    "pattern": {"type": "string", "pattern": "^[a-z]{2,4}-[0-9]{1,3}$"},
    "date": record({"day": {"type": "string", "format": "date"}}),
    "uuid": record({"id": {"type": "string", "format": "uuid"}}),
    "address": record({"host": {"type": "string", "format": "ipv4"}}),
    "list": {"type": "array", "items": DIGIT, "minItems": 1, "maxItems": 4},
    "tuple": {
        "type": "array",
        "prefixItems": [WORD, DIGIT, {"type": "null"}],
        "items": False,
        "minItems": 3,
    },
    "nested": record(
        {"a": record({"b": record({"c": {"type": "array", "maxItems": 1, "items": POINT}})})}
    ),
    "optional": {
        "type": "object",
        "properties": {"a": DIGIT, "b": {"type": "boolean"}, "c": {"type": "null"}},
        "required": ["b"],
        "additionalProperties": False,
    },
    "reference": {
        "$defs": {"point": POINT},
        **record({"from": {"$ref": "#/$defs/point"}, "to": {"$ref": "#/$defs/point"}}),
    },
    "references of references": {
        "$defs": {
            "pair": {"type": "array", "items": {"$ref": "#/$defs/leaf"}, "maxItems": 2},
            "leaf": {"enum": ["l", "r"]},
        },
        "$ref": "#/$defs/pair",
    },
    "union of types": {"anyOf": [DIGIT, {"type": "boolean"}, {"type": "null"}, POINT]},
    "tagged union": {
        "anyOf": [
            record({"kind": {"const": "circle"}, "radius": DIGIT}),
            record(
                {
                    "kind": {"const": "box"},
                    "sides": {"type": "array", "items": DIGIT, "minItems": 2, "maxItems": 2},
                }
            ),
        ]
    },
    "several types": record({"value": {"type": ["integer", "null"], "minimum": 1, "maximum": 5}}),
    "tool call": record(
        {
            "name": {"enum": ["get_weather", "get_time"]},
            "arguments": record(
                {
                    "city": WORD,
                    "unit": {"enum": ["C", "F"]},
                    "hours": {"type": "array", "items": DIGIT, "maxItems": 2},
                }
            ),
        }
    ),
}

UNBOUNDED: dict[str, Schema] = {
    "any object": {"type": "object"},
    "any text": {"type": "string"},
    "any list": {"type": "array", "items": {"type": "integer"}},
    "a tree": {
        "$defs": {
            "node": record(
                {
                    "name": {"type": "string"},
                    "children": {"type": "array", "items": {"$ref": "#/$defs/node"}},
                }
            )
        },
        "$ref": "#/$defs/node",
    },
}
