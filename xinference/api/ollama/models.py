# SPDX-License-Identifier: Apache-2.0
"""What Ollama's clients list: `/api/tags`, `/api/ps`, `/api/show`, `/api/version`."""

import hashlib
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference import __version__
from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import body_of, refusals
from xinference.errors import FamilyNotFound, InvalidRequest
from xinference.protocol.deployment import ModelState, ModelStatus

from .convert import model_of
from .form import timestamp
from .schema import (
    OllamaErrorAnswer,
    OllamaModels,
    OllamaShowAnswer,
    OllamaShowRequest,
    OllamaVersion,
)

router = APIRouter(tags=["Ollama"])

OLLAMA_VERSION = "0.12.6"
"""The Ollama whose API this is; clients refuse servers that are older than they need."""

NEVER = "2300-01-01T00:00:00Z"
"""When a model will be unloaded."""

CAPABILITIES = {
    "chat": "completion",
    "generate": "completion",
    "tools": "tools",
    "vision": "vision",
    "embed": "embedding",
    "reasoning": "thinking",
    "hybrid": "thinking",
}
"""Our abilities in Ollama's words."""


@router.get(
    "/api/tags",
    responses={200: {"model": OllamaModels}, **refusals(503, body=OllamaErrorAnswer)},
)
async def list_tags(request: Request) -> Response:
    """List the models that can be asked now."""
    models = [
        _item(model) | {"modified_at": timestamp(model.created_ts)}
        for model in await _ready(request)
    ]
    return json_answer({"models": models})


@router.get(
    "/api/ps",
    responses={200: {"model": OllamaModels}, **refusals(503, body=OllamaErrorAnswer)},
)
async def list_running(request: Request) -> Response:
    """List the models that are loaded: the same ones."""
    models = [
        _item(model)
        | {
            "expires_at": NEVER,
            "size_vram": 0,
            "context_length": model.description.context_length,
        }
        for model in await _ready(request)
    ]
    return json_answer({"models": models})


@router.post(
    "/api/show",
    openapi_extra=body_of(OllamaShowRequest),
    responses={
        200: {"model": OllamaShowAnswer},
        **refusals(400, 404, 503, body=OllamaErrorAnswer),
    },
)
async def show(request: Request) -> Response:
    """Describe a model."""
    body = await read_body(request, OllamaShowRequest)
    name = body.model or body.name
    if name is None:
        raise InvalidRequest(field="model", problem="is required")
    cluster = gateway_of(request).cluster
    model = await cluster.model(model_of(name))
    what = model.description
    try:
        family = await cluster.registration(what.model_type, what.model_name)
    except FamilyNotFound:
        family = {}  # it was removed from the catalogue; the model goes on
    capabilities = [CAPABILITIES[one] for one in what.model_ability if one in CAPABILITIES]
    return json_answer(
        {
            "modelfile": "",
            "parameters": "",
            "template": family.get("chat_template") or "",
            "license": "",
            "modified_at": timestamp(model.created_ts),
            "details": _details(model),
            "model_info": {
                "general.architecture": what.model_family,
                "general.basename": what.model_name,
                f"{what.model_family}.context_length": what.context_length,
            },
            "capabilities": list(dict.fromkeys(capabilities)),
        }
    )


@router.get(
    "/api/version",
    responses={200: {"model": OllamaVersion}, **refusals(body=OllamaErrorAnswer)},
)
async def version(request: Request) -> Response:
    """Say which Ollama's API this is."""
    return json_answer({"version": OLLAMA_VERSION, "xinference": __version__})


async def _ready(request: Request) -> list[ModelStatus]:
    models = await gateway_of(request).cluster.models()
    return [model for model in models if model.state is ModelState.READY]


def _item(model: ModelStatus) -> dict[str, Any]:
    # Why a digest: clients cut and compare it. It names the launch, as Ollama's names the files.
    named = f"{model.model_uid} {model.created_ts}".encode()
    return {
        "name": model.model_uid,
        "model": model.model_uid,
        "size": 0,
        "digest": hashlib.sha256(named).hexdigest(),
        "details": _details(model),
    }


def _details(model: ModelStatus) -> dict[str, Any]:
    what = model.description
    size = what.model_size_in_billions.replace("_", ".")
    return {
        "parent_model": "",
        "format": what.model_format,
        "family": what.model_family,
        "families": [what.model_family],
        "parameter_size": f"{size}B" if size else "",
        "quantization_level": what.quantization,
    }
