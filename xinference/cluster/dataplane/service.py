# SPDX-License-Identifier: Apache-2.0
"""What a data plane server serves, and the values that describe it.

The replica's process and the fake of the tests implement `ReplicaService`; `server.py` puts it
on a socket. All of it is called on the event loop's thread.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from xinference.identifiers import ModelUid, RequestId
from xinference.protocol.deployment import ReplicaSpec, ReplicaState
from xinference.protocol.generation import Accepted
from xinference.protocol.vectors import AnswerEvent, ModelRequest

ServiceEvent = Accepted | AnswerEvent
"""Of a submitted request: Accepted, any number of pieces, then one Finished or Failed.

Failed without Accepted before it is a rejection.
"""

Deliver = Callable[[Sequence[tuple[RequestId, ServiceEvent]]], None]
"""Takes the events of one step, of any requests, in order."""

OnProgress = Callable[[float, str, str], None]
"""Takes how far loading is, from 0 to 1, its stage, and a line about it."""

ConfigValue = str | int | float | bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaReport:
    """What a replica says of itself once it is loaded."""

    context_length: int
    """Prompt and answer, in tokens."""
    max_num_seqs: int
    config: dict[str, ConfigValue]
    """What the engine has chosen, by name, for people to read."""
    virtual_env_packages: dict[str, str] | None = None
    """In a virtual environment: versions of what the process finds in that, by name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """A reading of a replica: its state and the engine's counters."""

    state: ReplicaState
    counters: dict[str, float]


class ReplicaService(Protocol):
    """A replica, without its socket."""

    @property
    def model(self) -> ModelUid:
        """The model it is a copy of."""
        ...

    @property
    def state(self) -> ReplicaState:
        """STARTING until it is told what to load, then LOADING, READY or FAILED; STOPPING."""
        ...

    def counters(self) -> dict[str, float]:
        """Return the engine's counters; empty before it is loaded."""
        ...

    def start(self, deliver: Deliver) -> None:
        """Take the function that every event goes to. Called once, before anything else."""
        ...

    async def load(self, spec: ReplicaSpec, on_progress: OnProgress) -> ReplicaReport:
        """Become ready. Called once.

        Raises:
            XinferenceError: it does not load; the state is FAILED.
        """
        ...

    def submit(self, request: ModelRequest) -> None:
        """Start a request; everything that becomes of it is delivered as events.

        Invariant: exactly one Finished or Failed is delivered for it, after `abort` too.
        """
        ...

    def abort(self, request_id: RequestId) -> None:
        """End a submitted request soon; it may have ended already."""
        ...

    def drain(self) -> None:
        """Take no new requests."""
        ...

    def stop(self) -> None:
        """End all requests and then the process; returns at once."""
        ...
