# SPDX-License-Identifier: Apache-2.0
"""What the routes of one application share."""

from dataclasses import dataclass

from fastapi import FastAPI, Request

from xinference.cluster.interface import Cluster

from .metrics import Metrics


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The cluster that is asked, and what is counted while asking."""

    cluster: Cluster
    metrics: Metrics
    keep_alive_seconds: float
    """A stream that has had nothing to say for so long says that it lives."""


def install_gateway(app: FastAPI, gateway: Gateway) -> None:
    """Give it to every route of an application."""
    app.state.gateway = gateway


def gateway_of(request: Request) -> Gateway:
    """Return that of the application a request came to."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
