# SPDX-License-Identifier: Apache-2.0
"""The form of a family as JSON Schema, for editors and for whoever writes registrations.

It is derived from the tables by which `schema` and `encoder_family` read. What it cannot say,
such as that tools need a parser, they check. `python -m xinference.catalog.json_schema DIR`
writes the files that are in `doc/schemas`.
"""

import json
import sys
from pathlib import Path
from typing import Any

from .encoder_family import (
    ABILITIES as ENCODER_ABILITIES,
)
from .encoder_family import (
    EMBEDDING,
    ENCODER_TYPES,
    RERANK_TYPES,
    TEMPLATE_FIELDS,
    UNKNOWN_TYPE,
)
from .schema import (
    ABILITIES,
    CARRIED_FIELDS,
    CARRIED_SPEC_FIELDS,
    DROPPED_FIELDS,
    DROPPED_SPEC_FIELDS,
    FORMATS,
    HUBS,
    NO_HUBS,
    TOOL_PARSERS,
)

Schema = dict[str, Any]

LANGUAGE = "LLM"


def family_schema(model_type: str) -> Schema:
    """Return the schema of a family: LLM, embedding or rerank."""
    about = _LANGUAGE if model_type == LANGUAGE else _encoder(model_type)
    required = ["model_name", "model_specs"]
    if model_type == LANGUAGE:
        required.insert(1, "model_ability")
    if model_type == EMBEDDING:
        required[1:1] = ["dimensions", "max_tokens"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"A family of models of type {model_type}",
        "type": "object",
        "required": required,
        "properties": {
            "version": {"enum": [1, 2]},
            "model_name": {"type": "string", "pattern": r"^[^\s+\\/?%#&=]+$", "maxLength": 200},
            "model_description": _text("for people"),
            "license": _text("as the makers name it"),
            **about,
            "model_specs": {
                "type": "array",
                "minItems": 1,
                "items": _spec(needs_size=model_type == LANGUAGE),
            },
            **_any(CARRIED_FIELDS, "kept and shown"),
            **_any(DROPPED_FIELDS, "of a family that is shown; not kept"),
        },
        "additionalProperties": False,
    }


def write(directory: Path) -> None:
    """Write each schema to a file of its type."""
    directory.mkdir(parents=True, exist_ok=True)
    for model_type in (LANGUAGE, *ENCODER_TYPES):
        (directory / f"{model_type}.json").write_text(text_of(model_type), encoding="utf-8")


def text_of(model_type: str) -> str:
    """Return the file of a type."""
    return json.dumps(family_schema(model_type), indent=2) + "\n"


def _text(description: str) -> Schema:
    return {"type": ["string", "null"], "description": description}


def _texts(description: str, **items: Any) -> Schema:
    return {
        "type": ["array", "null"],
        "items": {"type": "string", "minLength": 1, **items},
        "description": description,
    }


def _count(description: str) -> Schema:
    return {"type": ["integer", "null"], "minimum": 1, "description": description}


def _any(names: tuple[str, ...], description: str) -> dict[str, Schema]:
    return {name: {"description": description} for name in names}


_SIZE: Schema = {
    "oneOf": [
        {"type": "number", "minimum": 0},
        {"type": "string", "pattern": r"^\d{1,6}([._]\d{1,6})?$"},
        {"type": "null"},
    ],
    "description": 'billions of parameters: 7, "0_5"',
}
_SOURCE: Schema = {
    "type": "object",
    "required": ["model_id"],
    "properties": {
        "model_id": {
            "type": "string",
            "description": "the repository; {quantization} in it stands for the name of one",
        },
        "model_revision": _text("a commit or tag"),
        "quantizations": _texts("as the format names them"),
        **_any(CARRIED_SPEC_FIELDS, "kept and shown"),
    },
    "additionalProperties": False,
}
_LANGUAGE: Schema = {
    "context_length": _count("tokens of prompt and answer together"),
    "model_lang": _texts("languages it is made for"),
    "model_ability": {"type": "array", "minItems": 1, "items": {"enum": list(ABILITIES)}},
    "model_family": _text("the built-in family it comes of"),
    "architectures": _texts("class names of transformers"),
    "chat_template": _text("Jinja, or the name of a built-in family; else the tokenizer's own"),
    "stop_token_ids": {"type": ["array", "null"], "items": {"type": "integer", "minimum": 0}},
    "stop": _texts("texts that end an answer"),
    "reasoning_start_tag": _text("before the thinking"),
    "reasoning_end_tag": _text("after the thinking"),
    "tool_parser": {
        "enum": [*TOOL_PARSERS, "", None],
        "description": "how calls of tools are written",
    },
}


def _spec(*, needs_size: bool) -> Schema:
    required = ["model_format"] + (["model_size_in_billions"] if needs_size else [])
    return {
        "type": "object",
        "required": required,
        "properties": {
            "model_format": {"enum": list(FORMATS)},
            "model_size_in_billions": _SIZE,
            "activated_size_in_billions": _SIZE,
            "quantization": {
                "type": ["string", "array", "null"],
                "items": {"type": "string", "minLength": 1},
            },
            "quantizations": _texts("as the format names them"),
            "model_hub": {"enum": [*HUBS, *NO_HUBS, "", None]},
            "model_id": _text("the repository on the hub"),
            "model_revision": _text("a commit or tag"),
            "model_uri": _text("an absolute path on the worker, or file:///…"),
            "model_src": {
                "type": ["object", "null"],
                "minProperties": 1,
                "propertyNames": {"enum": list(HUBS)},
                "additionalProperties": _SOURCE,
            },
            **_any(CARRIED_SPEC_FIELDS, "kept and shown"),
            **_any(DROPPED_SPEC_FIELDS, "of a family that is shown; not kept"),
        },
        "additionalProperties": False,
    }


def _encoder(model_type: str) -> Schema:
    about: Schema = {
        "max_tokens": _count("of one text, or of a query and a document"),
        "language": _texts("languages it is made for"),
        "model_ability": _texts("what it gives", enum=list(ENCODER_ABILITIES[model_type])),
    }
    if model_type == EMBEDDING:
        return about | {
            "max_tokens": {**about["max_tokens"], "type": "integer"},
            "dimensions": {**_count("numbers in a vector"), "type": "integer"},
            "prompts": {
                "type": ["object", "null"],
                "additionalProperties": {"type": "string"},
                "description": "put before texts, by the name of what they are for",
            },
        }
    return about | {
        "type": {"enum": [*RERANK_TYPES, UNKNOWN_TYPE, "", None]},
        "template": {
            "type": ["object", "null"],
            "required": ["query", "document", "yes"],
            "properties": {name: _text("of the question to the model") for name in TEMPLATE_FIELDS},
            "additionalProperties": False,
        },
    }


if __name__ == "__main__":
    write(Path(sys.argv[1]))
