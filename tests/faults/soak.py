# SPDX-License-Identifier: Apache-2.0
"""Mixed load by HTTP for a long time, while processes are killed in turn; who grows meanwhile.

`Callers` ask, `Killer` kills, `Watch` looks at memory and open files. What may go wrong for a
caller is decided by what was killed while it waited.
"""

import asyncio
import json
import os
import random
import signal
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Self

import httpx

from tests.cluster.guarded_cluster import GuardedCluster, words_of
from tests.faults.harness import num_descriptors, resident_kib
from xinference.cluster.supervision import INSTANCE_VARIABLE, PLATFORM
from xinference.errors import XinferenceError
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import ReplicaState
from xinference.protocol.nodes import NodeState

DEADLINE_SECONDS = 30.0
WHOLE_TIMEOUT_SECONDS = 60.0
SAMPLE_SECONDS = 5.0
WARM_UP_SHARE = 0.5
"""What a process takes in the first half of its life is not growth: an engine touches the blocks of
its pool one after the other."""
LIFE_SECONDS = 300.0
"""Who lived shorter tells nothing about growth."""
ABORT_SHARE = 0.15
STREAM_SHARE = 0.5
NUM_CALLERS = 8


@dataclass(frozen=True)
class Asked:
    """A model, how often it is asked, and what."""

    model: ModelUid
    path: str
    body: Mapping[str, object]
    rate_per_second: float
    num_at_once: int = 1
    """So many are asked together at first."""

    def by(self, caller: int) -> Self:
        """Return the same, asked by one of several callers that share no cache.

        Why: the replica that has seen a prompt is preferred, and the other would stay cold.
        """
        return replace(self, body={**self.body, "cache_salt": f"caller {caller % NUM_CALLERS}"})


@dataclass(slots=True)
class Sent:
    """One request."""

    sent_at: float
    ended_at: float | None = None
    outcome: str = "hung"
    """good, wrong, left (by us, as planned), lost (its connection), or a status with its body."""


@dataclass
class Callers:
    """An open loop over HTTP: streamed, whole, and left halfway, by a seed."""

    endpoint: str
    seed: int
    golden: dict[ModelUid, str] = field(default_factory=dict)
    """The answer of each model: that of its first request."""
    sent: list[Sent] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _sending: list[asyncio.Task[None]] = field(default_factory=list)

    async def start(self, asked: Sequence[Asked]) -> None:
        """Ask each model once, alone, and then many times together; then begin."""
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=self.endpoint, timeout=60.0, limits=limits) as client:
            for one in asked:
                golden = self.golden[one.model] = await _whole(client, one)
                answers = await asyncio.gather(
                    *(_whole(client, one.by(number)) for number in range(one.num_at_once))
                )
                assert set(answers) == {golden}
        self._sending = [asyncio.create_task(self._send(one)) for one in asked]

    async def stop(self) -> None:
        """Send no more; return when each has ended or its time is over."""
        for sending in self._sending:
            sending.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=DEADLINE_SECONDS + 1.0)

    def outcomes(self) -> dict[str, int]:
        """Return how many ended how."""
        told = [one.outcome for one in self.sent]
        return {outcome: told.count(outcome) for outcome in sorted(set(told))}

    async def _send(self, asked: Asked) -> None:
        chances = random.Random(f"{self.seed} {asked.model}")
        while True:
            one = asked.by(chances.randrange(NUM_CALLERS))
            task = asyncio.create_task(self._ask(one, chances.random(), chances.random()))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(chances.expovariate(asked.rate_per_second))

    async def _ask(self, asked: Asked, how: float, whether: float) -> None:
        one = Sent(sent_at=time.monotonic())
        self.sent.append(one)
        # A connection for each: which gateway it leads to is the kernel's choice, each time.
        async with httpx.AsyncClient(base_url=self.endpoint, timeout=DEADLINE_SECONDS) as client:
            try:
                async with asyncio.timeout(DEADLINE_SECONDS):
                    if how < STREAM_SHARE:
                        leaves = whether < ABORT_SHARE
                        text = await _streamed(client, asked, leaves=leaves)
                    else:
                        leaves = False
                        text = await _whole(client, asked)
                if leaves:
                    one.outcome = "left"
                else:
                    one.outcome = "good" if text == self.golden[asked.model] else "wrong"
            except TimeoutError:
                return
            except httpx.HTTPStatusError as error:
                one.outcome = f"{error.response.status_code} {error.response.text[:200]}"
            except httpx.TransportError as error:
                one.outcome = "lost" if not isinstance(error, httpx.TimeoutException) else "hung"
            except StreamFailed as error:
                one.outcome = str(error)
        one.ended_at = time.monotonic()


class StreamFailed(Exception):
    """A stream said that it could not go on, or just ended."""


async def _whole(client: httpx.AsyncClient, asked: Asked) -> str:
    answer = await client.post(asked.path, json=asked.body)
    if answer.is_error:
        answer.raise_for_status()
    return _text_of(answer.json()["choices"][0], "message")


async def _streamed(client: httpx.AsyncClient, asked: Asked, *, leaves: bool) -> str:
    """Return the whole text, or a part of it when it `leaves`."""
    text = ""
    async with client.stream("POST", asked.path, json={**asked.body, "stream": True}) as answer:
        if answer.is_error:
            await answer.aread()
            answer.raise_for_status()
        async for line in answer.aiter_lines():
            data = line.removeprefix("data: ")
            if data == "[DONE]":
                return text
            if not data or data == line:
                continue
            piece = json.loads(data)
            if "error" in piece:
                raise StreamFailed(f"error event {data[:200]}")
            if piece["choices"]:
                text += _text_of(piece["choices"][0], "delta")
            if leaves and text:
                return text
    raise StreamFailed("the stream ended without [DONE]")


def _text_of(choice: Mapping[str, object], name: str) -> str:
    if "text" in choice:
        return str(choice["text"] or "")
    said = choice[name]
    assert isinstance(said, dict)
    return str(said.get("content") or "")


@dataclass
class Killer:
    """Kills one process after another, each when the cluster is whole again; by a seed.

    Of each kind one is spared for good, so that there is somebody whose memory can be watched for
    the whole time: the second replica of each model, the second worker, the second gateway.
    """

    guarded: GuardedCluster
    models: Sequence[ModelUid]
    seed: int
    pause_seconds: tuple[float, float]
    """Between a cluster that is whole and the next kill: evenly from this to that."""
    killed: list[tuple[float, str]] = field(default_factory=list)
    """When, and which."""

    async def run(self, until_moment: float) -> None:
        """Kill until a moment; return when the cluster is whole again."""
        chances = random.Random(self.seed)
        spared = max(gateways(self.guarded))
        round_number = 0
        while True:
            victims = [f"replica of {model}" for model in self.models] + ["worker", "gateway"]
            # Why not each time: its memory is to be watched as well.
            if round_number % 6 == 0:
                victims.append("supervisor")
            chances.shuffle(victims)
            for victim in victims:
                await asyncio.sleep(chances.uniform(*self.pause_seconds))
                if time.monotonic() > until_moment:
                    return
                await self._kill(victim, spared=spared)
                await self._until_whole()
            round_number += 1

    async def _kill(self, victim: str, *, spared: int) -> None:
        if victim.startswith("replica of "):
            pid = await self._replica(ModelUid(victim.removeprefix("replica of ")))
        elif victim == "gateway":
            (pid,) = set(gateways(self.guarded)) - {spared}
        else:
            pid = self.guarded.role(victim)
        os.kill(pid, signal.SIGKILL)
        self.killed.append((time.monotonic(), victim))

    async def _replica(self, model: ModelUid) -> int:
        assert self.guarded.cluster is not None
        first, *_ = (await self.guarded.cluster.model(model)).replicas
        tagged = PLATFORM.tagged(INSTANCE_VARIABLE)
        return next(pid for pid in self.guarded.replicas() if tagged.get(pid) == first.instance)

    async def _until_whole(self) -> None:
        deadline = time.monotonic() + WHOLE_TIMEOUT_SECONDS
        while not await self._is_whole():
            assert time.monotonic() < deadline, f"not whole after {self.killed[-1]}"
            await asyncio.sleep(0.2)

    async def _is_whole(self) -> bool:
        cluster = self.guarded.cluster
        assert cluster is not None
        try:
            workers = (await cluster.info()).workers
            found = [await cluster.model(model) for model in self.models]
        except XinferenceError:
            return False
        is_busy = self.guarded.find("worker") is None or len(gateways(self.guarded)) < 2
        states = [one.state for model in found for one in model.replicas]
        pids = self.guarded.replicas()
        return (
            not is_busy
            and [one.state for one in workers] == [NodeState.READY] * len(self.guarded.hosts)
            and states == [ReplicaState.READY] * 2 * len(self.models)
            and len(pids) == len(states)
        )


def gateways(guarded: GuardedCluster) -> list[int]:
    """Return the pids of the gateways' processes."""
    children = PLATFORM.children_of(guarded.guardian)
    return sorted(pid for pid in children if words_of(pid)[-1:] == ["gateway"])


@dataclass(frozen=True)
class Growth:
    """Of one process, once it was warm."""

    name: str
    seconds: float
    mib: float
    mib_per_hour: float
    descriptors: int


class Watch:
    """Samples memory and descriptors of every process of a cluster."""

    def __init__(self, guarded: GuardedCluster) -> None:
        self._guarded = guarded
        self._seen: dict[int, list[tuple[float, int, int]]] = {}
        self._names: dict[int, str] = {}

    async def run(self) -> None:
        """Sample for ever."""
        while True:
            for pid in self._guarded.processes():
                sample = (time.monotonic(), resident_kib(pid), num_descriptors(pid))
                name = self._names.get(pid) or _name_of(pid)
                if sample[1] and name is not None:
                    self._seen.setdefault(pid, []).append(sample)
                    self._names[pid] = name
            await asyncio.sleep(SAMPLE_SECONDS)

    def growths(self) -> list[Growth]:
        """Return what became of each process that lived long enough."""
        found = []
        for pid, samples in self._seen.items():
            life_seconds = samples[-1][0] - samples[0][0]
            if life_seconds < LIFE_SECONDS:
                continue
            warm_at = samples[0][0] + WARM_UP_SHARE * life_seconds
            warm = [one for one in samples if one[0] >= warm_at]
            seconds = warm[-1][0] - warm[0][0]
            mib_per_second = _slope([(at, kib / 1024) for at, kib, _ in warm])
            found.append(
                Growth(
                    name=self._names[pid],
                    seconds=seconds,
                    mib=warm[-1][1] / 1024,
                    mib_per_hour=mib_per_second * 3600,
                    descriptors=_typical(warm[-12:]) - _typical(warm[:12]),
                )
            )
        return sorted(found, key=lambda one: (one.name, -one.seconds))


def _typical(samples: Sequence[tuple[float, int, int]]) -> int:
    """Return the median of the descriptors: those of connections come and go."""
    return sorted(number for _, _, number in samples)[len(samples) // 2]


def _slope(points: Sequence[tuple[float, float]]) -> float:
    """Return the slope of the line with the least squares."""
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def _name_of(pid: int) -> str | None:
    """Return what a process is; None: it has just ended."""
    words = words_of(pid)
    if not words:
        return None
    module = words[words.index("-m") + 1] if "-m" in words else words[0]
    names = {
        "tests.cluster.guarded": "guardian",
        "tests.fakes.replica": "replica that counts",
        "xinference.cluster.replica": "replica of the guide",
    }
    return names.get(module, words[-1])
