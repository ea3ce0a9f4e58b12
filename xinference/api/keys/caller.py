# SPDX-License-Identifier: Apache-2.0
"""A cluster as the owner of one API key may use it.

Every route gets its cluster here, so what a key may ask, how often, and in whose turn, is decided
in one place for every protocol.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, cast

from xinference.cluster.interface import Cluster, GenerationStream, VectorStream
from xinference.errors import DuplicateRequest, ModelNotFound, RequestAborted
from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.deployment import AbortOutcome, ModelStatus
from xinference.protocol.generation import GenerationRequest
from xinference.protocol.vectors import VectorRequest

from .key import ApiKey, Scope
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
        own = replace(
            request,
            request_id=self._own(request.request_id),
            # Why not the request's own: somebody with many users would get many turns.
            fairness_key=self._key.key_id,
        )
        with self._told_as_asked(request.request_id):
            return await self._cluster.generate(model, own)

    async def compute(self, model: ModelUid, request: VectorRequest) -> VectorStream:
        self._keyring.start(self._key, model)
        own = replace(request, request_id=self._own(request.request_id))
        with self._told_as_asked(request.request_id):
            return await self._cluster.compute(model, own)

    async def abort_request(
        self, model: ModelUid, request_id: RequestId, *, block_seconds: float
    ) -> AbortOutcome:
        self._keyring.check_use(self._key, model)
        try:
            outcome = await self._cluster.abort_request(
                model, self._own(request_id), block_seconds=block_seconds
            )
            if outcome is AbortOutcome.NOT_FOUND and self._key.may(Scope.ADMIN):
                # Why: who may stop a model may stop any request; its id has its key's before it.
                outcome = await self._cluster.abort_request(
                    model, request_id, block_seconds=block_seconds
                )
        except ModelNotFound as error:
            raise self._narrowed(error) from None
        return outcome

    async def models(self) -> list[ModelStatus]:
        found = await self._cluster.models()
        return [model for model in found if self._key.may_use(model.model_uid)]

    async def model(self, model: ModelUid) -> ModelStatus:
        self._keyring.check_use(self._key, model)
        try:
            return await self._cluster.model(model)
        except ModelNotFound as error:
            raise self._narrowed(error) from None

    @contextmanager
    def _told_as_asked(self, request_id: RequestId) -> Iterator[None]:
        """Let errors name a request as its caller does, and only models that are the key's."""
        try:
            yield
        except ModelNotFound as error:
            raise self._narrowed(error) from None
        except DuplicateRequest:
            raise DuplicateRequest(request_id=request_id) from None
        except RequestAborted:
            raise RequestAborted(request_id=request_id) from None

    def _own(self, request_id: RequestId) -> RequestId:
        """Return what the cluster knows a request by.

        Why: an id that one caller chose must neither be taken for others nor let them abort it.
        """
        return RequestId(f"{self._key.key_id}.{request_id}")

    def _narrowed(self, error: ModelNotFound) -> ModelNotFound:
        """Return the error without models that are not this key's to know of."""
        running = [model for model in error.running if self._key.may_use(model)]
        return ModelNotFound(model=error.model, running=running)
