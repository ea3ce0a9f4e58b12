# SPDX-License-Identifier: Apache-2.0
"""The routing table, its version, and what has changed since an earlier one."""

from collections import OrderedDict
from itertools import takewhile

from xinference.cluster.messages import ModelRoutes, RoutesUpdate, RoutesVersion, RoutingTable
from xinference.identifiers import ModelUid

MAX_REMOVED = 1024
"""Models that are gone and still told to gateways which knew them; more: the whole table is."""


class Routes:
    """Where requests of every model go. Its version grows with every set of changes."""

    def __init__(self, *, epoch: int) -> None:
        """Begin empty, at number 0 of a supervisor's epoch."""
        self.version = RoutesVersion(supervisor_epoch=epoch)
        self._models: dict[ModelUid, ModelRoutes] = {}
        self._changed_at: OrderedDict[ModelUid, int] = OrderedDict()
        self._known_since = 0
        self._table: RoutingTable | None = None

    @property
    def table(self) -> RoutingTable:
        """All of it, as a value."""
        if self._table is None:
            self._table = RoutingTable(version=self.version, models=dict(self._models))
        return self._table

    def change(self, entries: dict[ModelUid, ModelRoutes | None]) -> None:
        """Take on what the routes of some models are; None: there is no such model."""
        news = {uid: entry for uid, entry in entries.items() if self._models.get(uid) != entry}
        if not news:
            return
        number = self.version.number + 1
        self.version = RoutesVersion(supervisor_epoch=self.version.supervisor_epoch, number=number)
        self._table = None
        for uid, entry in news.items():
            if entry is None:
                del self._models[uid]
            else:
                self._models[uid] = entry
            self._changed_at[uid] = number
            self._changed_at.move_to_end(uid)
        if len(self._changed_at) - len(self._models) > MAX_REMOVED:
            self._forget_removed()

    def since(self, known: RoutesVersion) -> RoutesUpdate:
        """Return what makes a table of a known version the current one."""
        if (
            known.supervisor_epoch != self.version.supervisor_epoch
            or known.number < self._known_since
        ):
            return RoutesUpdate(version=self.version, models=dict(self._models), is_whole=True)
        later = takewhile(
            lambda uid: self._changed_at[uid] > known.number, reversed(self._changed_at)
        )
        changed = list(later)
        return RoutesUpdate(
            version=self.version,
            models={uid: self._models[uid] for uid in changed if uid in self._models},
            removed=tuple(uid for uid in changed if uid not in self._models),
        )

    def _forget_removed(self) -> None:
        for uid in [uid for uid in self._changed_at if uid not in self._models]:
            self._known_since = max(self._known_since, self._changed_at.pop(uid))
