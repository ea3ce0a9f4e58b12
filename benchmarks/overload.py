# SPDX-License-Identifier: Apache-2.0
"""What is left of a model's throughput under five times the load it can take.

    python -m benchmarks.overload --seconds 60

A whole platform with the guide model, small enough that its queue fills. By turns, as many callers
as it can hold, each of whom sends its next request when the last is answered: the peak; and
requests at five times the rate that this answered, whatever becomes of them. The load shares the
machine with what it measures.
"""

import argparse
import asyncio
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

import httpx

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, started

NUM_RUNNING, NUM_QUEUED = 8, 8
FACTOR = 5.0
NUM_TOKENS = 32
WARM_SECONDS = 2.0
NUM_ROUNDS = 4


class Load:
    """What came of requests."""

    def __init__(self, http: httpx.AsyncClient) -> None:
        self._http = http
        self.good: list[float] = []
        """When each good answer came."""
        self.refusals: list[float] = []
        """How long each 429 took."""
        self.others = 0

    async def ask(self) -> None:
        """Send one request."""
        body = {
            "model": GUIDE,
            "messages": [{"role": "user", "content": "What is a replica?"}],
            "max_tokens": NUM_TOKENS,
            "ignore_eos": True,
        }
        sent_at = time.monotonic()
        answer = await self._http.post("/v1/chat/completions", json=body)
        if answer.status_code == 200:
            self.good.append(time.monotonic())
        elif answer.status_code == 429:
            self.refusals.append(time.monotonic() - sent_at)
        else:
            self.others += 1


async def peak(http: httpx.AsyncClient, seconds: float) -> float:
    """Return how many requests a second are answered when the model is never idle."""
    load = Load(http)
    ends_at = time.monotonic() + WARM_SECONDS + seconds

    async def keep_asking() -> None:
        while time.monotonic() < ends_at:
            await load.ask()

    await asyncio.gather(*(keep_asking() for _ in range(NUM_RUNNING + NUM_QUEUED // 2)))
    return sum(ends_at - seconds <= at < ends_at for at in load.good) / seconds


async def overload(http: httpx.AsyncClient, rate: float, seconds: float) -> Load:
    """Send at a rate; return what came of it when the time is over."""
    load = Load(http)
    tasks: set[asyncio.Task[None]] = set()
    started_at = time.monotonic()
    ends_at = started_at + WARM_SECONDS + seconds
    while (now := time.monotonic()) < ends_at:
        while len(load.refusals) + len(load.good) + load.others + len(tasks) < rate * (
            now - started_at
        ):
            task = asyncio.create_task(load.ask())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.sleep(0.005)
    load.good = [at for at in load.good if ends_at - seconds <= at < ends_at]
    await asyncio.gather(*tasks)
    return load


async def measure(platform: Platform, seconds: float) -> None:
    limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
    peaks, loads = [], []
    async with httpx.AsyncClient(base_url=platform.endpoint, timeout=60, limits=limits) as http:
        await peak(http, 1.0)
        before = resident(platform)
        for _ in range(NUM_ROUNDS):
            peaks.append(await peak(http, seconds / NUM_ROUNDS))
            loads.append(await overload(http, FACTOR * peaks[-1], seconds / NUM_ROUNDS))
        grown = [(now - then) / 2**20 for now, then in zip(resident(platform), before, strict=True)]
    most = statistics.mean(peaks)
    admitted = sum(len(load.good) for load in loads) / seconds
    refused = sorted(one for load in loads for one in load.refusals) or [0.0]
    others = sum(load.others for load in loads)
    print(f"peak {most:.1f} requests/s of {NUM_TOKENS} tokens")
    print(f"at {FACTOR:.0f} times that {admitted:.1f} answered a second: {admitted / most:.1%}")
    print(
        f"{len(refused)} refused, in {1e3 * statistics.median(refused):.1f} ms (median), "
        f"{1e3 * refused[int(0.99 * (len(refused) - 1))]:.1f} ms (p99); {others} other answers"
    )
    # The replica keeps blocks of prompts it has seen, up to the size of its KV cache.
    print(f"memory of the gateway {grown[0]:+.1f} MiB, of the replica {grown[1]:+.1f} MiB")


def resident(platform: Platform) -> list[int]:
    """Return the memory of the gateway and of the replica."""
    processes = [platform.control("gateway"), *platform.replicas]
    return [process.memory_info().rss for process in processes]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    print(f"commit {commit.stdout.strip()}, {arguments.seconds:.0f} s each")
    with tempfile.TemporaryDirectory() as home, started(Path(home)) as platform:
        launch_guide(platform, max_num_seqs=NUM_RUNNING, max_queue_size=NUM_QUEUED)
        asyncio.run(measure(platform, arguments.seconds))


if __name__ == "__main__":
    main()
