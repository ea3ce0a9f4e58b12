# SPDX-License-Identifier: Apache-2.0
"""How much of a GPU the server of an engine may take where replicas share it. Pure.

Such a server takes a fraction of its GPU at once, by default nearly all of it. One that is alone is
left at that; of a GPU that several replicas are on, each gets an equal part of what no launch has
claimed by its own option. What a server that was alone has taken stays taken until it is started
again.
"""

from collections.abc import Iterable

from xinference.errors import InsufficientResources, InvalidRequest
from xinference.identifiers import NodeId
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.servers import MEMORY_FRACTION, ServerOptions

from .records import Model

USABLE = 0.92
"""Of a GPU, by all servers on it; contexts of the driver and of other processes need the rest."""
LEAST = 0.05
"""Of a GPU; less is no room for a model."""

Gpu = tuple[NodeId, int]


def claim_of(options: ServerOptions | None) -> float | None:
    """Return the fraction of its GPU that a launch claims by its server's option; None: none.

    What the server itself would refuse is no claim.
    """
    given = None if options is None else options.memory_fraction
    return given if given is not None and 0 < given <= 1 else None


def with_share(options: ServerOptions, models: Iterable[Model], gpu: Gpu) -> ServerOptions:
    """Return the options of a server that is started on a GPU, with the part it may take.

    They are what they were if it is alone there, the launch says it, or the engine has no option
    for it.

    Args:
        models: all, with their replicas counted on the GPU, this one too.
    """
    flag = MEMORY_FRACTION.get(options.engine)
    if flag is None or options.limits_memory:
        return options
    claimed, num_sharing = _taken(models, gpu)
    if num_sharing < 2 and not claimed:
        return options
    part = max((USABLE - claimed) / max(num_sharing, 1), LEAST)
    # Why rounded down: the parts of one GPU are never more than all of it.
    fraction = int(part * flag.share_of_part * 1000) / 1000
    return options.with_flag(flag.name, fraction)


def check_claims(spec: LaunchSpec, models: Iterable[Model], gpus: Iterable[Gpu]) -> None:
    """Refuse a launch whose servers would claim more of a GPU than others leave of it.

    Args:
        gpus: where its replicas would be; one for each of them.

    Raises:
        InvalidRequest: its claim and those of others are more than the whole.
        InsufficientResources: it has none, and those of others leave nothing.
    """
    options = spec.server_options
    flag = None if options is None else MEMORY_FRACTION.get(options.engine)
    if options is None or flag is None:
        return
    models, own = list(models), claim_of(options)
    places = list(gpus)
    for gpu in dict.fromkeys(places):
        claimed, _ = _taken(models, gpu)
        where = f"GPU {gpu[1]} of {gpu[0]}"
        if own is not None and claimed + own * places.count(gpu) > 1 + 1e-9:
            others = f", and {claimed:g} is claimed there already" if claimed else ""
            raise InvalidRequest(
                field=flag.name,
                problem=f"claims {own:g} of {where} for each of {places.count(gpu)} replicas"
                f"{others}; together that is more than the whole",
            )
        if own is None and not options.limits_memory and USABLE - claimed < LEAST:
            raise InsufficientResources(
                problem=f"{claimed:g} of {where} is claimed by other launches; give them less of "
                f"it, or this one another GPU."
            )


def _taken(models: Iterable[Model], gpu: Gpu) -> tuple[float, int]:
    """Return what is claimed of a GPU, and how many replicas share the rest."""
    claimed, num_sharing = 0.0, 0
    for model in models:
        num = model.own_gpus.get(gpu, 0)
        claim = claim_of(model.desired.spec.server_options) if num else None
        if claim is None:
            num_sharing += num
        else:
            claimed += claim * num
    return claimed, num_sharing
