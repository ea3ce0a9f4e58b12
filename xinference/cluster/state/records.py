# SPDX-License-Identifier: Apache-2.0
"""What the state knows of a model and of each of its replicas, and the effects it asks for."""

import math
from collections import Counter, deque
from dataclasses import dataclass, field, replace
from enum import StrEnum

from xinference.cluster.messages import (
    Command,
    DesiredModel,
    DesiredReplica,
    InstanceLoad,
    InstanceReport,
    WorkerEpoch,
)
from xinference.cluster.placement import memory_of
from xinference.errors import XinferenceError
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid
from xinference.protocol.deployment import ModelEvent, ModelState, ReplicaState

RETRY_AFTER_SECONDS = 5
STORY_LEN = 100


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Now, on both clocks: decisions use the monotonic one, people read the other."""

    monotonic: float
    unix: int


@dataclass(frozen=True, slots=True)
class SaveModel:
    """Effect: write the model down."""

    model: DesiredModel


@dataclass(frozen=True, slots=True)
class ForgetModel:
    """Effect: remove the model from the store."""

    model_uid: ModelUid


@dataclass(frozen=True, slots=True)
class Tell:
    """Effect: send the command to the worker of the node."""

    node: NodeId
    command: Command


Effect = SaveModel | ForgetModel | Tell


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a replica is meant to run, and as which instance."""

    node: NodeId
    worker_epoch: WorkerEpoch
    instance: InstanceId
    gpu_idx: tuple[int, ...] | None

    @property
    def gpus(self) -> list[tuple[NodeId, int]]:
        """The GPUs it has, named over all nodes."""
        return [(self.node, index) for index in self.gpu_idx or ()]


@dataclass(frozen=True, slots=True)
class Outgoing:
    """Where a replica still serves while it is brought up elsewhere."""

    assigned: Assignment
    report: InstanceReport


class Wish(StrEnum):
    """What is wanted of a model."""

    RUN = "run"
    SLEEP = "sleep"
    """Nothing of it runs until a request wakes it."""
    STOP = "stop"
    NOTHING = "nothing"
    """It was given up; it is kept to be looked at."""


@dataclass(slots=True, eq=False)
class Replica:
    """One copy of a model, and how far it is. Only `World` changes where it is assigned."""

    model: "Model" = field(repr=False)
    uid: ReplicaUid
    created_ts: int
    desired: DesiredReplica
    is_wanted: bool = True
    """False: it is being removed; it goes when nothing of it is left."""
    state: ReplicaState = ReplicaState.PENDING
    assigned: Assignment | None = None
    report: InstanceReport | None = None
    """The latest of the assigned instance; None until its worker has shown it."""
    load: InstanceLoad | None = None
    """The latest of it; None until it is ready."""
    outgoing: Outgoing | None = None
    not_before: float = -math.inf
    """Monotonic; no start earlier than this."""
    deaths: list[float] = field(default_factory=list)
    num_restarts: int = 0
    problem: str = ""

    @property
    def runs(self) -> bool:
        """Whether it should run."""
        return self.is_wanted and self.model.wish is Wish.RUN

    @property
    def is_busy(self) -> bool:
        """Whether it has requests, as far as its worker has said."""
        return self.load is not None and self.load.num_outstanding > 0

    def forgive(self) -> None:
        """Let a replica that died, even too often, be started as if it had not."""
        if self.state in {ReplicaState.FAILED, ReplicaState.BACKING_OFF}:
            self.state, self.problem = ReplicaState.PENDING, ""
        self.deaths.clear()
        self.not_before = -math.inf

    def note_load(self, load: InstanceLoad, now: Moment) -> None:
        """Take in how much it has to do."""
        if load != self.load or load.num_outstanding:
            self.model.used_at = now.monotonic
        self.load = load

    @property
    def serving(self) -> tuple[Assignment, InstanceReport] | None:
        """Where it serves, if it does."""
        if self.state is ReplicaState.READY and self.assigned and self.report:
            return self.assigned, self.report
        return None if self.outgoing is None else (self.outgoing.assigned, self.outgoing.report)


@dataclass(slots=True)
class Pressure:
    """Since when a model has had too few replicas for its load, or one too many."""

    high_since: float | None = None
    low_since: float | None = None
    not_before: float = -math.inf
    """Monotonic; no other number of replicas earlier than this."""

    def clear(self) -> None:
        """Begin to watch anew."""
        self.high_since = self.low_since = None


@dataclass(slots=True, eq=False)
class Model:
    """A model that is wanted, stops, or was given up."""

    desired: DesiredModel
    replicas: dict[int, Replica] = field(default_factory=dict)
    """By index."""
    wish: Wish = Wish.RUN
    error: XinferenceError | None = None
    """Why it was given up, or how its launch ended."""
    retry_after_seconds: int = RETRY_AFTER_SECONDS
    story: deque[ModelEvent] = field(default_factory=lambda: deque(maxlen=STORY_LEN))
    memory_bytes: int = 0
    """About what one replica takes; 0: nobody knows."""
    used_at: float = -math.inf
    """Monotonic; when it last had a request, or has become ready."""
    pressure: Pressure = field(default_factory=Pressure)
    own_nodes: Counter[NodeId] = field(default_factory=Counter)
    """How many replicas are assigned to each node,"""
    own_gpus: Counter[tuple[NodeId, int]] = field(default_factory=Counter)
    """and to each GPU."""

    @classmethod
    def of(cls, desired: DesiredModel) -> "Model":
        """Return a model of which nothing runs yet."""
        model = cls(
            desired,
            wish=Wish.SLEEP if desired.is_asleep else Wish.RUN,
            memory_bytes=memory_of(desired.description, dtype=desired.spec.engine_options.dtype),
        )
        for one in desired.replicas:
            model.add(one, desired.created_ts)
        return model

    @property
    def uid(self) -> ModelUid:
        """Its name."""
        return self.desired.model_uid

    @property
    def wanted(self) -> list[Replica]:
        """The replicas that should run."""
        return [replica for replica in self.replicas.values() if replica.is_wanted]

    @property
    def is_ready(self) -> bool:
        """Whether it can be asked."""
        return self.wish is Wish.RUN and any(
            replica.is_wanted and replica.serving is not None for replica in self.replicas.values()
        )

    @property
    def is_on_demand(self) -> bool:
        """Whether it may sleep, and is woken by a request."""
        return self.desired.spec.autoload or self.desired.spec.idle_timeout is not None

    @property
    def state(self) -> ModelState:
        """How it is, in one word."""
        if self.wish is Wish.STOP:
            return ModelState.TERMINATING
        if self.wish is Wish.NOTHING:
            return ModelState.ERROR
        if self.wish is Wish.SLEEP:
            return ModelState.ASLEEP
        if self.is_ready:
            return ModelState.READY
        is_loading = any(one.state is ReplicaState.LOADING for one in self.replicas.values())
        if is_loading or self.desired.has_been_ready:
            return ModelState.LOADING
        return ModelState.CREATING

    def add(self, desired: DesiredReplica, created_ts: int) -> Replica:
        """Have one more replica."""
        replica = Replica(self, ReplicaUid(self.uid, desired.index), created_ts, desired)
        self.replicas[desired.index] = replica
        return replica

    def note_first_ready(self, replica: Replica) -> None:
        """Remember in the wish that a replica has been ready."""
        replica.desired = replace(replica.desired, has_been_ready=True)
        self.desired = replace(
            self.desired,
            replicas=tuple(
                replica.desired if one.index == replica.uid.index else one
                for one in self.desired.replicas
            ),
        )

    def tell(self, kind: str, content: str, now: Moment) -> None:
        """Add to the story."""
        self.story.append(ModelEvent(event_type=kind, event_ts=now.unix, event_content=content))
