# SPDX-License-Identifier: Apache-2.0
"""A second gateway's requests: `python -m tests.faults.caller SUPERVISOR SOCKETS NUMBER`.

It asks for so many endless answers, prints a line when each has begun, and waits for its end.
"""

import asyncio
import sys
from pathlib import Path

from tests.cluster.guarded_cluster import KEY, MODEL
from xinference.cluster.remote import RemoteCluster
from xinference.identifiers import new_request_id
from xinference.protocol.generation import GenerationRequest, SamplingParams, TextPrompt

NUM_TOKENS = 900_000


async def main(supervisor_address: str, sockets: str, number: str) -> None:
    cluster = await RemoteCluster.connect(
        supervisor_address, cluster_key=KEY, socket_directory=Path(sockets)
    )

    async def listen() -> None:
        request = GenerationRequest(
            request_id=new_request_id(),
            prompt=TextPrompt(text="count"),
            sampling=SamplingParams(max_tokens=NUM_TOKENS),
        )
        stream = await cluster.generate(MODEL, request)
        streams.append(stream)
        if len(streams) == int(number):
            print("begun", flush=True)  # noqa: T201  # who started it waits for that
        async for _ in stream:
            pass

    streams: list[object] = []
    await asyncio.gather(*(listen() for _ in range(int(number))))


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
