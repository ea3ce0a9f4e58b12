# SPDX-License-Identifier: Apache-2.0
"""Hosts in networks of their own whose links are cut: `unshare -rn python -m tests.faults.network`.

It takes the names of scenarios and a directory, and prints what became of each as a line of JSON.
This process has the bridge, the supervisor and the client; each worker has a network namespace that
ends with a process of ours. No packet leaves these namespaces, and no privilege is needed.
"""

import argparse
import asyncio
import contextlib
import dataclasses
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.cluster.guarded_cluster import MODEL, GuardedCluster, Host, spec
from tests.faults.harness import Bounds, Trial
from tests.faults.load import Load
from tests.faults.table import Outcome
from xinference.identifiers import ModelUid
from xinference.protocol.deployment import LaunchSpec, ReplicaPlacement

NUM_HOSTS = 3
HUB = "10.77.0.1"
WHOLE_TIMEOUT_SECONDS = 60.0
HEALTHY = ModelUid("healthy")
NUM_ASKED = 100
"""Requests whose latencies are compared."""


def address_of(number: int) -> str:
    """Return the address of a worker's host, from 1."""
    return f"10.77.0.{10 + number}"


class Network:
    """A bridge in this namespace, and hosts on it."""

    def __init__(self) -> None:
        self._holders: dict[int, subprocess.Popen[bytes]] = {}
        """A process per namespace, which lives as long as that one does."""

    def make(self) -> None:
        """Make the bridge and the namespaces of all hosts."""
        _ip("link", "set", "lo", "up")
        _ip("link", "add", "hub", "type", "bridge")
        _ip("addr", "add", f"{HUB}/24", "dev", "hub")
        _ip("link", "set", "hub", "up")
        for number in range(1, NUM_HOSTS + 1):
            self._add(number)

    def _add(self, number: int) -> None:
        holder = subprocess.Popen(
            ["unshare", "-n", sys.executable, "-I", "-S", "-c", _HOLD],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._holders[number] = holder
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"here\n"
        peer = ("peer", "name", "eth0", "netns", str(holder.pid))
        _ip("link", "add", f"host{number}", "type", "veth", *peer)
        _ip("link", "set", f"host{number}", "master", "hub", "up")
        within = self.within(number)
        _ip("addr", "add", f"{address_of(number)}/24", "dev", "eth0", within=within)
        for device in ("lo", "eth0"):
            _ip("link", "set", device, "up", within=within)

    def within(self, number: int) -> tuple[str, ...]:
        """Return the words before a command that is to run on a host."""
        return ("nsenter", "-n", "-t", str(self._holders[number].pid))

    def cut(self, number: int) -> None:
        """Let nothing go to a host or come from it."""
        _ip("link", "set", f"host{number}", "down")

    def heal(self, number: int) -> None:
        """Undo `cut`."""
        _ip("link", "set", f"host{number}", "up")

    def close(self) -> None:
        """Let the namespaces go."""
        for holder in self._holders.values():
            holder.communicate()


_HOLD = "import sys; print('here', flush=True); sys.stdin.read()"


def _ip(*words: str, within: tuple[str, ...] = ()) -> None:
    subprocess.run([*within, "ip", *words], check=True)


@contextlib.contextmanager
def network() -> Iterator[Network]:
    """Give the bridge and the hosts."""
    made = Network()
    try:
        made.make()
        yield made
    finally:
        made.close()


async def start(guarded: GuardedCluster, network: Network) -> None:
    """Start the supervisor here, and a worker on each host."""
    await guarded.hosts[0].start(listen=f"{HUB}:0", has_worker=False, expected_workers=NUM_HOSTS)
    for number in range(1, NUM_HOSTS + 1):
        host = Host(guarded.home / f"host-{number}", within=network.within(number))
        guarded.hosts.append(host)
        await guarded.start_host(number, listen=f"{address_of(number)}:0")
    await guarded.connect()


async def cut_and_heal(guarded: GuardedCluster, network: Network) -> list[Outcome]:
    """A replica on each of three hosts; the link of one is cut, and heals when it is replaced."""
    cluster = guarded.cluster
    assert cluster is not None
    await cluster.launch(spec(replica=3), wait_ready=True)
    assert [len(host.replicas()) for host in guarded.hosts] == [0, 1, 1, 1]
    trial = await Trial.begin(guarded, {MODEL: 3})
    trial.num_workers -= 1
    trial.num_surplus = 1  # the one that nobody reaches
    trial.num_processes += 1
    trial.num_files += 1  # its successor is noted, too

    network.cut(1)
    outcome = await trial.end(
        row="F16",
        fault="the link to one of three hosts is cut, with a replica each",
        bounds=Bounds(detected=5.0, good=5.0, whole=15.0),
    )
    assert [len(host.replicas()) for host in guarded.hosts[:2]] == [0, 1]

    trial = await Trial.begin(guarded, {MODEL: 3})
    trial.num_workers = NUM_HOSTS
    trial.num_processes -= 1
    trial.num_files -= 1
    network.heal(1)
    healed = await trial.end(
        row="F16, F41",
        fault="the link heals; what has been replaced there ends",
        bounds=Bounds(good=1.0, whole=10.0),
    )
    return [outcome, healed]


async def cut_all_but_one(guarded: GuardedCluster, network: Network) -> list[Outcome]:
    """Two of three hosts are cut; the model on the third one is asked."""
    cluster = guarded.cluster
    assert cluster is not None
    await cluster.launch(spec_at(HEALTHY, NUM_HOSTS), wait_ready=True)
    await cluster.launch(spec_at(MODEL, *range(1, NUM_HOSTS)), wait_ready=True)
    before = await latency_seconds(guarded)
    load = Load(cluster, MODEL)  # it asks those that are silent, too
    load.start()
    for number in range(1, NUM_HOSTS):
        network.cut(number)
    after = await latency_seconds(guarded)
    assert after < before + 0.1
    for number in range(1, NUM_HOSTS):
        network.heal(number)
    await load.stop()
    routing = cluster.routing()
    return [
        Outcome(
            row="F17",
            fault="the links to two of three hosts are cut, with both replicas of the model asked",
            num_requests=len(load.sent) + NUM_ASKED,
            failed=load.failures(),
            num_retried=routing.num_retried,
            num_continued=routing.num_continued,
            num_hung=load.count("hung"),
            num_wrong=load.count("wrong"),
            note=f"the 99th percentile of a model on the third is {1000 * after:.0f} ms, "
            f"{1000 * before:.0f} ms before",
        )
    ]


def spec_at(model: ModelUid, *numbers: int) -> LaunchSpec:
    """Return a launch of a model with a replica on each of these hosts."""
    at = tuple(ReplicaPlacement(worker_ip=address_of(number)) for number in numbers)
    return dataclasses.replace(spec(uid=model, replica=len(at)), replica_config=at)


async def latency_seconds(guarded: GuardedCluster) -> float:
    """Return the 99th percentile of the model on the healthy host."""
    assert guarded.cluster is not None
    load = Load(guarded.cluster, HEALTHY)
    load.start()
    await load.wait_good(NUM_ASKED)
    await load.stop()
    taken = sorted(one.ended_at - one.sent_at for one in load.sent if one.ended_at is not None)
    assert len(taken) == load.count("good")
    return taken[int(len(taken) * 0.99) - 1]


SCENARIOS = {"one": cut_and_heal, "all-but-one": cut_all_but_one}


async def main(names: list[str], home: Path) -> None:
    """Run the scenarios one after the other, on one cluster."""
    guarded = GuardedCluster(home)
    with network() as made:
        try:
            await start(guarded, made)
            for name in names:
                for outcome in await SCENARIOS[name](guarded, made):
                    sys.stdout.write(json.dumps(dataclasses.asdict(outcome)) + "\n")
                    sys.stdout.flush()
        finally:
            sys.stderr.write(await guarded.clean_up())


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("home", type=Path)
    parser.add_argument("scenarios", nargs="+", choices=SCENARIOS)
    told = parser.parse_args()
    asyncio.run(main(told.scenarios, told.home))
