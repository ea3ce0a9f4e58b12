# SPDX-License-Identifier: Apache-2.0
"""Requests at a fixed rate, half of them read piece by piece, and what became of each."""

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from xinference.cluster.interface import Cluster
from xinference.errors import XinferenceError
from xinference.identifiers import ModelUid, new_request_id
from xinference.protocol.generation import (
    Finished,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
)

RATE_PER_SECOND = 25.0
NUM_TOKENS = 40
DEADLINE_SECONDS = 20.0
GOLDEN = "".join(f" {number}" for number in range(1, NUM_TOKENS + 1))


@dataclass(slots=True)
class Sent:
    """One request."""

    is_streamed: bool
    sent_at: float
    ended_at: float | None = None
    outcome: str = "hung"
    """good, wrong, an error's code, or hung."""


@dataclass
class Load:
    """An open loop: it sends on, whatever becomes of what was sent."""

    cluster: Cluster
    model: ModelUid
    rate_per_second: float = RATE_PER_SECOND
    deadline_seconds: float = DEADLINE_SECONDS
    sent: list[Sent] = field(default_factory=list)
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)
    _sending: asyncio.Task[None] | None = None
    _ended: asyncio.Event = field(default_factory=asyncio.Event)

    def start(self) -> None:
        """Begin."""
        self._sending = asyncio.create_task(self._send())

    async def stop(self) -> None:
        """Send no more; return when each has ended or its time is over."""
        assert self._sending is not None
        self._sending.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=self.deadline_seconds + 1.0)

    async def wait_good(self, number: int) -> None:
        """Return when so many have been answered."""
        await self._wait(lambda: self.count("good") >= number)

    async def wait_good_since(self, since: float) -> None:
        """Return when one has been answered that was sent after a moment."""
        await self._wait(lambda: self.seconds_until_good(since) < float("inf"))

    async def _wait(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(self.deadline_seconds):
            while not condition():
                self._ended.clear()
                await self._ended.wait()

    def count(self, *outcomes: str, is_streamed: bool | None = None) -> int:
        """Return how many ended so."""
        return sum(
            one.outcome in outcomes and is_streamed in {None, one.is_streamed} for one in self.sent
        )

    def failures(self) -> dict[str, int]:
        """Return how many ended by each error."""
        codes = [one.outcome for one in self.sent if one.outcome not in {"good", "hung", "wrong"}]
        return {code: codes.count(code) for code in sorted(set(codes))}

    def seconds_until_good(self, since: float) -> float:
        """Return how long after a moment the first request was answered that was sent after it."""
        good = [
            one.ended_at
            for one in self.sent
            if one.outcome == "good" and one.sent_at >= since and one.ended_at is not None
        ]
        return min(good, default=float("inf")) - since

    def slowest_seconds(self, since: float) -> float:
        """Return how long the slowest good answer took that ended after a moment."""
        taken = [
            one.ended_at - one.sent_at
            for one in self.sent
            if one.outcome == "good" and one.ended_at is not None and one.ended_at >= since
        ]
        return max(taken, default=float("inf"))

    async def _send(self) -> None:
        while True:
            one = Sent(is_streamed=len(self.sent) % 2 == 0, sent_at=time.monotonic())
            self.sent.append(one)
            task = asyncio.create_task(self._ask(one))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
            await asyncio.sleep(1.0 / self.rate_per_second)

    async def _ask(self, one: Sent) -> None:
        request = GenerationRequest(
            request_id=new_request_id(),
            prompt=TextPrompt(text="count"),
            sampling=SamplingParams(max_tokens=NUM_TOKENS),
        )
        try:
            async with asyncio.timeout(self.deadline_seconds):
                one.outcome = await self._answer(request)
        except TimeoutError:
            return
        except XinferenceError as error:
            one.outcome = error.code
        one.ended_at = time.monotonic()
        self._ended.set()

    async def _answer(self, request: GenerationRequest) -> str:
        text = ""
        async for event in await self.cluster.generate(self.model, request):
            if isinstance(event, TextDelta):
                text += event.text
            elif isinstance(event, Finished):
                return "good" if text == GOLDEN else "wrong"
        return "wrong"
