# SPDX-License-Identifier: Apache-2.0
"""The virtual environments of models, on every worker."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.gateway import gateway_of
from xinference.api.openapi import refusals

from .convert import virtual_env_item
from .schema import ResultAnswer, VirtualEnvList

router = APIRouter(tags=["Cluster"], default_response_class=Response)

WorkerIp = Annotated[str | None, Query(description='Of this worker alone: a host or "host:port".')]
ModelEngine = Annotated[str | None, Query(description="Of this engine alone.")]


@router.get("/v1/virtualenvs", responses={200: {"model": VirtualEnvList}, **refusals(400, 503)})
async def list_virtual_envs(
    request: Request,
    model_name: str | None = None,
    model_engine: ModelEngine = None,
    worker_ip: WorkerIp = None,
) -> Response:
    """List the virtual environments that models run in, or did."""
    found = await gateway_of(request).cluster.virtual_envs(worker_ip)
    shown = [
        virtual_env_item(one)
        for one in found
        if model_name in (None, one.model_name) and model_engine in (None, one.model_engine)
    ]
    return json_answer({"list": shown})


@router.delete(
    "/v1/virtualenvs", responses={200: {"model": ResultAnswer}, **refusals(400, 409, 503)}
)
async def remove_virtual_envs(
    request: Request,
    model_name: str,
    model_engine: ModelEngine = None,
    python_version: Annotated[str | None, Query(description='Such as "3.11".')] = None,
    worker_ip: WorkerIp = None,
) -> Response:
    """Remove the virtual environments of a model; "result" is whether there were any."""
    num_removed = await gateway_of(request).cluster.remove_virtual_envs(
        model_name, model_engine=model_engine, python_version=python_version, worker_ip=worker_ip
    )
    return json_answer({"result": num_removed > 0})
