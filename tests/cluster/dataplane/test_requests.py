# SPDX-License-Identifier: Apache-2.0
"""Ids live once, stay refused as long as was said, and the past is bounded."""

import pytest
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from hypothesis.strategies import floats, sampled_from

from xinference.cluster.dataplane import requests
from xinference.cluster.dataplane.requests import RequestTable
from xinference.errors import DuplicateRequest, RequestAborted
from xinference.identifiers import RequestId
from xinference.protocol.deployment import AbortOutcome

A, B = RequestId("a"), RequestId("b")


def test_a_blocked_id_is_refused_until_its_time_is_over() -> None:
    table: RequestTable[str] = RequestTable()
    table.abort(A, block_seconds=5.0, now=100.0)

    with pytest.raises(RequestAborted):
        table.admit(A, "owner", now=104.9)
    table.admit(A, "owner", now=105.0)

    assert table.owner(A) == "owner"


def test_an_abort_without_a_block_refuses_nothing() -> None:
    table: RequestTable[str] = RequestTable()

    assert table.abort(A, block_seconds=0.0, now=0.0) is AbortOutcome.NOT_FOUND
    table.admit(A, "owner", now=0.0)


def test_the_oldest_block_is_forgotten_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "MAX_BLOCKED", 2)
    table: RequestTable[str] = RequestTable()
    for request_id in ("a", "b", "c"):
        table.abort(RequestId(request_id), block_seconds=60.0, now=0.0)

    table.admit(A, "owner", now=1.0)

    with pytest.raises(RequestAborted):
        table.admit(B, "owner", now=1.0)


class Histories(RuleBasedStateMachine):
    """The table against the plainest model of it."""

    ids = sampled_from([RequestId(name) for name in "abc"])

    def __init__(self) -> None:
        super().__init__()
        self.table: RequestTable[int] = RequestTable()
        self.now = 0.0
        self.live: set[RequestId] = set()
        self.ended: set[RequestId] = set()
        self.blocked_until: dict[RequestId, float] = {}

    @rule(request_id=ids)
    def admit(self, request_id: RequestId) -> None:
        refusal: type[Exception] | None = None
        if self.blocked_until.get(request_id, 0.0) > self.now:
            refusal = RequestAborted
        elif request_id in self.live:
            refusal = DuplicateRequest
        if refusal is None:
            self.table.admit(request_id, 1, now=self.now)
            self.live.add(request_id)
        else:
            with pytest.raises(refusal):
                self.table.admit(request_id, 1, now=self.now)

    @rule(request_id=ids)
    def end(self, request_id: RequestId) -> None:
        self.table.end(request_id)
        if request_id in self.live:
            self.live.remove(request_id)
            self.ended.add(request_id)

    @rule(request_id=ids, block_seconds=sampled_from([0.0, 1.0, 10.0]))
    def abort(self, request_id: RequestId, block_seconds: float) -> None:
        outcome = self.table.abort(request_id, block_seconds=block_seconds, now=self.now)
        if block_seconds:
            self.blocked_until[request_id] = self.now + block_seconds
        if request_id in self.live:
            assert outcome is AbortOutcome.DONE
        elif request_id in self.ended:
            assert outcome is AbortOutcome.NO_OP
        else:
            assert outcome is AbortOutcome.NOT_FOUND

    @rule(seconds=floats(0.0, 6.0))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def the_live_are_live(self) -> None:
        assert set(self.table.live_ids()) == self.live
        assert len(self.table) == len(self.live)


TestHistories = Histories.TestCase
