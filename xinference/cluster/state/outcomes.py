# SPDX-License-Identifier: Apache-2.0
"""How launches and changes of them ended, for the callers who wait. Remembered for a while."""

from collections import OrderedDict
from typing import TypeVar

from xinference.cluster.messages import LaunchId, LaunchTicket
from xinference.errors import LaunchCancelled, XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import LaunchProgress, ReplicaState

from .records import Model, Replica, Wish

MAX_ENDED_LAUNCHES = 256

KeyT = TypeVar("KeyT")
ValueT = TypeVar("ValueT")


class Outcomes:
    """What became of launches. Reads the models, changes none."""

    def __init__(self, models: dict[ModelUid, Model]) -> None:
        """Look at these models whenever asked."""
        self._models = models
        self._ended: OrderedDict[LaunchId, XinferenceError] = OrderedDict()
        self._dropped: OrderedDict[tuple[LaunchId, int], XinferenceError] = OrderedDict()
        self._progress: OrderedDict[ModelUid, LaunchProgress] = OrderedDict()

    def note_launch(self, model_uid: ModelUid) -> None:
        """A model is being launched: how an earlier one of its uid ended is the past."""
        self._progress.pop(model_uid, None)

    def note_ended(self, model: Model) -> None:
        """Nothing of a model that was stopped is left."""
        assert model.error is not None
        _remember(self._ended, model.desired.launch_id, model.error)
        if not model.desired.has_been_ready:
            cancelled = LaunchProgress(progress=0.0, stage="cancelled")
            _remember(self._progress, model.uid, cancelled)

    def note_dropped(self, model: Model, replica: Replica, error: XinferenceError) -> None:
        """A replica that was added to a running model is given up."""
        _remember(self._dropped, (model.desired.launch_id, replica.uid.index), error)

    def of_launch(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """See `ClusterState.launch_outcome`."""
        model = self._models.get(model_uid)
        if model is None or model.desired.launch_id != launch_id:
            raise self._ended.get(launch_id) or LaunchCancelled(model=model_uid)
        if model.wish is Wish.NOTHING:
            assert model.error is not None
            if any(replica.assigned is not None for replica in model.replicas.values()):
                return False  # what ran beside the replica that failed is still ending
            raise model.error
        return model.desired.has_been_ready

    def of_replicas(self, ticket: LaunchTicket) -> bool:
        """See `ClusterState.replicas_outcome`."""
        model = self._models.get(ticket.model_uid)
        if model is None or model.desired.launch_id != ticket.launch_id:
            raise self._ended.get(ticket.launch_id) or LaunchCancelled(model=ticket.model_uid)
        for index in ticket.replicas:
            if (ticket.launch_id, index) in self._dropped:
                raise self._dropped[ticket.launch_id, index]
        asked = [one for one in model.wanted if one.uid.index in ticket.replicas]
        if model.wish is not Wish.RUN or len(asked) < len(ticket.replicas):
            raise model.error or LaunchCancelled(model=ticket.model_uid)
        return all(replica.state is ReplicaState.READY for replica in asked)

    def are_gone(self, ticket: LaunchTicket) -> bool:
        """See `ClusterState.are_gone`."""
        model = self._models.get(ticket.model_uid)
        if model is None or model.desired.launch_id != ticket.launch_id:
            return True
        return not any(index in model.replicas for index in ticket.replicas)

    def is_ended(self, model_uid: ModelUid, launch_id: LaunchId) -> bool:
        """See `ClusterState.is_ended`."""
        model = self._models.get(model_uid)
        return model is None or model.desired.launch_id != launch_id

    def progress_of_ended(self, model_uid: ModelUid) -> LaunchProgress:
        """Return what is to be said of a launch that there is not, or no more."""
        pending = LaunchProgress(progress=0.0, stage="pending")
        return self._progress.get(model_uid, pending)


def _remember(ended: "OrderedDict[KeyT, ValueT]", key: KeyT, value: ValueT) -> None:
    ended[key] = value
    ended.move_to_end(key)
    while len(ended) > MAX_ENDED_LAUNCHES:
        ended.popitem(last=False)
