# SPDX-License-Identifier: Apache-2.0
"""The routing table on its way to gateways: what has changed, or all of it if that is not known."""

import random

from xinference.cluster.messages import ModelRoutes, RoutesVersion, RoutingTable
from xinference.cluster.routing import updated
from xinference.cluster.state.routes import MAX_REMOVED, Routes
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import ModelState

EMPTY = RoutingTable(version=RoutesVersion(), models={})


def entry(number: int = 5) -> ModelRoutes:
    return ModelRoutes(state=ModelState.LOADING, retry_after_seconds=number)


def test_a_gateway_that_asks_now_and_then_has_the_same_table() -> None:
    for seed in range(20):
        draw = random.Random(seed)
        routes = Routes(epoch=3)
        table = EMPTY
        for _ in range(60):
            uid = ModelUid(f"m{draw.randrange(6)}")
            routes.change({uid: draw.choice([None, entry(draw.randrange(3))])})
            if draw.random() < 0.3:
                table = updated(table, routes.since(table.version))
                assert table == routes.table


def test_only_what_has_changed_is_sent() -> None:
    routes = Routes(epoch=1)
    routes.change({ModelUid(f"m{number}"): entry() for number in range(100)})
    known = routes.version
    routes.change({ModelUid("m7"): entry(60), ModelUid("m8"): None, ModelUid("m9"): entry()})

    update = routes.since(known)

    assert not update.is_whole
    assert update.models == {"m7": entry(60)}
    assert update.removed == ("m8",)


def test_the_version_grows_only_with_a_change() -> None:
    routes = Routes(epoch=1)
    routes.change({ModelUid("m"): entry()})
    before = routes.version

    routes.change({ModelUid("m"): entry(), ModelUid("unknown"): None})

    assert routes.version == before


def test_the_whole_table_is_sent_after_a_restart_and_when_too_much_was_removed() -> None:
    routes = Routes(epoch=2)
    routes.change({ModelUid("m"): entry()})
    assert routes.since(RoutesVersion(supervisor_epoch=1, number=1)).is_whole
    known = routes.version
    table = routes.table

    for number in range(MAX_REMOVED + 2):
        routes.change({ModelUid(f"old{number}"): entry()})
        routes.change({ModelUid(f"old{number}"): None})

    assert routes.since(known).is_whole
    assert updated(table, routes.since(known)) == routes.table
