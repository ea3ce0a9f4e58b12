# SPDX-License-Identifier: Apache-2.0
"""What TLS costs the data plane: `python -m benchmarks.encryption`.

The fake replica, in a process of its own, over TCP of this host with and without TLS. Of each:
how long a connection takes to be welcomed, a question to be answered, and what CPU time the
client's process spends on a token of many streams at once.
"""

import asyncio
import statistics
import subprocess
import sys
import time

from tests.replica_process import FAKE, replica_process
from xinference.cluster.dataplane.client import ReplicaConnection
from xinference.cluster.dataplane.handshake import instance_key
from xinference.cluster.replica import Bootstrap
from xinference.identifiers import InstanceId, ModelUid, ReplicaUid, new_request_id
from xinference.protocol.deployment import EngineOptions, ModelSource, ReplicaSpec
from xinference.protocol.generation import GenerationRequest, SamplingParams, TextPrompt

INSTANCE = InstanceId("benchmark")
KEY = instance_key(b"a key of a benchmark", INSTANCE)
NUM_STREAMS = 64
NUM_TOKENS = 500
NUM_CONNECTIONS = 20
NUM_PINGS = 500


async def opened(address: str, role: str = "gateway") -> ReplicaConnection:
    return await ReplicaConnection.open(
        address, instance=INSTANCE, key=KEY, role=role, timeout_seconds=10.0
    )


async def measure(address: str) -> str:
    actor = await opened(address, "actor")
    spec = ReplicaSpec(
        replica=ReplicaUid(ModelUid("counting"), 0),
        instance=INSTANCE,
        source=ModelSource(path="counting"),
        abilities=("chat",),
        engine_options=EngineOptions(max_num_seqs=NUM_STREAMS),
        python_executable=sys.executable,
    )
    await actor.load(spec, on_progress=lambda *_: None, timeout_seconds=10.0)
    connects = []
    for _ in range(NUM_CONNECTIONS):
        started = time.perf_counter()
        connection = await opened(address)
        connects.append(time.perf_counter() - started)
        await connection.aclose()
    pings = []
    for _ in range(NUM_PINGS):
        started = time.perf_counter()
        await actor.ping(5.0)
        pings.append(time.perf_counter() - started)
    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(_read(actor) for _ in range(NUM_STREAMS)))
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    num_tokens = NUM_STREAMS * NUM_TOKENS
    await actor.aclose()
    return (
        f"| {address.partition(':')[0]} | {1e3 * statistics.median(connects):.1f} | "
        f"{1e6 * statistics.median(pings):.0f} | {1e6 * cpu / num_tokens:.1f} | "
        f"{1e6 * wall / num_tokens:.1f} |"
    )


async def _read(connection: ReplicaConnection) -> None:
    request = GenerationRequest(
        request_id=new_request_id(),
        prompt=TextPrompt(text="count"),
        sampling=SamplingParams(max_tokens=NUM_TOKENS),
    )
    async for _ in await connection.generate(request, timeout_seconds=10.0):
        pass


def main() -> None:
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
    )
    print(f"commit {commit.stdout.strip()}, {NUM_STREAMS} streams of {NUM_TOKENS} tokens")
    print("| transport | welcomed, ms | PING, µs | client's CPU a token, µs | wall a token, µs |")
    print("|---|---|---|---|---|")
    for kind in ("tcp", "tls"):
        bootstrap = Bootstrap(
            instance=INSTANCE,
            key=KEY,
            listen=f"{kind}:127.0.0.1:0",
            model_uid=ModelUid("counting"),
        )
        with replica_process(FAKE, bootstrap) as process:
            print(asyncio.run(measure(process.address)))


if __name__ == "__main__":
    main()
