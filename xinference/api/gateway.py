# SPDX-License-Identifier: Apache-2.0
"""What the routes of one application share."""

from dataclasses import dataclass

from fastapi import FastAPI, Request

from xinference.cluster.interface import Cluster

from .metrics import Metrics
from .store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The cluster that is asked, what is counted while asking, and what is kept of it."""

    cluster: Cluster
    metrics: Metrics
    store: Store
    owner: str = ""
    """Whose things in the store a caller sees."""


def install_gateway(app: FastAPI, gateway: Gateway) -> None:
    """Give it to every route of an application."""
    app.state.gateway = gateway


def gateway_of(request: Request) -> Gateway:
    """Return that of the application a request came to."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    return gateway
