# SPDX-License-Identifier: Apache-2.0
"""How many replicas a model should have for its load, and whether it should sleep. Pure.

In: what replicas last said they have to do, and the time. Out: a number. More replicas come when
what there are have been nearly full for some seconds; one goes when the rest would have been half
empty for a minute. Between the two bounds nothing happens, and while replicas start or leave
nothing is decided, so that no load makes the number swing.
"""

import math

from .records import Model, Moment, Wish

LANGUAGE = "LLM"
HIGH = 0.8
"""Replicas are nearly full at this share of the requests that they compute at once,"""
UP_SECONDS = 3.0
"""and more are started after so long of that."""
TARGET = 0.6
"""As many are started as have this share then."""
LOW = 0.5
"""One is too many if the others would not have more than this share"""
DOWN_SECONDS = 60.0
"""for so long."""
HOLD_OFF_SECONDS = 30.0
"""After there was no place for another replica, or it did not come up."""


def wanted_replicas(model: Model, now: Moment) -> int:
    """Return how many replicas a model should have; changes what it has seen of its pressure."""
    spec = model.desired.spec
    wanted = model.wanted
    number, pressure = len(wanted), model.pressure
    if spec.max_replicas is None or not scales(model):
        return number
    lowest = lowest_of(model)
    is_settled = number == len(model.replicas) and all(
        replica.serving is not None and replica.load is not None for replica in wanted
    )
    if number < lowest or number > spec.max_replicas:
        return min(max(number, lowest), spec.max_replicas)
    if not is_settled:
        pressure.clear()
        return number
    outstanding = sum(one.load.num_outstanding for one in wanted if one.load is not None)
    each = capacity(model)
    is_high = outstanding >= HIGH * each * number and number < spec.max_replicas
    is_low = outstanding <= LOW * each * (number - 1) and number > lowest
    pressure.high_since = _since(pressure.high_since, is_high, now)
    pressure.low_since = _since(pressure.low_since, is_low, now)
    if _has_lasted(pressure.high_since, UP_SECONDS, now):
        needed = math.ceil(outstanding / (TARGET * each))
        return min(max(number + 1, needed), spec.max_replicas)
    if _has_lasted(pressure.low_since, DOWN_SECONDS, now):
        return number - 1
    return number


def scales(model: Model) -> bool:
    """Return whether the number of a model's replicas follows its load."""
    desired = model.desired
    is_running = model.wish is Wish.RUN and desired.has_been_ready
    return is_running and desired.spec.max_replicas is not None


def lowest_of(model: Model) -> int:
    """Return how many replicas a model that scales has at least."""
    return model.desired.spec.min_replicas or model.desired.spec.replica


def capacity(model: Model) -> int:
    """Return how many requests a replica computes at once, as those that are ready say."""
    spec = model.desired.spec
    # Why not the launch's own number: an engine may have less memory, or a default of its own.
    # That of an encoder is of texts, and a request may have any number of them.
    reports = [one.report for one in model.wanted] if spec.model_type == LANGUAGE else []
    told = [one.max_num_seqs for one in reports if one is not None and one.max_num_seqs]
    at_once = min(told, default=spec.engine_options.max_num_seqs)
    return at_once if spec.request_limits is None else min(at_once, spec.request_limits)


def is_idle(model: Model, now: Moment) -> bool:
    """Return whether a model has had no request for as long as its launch says."""
    timeout = model.desired.spec.idle_timeout
    return (
        timeout is not None
        and model.is_ready
        and now.monotonic - model.used_at >= timeout
        and not any(one.is_busy for one in model.wanted)
    )


def _since(since: float | None, holds: bool, now: Moment) -> float | None:
    if not holds:
        return None
    return now.monotonic if since is None else since


def _has_lasted(since: float | None, seconds: float, now: Moment) -> bool:
    return since is not None and now.monotonic - since >= seconds
