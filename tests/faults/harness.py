# SPDX-License-Identifier: Apache-2.0
"""A fault under load: what is seen of the cluster before, during and after it, and the oracle.

    cluster = await guarded.start(num_workers=2)
    await cluster.launch(spec(replica=2), wait_ready=True)
    trial = await Trial.begin(guarded, {MODEL: 2})
    os.kill(guarded.replicas()[0], signal.SIGKILL)
    record_fault(await trial.end(row="F02", fault="…"))

`end` asserts what holds at every fault: no request hangs, no answer is wrong, and in the end what
was wanted runs, once, and nothing else is left.
"""

import asyncio
import contextlib
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from tests.cluster.guarded_cluster import MODEL, GuardedCluster, Host, until
from tests.faults.load import DEADLINE_SECONDS, Load
from tests.faults.table import Outcome
from xinference.cluster.supervision import PLATFORM
from xinference.errors import XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import ReplicaState
from xinference.protocol.nodes import NodeState

NUM_WARM = 20
"""Requests that are answered before the fault."""
LOOK_SECONDS = 0.02
AFTER_SECONDS = 2.0
"""So long the load goes on when all is well again: what comes late is seen too."""
TIMEOUT_SECONDS = 40.0
SLACK = 8.0
"""How much longer than its bound anything may take on a machine that is busy with other tests."""
NOTHING_THERE = frozenset({"model_not_ready"})
"""What users may be told while nothing is there to serve them: a 503 that says when to retry."""


@dataclass(frozen=True)
class Bounds:
    """In seconds from the fault, on a machine that does nothing else; None: not bounded."""

    detected: float | None = None
    good: float | None = None
    whole: float | None = None


@dataclass(frozen=True)
class Footprint:
    """What a cluster has of the machine."""

    processes: frozenset[int]
    num_files: int
    """In the directories for temporary files: sockets, journals."""
    resident_kib: Mapping[int, int]
    descriptors: Mapping[int, int]

    @classmethod
    def of(cls, guarded: GuardedCluster) -> Self:
        """Look."""
        processes = guarded.processes()
        return cls(
            processes=frozenset(processes),
            num_files=sum(map(num_files, guarded.hosts)),
            resident_kib={pid: resident_kib(pid) for pid in processes},
            descriptors={pid: num_descriptors(pid) for pid in processes},
        )


def num_files(host: Host) -> int:
    """Return how many temporary files and sockets a host has."""
    return sum(not path.is_dir() for path in host.temporary.rglob("*"))


def resident_kib(pid: int) -> int:
    """Return how much memory of its own a process has; 0 if there is none."""
    with contextlib.suppress(OSError):
        found = re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
        return 0 if found is None else int(found[1])
    return 0


def num_descriptors(pid: int) -> int:
    """Return how many files and sockets a process has open; 0 if there is none."""
    with contextlib.suppress(OSError):
        return sum(1 for _ in Path(f"/proc/{pid}/fd").iterdir())
    return 0


class Trial:
    """A cluster around one fault. Begins when the load is well under way."""

    def __init__(
        self, guarded: GuardedCluster, models: Mapping[ModelUid, int], load: Load | None
    ) -> None:
        """See `begin`."""
        assert guarded.cluster is not None
        self.guarded = guarded
        self.load = load
        self.wanted = {uid: [ReplicaState.READY] * number for uid, number in models.items()}
        """How the replicas of each model are to be in the end."""
        self.num_workers = 0
        """That are to be ready in the end; at first those that are."""
        self.num_surplus = 0
        """Processes of replicas that nobody knows of in the end."""
        self.fault_at = 0.0
        self._cluster = guarded.cluster
        self._before = Footprint.of(guarded)
        self.num_processes = len(self._before.processes)
        """That there are to be in the end."""
        self.num_files = self._before.num_files
        """The same."""
        self._routing = self._cluster.routing()
        self._first_look: object = None
        self._detected_at: float | None = None
        self._not_whole_at: float | None = None
        """When it was last seen not to be whole."""
        self._looked_at = 0.0
        self._found: _Found | None = None
        self._looking: asyncio.Task[None] | None = None

    @classmethod
    async def begin(
        cls,
        guarded: GuardedCluster,
        models: Mapping[ModelUid, int],
        *,
        load_of: ModelUid | None = MODEL,
        deadline_seconds: float = DEADLINE_SECONDS,
    ) -> Self:
        """Put a cluster that is whole under load, and begin to look. The fault is due then.

        Args:
            models: how many replicas of each are to be ready in the end.
            load_of: the model that is asked; None: none is.
            deadline_seconds: a request that takes longer hangs.
        """
        assert guarded.cluster is not None
        load = None
        if load_of is not None:
            load = Load(guarded.cluster, load_of, deadline_seconds=deadline_seconds)
            load.start()
            await load.wait_good(NUM_WARM)
        trial = cls(guarded, models, load)
        trial._first_look = await trial._shown()
        trial.num_workers = len((await guarded.cluster.info()).workers)
        trial.fault_at = time.monotonic()
        trial._looking = asyncio.create_task(trial._look_forever(), name="look")
        return trial

    @property
    def is_undetected(self) -> bool:
        """Whether the platform has shown nothing so far."""
        return self._detected_at is None

    async def detected(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> float:
        """Return how long after the fault it was seen, once it is."""
        await until(
            lambda: self._detected_at is not None,
            "the fault is detected",
            timeout_seconds=timeout_seconds,
        )
        assert self._detected_at is not None
        return self._detected_at - self.fault_at

    async def whole(self, *, timeout_seconds: float = TIMEOUT_SECONDS) -> float:
        """Return how long after the fault all was as it should be, once it is seen so."""
        since = time.monotonic()
        try:
            await until(
                lambda: self._looked_at > since and self._not_whole_at != self._looked_at,
                "the cluster is whole",
                timeout_seconds=timeout_seconds,
            )
        except AssertionError as late:
            late.add_note(f"found {self._found}, wanted {self._as_wanted()}")
            raise
        return 0.0 if self._not_whole_at is None else max(0.0, self._not_whole_at - self.fault_at)

    async def end(
        self,
        *,
        row: str,
        fault: str,
        bounds: Bounds = Bounds(),
        may_fail_with: frozenset[str] = frozenset(),
        slack: float = SLACK,
        note: str = "",
    ) -> Outcome:
        """Wait until all is well, end the load, and return what was seen.

        Args:
            bounds: those that are None are not waited for either.
            may_fail_with: the codes of errors that users may have had.
            slack: by which factor the bounds may be missed.

        Raises:
            AssertionError: the oracle says no.
        """
        detected = None if bounds.detected is None else await self.detected()
        whole = await self.whole()
        await asyncio.sleep(AFTER_SECONDS)
        whole = max(whole, await self.whole())
        good = None
        if self.load is not None:
            if bounds.good is not None:
                await self.load.wait_good_since(self.fault_at)
                good = self.load.seconds_until_good(self.fault_at)
            await self.load.stop()
        await self._stop_looking()
        outcome = await self._outcome(row, fault, bounds, note, (detected, good, whole))
        assert outcome.num_hung == 0, outcome
        assert outcome.num_wrong == 0, outcome
        assert outcome.processes_left == 0, outcome
        assert outcome.files_left == 0, outcome
        assert outcome.failed.keys() <= may_fail_with, outcome
        assert outcome.is_within_bounds(slack), outcome
        return outcome

    async def _outcome(
        self,
        row: str,
        fault: str,
        bounds: Bounds,
        note: str,
        times: tuple[float | None, float | None, float],
    ) -> Outcome:
        with contextlib.suppress(AssertionError):  # what is left is told below
            await until(
                lambda: len(self.guarded.processes()) <= self.num_processes,
                "the rest ended",
                timeout_seconds=10.0,
            )
        after = Footprint.of(self.guarded)
        survivors = self._before.processes & after.processes
        routing = self._cluster.routing()
        load = self.load
        return Outcome(
            row=row,
            fault=fault,
            note=note,
            detected_seconds=times[0],
            detected_within=bounds.detected,
            good_seconds=times[1],
            good_within=bounds.good,
            whole_seconds=times[2],
            whole_within=bounds.whole,
            slowest_seconds=None if load is None else load.slowest_seconds(self.fault_at),
            num_requests=0 if load is None else len(load.sent),
            failed={} if load is None else load.failures(),
            num_retried=routing.num_retried - self._routing.num_retried,
            num_continued=routing.num_continued - self._routing.num_continued,
            num_hung=0 if load is None else load.count("hung"),
            num_wrong=0 if load is None else load.count("wrong"),
            processes_left=len(after.processes) - self.num_processes,
            files_left=after.num_files - self.num_files,
            mib_grown=sum(
                after.resident_kib[pid] - self._before.resident_kib[pid] for pid in survivors
            )
            / 1024,
            descriptors_grown=sum(
                after.descriptors[pid] - self._before.descriptors[pid] for pid in survivors
            ),
        )

    async def _stop_looking(self) -> None:
        assert self._looking is not None
        self._looking.cancel()
        await asyncio.gather(self._looking, return_exceptions=True)

    async def _look_forever(self) -> None:
        while True:
            shown = await self._shown()
            now = time.monotonic()
            if self._detected_at is None and shown != self._first_look:
                self._detected_at = now
            self._found = await self._find()
            self._looked_at = time.monotonic()
            if self._found != self._as_wanted():
                self._not_whole_at = self._looked_at
            await asyncio.sleep(LOOK_SECONDS)

    async def _shown(self) -> object:
        """Return what the platform says of itself, as far as it differs when a fault is known."""
        deaths = sum(
            len(re.findall(r" died \(", host.log.read_text()))
            for host in self.guarded.hosts
            if host.log.exists()
        )
        num_ejected = self._cluster.routing().num_ejected
        try:
            async with asyncio.timeout(1.0):
                nodes = {one.node: one.state for one in (await self._cluster.info()).workers}
                replicas = {
                    one.replica: (one.instance, one.state)
                    for model in self.wanted
                    for one in (await self._cluster.model(model)).replicas
                }
        except (XinferenceError, TimeoutError):
            # Who asks has noticed that the supervisor is away; that the platform has, its log says.
            return (deaths, num_ejected, *self._rest_of(self._first_look))
        return deaths, num_ejected, nodes, replicas

    @staticmethod
    def _rest_of(look: object) -> tuple[object, ...]:
        return look[2:] if isinstance(look, tuple) else ()

    async def _find(self) -> "_Found | None":
        """Return what runs; None if nobody says."""
        try:
            async with asyncio.timeout(1.0):
                workers = (await self._cluster.info()).workers
                states = {
                    model: sorted(one.state for one in (await self._cluster.model(model)).replicas)
                    for model in self.wanted
                }
        except (XinferenceError, TimeoutError):
            return None
        pids = self.guarded.replicas()
        return _Found(
            workers=[one.state for one in workers],
            replicas=states,
            num_processes=len(pids),
            num_stopped=sum(map(PLATFORM.is_stopped, pids)),
        )

    def _as_wanted(self) -> "_Found":
        """Return what is to be found in the end: each replica that is ready is one process."""
        num_ready = sum(wanted.count(ReplicaState.READY) for wanted in self.wanted.values())
        return _Found(
            workers=[NodeState.READY] * self.num_workers,
            replicas={model: sorted(wanted) for model, wanted in self.wanted.items()},
            num_processes=num_ready + self.num_surplus,
            num_stopped=0,
        )


@dataclass(frozen=True)
class _Found:
    """What runs, as the supervisor and the system say."""

    workers: list[NodeState]
    replicas: dict[ModelUid, list[ReplicaState]]
    num_processes: int
    """Of replicas."""
    num_stopped: int
    """Of those, by a signal."""
