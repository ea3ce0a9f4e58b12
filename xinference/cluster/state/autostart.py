# SPDX-License-Identifier: Apache-2.0
"""Which model of the autostart list is launched next. Pure: states and the time in, an entry out.

One at a time, by priority; each so often as its entry says. A model that somebody terminates is
left alone: the list starts models, it does not argue.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from xinference.errors import ObjectNotFound
from xinference.identifiers import ModelUid
from xinference.protocol.autostart import AutostartEntry, AutostartStatus
from xinference.protocol.deployment import ModelState

StateOf = Callable[[ModelUid], ModelState | None]
"""How a model is; None: there is none of this uid."""

_IS_STARTING = {ModelState.CREATING, ModelState.LOADING}
_IS_DOWN = {None, ModelState.ERROR}


@dataclass(slots=True)
class _Progress:
    entry: AutostartEntry
    num_attempts: int = 0
    problem: str = ""
    not_before: float = 0.0
    is_dismissed: bool = False
    """Somebody has terminated it."""


class Autostart:
    """The list, and how far each entry is. Not shared."""

    def __init__(self, entries: Iterable[AutostartEntry]) -> None:
        self._known = {entry.model_uid: _Progress(entry) for entry in entries}
        self._current: ModelUid | None = None

    def statuses(self) -> list[AutostartStatus]:
        """Return every entry with how far it is, the first to be launched first."""
        return [
            AutostartStatus(entry=one.entry, num_attempts=one.num_attempts, problem=one.problem)
            for one in self._in_order()
        ]

    def set(self, entry: AutostartEntry) -> None:
        """Take on a new entry, or another one for its model; its attempts begin anew."""
        self._known[entry.model_uid] = _Progress(entry)

    def remove(self, model_uid: ModelUid) -> None:
        """Forget an entry; its model stays as it is.

        Raises:
            ObjectNotFound: it is not in the list.
        """
        if self._known.pop(model_uid, None) is None:
            raise ObjectNotFound(kind="entry of the autostart list", id=model_uid)

    def dismiss(self, model_uid: ModelUid) -> None:
        """Leave a model alone that somebody terminates."""
        if model_uid in self._known:
            self._known[model_uid].is_dismissed = True

    def due(self, state_of: StateOf, *, now: float) -> AutostartEntry | None:
        """Return the entry to launch now, or None. Call `tried` when that is done.

        Args:
            now: monotonic.
        """
        for uid, one in self._known.items():
            if state_of(uid) is ModelState.READY:
                one.num_attempts, one.problem = 0, ""
        if self._current is not None and state_of(self._current) in _IS_STARTING:
            return None
        self._current = None
        for one in self._in_order():
            is_left_alone = (
                not one.entry.enabled
                or one.is_dismissed
                or one.num_attempts > one.entry.max_retries
                or now < one.not_before
            )
            if not is_left_alone and state_of(one.entry.model_uid) in _IS_DOWN:
                return one.entry
        return None

    def tried(self, entry: AutostartEntry, *, now: float, problem: str = "") -> None:
        """Note that an entry was launched, or why it was refused."""
        one = self._known.get(entry.model_uid)
        if one is None:  # it was removed meanwhile
            return
        one.num_attempts += 1
        one.problem = problem
        one.not_before = now + entry.retry_interval_seconds
        self._current = None if problem else entry.model_uid

    def _in_order(self) -> list[_Progress]:
        return sorted(
            self._known.values(), key=lambda one: (one.entry.priority, one.entry.model_uid)
        )
