# SPDX-License-Identifier: Apache-2.0
"""What a large cluster costs its supervisor and its gateways, in one process, without a network.

    python -m benchmarks.cluster_scale
    python -m benchmarks.cluster_scale --models 10000 --replicas 1
    python -m benchmarks.cluster_scale --models 10 --replicas 1000

Simulated workers with eight GPUs each report to the supervisor's state, which places the replicas
of all models, follows them until they are ready, and makes the routing table; a gateway's balancer
then chooses among the replicas. Only the state and the balancer are timed; messages are encoded and
decoded as on the bus. Printed are the median and the 99th percentile of each kind of event.
"""

import argparse
import gc
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import msgspec
import psutil

from tests.cluster.simulation import (
    GIB,
    ManualClock,
    SimulatedWorker,
    description,
    desired,
    gpu,
)
from xinference.cluster.messages import (
    DesiredModel,
    Heartbeat,
    InstanceState,
    LaunchId,
    RoutesVersion,
    WorkerEpoch,
    WorkerReport,
)
from xinference.cluster.routing import Balancer, cost_of, ready_routes
from xinference.cluster.state.cluster_state import ClusterState
from xinference.cluster.state.records import Effect, Tell
from xinference.errors import ReplicaLost
from xinference.identifiers import InstanceId, ModelUid, NodeId, RequestId
from xinference.protocol.deployment import LaunchSpec
from xinference.protocol.generation import GenerationRequest, TextPrompt

GPUS_PER_WORKER = 8


class Stopwatch:
    """Durations by what took them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}

    @contextmanager
    def timing(self, what: str, *, count: int = 1) -> Iterator[None]:
        """Time a block that does `count` things of a kind."""
        started_at = time.perf_counter()
        yield
        taken = (time.perf_counter() - started_at) / count
        self.seconds.setdefault(what, []).append(taken)

    def show(self, what: str, *, unit: float = 1e-3, name: str = "ms") -> None:
        """Print a row of the table."""
        taken = sorted(seconds / unit for seconds in self.seconds[what])
        high = taken[int(0.99 * (len(taken) - 1))]
        print(f"| {what}, {name} | {statistics.median(taken):.3g} | {high:.3g} |")


class Scale:
    """A supervisor's state, and the workers that report to it."""

    def __init__(self, *, workers: int, models: int, replicas: int) -> None:
        self.watch = Stopwatch()
        self.clock = ManualClock()
        self.num_models, self.num_replicas = models, replicas
        self.numbers = iter(range(10**9))
        self.state = ClusterState(
            epoch=1,
            desired=[],
            now=self.clock(),
            new_instance=lambda: InstanceId(f"{next(self.numbers):016x}"),
            jitter=lambda: 1.0,
            restart_limit=5,
        )
        devices = tuple(gpu(index) for index in range(GPUS_PER_WORKER))
        self.workers = [
            SimulatedWorker(
                NodeId(f"10.{number // 250}.{number % 250}.1:9000"),
                WorkerEpoch(f"{number}-0a1b2c3d4e5f"),
                devices=devices,
            )
            for number in range(workers)
        ]
        self.by_node = {worker.node: worker for worker in self.workers}

    def join(self) -> None:
        """Let every worker report for the first time."""
        for worker in self.workers:
            self.report(worker, "a worker joins")

    def report(self, worker: SimulatedWorker, what: str) -> list[Effect]:
        """Let a worker say what runs there, as its supervisor takes it."""
        message = msgspec.msgpack.encode(worker.report())
        with self.watch.timing(what):
            report = msgspec.msgpack.decode(message, type=WorkerReport)
            self.state.node_reported(report, now=self.clock())
            effects = self.state.reconcile(now=self.clock())
        return effects

    def beat(self) -> int:
        """Let every worker say that it lives; return the bytes of one message."""
        messages = [msgspec.msgpack.encode(worker.beat()) for worker in self.workers]
        with self.watch.timing("a heartbeat", count=len(messages)):
            for message in messages:
                beat = msgspec.msgpack.decode(message, type=Heartbeat)
                assert self.state.node_beat(beat, now=self.clock())
        return len(messages[0])

    def launch(self, number: int) -> None:
        """Launch one model as the supervisor does."""
        uid = ModelUid(f"model-{number}")
        spec = LaunchSpec(model_uid=uid, model_name="qwen", replica=self.num_replicas)
        with self.watch.timing("a launch"):
            admitted = self.state.check_launch(spec, description(uid), now=self.clock())
            model: DesiredModel = replace(
                desired(uid),
                launch_id=LaunchId(f"launch-{number}"),
                spec=spec,
                replicas=admitted.replicas,
            )
            self.state.launch(model, now=self.clock())
            effects = self.state.reconcile(now=self.clock())
        self.carry_out(effects)

    def carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            if isinstance(effect, Tell):
                self.by_node[effect.node].apply(effect.command)

    def settle(self, what: str) -> None:
        """Let each worker report what it was told, one after the other, until all is said."""
        for worker in self.workers:
            self.carry_out(self.report(worker, what))

    def become_ready(self) -> None:
        """Let each replica load and be ready, each with a report of its own."""
        for state in (InstanceState.LOADING, InstanceState.READY):
            for worker in self.workers:
                for instance in list(worker.instances):
                    worker.move(instance, state)
                    self.report(worker, "a replica moves on")

    def die(self) -> None:
        """Let some replicas crash and be started again."""
        for worker in self.workers[:100]:
            if worker.instances:
                instance = next(iter(worker.instances))
                worker.move(instance, InstanceState.EXITED)
                error = ReplicaLost(model="m", problem="signal SIGKILL").to_wire()
                worker.instances[instance] = replace(worker.instances[instance], error=error)
                self.carry_out(self.report(worker, "a replica dies"))
                self.report(worker, "a replica dies")


def measure_gateway(scale: Scale) -> None:
    """Time what a gateway does for each request, with the table that was made."""
    table = scale.state.routes
    balancer = Balancer()
    prompts = [f"{number} What is the answer? " * 60 for number in range(50)]
    uids = list(table.models)
    for number in range(20_000):
        request = GenerationRequest(
            request_id=RequestId(str(number)),
            prompt=TextPrompt(text=prompts[number % len(prompts)]),
        )
        uid = uids[number * 7919 % len(uids)]
        with scale.watch.timing("a routing decision"):
            routes = ready_routes(table, uid)
            cost = cost_of(uid, request)
            route = balancer.choose(routes, cost)
            assert route is not None
            lease = balancer.begin(route, cost)
        if number % 3:
            balancer.end(lease, is_good=True)


def table_bytes(scale: Scale, change: Callable[[], object]) -> tuple[int, int]:
    """Return the bytes of the whole routing table, and of what one change makes of it."""
    known = scale.state.routes_version
    change()
    whole = len(msgspec.msgpack.encode(scale.state.routes_since(RoutesVersion())))
    with scale.watch.timing("an update of the table is made"):
        update = msgspec.msgpack.encode(scale.state.routes_since(known))
    return whole, len(update)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--workers", type=int, default=1000)
    parser.add_argument("--models", type=int, default=1000)
    parser.add_argument("--replicas", type=int, default=10, help="of each model")
    given = parser.parse_args()
    scale = Scale(workers=given.workers, models=given.models, replicas=given.replicas)
    process = psutil.Process()
    gc.collect()
    gc.freeze()
    before = process.memory_info().rss
    scale.join()
    started_at = time.perf_counter()
    for number in range(given.models):
        scale.launch(number)
    seconds = sum(scale.watch.seconds["a launch"])
    total = given.models * given.replicas
    print(f"{given.workers} workers, {given.models} models of {given.replicas} replicas\n")
    print("| | median | 99 % |\n|---|---|---|")
    scale.settle("a report of what was started")
    scale.become_ready()
    lifetime = time.perf_counter() - started_at
    heartbeat_bytes = scale.beat()
    for _ in range(20):
        with scale.watch.timing("a tick with nothing new"):
            scale.state.reconcile(now=scale.clock())
        scale.beat()
    scale.state.mark_everything()
    with scale.watch.timing("a look at everything"):
        scale.state.reconcile(now=scale.clock())
    with scale.watch.timing("a list of all models"):
        scale.state.models()
    measure_gateway(scale)
    whole, update = table_bytes(scale, scale.die)
    for what in ("a worker joins", "a launch", "a report of what was started"):
        scale.watch.show(what)
    for what in ("a replica moves on", "a replica dies", "a tick with nothing new"):
        scale.watch.show(what)
    for what in ("a look at everything", "a list of all models", "an update of the table is made"):
        scale.watch.show(what)
    for what in ("a heartbeat", "a routing decision"):
        scale.watch.show(what, unit=1e-6, name="µs")
    gc.collect()
    grown = process.memory_info().rss - before
    routing = statistics.fmean(scale.watch.seconds["a routing decision"])
    print(f"\nplaced {total:,} replicas in {seconds:.2f} s, each checked and then placed: ", end="")
    print(f"{2 * total / seconds:,.0f} decisions/s; all ready after {lifetime:.1f} s")
    print(f"routing: {1 / routing:,.0f} decisions/s")
    print(f"memory of the state and the simulated workers: {grown / GIB * 1024:.0f} MiB")
    print(f"on the wire: a heartbeat {heartbeat_bytes} bytes; the whole routing table {whole:,}, ")
    print(f"an update after 100 deaths {update:,}")


if __name__ == "__main__":
    main()
