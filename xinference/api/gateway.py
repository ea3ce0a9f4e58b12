# SPDX-License-Identifier: Apache-2.0
"""What the routes of one application share, as one caller may use it."""

from dataclasses import dataclass, field, replace

from fastapi import FastAPI, Request

from xinference.cluster.interface import Cluster
from xinference.identifiers import ModelUid

from .access import key_of
from .history import History
from .keys.caller import cluster_for
from .keys.key import ApiKey
from .keys.keyring import Keyring
from .metrics import Metrics, Observation
from .store.store import Store


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """The cluster that is asked, who asks, what is counted while asking, and what is kept."""

    cluster: Cluster
    metrics: Metrics
    keyring: Keyring
    store: Store
    history: History
    keep_alive_seconds: float
    """A stream that has had nothing to say for so long says that it lives."""
    answer_timeout_seconds: float | None = None
    """For the beginning of an answer, where its caller does not say; None: for ever."""
    key: ApiKey | None = None
    """The caller's; None while the gateway is open."""
    log_followers: set[object] = field(default_factory=set)
    """Streams of logs that are under way; the same set for every caller."""

    @property
    def owner(self) -> str:
        """Whose things in the store the caller sees; nobody's while the gateway is open."""
        return "" if self.key is None else self.key.key_id

    def for_key(self, key: ApiKey) -> "Gateway":
        """Return this as the owner of a key may use it."""
        cluster = cluster_for(key, self.cluster, self.keyring)
        return replace(self, cluster=cluster, key=key)

    def for_owner(self, owner: str) -> "Gateway":
        """Return this for work that goes on after its caller has left.

        Raises:
            InvalidApiKey: the key that it was ordered with has ended since.
        """
        return self.for_key(self.keyring.active(owner)) if owner else self

    def observe(self, model: ModelUid, *, stream: bool) -> Observation:
        """Return what measures and counts one request to a model; enter it when that starts."""
        return self.metrics.observe(
            model,
            stream=stream,
            key_name="" if self.key is None else self.key.spec.name,
            on_usage=lambda usage: self.keyring.count(self.key, model, usage),
        )


def install_gateway(app: FastAPI, gateway: Gateway) -> None:
    """Give it to every route of an application."""
    app.state.gateway = gateway


def gateway_of(request: Request) -> Gateway:
    """Return that of the application a request came to, as its caller may use it."""
    gateway = request.app.state.gateway
    assert isinstance(gateway, Gateway)
    key = key_of(request)
    if key is None:
        return gateway
    return gateway.for_key(key)
