# SPDX-License-Identifier: Apache-2.0
"""The autostart list: models that are launched whenever the cluster runs and they do not."""

from typing import Annotated

from fastapi import APIRouter, Path, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import body_of, refusals
from xinference.identifiers import ModelUid
from xinference.protocol.autostart import AutostartStatus

from .convert import autostart_entry, autostart_item, autostart_summary, with_secrets_of
from .schema import AutostartItem, AutostartList, AutostartRequest, AutostartSummary

router = APIRouter(tags=["Autostart"], default_response_class=Response)


@router.get("/v1/autostart/models", responses={200: {"model": AutostartList}, **refusals(503)})
async def list_autostart(request: Request) -> Response:
    """List what is started by itself, the first to be launched first."""
    statuses = await gateway_of(request).cluster.autostart()
    return json_answer({"models": [autostart_item(status) for status in statuses]})


@router.get(
    "/v1/autostart/models/summary",
    responses={200: {"model": list[AutostartSummary]}, **refusals(503)},
)
async def summarize_autostart(request: Request) -> Response:
    """List the same without the launches, but with how each model is."""
    cluster = gateway_of(request).cluster
    states = {model.model_uid: model.state for model in await cluster.models()}
    return json_answer(
        [
            autostart_summary(status, states.get(status.entry.model_uid))
            for status in await cluster.autostart()
        ]
    )


@router.post(
    "/v1/autostart/models",
    openapi_extra=body_of(AutostartRequest),
    responses={200: {"model": AutostartItem}, **refusals(400, 413, 503, 507)},
)
async def set_autostart(request: Request) -> Response:
    """Add a model to the list, or replace its entry; it is launched soon if it does not run."""
    entry = autostart_entry(await read_body(request, AutostartRequest))
    cluster = gateway_of(request).cluster
    entry = with_secrets_of(entry, [status.entry for status in await cluster.autostart()])
    await cluster.set_autostart(entry)
    return json_answer(autostart_item(AutostartStatus(entry=entry)))


@router.delete("/v1/autostart/models/{model_uid}", responses=refusals(404, 503, 507))
async def remove_autostart(
    request: Request, model_uid: Annotated[str, Path(description="The uid of a model.")]
) -> Response:
    """Remove a model from the list; it goes on if it runs. Answers null."""
    await gateway_of(request).cluster.remove_autostart(ModelUid(model_uid))
    return json_answer(None)
