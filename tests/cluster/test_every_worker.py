# SPDX-License-Identifier: Apache-2.0
"""One question to many workers: the silent are named, the others are heard."""

import asyncio

import pytest

from xinference.cluster.control_bus import remote
from xinference.cluster.every_worker import ask_each, nodes_at, unreachable
from xinference.cluster.local_bus import LocalBus, LocalNetwork
from xinference.errors import InvalidRequest, ObjectNotFound
from xinference.identifiers import NodeId

NODES = [NodeId(f"10.0.0.{number}:9001") for number in (1, 2, 3)]


class Counter:
    """Counts, or has nothing to count."""

    def __init__(self, count: int | None) -> None:
        self.count = count
        self.was_asked = asyncio.Event()

    @remote
    async def counted(self, times: int) -> int:
        self.was_asked.set()
        if self.count is None:
            raise ObjectNotFound(kind="thing", id="one")
        return self.count * times


async def network_of(*counters: Counter) -> tuple[LocalNetwork, LocalBus]:
    network = LocalNetwork()
    for node, counter in zip(NODES, counters, strict=False):
        await LocalBus(network, node).serve("counter", counter)
    return network, LocalBus(network, None)


async def test_the_silent_and_the_gone_are_named_and_the_others_heard() -> None:
    network, bus = await network_of(Counter(1), Counter(2), Counter(3))
    network.hang(NODES[1])
    network.kill(NODES[2])

    answers = await ask_each(bus, NODES, "counter", "counted", 10, returns=int, timeout_seconds=0.2)

    assert answers.by_node == {NODES[0]: 10}
    assert answers.unanswered == (NODES[1], NODES[2])
    error = unreachable(answers.unanswered, "it was not asked")
    assert str(error) == f"The worker {NODES[1]}, {NODES[2]} cannot be reached: it was not asked"


async def test_a_refusal_is_raised_when_all_have_done_what_they_were_asked() -> None:
    refusing, counting = Counter(None), Counter(2)
    _, bus = await network_of(refusing, counting)

    with pytest.raises(ObjectNotFound):
        await ask_each(bus, NODES[:2], "counter", "counted", 1, returns=int, timeout_seconds=10.0)

    assert counting.was_asked.is_set()


def test_workers_are_named_by_their_host_or_their_address() -> None:
    assert nodes_at(NODES, None) == NODES
    assert nodes_at(NODES, "10.0.0.2") == nodes_at(NODES, "10.0.0.2:9001") == [NODES[1]]
    assert nodes_at([], None) == []
    with pytest.raises(InvalidRequest, match=r"no worker is at 10\.0\.0\.9; workers: 10\.0\.0\.1"):
        nodes_at(NODES, "10.0.0.9")
