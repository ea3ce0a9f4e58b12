# SPDX-License-Identifier: Apache-2.0
"""A peer for the contract of `ControlBus`; as a program it serves on the real one.

python -m tests.contracts.bus_peer KEY SOCKET_DIRECTORY
"""

import asyncio
import sys
from pathlib import Path

import uvloop

from xinference.cluster.control_bus import remote
from xinference.cluster.xoscar_bus import XoscarBus
from xinference.errors import ModelOverloaded
from xinference.identifiers import Address, ModelUid, ReplicaUid
from xinference.protocol.deployment import EngineOptions, LaunchSpec


class Peer:
    """Something to call."""

    def __init__(self) -> None:
        self.num_slow = 0

    @remote
    async def echo(self, spec: LaunchSpec, replica: ReplicaUid) -> tuple[LaunchSpec, ReplicaUid]:
        return spec, replica

    @remote
    async def wait(self, seconds: float) -> str:
        await asyncio.sleep(seconds)
        self.num_slow += 1
        return "waited"

    @remote
    async def count(self) -> int:
        return self.num_slow

    @remote
    async def refuse(self) -> None:
        raise ModelOverloaded(model="m", num_waiting=3, retry_after_seconds=7)

    @remote
    async def fail(self) -> None:
        raise ZeroDivisionError("by nought")

    @remote
    async def leave(self) -> None:
        raise SystemExit(3)

    @remote
    async def be_cancelled(self) -> None:
        raise asyncio.CancelledError

    @remote
    async def fail_foreignly(self) -> None:
        class Foreign(Exception):
            """Nobody else can import it."""

            def __init__(self, one: int, other: int) -> None:
                super().__init__(f"{one} and {other}")

        raise Foreign(1, 2)

    async def hidden(self) -> str:
        return "not for peers"


SPEC = LaunchSpec(
    model_uid=ModelUid("m"), model_name="x", engine_options=EngineOptions(max_num_seqs=3)
)
REPLICA = ReplicaUid(ModelUid("m"), 0)


async def main() -> None:
    bus = await XoscarBus.open(
        Address("127.0.0.1", 0), key=sys.argv[1], socket_directory=Path(sys.argv[2])
    )
    await bus.serve("peer", Peer())
    sys.stdout.write(f"{bus.address}\n")
    sys.stdout.flush()
    await asyncio.Event().wait()


if __name__ == "__main__":
    uvloop.run(main())
