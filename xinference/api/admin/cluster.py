# SPDX-License-Identifier: Apache-2.0
"""The cluster as a whole: what it is made of, how busy it is, and how it is stopped."""

import asyncio
import time
from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from xinference import __version__
from xinference.api.answers import json_answer
from xinference.api.gateway import gateway_of
from xinference.api.openapi import refusals
from xinference.errors import XinferenceError

from .convert import cluster_nodes, host_of, status_page, worker_item

READY_TIMEOUT_SECONDS = 2.0

router = APIRouter(tags=["Cluster"], default_response_class=Response)


@router.get("/status", responses=refusals(503))
async def status(request: Request) -> Response:
    """Say how long the cluster runs, and how busy its workers are."""
    return json_answer(status_page(await gateway_of(request).cluster.info(), now=time.time()))


@router.get("/health", responses=refusals())
async def health(request: Request) -> Response:
    """Say that this process lives; it asks nobody else."""
    return json_answer({"status": "ok"})


@router.get("/ready", responses=refusals(503))
async def ready(request: Request) -> Response:
    """Say whether this gateway can serve: there is a worker, or at least a model that answers."""
    cluster = gateway_of(request).cluster
    num_models = cluster.routing().num_ready_models
    problem = ""
    try:
        async with asyncio.timeout(READY_TIMEOUT_SECONDS):
            if not (await cluster.info()).workers:
                problem = "no worker has joined"
    except (XinferenceError, TimeoutError):
        # Why not always: while the supervisor is away, what runs is served.
        problem = "" if num_models else "the supervisor does not answer"
    answer = {"ready": not problem, "problem": problem, "num_ready_models": num_models}
    return json_answer(answer, status=503 if problem else 200)


@router.get("/v1/address", responses=refusals(503))
async def supervisor_address(request: Request) -> Response:
    """Return the address at which workers join, "host:port"."""
    return json_answer((await gateway_of(request).cluster.info()).supervisor_address)


@router.get("/v1/cluster/auth", responses=refusals())
async def is_authentication_on(request: Request) -> Response:
    """Say whether requests need an API key."""
    return json_answer({"auth": gateway_of(request).keyring.is_locked})


@router.get("/v1/cluster/info", responses=refusals(400, 503))
async def cluster_info(request: Request, detailed: bool = False) -> Response:
    """List the supervisor and the workers."""
    info = await gateway_of(request).cluster.info()
    return json_answer(cluster_nodes(info, detailed=detailed))


@router.get("/v1/cluster/version", responses=refusals())
async def version(request: Request) -> Response:
    """Return the version of this software."""
    return json_answer({"version": __version__, "full-revisionid": None})


@router.get("/v1/cluster/devices", responses=refusals(503))
async def num_devices(request: Request) -> Response:
    """Return how many accelerators the worker has that has most."""
    info = await gateway_of(request).cluster.info()
    return json_answer(max((len(worker.resources.devices) for worker in info.workers), default=0))


@router.get("/v1/workers", responses=refusals(503))
async def list_workers(request: Request) -> Response:
    """List the workers and what runs on each."""
    cluster = gateway_of(request).cluster
    info, models = await cluster.info(), await cluster.models()
    return json_answer([worker_item(worker, models) for worker in info.workers])


@router.get("/v1/cluster/history", responses=refusals(400))
async def history(request: Request, since: Annotated[float, Query(ge=0)] = 0.0) -> Response:
    """Say how busy workers and models were over the last hour, as this gateway process saw it.

    `since` leaves out what is not later, in seconds since 1970.
    """
    return json_answer(gateway_of(request).history.as_item(since=since))


@router.get("/v1/supervisor", responses=refusals(503))
async def supervisor(request: Request) -> Response:
    """Return the supervisor's host."""
    info = await gateway_of(request).cluster.info()
    return json_answer({"supervisor_ip": host_of(info.supervisor_address)})


@router.delete("/v1/clusters", responses=refusals(503))
async def stop_cluster(request: Request) -> Response:
    """Shut the cluster down; its models stay wanted and come back with the next start."""
    await gateway_of(request).cluster.stop()
    return json_answer({"result": True})
