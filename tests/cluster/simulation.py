# SPDX-License-Identifier: Apache-2.0
"""A cluster without processes: workers that obey commands, a clock that is turned by hand."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from xinference.cluster.messages import (
    Command,
    DesiredModel,
    DesiredReplica,
    Heartbeat,
    InstanceLoad,
    InstanceReport,
    InstanceState,
    LaunchId,
    LaunchTicket,
    WorkerEpoch,
    WorkerReport,
)
from xinference.cluster.state.cluster_state import ClusterState
from xinference.cluster.state.records import Effect, ForgetModel, Moment, SaveModel, Tell
from xinference.errors import LoadFailed
from xinference.identifiers import InstanceId, ModelUid, NodeId
from xinference.protocol.deployment import (
    LaunchSpec,
    ModelDescription,
    ModelSource,
    ReplicaPlacement,
)
from xinference.protocol.nodes import Device, NodeResources

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


def gpu(index: int, used_gib: int = 0, total_gib: int = 80) -> Device:
    return Device(
        index=index,
        name="simulated",
        total_bytes=total_gib * GIB,
        used_bytes=used_gib * GIB,
        utilization=0.0,
    )


def resources(available_bytes: int = 8 * GIB, devices: tuple[Device, ...] = ()) -> NodeResources:
    return NodeResources(
        cpu_count=2,
        cpu_utilization=0.1,
        memory_total_bytes=16 * GIB,
        memory_used_bytes=16 * GIB - available_bytes,
        memory_available_bytes=available_bytes,
        devices=devices,
    )


def desired(uid: str = "qwen", launch: str = "launch-1", **changes: Any) -> DesiredModel:
    given = {"replicas": (DesiredReplica(index=0),)} | changes
    return DesiredModel(
        model_uid=ModelUid(uid),
        launch_id=LaunchId(launch),
        spec=LaunchSpec(model_uid=ModelUid(uid), model_name="qwen"),
        description=description(uid),
        source=ModelSource(path="package:guide"),
        abilities=("chat",),
        created_ts=1_700_000_000,
        **given,
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


BRINGING_UP = {InstanceState.STARTING, InstanceState.DOWNLOADING, InstanceState.LOADING}


@dataclass
class SimulatedWorker:
    """A worker's process: keeps the rules that `worker.py` keeps, with no process behind."""

    node: NodeId
    worker_epoch: WorkerEpoch
    instances: dict[InstanceId, InstanceReport] = field(default_factory=dict)
    forgotten: set[InstanceId] = field(default_factory=set)
    supervisor_epoch: int = 0
    sequence: int = 0
    devices: tuple[Device, ...] = ()
    is_leaving: bool = False
    loads: dict[InstanceId, InstanceLoad] = field(default_factory=dict)
    instance_bytes: int = 0
    """What each that has been ready takes of the host's memory."""

    def resources(self) -> NodeResources:
        num_loaded = sum(
            one.state in {InstanceState.READY, InstanceState.STOPPING} for one in self.living()
        )
        return resources(8 * GIB - num_loaded * self.instance_bytes, self.devices)

    def report(self) -> WorkerReport:
        return WorkerReport(
            node=self.node,
            worker_epoch=self.worker_epoch,
            sequence=self.sequence,
            resources=self.resources(),
            instances=tuple(self.instances.values()),
            is_leaving=self.is_leaving,
        )

    def beat(self) -> Heartbeat:
        return Heartbeat(
            node=self.node,
            worker_epoch=self.worker_epoch,
            sequence=self.sequence,
            resources=self.resources(),
            loads=self.loads,
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
            if not known and not self.is_leaving:
                self.instances[start.spec.instance] = InstanceReport(
                    replica=start.spec.replica,
                    instance=start.spec.instance,
                    launch_id=start.launch_id,
                    state=InstanceState.STARTING,
                    gpu_idx=start.spec.gpu_idx,
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
            found = self.instances.get(instance)
            # One that was started again meanwhile lives.
            if found is not None and found.state is InstanceState.EXITED:
                del self.instances[instance]
                self.forgotten.add(instance)

    def move(self, instance: InstanceId, state: InstanceState, error: str = "") -> None:
        report = self.instances[instance]
        wire = LoadFailed(model=report.replica.model, problem=error).to_wire() if error else None
        address = f"unix:{instance}" if state is InstanceState.READY else report.address
        self.sequence += 1
        self.instances[instance] = replace(report, state=state, error=wire, address=address)

    def restart_alone(self) -> None:
        """Start again what served here and broke, as a worker does that has no supervisor."""
        for report in list(self.instances.values()):
            living = {one.replica for one in self.living()}
            has_served = report.address is not None
            if report.error is not None and has_served and report.replica not in living:
                self.sequence += 1
                self.instances[report.instance] = replace(
                    report, state=InstanceState.STARTING, error=None, address=None
                )

    def living(self) -> list[InstanceReport]:
        return [
            report for report in self.instances.values() if report.state is not InstanceState.EXITED
        ]


class SimulatedCluster:
    """A `ClusterState`, its store and its workers, with messages that arrive when told."""

    def __init__(self, *, restart_limit: int = 5, shares_gpus: bool = True) -> None:
        self.clock = ManualClock()
        self.store: dict[ModelUid, DesiredModel] = {}
        self.workers: dict[NodeId, SimulatedWorker] = {}
        self.epoch = 0
        self.restart_limit = restart_limit
        self.shares_gpus = shares_gpus
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
            shares_gpus=self.shares_gpus,
        )

    def restart_supervisor(self) -> None:
        self.state = self._new_state()

    def add_worker(
        self, name: str = "127.0.0.1:1", devices: tuple[Device, ...] = ()
    ) -> SimulatedWorker:
        node = NodeId(name)
        epoch = WorkerEpoch(f"epoch-{next(self._numbers)}")
        worker = SimulatedWorker(node, epoch, devices=devices)
        self.workers[node] = worker
        return worker

    def launch(self, uid: str = "qwen", **options: Any) -> LaunchId:
        spec = LaunchSpec(model_uid=ModelUid(uid), model_name="qwen", **options)
        admitted = self.state.check_launch(spec, description(uid), now=self.clock())
        for other in admitted.to_sleep:
            self.change(other)
        model = replace(
            desired(uid, f"launch-{next(self._numbers)}"), spec=spec, replicas=admitted.replicas
        )
        self.store[model.model_uid] = model
        self.state.launch(model, now=self.clock())
        self.reconcile()
        return model.launch_id

    def add_replicas(self, uid: str = "qwen", count: int = 1) -> LaunchTicket:
        """Scale up; return what a caller would wait with."""
        wishes = [ReplicaPlacement()] * count
        more = self.state.with_more_replicas(ModelUid(uid), wishes)
        before = {one.index for one in self.store[ModelUid(uid)].replicas}
        return self._change(more, before)

    def remove_replica(self, index: int, uid: str = "qwen") -> LaunchTicket:
        """Scale down."""
        kept = self.state.without_replica(ModelUid(uid), index)
        return self._change(kept, {index}, (index,))

    def _change(
        self, model: DesiredModel, before: set[int], asked: tuple[int, ...] = ()
    ) -> LaunchTicket:
        self.change(model)
        added = tuple(one.index for one in model.replicas if one.index not in before)
        return LaunchTicket(
            model_uid=model.model_uid, launch_id=model.launch_id, replicas=asked or added
        )

    def adapt(self) -> None:
        """Let time and load have their way, as each tick of the supervisor does."""
        for worker in self.workers.values():
            self.state.node_beat(worker.beat(), now=self.clock())
        for model in self.state.adapted(now=self.clock()):
            self.change(model)

    def wake(self, uid: str = "qwen") -> None:
        for model in self.state.awake(ModelUid(uid), now=self.clock()):
            self.change(model)

    def change(self, model: DesiredModel) -> None:
        self.store[model.model_uid] = model
        self.state.change(model, now=self.clock())
        self.reconcile()

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
                if report.state in BRINGING_UP:
                    worker.move(report.instance, InstanceState.READY)
                elif report.state is InstanceState.STOPPING:
                    worker.move(report.instance, InstanceState.EXITED)

    def run_to_rest(self) -> None:
        """Settle, with work finishing and delays passing, until nothing changes."""
        for _ in range(40):
            self.settle()
            if self.is_at_rest:
                return
            self.finish_work()
            self.clock.advance(0.9)
        self.settle()

    @property
    def is_at_rest(self) -> bool:
        """Whether nothing is under way or due: neither work nor time alone changes anything."""
        nodes = {status.node for status in self.state.nodes(now=self.clock())}
        moving = {InstanceState.STOPPING, *BRINGING_UP}
        return (
            self.state.next_due() is None
            and nodes <= self.workers.keys()
            and not any(
                one.state in moving for each in self.workers.values() for one in each.living()
            )
        )
