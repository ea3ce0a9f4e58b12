# SPDX-License-Identifier: Apache-2.0
"""A cluster without processes: workers that obey commands, a clock that is turned by hand."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from xinference.cluster.messages import (
    Command,
    DesiredModel,
    Heartbeat,
    InstanceReport,
    InstanceState,
    LaunchId,
    WorkerEpoch,
    WorkerReport,
)
from xinference.cluster.state import (
    ClusterState,
    Effect,
    ForgetModel,
    Moment,
    SaveModel,
    Tell,
)
from xinference.errors import LoadFailed
from xinference.identifiers import InstanceId, ModelUid, NodeId
from xinference.protocol.deployment import LaunchSpec, ModelDescription, ModelSource
from xinference.protocol.nodes import NodeResources

GIB = 2**30


class ManualClock:
    """Both clocks of the supervisor; they move when told."""

    def __init__(self) -> None:
        # Why not 0: a monotonic time taken for a duration, or for unix time, shows.
        self.monotonic = 731.5

    def __call__(self) -> Moment:
        return Moment(monotonic=self.monotonic, unix=1_700_000_000 + int(self.monotonic))

    def advance(self, seconds: float) -> None:
        self.monotonic += seconds


def resources(available_bytes: int = 8 * GIB) -> NodeResources:
    return NodeResources(
        cpu_count=2,
        cpu_utilization=0.1,
        memory_total_bytes=16 * GIB,
        memory_used_bytes=16 * GIB - available_bytes,
        memory_available_bytes=available_bytes,
    )


def desired(uid: str = "qwen", launch: str = "launch-1", **changes: object) -> DesiredModel:
    return DesiredModel(
        model_uid=ModelUid(uid),
        launch_id=LaunchId(launch),
        spec=LaunchSpec(model_uid=ModelUid(uid), model_name="qwen"),
        description=description(uid),
        source=ModelSource(path="package:guide"),
        abilities=("chat",),
        created_ts=1_700_000_000,
        **changes,  # type: ignore[arg-type]
    )


def description(uid: str) -> ModelDescription:
    return ModelDescription(
        model_uid=ModelUid(uid),
        model_type="LLM",
        model_name="qwen",
        model_engine="transformers",
        model_format="pytorch",
        model_size_in_billions="0_5",
        quantization="none",
        model_family="qwen",
        model_lang=("en",),
        model_ability=("chat",),
        model_description="",
        model_hub="huggingface",
        revision=None,
        context_length=2048,
        replica=1,
    )


@dataclass
class SimulatedWorker:
    """A worker's process: keeps the rules that `worker.py` keeps, with no process behind."""

    node: NodeId
    worker_epoch: WorkerEpoch
    instances: dict[InstanceId, InstanceReport] = field(default_factory=dict)
    forgotten: set[InstanceId] = field(default_factory=set)
    supervisor_epoch: int = 0
    sequence: int = 0

    def report(self) -> WorkerReport:
        return WorkerReport(
            node=self.node,
            worker_epoch=self.worker_epoch,
            sequence=self.sequence,
            resources=resources(),
            instances=tuple(self.instances.values()),
        )

    def beat(self) -> Heartbeat:
        return Heartbeat(
            node=self.node,
            worker_epoch=self.worker_epoch,
            sequence=self.sequence,
            resources=resources(),
        )

    def apply(self, command: Command) -> None:
        if command.worker_epoch != self.worker_epoch:
            return
        if command.supervisor_epoch < self.supervisor_epoch:
            return
        self.supervisor_epoch = command.supervisor_epoch
        self.sequence += 1
        for start in command.start:
            known = start.spec.instance in self.instances or start.spec.instance in self.forgotten
            if not known:
                self.instances[start.spec.instance] = InstanceReport(
                    replica=start.spec.replica,
                    instance=start.spec.instance,
                    launch_id=start.launch_id,
                    state=InstanceState.STARTING,
                )
        for stop in command.stop:
            found = self.instances.get(stop.instance)
            if stop.instance in self.forgotten:
                continue
            if found is None:
                self.instances[stop.instance] = InstanceReport(
                    replica=stop.replica,
                    instance=stop.instance,
                    launch_id=stop.launch_id,
                    state=InstanceState.EXITED,
                )
            elif found.state is not InstanceState.EXITED:
                self.move(stop.instance, InstanceState.STOPPING)
        for instance in command.forget:
            if self.instances.get(instance, None) is not None:
                assert self.instances[instance].state is InstanceState.EXITED
                del self.instances[instance]
                self.forgotten.add(instance)

    def move(self, instance: InstanceId, state: InstanceState, error: str = "") -> None:
        report = self.instances[instance]
        wire = LoadFailed(model=report.replica.model, problem=error).to_wire() if error else None
        address = f"unix:{instance}" if state is InstanceState.READY else report.address
        self.sequence += 1
        self.instances[instance] = replace(report, state=state, error=wire, address=address)

    def living(self) -> list[InstanceReport]:
        return [
            report for report in self.instances.values() if report.state is not InstanceState.EXITED
        ]


class SimulatedCluster:
    """A `ClusterState`, its store and its workers, with messages that arrive when told."""

    def __init__(self, *, restart_limit: int = 5) -> None:
        self.clock = ManualClock()
        self.store: dict[ModelUid, DesiredModel] = {}
        self.workers: dict[NodeId, SimulatedWorker] = {}
        self.epoch = 0
        self.restart_limit = restart_limit
        self._numbers = itertools.count(1)
        self.state = self._new_state()

    def _new_state(self) -> ClusterState:
        self.epoch += 1
        return ClusterState(
            epoch=self.epoch,
            desired=list(self.store.values()),
            now=self.clock(),
            new_instance=lambda: InstanceId(f"instance-{next(self._numbers)}"),
            jitter=lambda: 1.0,
            restart_limit=self.restart_limit,
        )

    def restart_supervisor(self) -> None:
        self.state = self._new_state()

    def add_worker(self, name: str = "127.0.0.1:1") -> SimulatedWorker:
        node = NodeId(name)
        worker = SimulatedWorker(node, WorkerEpoch(f"epoch-{next(self._numbers)}"))
        self.workers[node] = worker
        return worker

    def launch(self, uid: str = "qwen") -> LaunchId:
        spec = LaunchSpec(model_uid=ModelUid(uid), model_name="qwen")
        self.state.check_launch(spec)
        model = desired(uid, f"launch-{next(self._numbers)}")
        self.store[model.model_uid] = model
        self.state.launch(model, now=self.clock())
        self.reconcile()
        return model.launch_id

    def terminate(self, uid: str = "qwen") -> LaunchId:
        self.store.pop(ModelUid(uid), None)
        launch_id = self.state.terminate(ModelUid(uid), now=self.clock())
        self.reconcile()
        return launch_id

    def reconcile(self, deliver: Callable[[Tell], bool] = lambda tell: True) -> list[Effect]:
        effects = self.state.reconcile(now=self.clock())
        for effect in effects:
            match effect:
                case SaveModel(model):
                    self.store[model.model_uid] = model
                case ForgetModel(uid):
                    self.store.pop(uid, None)
                case Tell(node, command):
                    if deliver(effect) and node in self.workers:
                        self.workers[node].apply(command)
        return effects

    def report(self, worker: SimulatedWorker) -> None:
        self.state.node_reported(worker.report(), now=self.clock())

    def settle(self) -> None:
        """Let every message through until nothing more is said."""
        for _ in range(50):
            for worker in self.workers.values():
                self.report(worker)
            if not any(isinstance(effect, Tell) for effect in self.reconcile()):
                for worker in self.workers.values():
                    self.report(worker)
                self.reconcile()
                return
        raise AssertionError("the cluster does not come to rest")

    def finish_work(self) -> None:
        """Let what starts become ready, and what stops be gone."""
        for worker in self.workers.values():
            for report in list(worker.instances.values()):
                if report.state in {InstanceState.STARTING, InstanceState.LOADING}:
                    worker.move(report.instance, InstanceState.READY)
                elif report.state is InstanceState.STOPPING:
                    worker.move(report.instance, InstanceState.EXITED)

    def run_to_rest(self) -> None:
        """Settle, with work finishing and delays passing, until nothing changes."""
        for _ in range(40):
            self.settle()
            self.finish_work()
            self.clock.advance(0.9)
        self.settle()
