# SPDX-License-Identifier: Apache-2.0
"""What OpenAI's `service_tier` is here: who is served first. Pure; raises `InvalidRequest`."""

from collections.abc import Mapping

from xinference.errors import InvalidRequest

from .schema import ServiceTier

SERVED_AS: Mapping[ServiceTier, str] = {
    "auto": "default",
    "default": "default",
    "flex": "flex",
    "fast": "priority",
    "priority": "priority",
}
PRIORITIES: Mapping[str, int] = {"priority": -1, "default": 0, "flex": 1}
"""Lower is earlier."""


def served_as(tier: ServiceTier | None) -> str:
    """Return the tier that an answer names."""
    return SERVED_AS[tier or "auto"]


def priority_of(tier: ServiceTier | None, priority: int | None) -> int:
    """Return the priority of a request that names a tier, a priority, or neither.

    Raises:
        InvalidRequest: it names both.
    """
    if priority is None:
        return PRIORITIES[served_as(tier)]
    if served_as(tier) != "default":
        raise InvalidRequest(field="priority", problem=f"cannot be combined with the tier {tier}")
    return priority
