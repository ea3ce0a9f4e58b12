# SPDX-License-Identifier: Apache-2.0
"""Which replica serves the next request. Pure: a routing table in, a route or an error out."""

from xinference.errors import LoadFailed, ModelNotFound, ModelNotReady
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import ModelState

from .messages import Route, RoutingTable


def routes_of(table: RoutingTable, model: ModelUid) -> tuple[Route, ...]:
    """Return every ready replica of a model; none if it is known but not ready.

    Raises:
        ModelNotFound
    """
    if model not in table.models:
        raise ModelNotFound(model=model, running=ready_models(table))
    return table.models[model].routes


def route_for(table: RoutingTable, model: ModelUid) -> Route:
    """Return the replica that serves the next request of a model.

    Raises:
        ModelNotFound: the table has no such model.
        ModelNotReady: it is being started, restarted or stopped.
        LoadFailed: it was given up; asking again changes nothing.
    """
    routes = routes_of(table, model)
    if routes:
        return routes[0]
    entry = table.models[model]
    if entry.state is ModelState.ERROR:
        raise LoadFailed(model=model, problem=entry.problem)
    raise ModelNotReady(
        model=model,
        state=entry.state.value.lower(),
        retry_after_seconds=entry.retry_after_seconds,
    )


def ready_models(table: RoutingTable) -> list[str]:
    """Return the uids that have a route, sorted."""
    return sorted(uid for uid, entry in table.models.items() if entry.routes)
