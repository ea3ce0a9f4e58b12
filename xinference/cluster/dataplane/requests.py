# SPDX-License-Identifier: Apache-2.0
"""Which request ids live, which are refused for a while, and which have lately ended. Pure.

Both lists of the past are bounded: the oldest are forgotten first.
"""

from collections import OrderedDict
from typing import Generic, TypeVar

from xinference.errors import DuplicateRequest, RequestAborted
from xinference.identifiers import RequestId
from xinference.protocol.deployment import AbortOutcome

MAX_BLOCKED = 4096
MAX_ENDED = 4096

Owner = TypeVar("Owner")


class RequestTable(Generic[Owner]):
    """The ids of one replica's requests; `Owner` is whatever the caller keeps of a live one.

    Times are seconds of any clock that does not go back.
    """

    def __init__(self) -> None:
        self._live: dict[RequestId, Owner] = {}
        self._blocked_until: OrderedDict[RequestId, float] = OrderedDict()
        self._ended: OrderedDict[RequestId, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._live)

    def live_ids(self) -> list[RequestId]:
        """Return the ids of all live requests, oldest first."""
        return list(self._live)

    def owner(self, request_id: RequestId) -> Owner | None:
        """Return what was admitted under this id; None if it is not live."""
        return self._live.get(request_id)

    def admit(self, request_id: RequestId, owner: Owner, *, now: float) -> None:
        """Make an id live.

        Raises:
            RequestAborted: it was aborted before it came.
            DuplicateRequest: it is live already.
        """
        if self._blocked_until.get(request_id, now) > now:
            raise RequestAborted(request_id=request_id)
        if request_id in self._live:
            raise DuplicateRequest(request_id=request_id)
        self._live[request_id] = owner

    def end(self, request_id: RequestId) -> None:
        """Say that a live request has had its last event."""
        if self._live.pop(request_id, None) is not None:
            _remember(self._ended, request_id, None, MAX_ENDED)

    def abort(self, request_id: RequestId, *, block_seconds: float, now: float) -> AbortOutcome:
        """Refuse the id for a while and say what became of it; a live one is the caller's to stop.

        Returns:
            DONE: it is live. NO_OP: it had ended. NOT_FOUND: it never came, or long ago.
        """
        if block_seconds > 0:
            _remember(self._blocked_until, request_id, now + block_seconds, MAX_BLOCKED)
        if request_id in self._live:
            return AbortOutcome.DONE
        return AbortOutcome.NO_OP if request_id in self._ended else AbortOutcome.NOT_FOUND


Value = TypeVar("Value")


def _remember(
    past: OrderedDict[RequestId, Value], request_id: RequestId, value: Value, limit: int
) -> None:
    past[request_id] = value
    past.move_to_end(request_id)
    while len(past) > limit:
        past.popitem(last=False)
