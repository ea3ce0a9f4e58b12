# SPDX-License-Identifier: Apache-2.0
"""What users see, and for how long, when a part of the platform is killed.

    python -m benchmarks.recovery --rounds 3
    python -m benchmarks.recovery --rounds 3 --json

Each round starts `xinference-local` with the guide model, asks it one short question after
another, kills a part with SIGKILL, and goes on asking until answers are good again. Printed for
each part: the seconds from the kill to the first good answer (median and maximum over the
rounds), the seconds without any answer at all, the statuses seen meanwhile, and how many processes
there are too many once all is as before: a replica whose worker was killed serves on and is
adopted, which is none; another one beside it would be. Nothing else should be running.
"""

import argparse
import collections
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import httpx
import psutil

from tests.e2e.conftest import GUIDE, launch_guide
from tests.e2e.platform import Platform, free_port, started

LIMIT_SECONDS = 60.0
SETTLE_SECONDS = 5.0
"""For what was killed to be back, and for what that would start too much to be there."""


@dataclass
class Recovery:
    """How one kill went."""

    first_good_seconds: float
    silent_seconds: float
    """From the kill, how long connections were refused in all."""
    seen: dict[str, int] = field(default_factory=dict)
    """Status, or "no answer", and how often."""
    left: int = 0
    """Processes too many when all is as before; of everything, those that were not killed."""


def ask(endpoint: str) -> str:
    """Ask the guide once; return the status, or "no answer"."""
    body = {"model": GUIDE, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    try:
        return str(httpx.post(f"{endpoint}/v1/chat/completions", json=body, timeout=30).status_code)
    except httpx.TransportError:
        return "no answer"


def watch(endpoint: str, killed_at: float) -> Recovery:
    """Ask until an answer is good."""
    seen: collections.Counter[str] = collections.Counter()
    silent = 0.0
    while time.perf_counter() - killed_at < LIMIT_SECONDS:
        began = time.perf_counter()
        status = ask(endpoint)
        if status == "200":
            return Recovery(time.perf_counter() - killed_at, silent, dict(seen))
        seen[status] += 1
        time.sleep(0.02)
        if status == "no answer":
            silent += time.perf_counter() - began
    raise TimeoutError(f"no good answer within {LIMIT_SECONDS} s; seen: {dict(seen)}")


def below(platform: Platform) -> list[psutil.Process]:
    """Return every process of the platform but the first."""
    return psutil.Process(platform.process.pid).children(recursive=True)


def surplus(platform: Platform, num_wanted: int) -> int:
    """Return how many processes there are too many, once it had time to come to rest."""
    deadline = time.perf_counter() + LIMIT_SECONDS
    while True:
        time.sleep(SETTLE_SECONDS)
        num_surplus = len(below(platform)) - num_wanted
        if num_surplus == 0 or time.perf_counter() > deadline:
            return num_surplus


def kill_one(choose: Callable[[Platform], psutil.Process]) -> Callable[[Path], Recovery]:
    """Return a measurement that kills what `choose` picks."""

    def measure(home: Path) -> Recovery:
        with started(home) as platform:
            launch_guide(platform)
            num_before = len(below(platform))
            victim = choose(platform)
            killed_at = time.perf_counter()
            victim.kill()
            recovery = watch(platform.endpoint, killed_at)
            recovery.left = surplus(platform, num_before)
            return recovery

    return measure


def kill_everything(home: Path) -> Recovery:
    """Kill all processes, start again on the same port, and measure from the new start."""
    port = free_port()
    with started(home, port=port) as platform:
        launch_guide(platform)
        doomed = below(platform)
        for process in [psutil.Process(platform.process.pid), *doomed]:
            process.kill()
        platform.process.wait(10)
        _, alive = psutil.wait_procs(doomed, timeout=1)
        left = sum(one.status() != psutil.STATUS_ZOMBIE for one in alive)
    restarted_at = time.perf_counter()
    with started(home, port=port) as platform:
        recovery = watch(platform.endpoint, restarted_at)
        recovery.left = left
        return recovery


PARTS: dict[str, Callable[[Path], Recovery]] = {
    "model process": kill_one(lambda platform: platform.replicas[0]),
    "worker": kill_one(lambda platform: platform.control("worker")),
    "supervisor": kill_one(lambda platform: platform.control("supervisor")),
    "gateway": kill_one(lambda platform: platform.control("gateway")),
    "everything, then started again": kill_everything,
}


def main() -> None:
    """Run the rounds; print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    table = {}
    for part, measure in PARTS.items():
        rounds = []
        for _ in range(options.rounds):
            with tempfile.TemporaryDirectory() as home:
                rounds.append(measure(Path(home)))
        seen: collections.Counter[str] = collections.Counter()
        for one in rounds:
            seen.update(one.seen)
        table[part] = {
            "first good answer, s, median": statistics.median(r.first_good_seconds for r in rounds),
            "first good answer, s, maximum": max(r.first_good_seconds for r in rounds),
            "no answer at all, s, maximum": max(r.silent_seconds for r in rounds),
            "seen meanwhile": dict(seen),
            "processes left": max(r.left for r in rounds),
        }
    if options.json:
        print(json.dumps(table, indent=2))
        return
    print(f"{'killed':32}{'good again, s':>14}{'max':>7}{'silent':>8}{'left':>6}  seen meanwhile")
    for part, row in table.items():
        median, most, silent, seen, left = row.values()
        words = ", ".join(f"{count} × {status}" for status, count in seen.items()) or "good only"
        print(f"{part:32}{median:14.2f}{most:7.2f}{silent:8.2f}{left:6}  {words}")


if __name__ == "__main__":
    main()
