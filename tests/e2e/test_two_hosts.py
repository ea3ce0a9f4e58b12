# SPDX-License-Identifier: Apache-2.0
"""A supervisor and a worker started apart find each other, if they share the cluster key."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil

from tests.e2e.conftest import GUIDE
from tests.e2e.platform import environment, free_port, stop, wait_until


@contextmanager
def command(name: str, *words: str, home: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Run one of the server commands until the block ends."""
    home.mkdir(parents=True, exist_ok=True)
    program = (
        f"import sys; from xinference.cli.main import {name}; sys.argv[0] = '{name}'; {name}()"
    )
    with (home / "output.txt").open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *words],
            env=environment(home),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        stop(process)


def workers_of(endpoint: str) -> list[str]:
    try:
        return list(httpx.get(f"{endpoint}/status", timeout=5).json()["workers"])
    except httpx.TransportError:
        return []


def test_a_worker_with_the_key_joins_and_serves(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with command("supervisor", "-H", "127.0.0.1", "-p", str(port), home=one):
        key = one / "cluster.key"
        wait_until("there is a cluster key", key.exists, timeout_seconds=30)
        assert key.stat().st_mode & 0o777 == 0o600
        two.mkdir()
        (two / "cluster.key").write_bytes(key.read_bytes())
        # Of this machine, too, but not the address that says so: what comes here is encrypted.
        with command("worker", "-e", endpoint, "-H", "127.0.0.2", home=two) as worker:
            wait_until("the worker joined", lambda: workers_of(endpoint), timeout_seconds=60)

            launch = {"model_name": GUIDE, "model_engine": "transformers"}
            httpx.post(f"{endpoint}/v1/models", json=launch, timeout=90).raise_for_status()
            reply = httpx.post(
                f"{endpoint}/v1/chat/completions",
                json={"model": GUIDE, "messages": [{"role": "user", "content": "hello"}]},
                timeout=60,
            )
            assert reply.status_code == 200, reply.text
            (instance,) = httpx.get(f"{endpoint}/v1/models/instances", timeout=10).json()
            (replica,) = instance["replica_statuses"]
            assert replica["model_address"].startswith("tls:127.0.0.2:")
            below = psutil.Process(worker.pid).children(recursive=True)
            assert any("xinference.cluster.replica" in one.cmdline() for one in below)


def test_a_worker_without_the_key_stops_and_prints_how_to_join(tmp_path: Path) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    port = free_port()
    endpoint = f"http://127.0.0.1:{port}"
    with command("supervisor", "-H", "127.0.0.1", "-p", str(port), home=one):
        wait_until(
            "the gateway answers",
            lambda: (one / "cluster.key").exists() and answers(endpoint),
            timeout_seconds=60,
        )
        with command("worker", "-e", endpoint, "-H", "127.0.0.1", home=two) as worker:
            status = worker.wait(60)

        said = (two / "output.txt").read_text()
        assert status != 0
        assert "cluster.key" in said
        assert f"xinference-worker -e {endpoint}" in said
        assert "Traceback" not in said
        assert workers_of(endpoint) == []


def answers(endpoint: str) -> bool:
    try:
        return isinstance(json.loads(httpx.get(f"{endpoint}/v1/address", timeout=5).text), str)
    except httpx.TransportError:
        return False
