# SPDX-License-Identifier: Apache-2.0
"""The catalogue: which families exist, adding one's own, and which engines run them."""

from typing import Annotated

from fastapi import APIRouter, Query, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import body_of, refusals
from xinference.cluster.interface import Cluster
from xinference.errors import InsufficientResources
from xinference.protocol.downloads import CachedModel, KeptModels
from xinference.protocol.nodes import largest_room_bytes

from .convert import version_items
from .family_filter import FamilyFilter
from .schema import RegistrationRequest, VersionItem
from .spec_state import with_state

router = APIRouter(tags=["Catalogue"], default_response_class=Response)

LOOK_SECONDS = 1.5
"""For workers to say what they keep; the catalogue does not wait for one that is silent."""

VirtualEnv = Annotated[
    bool, Query(description="Changes nothing: a virtual environment has the engines of its host.")
]


@router.post(
    "/v1/model_registrations/{model_type}",
    openapi_extra=body_of(RegistrationRequest),
    responses=refusals(400, 413, 503),
)
async def register_model(request: Request, model_type: str) -> Response:
    """Add a family of one's own."""
    body = await read_body(request, RegistrationRequest)
    await gateway_of(request).cluster.register(model_type, body.model, persist=body.persist)
    return json_answer(None)


@router.get("/v1/model_registrations/{model_type}", responses=refusals(400, 503))
async def list_registrations(
    request: Request,
    model_type: str,
    detailed: bool = False,
    query: Annotated[str | None, Query(description="Words of the name or description.")] = None,
    ability: Annotated[list[str] | None, Query(description="All of these.")] = None,
    language: Annotated[list[str] | None, Query(description="All of these.")] = None,
    model_format: Annotated[str | None, Query(description="Such as ggufv2.")] = None,
    min_size: Annotated[float | None, Query(ge=0, description="Billions.")] = None,
    max_size: Annotated[float | None, Query(ge=0, description="Billions.")] = None,
    fits: Annotated[bool, Query(description="Only what the cluster has memory for now.")] = False,
    cached: Annotated[bool, Query(description="Only what needs no download.")] = False,
) -> Response:
    """List the families of a type; `detailed` gives all that is known of each, and the specs
    that are as asked, with `cache_status` and `fits`."""
    cluster = gateway_of(request).cluster
    families = await cluster.registrations(model_type)
    room_bytes = largest_room_bytes((await cluster.info()).workers) if fits or detailed else 0
    if detailed or cached:
        families = with_state(families, _all_of(await _kept(cluster)), room_bytes)
    asked = FamilyFilter(
        words=tuple((query or "").casefold().split()),
        abilities=frozenset(ability or ()),
        languages=frozenset(language or ()),
        model_format=model_format,
        min_size=min_size,
        max_size=max_size,
        room_bytes=room_bytes if fits else None,
        is_cached=cached,
    )
    families = asked.applied_to(families)
    if not detailed:
        names = ("model_name", "is_builtin")
        families = [{name: family[name] for name in names} for family in families]
    return json_answer(families)


@router.get("/v1/model_registrations/{model_type}/{model_name}", responses=refusals(400, 404, 503))
async def describe_registration(request: Request, model_type: str, model_name: str) -> Response:
    """Return one family, with `cache_status` and `fits` in each spec."""
    cluster = gateway_of(request).cluster
    family = await cluster.registration(model_type, model_name)
    room_bytes = largest_room_bytes((await cluster.info()).workers)
    (family,) = with_state([family], _all_of(await _kept(cluster)), room_bytes)
    return json_answer(family)


@router.get(
    "/v1/models/{model_type}/{model_name}/versions",
    responses={200: {"model": list[VersionItem]}, **refusals(400, 404, 503)},
)
async def list_versions(request: Request, model_type: str, model_name: str) -> Response:
    """List the variants of a family, each in the one word that `/v1/models/instance` takes."""
    cluster = gateway_of(request).cluster
    family = await cluster.registration(model_type, model_name)
    kept = await _kept(cluster)
    (family,) = with_state([family], _all_of(kept), 0)
    return json_answer(version_items(model_type, family, kept))


@router.delete(
    "/v1/model_registrations/{model_type}/{model_name}", responses=refusals(400, 404, 503)
)
async def unregister_model(request: Request, model_type: str, model_name: str) -> Response:
    """Remove a family that was added; models that run of it go on."""
    await gateway_of(request).cluster.unregister(model_type, model_name)
    return json_answer(None)


@router.get("/v1/engines/{model_name}", responses=refusals(400, 404, 503))
async def list_llm_engines(
    request: Request, model_name: str, enable_virtual_env: VirtualEnv = False
) -> Response:
    """Return what each engine can run of a language model, or why it cannot."""
    return await list_engines(request, "LLM", model_name, enable_virtual_env)


@router.get("/v1/engines/{model_type}/{model_name}", responses=refusals(400, 404, 503))
async def list_engines(
    request: Request, model_type: str, model_name: str, enable_virtual_env: VirtualEnv = False
) -> Response:
    """Return what each engine can run of a model, or why it cannot."""
    return json_answer(await gateway_of(request).cluster.engines(model_type, model_name))


async def _kept(cluster: Cluster) -> KeptModels:
    """Return what the workers keep that say so soon."""
    try:
        return await cluster.cached_models(None, timeout_seconds=LOOK_SECONDS)
    except InsufficientResources:  # no worker has joined yet
        return KeptModels(models={})


def _all_of(kept: KeptModels) -> list[CachedModel]:
    return [model for models in kept.models.values() for model in models]
