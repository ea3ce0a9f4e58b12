# SPDX-License-Identifier: Apache-2.0
"""How long until a user chats: the command line, the platform, the guide model, the first token.

    python benchmarks/startup.py --rounds 5
    python benchmarks/startup.py --rounds 5 --json

Each round starts `xinference-local` on a free loopback port with an empty home, launches
`xinference-guide`, and asks it five questions, one after the other. Printed: minimum, median and
maximum of each figure over the rounds, beside its target. Memory is the sum over the guardian,
supervisor, worker and gateway of what is private to each, and of what the kernel charges each
(RSS, which counts shared pages once per process). Nothing else should be running.
"""

import argparse
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

QUESTIONS = (
    "What is Xinference?",
    "How do I launch a model?",
    "How do I chat with a model from Python?",
    "How do I stop a model?",
    "How do I use my own model?",
)
TARGETS = {
    "xinference --help, s": 0.3,
    "xinference-local ready, s": 4.0,
    "control processes, RSS, MB": 400.0,
    "guide model launched, s": 7.0,
    "first streamed token, ms": 100.0,
}


@contextmanager
def platform(home: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """Start `xinference-local`; yield its endpoint and first process."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
    process = subprocess.Popen(
        [Path(sys.executable).with_name("xinference-local"), "-p", str(port)],
        env=os.environ | {"XINFERENCE_HOME": home},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_until_ready(endpoint: str, *, timeout_seconds: float = 60) -> None:
    """Return when the gateway answers and a worker has joined."""
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{endpoint}/status", timeout=5).json()["workers"]:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.02)
    raise TimeoutError(f"{endpoint} is not ready after {timeout_seconds} s")


def first_token_seconds(client: httpx.Client, question: str) -> float:
    """Return the time from sending a streamed chat request to its first text."""
    body = {
        "model": "xinference-guide",
        "messages": [{"role": "user", "content": question}],
        "stream": True,
    }
    started = time.perf_counter()
    elapsed = None
    with client.stream("POST", "/v1/chat/completions", json=body) as reply:
        reply.raise_for_status()
        for line in reply.iter_lines():
            if elapsed is None and line.startswith("data: {"):
                choices = json.loads(line.removeprefix("data: "))["choices"]
                if choices and choices[0]["delta"].get("content"):
                    elapsed = time.perf_counter() - started
    assert elapsed is not None, "the answer was empty"
    return elapsed


def one_round() -> dict[str, float]:
    """Measure each figure once."""
    figures: dict[str, float] = {}
    started = time.perf_counter()
    command = Path(sys.executable).with_name("xinference")
    subprocess.run([command, "--help"], check=True, stdout=subprocess.DEVNULL)
    figures["xinference --help, s"] = time.perf_counter() - started

    with tempfile.TemporaryDirectory() as home:
        started = time.perf_counter()
        with platform(home) as (endpoint, process):
            wait_until_ready(endpoint)
            figures["xinference-local ready, s"] = time.perf_counter() - started
            guardian = psutil.Process(process.pid)
            control = [guardian, *guardian.children(recursive=True)]
            memory = [one.memory_full_info() for one in control]
            figures["control processes, RSS, MB"] = sum(m.rss for m in memory) / 1e6
            figures["control processes, private, MB"] = sum(m.uss for m in memory) / 1e6

            with httpx.Client(base_url=endpoint, timeout=120) as client:
                started = time.perf_counter()
                launch = {"model_name": "xinference-guide", "model_engine": "transformers"}
                client.post("/v1/models", json=launch).raise_for_status()
                figures["guide model launched, s"] = time.perf_counter() - started
                waits = [first_token_seconds(client, question) for question in QUESTIONS]
            figures["very first token after launch, ms"] = 1000 * waits[0]
            figures["first streamed token, ms"] = 1000 * statistics.median(waits)
    return figures


def main() -> None:
    """Run the rounds; print a table, or JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    rounds = [one_round() for _ in range(options.rounds)]
    table = {
        name: {
            "minimum": min(one[name] for one in rounds),
            "median": statistics.median(one[name] for one in rounds),
            "maximum": max(one[name] for one in rounds),
            "target": TARGETS.get(name),
        }
        for name in rounds[0]
    }
    if options.json:
        print(json.dumps(table, indent=2))
        return
    print(f"{'':36}{'min':>9}{'median':>9}{'max':>9}{'target':>9}")
    for name, row in table.items():
        target = "" if row["target"] is None else f"{row['target']:g}"
        cells = "".join(f"{row[key]:9.2f}" for key in ("minimum", "median", "maximum"))
        print(f"{name:36}{cells}{target:>9}")


if __name__ == "__main__":
    main()
