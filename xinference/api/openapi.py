# SPDX-License-Identifier: Apache-2.0
"""`/openapi.json` and `/docs`: what the routes take and give, for programs and for people.

Bodies are read by `body.py`, not by FastAPI, so their schemas are put into the document here.
The page is written on the server from the same document and needs nothing from the internet.
"""

from collections.abc import Iterator
from html import escape
from typing import Any

import orjson
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from xinference import __version__

from .fields import Answer, Body
from .openai.schema import ErrorAnswer

REF = "#/components/schemas/{model}"

MEANINGS = {
    400: "A field is wrong, missing or not supported; `param` names it.",
    401: "The gateway needs an API key, and there was none that is valid.",
    403: "The API key is not for this.",
    404: "There is no such model, family, registration, key or stored thing.",
    409: "The request was aborted, a live request has its id, or what is to be removed is used.",
    413: "The body is too large.",
    422: "Two processes of the model ended while they worked on the request.",
    429: "The model's queue is full, or the API key's limit used up; try again after `Retry-After` "
    "seconds.",
    499: "The launch was cancelled.",
    503: "The model or a part of the cluster is not ready, or the launch failed.",
    504: "The answer did not begin in the time that the request had.",
    507: "The disk is full: of the worker, for the files, or of the supervisor, for the change.",
}

SECURITY = {
    "bearer": {"type": "http", "scheme": "bearer"},
    "api_key": {"type": "apiKey", "in": "header", "name": "x-api-key"},
}
"""How an API key is sent; while a gateway has none, nothing is."""


def body_of(schema: type[Body], *, required: bool = True) -> dict[str, Any]:
    """Return the part of an operation that describes its body."""
    content = {"application/json": {"schema": {"$ref": REF.format(model=schema.__name__)}}}
    return {"requestBody": {"required": required, "content": content}}


def refusals(*statuses: int, body: type[Answer] = ErrorAnswer) -> dict[int | str, dict[str, Any]]:
    """Return the part of an operation that describes its errors."""
    meanings: dict[int | str, str] = {status: MEANINGS[status] for status in statuses}
    meanings["default"] = "Any other error."
    return {status: {"model": body, "description": meaning} for status, meaning in meanings.items()}


def _bodies(schema: type[Body] = Body) -> Iterator[type[Body]]:
    for child in schema.__subclasses__():
        yield child
        yield from _bodies(child)


def document_of(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document of an application; made once, then kept by it."""
    if app.openapi_schema is None:
        document = get_openapi(
            title=app.title,
            version=__version__,
            summary=app.summary,
            routes=app.routes,
            tags=app.openapi_tags,
        )
        _, bodies = models_json_schema(
            [(schema, "validation") for schema in _bodies()], ref_template=REF
        )
        components = document.setdefault("components", {})
        components.setdefault("schemas", {}).update(bodies["$defs"])
        components["securitySchemes"] = SECURITY
        document["security"] = [{name: []} for name in SECURITY]
        app.openapi_schema = document
    return app.openapi_schema


STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem;
  color: #1c1c1c; background: #fff }
h2 { border-bottom: 1px solid #ccc } code, pre { font: 13px ui-monospace, monospace }
summary { cursor: pointer; padding: .3rem 0 } summary b { display: inline-block; min-width: 4.5em }
table { border-collapse: collapse; margin: .5rem 0 1rem 4.5em } td { border-top: 1px solid #ddd;
  padding: .2rem .8rem .2rem 0; vertical-align: top } pre { background: #f4f4f4; padding: 1rem;
  overflow-x: auto }
@media (prefers-color-scheme: dark) { body { color: #ddd; background: #181818 } pre { background:
  #262626 } a { color: #8ab4ff } }
"""


def page_of(document: dict[str, Any], *, base_url: str) -> str:
    """Return the page for people: every route with its parameters, body and answers."""
    groups: dict[str, list[str]] = {}
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            entry = _operation(document, path, method, operation)
            groups.setdefault(operation["tags"][0], []).append(entry)
    question = orjson.dumps(
        {"model": "MODEL_UID", "messages": [{"role": "user", "content": "Hello!"}]}
    ).decode()
    example = (
        f"curl {base_url}v1/chat/completions -H 'Content-Type: application/json' -d '{question}'"
    )
    body = "".join(
        f"<h2>{escape(group)}</h2>{''.join(entries)}" for group, entries in groups.items()
    )
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><title>Xinference API</title>"
        f"<style>{STYLE}</style><h1>{escape(document['info']['title'])} {__version__}</h1>"
        f"<p>Base URL of OpenAI's clients: <code>{escape(base_url)}v1</code>. "
        "For programs: <a href=/openapi.json>openapi.json</a>.</p>"
        f"<pre>{escape(example)}</pre>{body}</html>"
    )


def _operation(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    rows = [
        (f"{given['name']} ({given['in']})", given["schema"], "")
        for given in operation.get("parameters", [])
    ]
    if "requestBody" in operation:
        (content,) = operation["requestBody"]["content"].values()
        schema = content["schema"]
        if "$ref" in schema:
            schema = document["components"]["schemas"][schema["$ref"].rpartition("/")[2]]
        required = schema.get("required", ())
        rows += [
            (name, field, "required" if name in required else "")
            for name, field in schema["properties"].items()
        ]
    table = "".join(
        f"<tr><td><code>{escape(name)}</code><td>{escape(_kind(field))}<td>{need}"
        for name, field, need in rows
    )
    answers = "".join(
        f"<tr><td>{status}<td colspan=2>{escape(answer['description'])}"
        for status, answer in operation["responses"].items()
    )
    return (
        f"<details><summary><b>{method.upper()}</b> <code>{escape(path)}</code> — "
        f"{escape(operation.get('description', ''))}</summary>"
        f"<table>{table}{answers}</table></details>"
    )


def _kind(field: dict[str, Any]) -> str:
    """Return a schema in a few words."""
    if "enum" in field:
        return "one of " + ", ".join(orjson.dumps(value).decode() for value in field["enum"])
    if "const" in field:
        return orjson.dumps(field["const"]).decode()
    if "anyOf" in field:
        return " or ".join(_kind(option) for option in field["anyOf"])
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if field.get("type") == "array":
        return "list of " + _kind(field.get("items", {}))
    return str(field.get("type", "anything"))
