# SPDX-License-Identifier: Apache-2.0
"""What goes through a gateway costs: first token, requests and tokens per second.

    python -m benchmarks.gateway
    python -m benchmarks.gateway --litellm .litellm/bin/litellm

A model of no cost (`free_model.py`) is behind a whole platform: guardian, supervisor, worker, one
gateway process, the real data plane. In the same rounds, one after another, a bare FastAPI echo
that counts just so (`bare_echo.py`), and with `--litellm` LiteLLM's proxy, one process of it, in
front of that echo. The load (`http_load.py`) shares the machine's cores with what it measures, in
the same way for all: what speaks HTTP has the first core, the load and the model that it asks have
the last. Printed are medians over the rounds:

    first text    of a streamed answer on one connection, in ms; as nothing else takes time, all of
                  it is what the gateway adds
    requests/s    whole answers of one token, on 32 connections
    tokens/s      32 streams of 256 tokens, each token a server-sent event

`--engine` compares something else: 32 requests of 16 + 24 tokens to Qwen2-0.5B's shape with
random weights, the engine driven directly in a process of its own against the same engine in a
platform, asked over HTTP, streamed and not.
"""

import argparse
import contextlib
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil

from . import http_load

NUM_CONNECTIONS = 32
STREAM_TOKENS = 256
MODEL = "counting"
START_SECONDS = 60.0
FIRST_TEXTS, REQUESTS, STREAMS = 300, 120, 4
"""Of a round: answers on one connection; whole and streamed ones on each of many."""
SLOW_SHARE = 10
"""LiteLLM's proxy gets a tenth of the first two, and one stream on each connection."""
CORES = sorted(os.sched_getaffinity(0))
HTTP_CORE, LOAD_CORE = CORES[0], CORES[-1]
"""Why not wherever the kernel likes: some rounds had an echo alone on a core, some had not."""


def main() -> None:
    """Read the flags, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--litellm", help="the executable of LiteLLM's proxy")
    parser.add_argument("--engine", action="store_true", help="compare with the engine itself")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--platform", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--direct", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.platform:
        sys.exit(run_platform(int(args.platform[0]), Path(args.platform[1])))
    if args.direct:
        from .gateway_engine import measure_directly

        print(json.dumps(measure_directly(args.direct)))
    elif args.engine:
        report_engine(args.rounds, as_json=args.json)
    else:
        report(measure_all(args.rounds, args.litellm), as_json=args.json)


# --- the three servers


def run_platform(port: int, home: Path) -> int:
    """Be the guardian of a platform whose replicas are free models."""
    from xinference.cluster import guardian
    from xinference.cluster.cluster_key import make_cluster_key
    from xinference.cluster.configuration import GatewayConfig, SupervisorConfig, WorkerConfig

    key = make_cluster_key(home)
    free = ("-m", "benchmarks.free_model")
    return guardian.run(
        [
            SupervisorConfig(home=home, cluster_key=key, log_level="WARNING", expected_workers=1),
            WorkerConfig(home=home, cluster_key=key, log_level="WARNING", replica_command=free),
            GatewayConfig(home=home, cluster_key=key, log_level="WARNING", port=port),
        ]
    )


@contextlib.contextmanager
def started(
    command: list[str], port: int, *, cores: Collection[int], **environment: str
) -> Iterator[int]:
    """Run a server until the block ends; give its port when it answers."""
    process = subprocess.Popen(
        command,
        env=os.environ | environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        # Why here: it has the affinity of the load otherwise.
        preexec_fn=lambda: os.sched_setaffinity(0, cores),
    )
    try:
        wait_until_answering(process, port)
        yield port
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def wait_until_answering(process: "subprocess.Popen[bytes]", port: int) -> None:
    """Return when somebody answers there."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
        with contextlib.suppress(httpx.TransportError):
            httpx.get(f"http://127.0.0.1:{port}/status", timeout=5)
            return
        time.sleep(0.05)
    raise TimeoutError(f"{process.args} does not answer")


def free_port() -> int:
    """Return a loopback port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def platform(home: str) -> Iterator[int]:
    """Run a platform with the free model on it."""
    port = free_port()
    command = [sys.executable, "-m", "benchmarks.gateway", "--platform", str(port), home]
    with started(command, port, cores=CORES):
        launch = {"model_name": "xinference-guide", "model_engine": "transformers"}
        launched = httpx.post(
            f"http://127.0.0.1:{port}/v1/models", json=launch | {"model_uid": MODEL}, timeout=60
        )
        launched.raise_for_status()
        keep_to(HTTP_CORE, "gateway")
        keep_to(LOAD_CORE, "benchmarks.free_model")
        yield port


def keep_to(core: int, word: str) -> None:
    """Keep the processes below this one that have a word in their command to one core."""
    found = [one for one in psutil.Process().children(recursive=True) if word in one.cmdline()]
    assert found, f"no process of {word}"
    for process in found:
        for thread in process.threads():
            os.sched_setaffinity(thread.id, {core})


@contextlib.contextmanager
def bare_echo() -> Iterator[int]:
    """Run the yardstick."""
    port = free_port()
    with started(
        [sys.executable, "-m", "benchmarks.bare_echo", str(port)], port, cores={HTTP_CORE}
    ):
        yield port


@contextlib.contextmanager
def litellm(executable: str, home: str, echo_port: int) -> Iterator[int]:
    """Run LiteLLM's proxy in front of the echo."""
    config = Path(home) / "litellm.yaml"
    backend = {"model": f"openai/{MODEL}", "api_base": f"http://127.0.0.1:{echo_port}/v1"}
    backend["api_key"] = "none"
    # JSON is YAML.
    config.write_text(
        json.dumps({"model_list": [{"model_name": MODEL, "litellm_params": backend}]})
    )
    port = free_port()
    command = [executable, "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    environment = {
        "LITELLM_LOG": "ERROR",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        # As open as the other two are.
        "LITELLM_DANGEROUSLY_PERMIT_WEAK_OR_UNSET_MASTER_KEY": "true",
    }
    with started([*command, "--telemetry", "False"], port, cores={HTTP_CORE}, **environment):
        yield port


# --- what is measured


def chat(max_tokens: int, *, stream: bool) -> dict[str, Any]:
    """Return a body."""
    messages = [{"role": "user", "content": "Count, please."}]
    return {"model": MODEL, "messages": messages, "max_tokens": max_tokens, "stream": stream}


def first_text_ms(port: int, share: int) -> float:
    """Return the median time to the first text on an idle server."""
    body = chat(1, stream=True)
    load = http_load.run(port, body, num_connections=1, num_requests=FIRST_TEXTS // share)
    return statistics.median(load.first_text_seconds) * 1000


def requests_per_second(port: int, share: int) -> float:
    """Return the rate of whole answers."""
    body, count = chat(1, stream=False), REQUESTS // share
    load = http_load.run(port, body, num_connections=NUM_CONNECTIONS, num_requests=count)
    return NUM_CONNECTIONS * count / load.seconds


def tokens_per_second(port: int, share: int) -> float:
    """Return the rate of streamed tokens."""
    body, count = chat(STREAM_TOKENS, stream=True), max(1, STREAMS // share)
    load = http_load.run(port, body, num_connections=NUM_CONNECTIONS, num_requests=count)
    return NUM_CONNECTIONS * count * STREAM_TOKENS / load.seconds


MEASURES: dict[str, Callable[[int, int], float]] = {
    "first text, ms": first_text_ms,
    "requests/s": requests_per_second,
    "tokens/s": tokens_per_second,
}


def measure_all(num_rounds: int, litellm_path: str | None) -> dict[str, dict[str, list[float]]]:
    """Return, by server and measure, the figure of each round."""
    os.sched_setaffinity(0, {LOAD_CORE})
    with contextlib.ExitStack() as running:
        home = running.enter_context(tempfile.TemporaryDirectory())
        ports = {"bare echo": running.enter_context(bare_echo())}
        ports["xinference"] = running.enter_context(platform(home))
        if litellm_path:
            proxy = litellm(litellm_path, home, ports["bare echo"])
            ports["litellm"] = running.enter_context(proxy)
        figures: dict[str, dict[str, list[float]]] = {
            name: {what: [] for what in MEASURES} for name in ports
        }
        for number in range(num_rounds + 1):
            for name, port in ports.items():
                for what, measure in MEASURES.items():
                    figure = measure(port, SLOW_SHARE if name == "litellm" else 1)
                    if number:  # the first round warms up
                        figures[name][what].append(figure)
        return figures


def report(figures: dict[str, dict[str, list[float]]], *, as_json: bool) -> None:
    """Print the table and what it comes to."""
    medians = {
        name: {what: statistics.median(each) for what, each in by_measure.items()}
        for name, by_measure in figures.items()
    }
    ours, bare = medians["xinference"], medians["bare echo"]
    if as_json:
        print(json.dumps({"medians": medians, "rounds": figures}))
        return
    print(f"{'':<12}" + "".join(f"{what:>16}" for what in MEASURES))
    for name, found in medians.items():
        print(f"{name:<12}" + "".join(f"{found[what]:>16,.2f}" for what in MEASURES))
    print(
        f"\nadded to the first token: {ours['first text, ms']:.2f} ms (at most 2)\n"
        f"requests: {ours['requests/s'] / bare['requests/s']:.2f} of the bare echo's "
        "(at least 0.6)\n"
        f"tokens: {ours['tokens/s']:,.0f} a second (at least 10,000)"
    )


def report_engine(num_rounds: int, *, as_json: bool) -> None:
    """Print what the gateway leaves of the engine's rate."""
    from xinference.cluster.replica_environment import DEFAULTS, num_usable_cores

    from .gateway_engine import measure_in_platform, model_directory

    # As a replica has it.
    environment = {**DEFAULTS, "OMP_NUM_THREADS": str(num_usable_cores()), **os.environ}
    with tempfile.TemporaryDirectory() as home:
        directory = model_directory(Path(home))
        direct: list[float] = []
        whole: list[float] = []
        streamed: list[float] = []
        for _ in range(num_rounds):
            command = [sys.executable, "-m", "benchmarks.gateway", "--direct", str(directory)]
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, check=True, text=True
            )
            direct.append(float(json.loads(done.stdout.splitlines()[-1])))
            rates = measure_in_platform(directory)
            whole.append(rates["whole"])
            streamed.append(rates["streamed"])
    figures = {"directly": direct, "whole answers": whole, "streams": streamed}
    if as_json:
        print(json.dumps(figures))
        return
    best = statistics.median(direct)
    for name, rates in figures.items():
        rate = statistics.median(rates)
        print(f"{name:<16}{rate:>10.1f} tokens/s{rate / best:>8.2f}")


if __name__ == "__main__":
    main()
