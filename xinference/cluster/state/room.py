# SPDX-License-Identifier: Apache-2.0
"""Room for a model, made by letting others sleep: the least recently used that allow it.

A ledger of estimates: what a replica of a model takes is known about, and counts as free once its
model goes to sleep. Whoever needs it waits until it is.
"""

from collections.abc import Callable

from xinference.errors import InsufficientResources
from xinference.protocol.deployment import ReplicaState

from .admission import check_places
from .records import Model, Moment
from .world import World

MIN_AWAKE_SECONDS = 10.0
"""A model that had a request, or became ready, so lately is not put to sleep for another."""


def make_room(world: World, check: Callable[[], None], *, now: Moment) -> list[Model]:
    """Return which models have to sleep for a check to pass; none if it does as it is.

    Raises:
        InsufficientResources: by the check, if that does not help.
    """
    try:
        check()
        return []
    except InsufficientResources as refusal:
        refused = refusal
    asleep: list[Model] = []
    try:
        for model in _candidates(world, now):
            world.credit(model, model.memory_bytes)
            asleep.append(model)
            if _passes(check):
                return _needed(world, asleep, check)
    finally:
        for model in asleep:
            world.credit(model, 0)
    raise refused


def check_wake(world: World, model: Model) -> None:
    """Refuse to wake a model for which there is no place, or no room.

    Raises:
        InvalidRequest, InsufficientResources
    """
    wishes = [one.placement for one in model.desired.replicas]
    check_places(world, wishes, memory_bytes=model.memory_bytes, spec=model.desired.spec)


def _candidates(world: World, now: Moment) -> list[Model]:
    """Return the models that may be put to sleep, the least recently used first."""
    found = [
        model
        for model in world.models.values()
        if model.desired.spec.autoload
        and model.memory_bytes
        and model.is_ready
        and now.monotonic - model.used_at >= MIN_AWAKE_SECONDS
        and all(one.state is ReplicaState.READY and not one.is_busy for one in model.wanted)
    ]
    return sorted(found, key=lambda model: model.used_at)


def _needed(world: World, asleep: list[Model], check: Callable[[], None]) -> list[Model]:
    """Return those of the models without which it would not do, the last used ones kept first."""
    needed = list(asleep)
    for model in reversed(asleep):
        world.credit(model, 0)
        if _passes(check):
            needed.remove(model)
        else:
            world.credit(model, model.memory_bytes)
    return needed


def _passes(check: Callable[[], None]) -> bool:
    try:
        check()
    except InsufficientResources:
        return False
    return True
