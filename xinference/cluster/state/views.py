# SPDX-License-Identifier: Apache-2.0
"""What the state shows of a model: snapshots for people, progress for who waits, routes."""

from dataclasses import replace

from xinference.cluster.messages import ModelRoutes, Route
from xinference.errors import LoadFailed, XinferenceError
from xinference.protocol.deployment import (
    LaunchProgress,
    ModelDescription,
    ModelStatus,
    ReplicaProgress,
    ReplicaState,
    ReplicaStatus,
)

from .launch_progress import replica_progress
from .records import Model, Replica, Wish


def status_of(model: Model) -> ModelStatus:
    """Return a snapshot of a model."""
    replicas = tuple(_replica_status(replica) for replica in model.replicas.values())
    addresses = [
        status.address
        for status in replicas
        if status.state is ReplicaState.READY and status.address is not None
    ]
    return ModelStatus(
        model_uid=model.uid,
        description=_description_of(model, addresses[0] if addresses else None),
        state=model.state,
        created_ts=model.desired.created_ts,
        replicas=replicas,
    )


def progress_of(model: Model) -> LaunchProgress:
    """Return how far the launch of a model is."""
    if model.wish is Wish.STOP:
        return LaunchProgress(progress=0.0, stage="cancelled")
    if model.wish is Wish.NOTHING:
        return LaunchProgress(progress=0.0, stage="error", info=str(model.error))
    if model.wish is Wish.SLEEP:
        # Why: only what was ready sleeps, and who waits for that may have looked away meanwhile.
        return LaunchProgress(progress=1.0, stage="completed")
    each = [(replica.uid, _progress(replica)) for replica in model.wanted]
    slowest = min((progress for _, progress in each), key=lambda progress: progress.progress)
    replicas = tuple(
        ReplicaProgress(
            replica=uid,
            progress=progress.progress,
            stage=progress.stage,
            info=progress.info,
            download_files=progress.download_files,
        )
        for uid, progress in each
    )
    return replace(slowest, replicas=replicas)


def routes_of(model: Model) -> ModelRoutes:
    """Return where requests of a model go."""
    routes = []
    for replica in model.replicas.values():
        serving = replica.serving
        if serving is not None and replica.runs and serving[1].address is not None:
            assigned, report = serving
            route = Route(
                replica=replica.uid, instance=assigned.instance, address=str(report.address)
            )
            routes.append(route)
    return ModelRoutes(
        state=model.state,
        retry_after_seconds=model.retry_after_seconds,
        problem=_problem_of(model.error),
        routes=tuple(routes),
        is_on_demand=model.is_on_demand,
    )


def _description_of(model: Model, address: str | None) -> ModelDescription:
    """Return what the model is; what its replica says of itself counts for more."""
    description = replace(model.desired.description, address=address, replica=len(model.wanted))
    for replica in model.replicas.values():
        if replica.report is not None and replica.report.context_length is not None:
            return replace(description, context_length=replica.report.context_length)
    return description


def _problem_of(error: XinferenceError | None) -> str:
    """Return what went wrong, without the sentence that a `LoadFailed` puts around it."""
    if error is None:
        return ""
    return error.problem if isinstance(error, LoadFailed) else str(error)


def _replica_status(replica: Replica) -> ReplicaStatus:
    assigned, report, state = replica.assigned, replica.report, replica.state
    if replica.serving is not None:
        (assigned, report), state = replica.serving, ReplicaState.READY
    return ReplicaStatus(
        replica=replica.uid,
        state=state,
        node=None if assigned is None else assigned.node,
        address=None if report is None else report.address,
        instance=None if assigned is None else assigned.instance,
        created_ts=replica.created_ts,
        num_restarts=replica.num_restarts,
        error_message=replica.problem,
        gpu_idx=None if assigned is None else assigned.gpu_idx,
        virtual_env_packages=None if report is None else report.virtual_env_packages,
    )


def _progress(replica: Replica) -> LaunchProgress:
    return replica_progress(replica.state, replica.report, replica.problem)
