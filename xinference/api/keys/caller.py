# SPDX-License-Identifier: Apache-2.0
"""A cluster as the owner of one API key may use it.

Every route gets its cluster here, so what a key may ask, how often, and in whose turn, is decided
in one place for every protocol.
"""

from dataclasses import replace
from typing import Any, cast

from xinference.cluster.interface import Cluster, GenerationStream
from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.deployment import AbortOutcome, ModelStatus
from xinference.protocol.generation import GenerationRequest

from .key import ApiKey
from .keyring import Keyring


def cluster_for(key: ApiKey, cluster: Cluster, keyring: Keyring) -> Cluster:
    """Return the cluster as this key may use it."""
    return cast(Cluster, _CallersCluster(key, cluster, keyring))


class _CallersCluster:
    """Narrows what concerns models; passes on the rest, which the route's scope decides."""

    def __init__(self, key: ApiKey, cluster: Cluster, keyring: Keyring) -> None:
        self._key = key
        self._cluster = cluster
        self._keyring = keyring

    def __getattr__(self, name: str) -> Any:
        return getattr(self._cluster, name)

    async def generate(self, model: ModelUid, request: GenerationRequest) -> GenerationStream:
        self._keyring.start(self._key, model)
        # Why not the request's own key too: somebody with many users would get many turns.
        return await self._cluster.generate(model, replace(request, fairness_key=self._key.key_id))

    async def abort_request(
        self, model: ModelUid, request_id: RequestId, *, block_seconds: float
    ) -> AbortOutcome:
        self._keyring.check_use(self._key, model)
        return await self._cluster.abort_request(model, request_id, block_seconds=block_seconds)

    async def models(self) -> list[ModelStatus]:
        found = await self._cluster.models()
        return [model for model in found if self._key.may_use(model.model_uid)]

    async def model(self, model: ModelUid) -> ModelStatus:
        self._keyring.check_use(self._key, model)
        return await self._cluster.model(model)
