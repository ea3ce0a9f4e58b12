# SPDX-License-Identifier: Apache-2.0
"""How busy the cluster was over the last hour, for the charts of the web page.

Each gateway process looks every few seconds and keeps what it saw, no more than an hour of it.
Whoever wants longer has `/metrics` and Prometheus.
"""

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Mapping
from dataclasses import dataclass

from xinference.cluster.interface import Cluster
from xinference.errors import XinferenceError
from xinference.identifiers import ModelUid, ReplicaUid
from xinference.protocol.nodes import ClusterInfo, NodeStatus

INTERVAL_SECONDS = 10.0
MAX_SAMPLES = 360
LOOK_TIMEOUT_SECONDS = 5.0
MAX_MODELS = 200
"""Models of one sample; the page could not show more."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSample:
    """A worker at one moment. Shares are from 0 to 1, of all its GPUs together where it has any."""

    cpu_utilization: float
    memory_share: float
    gpu_utilization: float | None
    gpu_memory_share: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSample:
    """A model at one moment, over all its replicas."""

    num_running: int
    num_waiting: int
    tokens_per_second: float
    """Since the sample before."""
    kv_share: float
    """Of the KV cache's blocks, those in use; from 0 to 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """The cluster at one moment."""

    time: float
    """In seconds since 1970."""
    workers: Mapping[str, WorkerSample]
    models: Mapping[str, ModelSample]


class History:
    """The last hour, as one gateway process saw it."""

    def __init__(self) -> None:
        self._samples: deque[Sample] = deque(maxlen=MAX_SAMPLES)
        self._counted: dict[ModelUid, float] = {}
        self._counted_at = 0.0

    async def run(self, cluster: Cluster) -> None:
        """Look at a cluster until cancelled."""
        while True:
            try:
                async with asyncio.timeout(LOOK_TIMEOUT_SECONDS):
                    info, stats = await cluster.info(), await cluster.engine_stats()
                now = time.monotonic()
                self.take(info, by_model(stats), unix=time.time(), monotonic=now)
            except (XinferenceError, TimeoutError):
                logger.debug("a sample is missing: the supervisor did not answer")
            await asyncio.sleep(INTERVAL_SECONDS)

    def take(
        self,
        info: ClusterInfo,
        stats: Mapping[ModelUid, Mapping[str, float]],
        *,
        unix: float,
        monotonic: float,
    ) -> None:
        """Add a sample.

        Args:
            stats: of engines, by model, summed over its replicas.
            monotonic: seconds on the clock that rates are counted by.
        """
        passed = monotonic - self._counted_at
        models = {}
        for uid, of_model in sorted(stats.items())[:MAX_MODELS]:
            made = of_model.get("num_generated_tokens", 0.0) - self._counted.get(uid, float("inf"))
            blocks = of_model.get("num_blocks", 0.0)
            models[str(uid)] = ModelSample(
                num_running=int(of_model.get("num_running", 0)),
                num_waiting=int(of_model.get("num_waiting", 0)),
                # Below 0: it is new here, or a replica of it began to count again.
                tokens_per_second=max(0.0, made / passed) if passed > 0 else 0.0,
                kv_share=of_model.get("num_blocks_used", 0.0) / blocks if blocks else 0.0,
            )
        self._counted = {uid: one.get("num_generated_tokens", 0.0) for uid, one in stats.items()}
        self._counted_at = monotonic
        workers = {str(worker.node): _worker_sample(worker) for worker in info.workers}
        self._samples.append(Sample(time=unix, workers=workers, models=models))

    def as_item(self, *, since: float) -> dict[str, object]:
        """Return the samples that are later than a time, for the encoder of JSON."""
        data = [sample for sample in self._samples if sample.time > since]
        return {"interval_seconds": INTERVAL_SECONDS, "data": data}


def by_model(stats: Mapping[ReplicaUid, Mapping[str, float]]) -> dict[ModelUid, Counter[str]]:
    """Return the counters of each model, summed over its replicas."""
    summed: dict[ModelUid, Counter[str]] = {}
    for replica, counters in stats.items():
        summed.setdefault(replica.model, Counter()).update(counters)
    return summed


def _worker_sample(worker: NodeStatus) -> WorkerSample:
    resources = worker.resources
    gpus = resources.devices
    total = sum(gpu.total_bytes for gpu in gpus)
    return WorkerSample(
        cpu_utilization=resources.cpu_utilization,
        memory_share=resources.memory_used_bytes / max(1, resources.memory_total_bytes),
        gpu_utilization=sum(gpu.utilization for gpu in gpus) / len(gpus) if gpus else None,
        gpu_memory_share=sum(gpu.used_bytes for gpu in gpus) / total if total else None,
    )
