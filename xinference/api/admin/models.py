# SPDX-License-Identifier: Apache-2.0
"""The life of models: launch, list, describe, progress, cancel, replicas, abort, terminate."""

from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from starlette.responses import Response

from xinference.api.answers import json_answer
from xinference.api.body import read_body
from xinference.api.gateway import gateway_of
from xinference.api.openapi import body_of, refusals
from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.deployment import ModelState

from .convert import (
    added_item,
    families_by_ability,
    families_of_vllm,
    instance_item,
    launch_of_version,
    launch_spec,
    model_item,
    placements,
    progress,
    prompts_of,
    replica_item,
)
from .schema import (
    AbortAnswer,
    AbortRequest,
    EventItem,
    InstanceItem,
    InstanceRequest,
    LaunchAnswer,
    LaunchRequest,
    ModelItem,
    ModelList,
    ProgressAnswer,
    RemainingAnswer,
    ReplicaItem,
    ScaleAnswer,
    ScaleRequest,
)

ASKABLE = (ModelState.READY, ModelState.ASLEEP)

router = APIRouter(tags=["Models"], default_response_class=Response)

Uid = Annotated[str, Path(description="The uid of a model.")]


@router.post(
    "/v1/models",
    openapi_extra=body_of(LaunchRequest),
    responses={200: {"model": LaunchAnswer}, **refusals(400, 404, 413, 499, 503, 507)},
)
async def launch_model(
    request: Request,
    wait_ready: Annotated[bool, Query(description="Answer when the model is ready.")] = True,
) -> Response:
    """Launch a model."""
    spec = launch_spec(await read_body(request, LaunchRequest))
    uid = await gateway_of(request).cluster.launch(spec, wait_ready=wait_ready)
    return json_answer({"model_uid": uid})


@router.post(
    "/v1/models/instance",
    openapi_extra=body_of(InstanceRequest),
    responses={200: {"model": LaunchAnswer}, **refusals(400, 404, 413, 499, 503, 507)},
)
async def launch_instance(
    request: Request,
    wait_ready: Annotated[bool, Query(description="Answer when the model is ready.")] = True,
) -> Response:
    """Launch the variant that a version names in one word; otherwise as `POST /v1/models`."""
    spec = launch_spec(launch_of_version(await read_body(request, InstanceRequest)))
    uid = await gateway_of(request).cluster.launch(spec, wait_ready=wait_ready)
    return json_answer({"model_uid": uid})


@router.get("/v1/models", responses={200: {"model": ModelList}, **refusals(503)})
async def list_models(request: Request) -> Response:
    """List the models that can be asked, also those that sleep; `/v1/models/instances` has all."""
    models = await gateway_of(request).cluster.models()
    ready = [model_item(model) for model in models if model.state in ASKABLE]
    return json_answer({"object": "list", "data": ready})


@router.get(
    "/v1/models/instances", responses={200: {"model": list[InstanceItem]}, **refusals(400, 503)}
)
async def list_instances(
    request: Request, model_name: str | None = None, model_uid: str | None = None
) -> Response:
    """List models in every state, with their replicas."""
    models = await gateway_of(request).cluster.models()
    return json_answer(
        [
            instance_item(model)
            for model in models
            if model.state is not ModelState.TERMINATED
            and model_name in (None, "", model.description.model_name)
            and model_uid in (None, "", model.model_uid)
        ]
    )


@router.get("/v1/models/prompts", responses=refusals(503))
async def list_prompts(request: Request) -> Response:
    """Return the chat template and the stop marks of each chat family."""
    families = await gateway_of(request).cluster.registrations("LLM")
    return json_answer(prompts_of(families))


@router.get("/v1/models/families", responses=refusals(503))
async def list_families(request: Request) -> Response:
    """Return the names of the families by ability."""
    families = await gateway_of(request).cluster.registrations("LLM")
    return json_answer(families_by_ability(families))


@router.get("/v1/models/vllm-supported", responses=refusals(503))
async def list_families_of_vllm(request: Request) -> Response:
    """Return the names of the families that vLLM runs, where it is installed."""
    families = await gateway_of(request).cluster.registrations("LLM")
    return json_answer(families_of_vllm(families))


@router.get("/v1/models/{model_uid}", responses={200: {"model": ModelItem}, **refusals(404, 503)})
async def describe_model(request: Request, model_uid: Uid) -> Response:
    """Describe one model, in whatever state it is."""
    return json_answer(model_item(await gateway_of(request).cluster.model(ModelUid(model_uid))))


@router.delete("/v1/models/{model_uid}", responses=refusals(404, 503, 507))
async def terminate_model(request: Request, model_uid: Uid) -> Response:
    """Stop a model; answers null when no process of it is left."""
    await gateway_of(request).cluster.terminate(ModelUid(model_uid))
    return json_answer(None)


@router.get(
    "/v1/models/{model_uid}/progress", responses={200: {"model": ProgressAnswer}, **refusals(503)}
)
async def launch_progress(request: Request, model_uid: Uid) -> Response:
    """Say how far a launch is; an unknown model is at 0, "pending"."""
    cluster = gateway_of(request).cluster
    return json_answer(progress(await cluster.launch_progress(ModelUid(model_uid))))


@router.post("/v1/models/{model_uid}/cancel", responses=refusals(400, 404, 503, 507))
async def cancel_launch(request: Request, model_uid: Uid) -> Response:
    """End a launch that is under way; answers null when nothing of it is left."""
    await gateway_of(request).cluster.cancel_launch(ModelUid(model_uid))
    return json_answer(None)


@router.get(
    "/v1/models/{model_uid}/events",
    responses={200: {"model": list[EventItem]}, **refusals(404, 503)},
)
async def model_events(request: Request, model_uid: Uid) -> Response:
    """Tell a model's story: its last 100 events, oldest first."""
    return json_answer(await gateway_of(request).cluster.events(ModelUid(model_uid)))


@router.get(
    "/v1/models/{model_uid}/replicas",
    responses={200: {"model": list[ReplicaItem]}, **refusals(404, 503)},
)
async def list_replicas(request: Request, model_uid: Uid) -> Response:
    """List the replicas of a model."""
    model = await gateway_of(request).cluster.model(ModelUid(model_uid))
    return json_answer([replica_item(model, replica) for replica in model.replicas])


@router.post(
    "/v1/models/{model_uid}/replicas",
    openapi_extra=body_of(ScaleRequest, required=False),
    responses={200: {"model": ScaleAnswer}, **refusals(400, 404, 413, 503, 507)},
)
async def add_replicas(request: Request, model_uid: Uid) -> Response:
    """Add replicas to a running model; answers when they are ready. The others serve meanwhile."""
    wanted = placements(await read_body(request, ScaleRequest, empty=True))
    added = await gateway_of(request).cluster.add_replicas(ModelUid(model_uid), wanted)
    return json_answer(added_item(added))


@router.delete(
    "/v1/models/{model_uid}/replicas/{replica_id}",
    responses={200: {"model": RemainingAnswer}, **refusals(400, 404, 503, 507)},
)
async def terminate_replica(
    request: Request,
    model_uid: Uid,
    replica_id: Annotated[int, Path(ge=0, le=2**31 - 1)],
) -> Response:
    """Remove one replica; with the last one the model is gone."""
    cluster = gateway_of(request).cluster
    remaining = await cluster.terminate_replica(ModelUid(model_uid), replica_id)
    return json_answer({"remaining_replicas": remaining})


@router.post(
    "/v1/models/{model_uid}/requests/{request_id:path}/abort",
    openapi_extra=body_of(AbortRequest, required=False),
    responses={200: {"model": AbortAnswer}, **refusals(400, 404, 413, 503)},
)
async def abort_request(request: Request, model_uid: Uid, request_id: str) -> Response:
    """Abort a request by the `request_id` of its body; one that has ended is left alone."""
    body = await read_body(request, AbortRequest, empty=True)
    outcome = await gateway_of(request).cluster.abort_request(
        ModelUid(model_uid), RequestId(request_id), block_seconds=body.block_duration
    )
    return json_answer({"msg": outcome})
