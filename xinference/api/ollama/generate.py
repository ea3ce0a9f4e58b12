# SPDX-License-Identifier: Apache-2.0
"""`POST /api/chat` and `POST /api/generate`."""

import time
from typing import Any

from fastapi import APIRouter, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.edge import name_request
from xinference.api.gateway import gateway_of
from xinference.api.generation import Generation, GenerationAnswer
from xinference.api.openapi import body_of, refusals
from xinference.errors import ModelNotReady
from xinference.protocol.deployment import ModelState
from xinference.protocol.generation import GenerationRequest

from .convert import chat_request, check_keep_alive, generate_request, model_of
from .form import OllamaChatForm, OllamaForm, OllamaGenerateForm, timestamp
from .schema import (
    OllamaChatAnswer,
    OllamaChatRequest,
    OllamaErrorAnswer,
    OllamaGenerateAnswer,
    OllamaGenerateRequest,
    OllamaParameters,
)

router = APIRouter(tags=["Ollama"])

REFUSALS = refusals(400, 404, 413, 429, 503, body=OllamaErrorAnswer)
LINES: dict[str, Any] = {"content": {"application/x-ndjson": {}}}
RETRY_AFTER_SECONDS = 2


@router.post(
    "/api/chat",
    response_model=None,
    openapi_extra=body_of(OllamaChatRequest),
    responses={200: {"model": OllamaChatAnswer, **LINES}, **REFUSALS},
)
async def chat(request: Request) -> Response:
    """Answer a conversation, as lines of JSON or in one piece."""
    body = await read_body(request, OllamaChatRequest)
    form = OllamaChatForm(body.model)
    if not body.messages:
        return await _loaded(request, body, form)
    return _answer(request, body, chat_request(body, name_request(request, None)), form)


@router.post(
    "/api/generate",
    response_model=None,
    openapi_extra=body_of(OllamaGenerateRequest),
    responses={200: {"model": OllamaGenerateAnswer, **LINES}, **REFUSALS},
)
async def generate(request: Request) -> Response:
    """Answer a prompt, as lines of JSON or in one piece."""
    body = await read_body(request, OllamaGenerateRequest)
    form = OllamaGenerateForm(body.model)
    if not body.prompt:
        return await _loaded(request, body, form)
    return _answer(request, body, generate_request(body, name_request(request, None)), form)


def _answer(
    request: Request, body: OllamaParameters, asked: GenerationRequest, form: OllamaForm
) -> Response:
    generation = Generation(model=model_of(body.model), asked=asked, form=form)
    return GenerationAnswer(gateway_of(request), generation, stream=body.stream is not False)


async def _loaded(request: Request, body: OllamaParameters, form: OllamaForm) -> Response:
    """Say that a model is loaded: what Ollama's clients ask by asking nothing."""
    check_keep_alive(body.keep_alive)
    model = await gateway_of(request).cluster.model(model_of(body.model))
    if model.state is not ModelState.READY:
        raise ModelNotReady(
            model=model.model_uid, state=model.state, retry_after_seconds=RETRY_AFTER_SECONDS
        )
    about = {"model": body.model, "created_at": timestamp(time.time())}
    return json_answer({**about, **form.piece(""), "done": True, "done_reason": "load"})
