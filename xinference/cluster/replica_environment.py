# SPDX-License-Identifier: Apache-2.0
"""The environment of a replica's process: what must be set before torch is loaded. Pure stdlib.

Precedence, last wins: defaults, the worker's own environment, the launch's `num_threads` and the
GPUs that the replica was given, the launch's `envs`. Secrets of the cluster are left out: a
model's process is given the key of its own instance, on stdin, and no other.
"""

import os
from collections.abc import Mapping
from pathlib import Path

from xinference.protocol.deployment import ReplicaSpec

SECRETS = frozenset({"XINFERENCE_CLUSTER_KEY", "XINFERENCE_API_KEY", "XOSCAR_AUTH_KEY"})

DEFAULTS: Mapping[str, str] = {
    # Why: a step has hundreds of barriers. A team that sleeps at each is half as fast as one that
    # spins; one that spins long, while a thread of it waits for a core that the gateway holds,
    # turned a step of 6 ms into 390. This is some 50 us, then it sleeps (libgomp; Intel's: in ms).
    "GOMP_SPINCOUNT": "20000",
    "KMP_BLOCKTIME": "0",
    # Why: with huge pages, where the kernel gives them to those that ask, products of few rows take
    # 0.85 of the time: they read every weight once, and pages of 4 KiB cost a walk each.
    "THP_MEM_ALLOC_ENABLE": "1",
    # Why: what a batch took is free when it ends, and by itself the C library gives that back to
    # the system: the pages that came anew with each batch of sentences took a fifth of its time.
    # The models give it back when they have grown, or have nothing to do.
    "MALLOC_TRIM_THRESHOLD_": str(256 * 2**20),
    "MALLOC_MMAP_THRESHOLD_": str(32 * 2**20),
    # Why: oneDNN keeps what it has made for each number of rows, 0.8 MB for each layer's shape, and
    # by itself a thousand of them (the first is PyTorch's list, the second its own). A step uses a
    # few, and making one again takes less than a millisecond.
    "LRU_CACHE_CAPACITY": "64",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64",
    # Why: the tokenizer's own thread pool would compete with that team. One thread tokenizes.
    "TOKENIZERS_PARALLELISM": "false",
    # Why: GPUs are counted as the driver does that reports them, not by speed.
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",
    # Why: files are on the node before a replica starts. Asking a hub would only take time.
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
    "PYTHONUNBUFFERED": "1",
}


def replica_environment(spec: ReplicaSpec, base: Mapping[str, str]) -> dict[str, str]:
    """Return the whole environment for the process of a replica.

    Args:
        spec: what the process is to become.
        base: the environment of whoever starts it.
    """
    inherited = without_secrets(base)
    environment = {**DEFAULTS, "OMP_NUM_THREADS": str(num_usable_cores()), **inherited}
    if spec.engine_options.num_threads is not None:
        environment["OMP_NUM_THREADS"] = str(spec.engine_options.num_threads)
    if spec.gpu_idx is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, spec.gpu_idx)) or "-1"
    return environment | spec.envs


def without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return an environment for a process that runs code of others."""
    return {name: value for name, value in environment.items() if name not in SECRETS}


def num_usable_cores() -> int:
    """Return the physical cores that this process may keep busy, at least 1.

    Two hardware threads of a core count once: a matrix product fills the core alone.
    """
    allowed = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if allowed is None:
        return os.cpu_count() or 1
    cores = {_siblings(cpu) for cpu in allowed}
    quota = _cgroup_quota()
    return max(1, len(cores) if quota is None else min(len(cores), round(quota)))


def _siblings(cpu: int) -> str:
    """Return a name of the core that a hardware thread is on."""
    path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
    try:
        return path.read_text().strip()
    except OSError:
        return str(cpu)


def _cgroup_quota() -> float | None:
    """Return how many cores' time the container may use; None: no limit is known."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if quota == "max" else int(quota) / int(period)
    except (OSError, ValueError):
        return None
