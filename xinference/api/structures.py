# SPDX-License-Identifier: Apache-2.0
"""What bodies of every protocol may hold of JSON schemas, as grammars and as tools: bounded."""

from typing import Any

import orjson

from xinference.errors import InvalidRequest
from xinference.protocol.generation import Grammar, GrammarKind

MAX_SCHEMA_DEPTH = 64
MAX_TOOLS_BYTES = 2**20
ANY_OBJECT: dict[str, Any] = {"type": "object"}


def is_deeper(value: object, levels: int) -> bool:
    """Return whether `value` nests in more than `levels`."""
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return bool(inner) and (levels == 0 or any(is_deeper(item, levels - 1) for item in inner))


def json_grammar(schema: dict[str, Any], *, field: str) -> Grammar:
    """Return what holds an answer to a JSON Schema.

    Args:
        field: where the schema came from; errors name it.

    Raises:
        InvalidRequest: it is too deep or too long.
    """
    # Why: deeper ones do not get through parsers further on.
    if is_deeper(schema, MAX_SCHEMA_DEPTH):
        raise InvalidRequest(field=field, problem=f"must be at most {MAX_SCHEMA_DEPTH} levels deep")
    text = orjson.dumps(schema).decode()
    return Grammar(kind=GrammarKind.JSON_SCHEMA, text=text, field=field)


def check_tools(
    tools: tuple[dict[str, Any], ...], *, is_required: bool = False, chosen: tuple[str, ...] = ()
) -> None:
    """Check functions that a model may call, as OpenAI's chats describe them.

    Args:
        is_required: at least one has to be called.
        chosen: the names of the one that has to be called, or of those that may be.

    Raises:
        InvalidRequest: two have one name, they are too deep or too long, or there is none to call.
    """
    names = {tool["function"]["name"] for tool in tools}
    if len(names) < len(tools):
        raise InvalidRequest(field="tools", problem="must have a name each")
    if (
        any(is_deeper(tool, MAX_SCHEMA_DEPTH) for tool in tools)
        or len(orjson.dumps(tools)) > MAX_TOOLS_BYTES
    ):
        raise InvalidRequest(
            field="tools",
            problem=f"must be at most {MAX_SCHEMA_DEPTH} levels deep "
            f"and {MAX_TOOLS_BYTES} bytes long",
        )
    for name in chosen:
        if name not in names:
            raise InvalidRequest(field="tool_choice", problem=f"{name!r} is none of the tools")
    if is_required and not tools:
        raise InvalidRequest(field="tool_choice", problem="there are no tools to call")
