# SPDX-License-Identifier: Apache-2.0
"""What the workers keep of models: list it, remove it, download without a launch."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import body_of, refusals
from xinference.errors import ObjectNotFound

from .convert import cached_item, deletable, download_progress, download_spec
from .schema import (
    CachedList,
    DeletableAnswer,
    DownloadAnswer,
    DownloadBody,
    DownloadProgressAnswer,
    RemovedAnswer,
)

router = APIRouter(tags=["Cache"], default_response_class=Response)

Version = Annotated[str, Query(min_length=1, description="As the list of the cache has it.")]
WorkerIp = Annotated[
    str | None, Query(description='A worker: its host, or "host:port"; none: every one.')
]
CacheUid = Annotated[str, Path(description="What the start of the download answered.")]


@router.get("/v1/cache/models", responses={200: {"model": CachedList}, **refusals(400, 503)})
async def list_cached(
    request: Request, model_name: str | None = None, worker_ip: WorkerIp = None
) -> Response:
    """List what is kept, of every model or of one family; `unanswered` are workers that did not
    say."""
    kept = await gateway_of(request).cluster.cached_models(worker_ip or None)
    items = [
        cached_item(node, model)
        for node, models in kept.models.items()
        for model in models
        if model_name in (None, "", model.model_name)
    ]
    return json_answer({"list": items, "unanswered": kept.unanswered})


@router.get(
    "/v1/cache/models/files",
    responses={200: {"model": DeletableAnswer}, **refusals(400, 404, 503)},
)
async def list_deletable(
    request: Request, model_version: Version, worker_ip: WorkerIp = None
) -> Response:
    """Say what a removal would remove. Files that another version needs are not among it."""
    kept = await gateway_of(request).cluster.cached_models(worker_ip or None)
    models = [
        model
        for models in kept.models.values()
        for model in models
        if model.model_version == model_version
    ]
    if not models:
        raise ObjectNotFound(kind="cached model", id=model_version)
    told = deletable(models, model_version, worker_ip)
    return json_answer({**told, "unanswered": kept.unanswered})


@router.delete(
    "/v1/cache/models",
    responses={200: {"model": RemovedAnswer}, **refusals(400, 404, 409, 503)},
)
async def remove_cached(
    request: Request,
    model_version: Version,
    worker_ip: WorkerIp = None,
    force: Annotated[bool, Query(description="Remove what a model runs from, too.")] = False,
) -> Response:
    """Remove what one version alone needs; `unanswered` are workers that may still keep it."""
    removed = await gateway_of(request).cluster.remove_cached(
        model_version, worker_ip or None, is_forced=force
    )
    return json_answer(
        {
            "result": True,
            "freed_bytes": removed.freed_bytes,
            "unanswered": removed.unanswered,
        }
    )


@router.post(
    "/v1/cache/models",
    openapi_extra=body_of(DownloadBody),
    responses={200: {"model": DownloadAnswer}, **refusals(400, 404, 413, 503)},
)
async def download_model(request: Request) -> Response:
    """Begin to download a variant to every worker, or to one, and launch nothing."""
    spec = download_spec(await read_body(request, DownloadBody))
    return json_answer({"cache_uid": await gateway_of(request).cluster.download(spec)})


@router.get(
    "/v1/cache/models/{cache_uid}/progress",
    responses={200: {"model": DownloadProgressAnswer}, **refusals(503)},
)
async def tell_download_progress(request: Request, cache_uid: CacheUid) -> Response:
    """Say how far a download is; one that nobody knows is at 0, "pending"."""
    statuses = await gateway_of(request).cluster.download_status(cache_uid)
    return json_answer(download_progress(statuses))


@router.post("/v1/cache/models/{cache_uid}/cancel", responses=refusals(404, 503))
async def cancel_download(request: Request, cache_uid: CacheUid) -> Response:
    """End a download; answers null. What has arrived is kept."""
    await gateway_of(request).cluster.cancel_download(cache_uid)
    return json_answer(None)
