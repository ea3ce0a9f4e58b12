# SPDX-License-Identifier: Apache-2.0
"""What this machine has and how busy it is: processors, memory, accelerators.

A reading takes about a millisecond, more with many GPUs, and is taken on the caller's thread.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import psutil

from xinference.models.servers.availability import engines_here
from xinference.protocol.nodes import Device, NodeResources

from .device_ledger import DeviceUse


class DeviceReader:
    """Reads this machine; keeps the driver's library open."""

    def __init__(self) -> None:
        # Why: the first reading of psutil is always 0 and starts its measurement.
        psutil.cpu_percent(interval=None)
        self._nvml = _open_nvml()

    def read(self) -> NodeResources:
        """Return a reading. Utilization is since the last one."""
        memory = psutil.virtual_memory()
        return NodeResources(
            cpu_count=psutil.cpu_count() or 1,
            cpu_utilization=psutil.cpu_percent(interval=None) / 100.0,
            memory_total_bytes=memory.total,
            memory_used_bytes=memory.used,
            memory_available_bytes=memory.available,
            devices=tuple(self._devices()),
            engines=engines_here(),
        )

    def uses(self) -> tuple[DeviceUse, ...]:
        """Return what is in use of each accelerator's memory, and by which processes."""
        return tuple(self._uses())

    def _uses(self) -> Iterator[DeviceUse]:
        nvml = self._nvml
        if nvml is None:
            return
        with contextlib.suppress(nvml.NVMLError):
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                processes = nvml.nvmlDeviceGetComputeRunningProcesses(handle)
                yield DeviceUse(
                    index=index,
                    used_bytes=int(nvml.nvmlDeviceGetMemoryInfo(handle).used),
                    pids=frozenset(int(process.pid) for process in processes),
                )

    def _devices(self) -> Iterator[Device]:
        nvml = self._nvml
        if nvml is None:
            return
        # A driver that fails mid-way shows fewer devices; the next reading tries again.
        with contextlib.suppress(nvml.NVMLError):
            for index in range(nvml.nvmlDeviceGetCount()):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                memory = nvml.nvmlDeviceGetMemoryInfo(handle)
                yield Device(
                    index=index,
                    name=str(nvml.nvmlDeviceGetName(handle)),
                    total_bytes=int(memory.total),
                    used_bytes=int(memory.used),
                    utilization=nvml.nvmlDeviceGetUtilizationRates(handle).gpu / 100.0,
                )


def _open_nvml() -> Any:
    """Return the driver's library, or None where there is no driver."""
    try:
        # Why here: it is only worth its memory where there is a driver.
        import pynvml

        pynvml.nvmlInit()
    except (ImportError, OSError):
        return None
    except pynvml.NVMLError:
        return None
    return pynvml
