# SPDX-License-Identifier: Apache-2.0
"""Where requests go."""

import pytest

from xinference.cluster.messages import ModelRoutes, Route, RoutesVersion, RoutingTable
from xinference.cluster.routing import route_for, routes_of
from xinference.errors import LoadFailed, ModelNotFound, ModelNotReady
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid
from xinference.protocol.deployment import ModelState

QWEN = ModelUid("qwen")
ROUTE = Route(replica=ReplicaUid(QWEN, 0), instance=InstanceId("i"), address="unix:s")


def table(**models: ModelRoutes) -> RoutingTable:
    return RoutingTable(
        version=RoutesVersion(supervisor_epoch=1, number=1),
        models={ModelUid(uid): routes for uid, routes in models.items()},
    )


def test_a_ready_model_has_a_route() -> None:
    ready = ModelRoutes(state=ModelState.READY, retry_after_seconds=5, routes=(ROUTE,))

    assert route_for(table(qwen=ready), QWEN) == ROUTE


def test_an_unknown_model_is_not_found_and_the_others_are_named() -> None:
    ready = ModelRoutes(state=ModelState.READY, retry_after_seconds=5, routes=(ROUTE,))

    with pytest.raises(ModelNotFound, match="Running: qwen"):
        route_for(table(qwen=ready), ModelUid("other"))


def test_a_model_that_is_not_ready_says_when_to_try_again() -> None:
    loading = ModelRoutes(state=ModelState.LOADING, retry_after_seconds=6)

    with pytest.raises(ModelNotReady, match="is loading; try again in 6 s"):
        route_for(table(qwen=loading), QWEN)
    assert routes_of(table(qwen=loading), QWEN) == ()


def test_a_model_that_was_given_up_says_why() -> None:
    failed = ModelRoutes(state=ModelState.ERROR, retry_after_seconds=5, problem="no such file")

    with pytest.raises(LoadFailed, match="no such file"):
        route_for(table(qwen=failed), QWEN)


def test_versions_grow_over_restarts_of_the_supervisor() -> None:
    late = RoutesVersion(supervisor_epoch=1, number=900)

    assert RoutesVersion() < late < RoutesVersion(supervisor_epoch=2, number=1)
