# SPDX-License-Identifier: Apache-2.0
"""A driver whose GPUs are a file that a test writes: what is in use of each, by its index."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from xinference.cluster.device_ledger import DeviceUse
from xinference.cluster.devices import DeviceReader
from xinference.cluster.processes import HostReader
from xinference.protocol.nodes import Device, NodeResources

FILE = "devices.json"
TOTAL_BYTES = 80 * 2**30


def write_devices(home: Path, used_bytes: Mapping[int, int]) -> None:
    """Let the driver of a home say so from now on."""
    draft = home / f"{FILE}.new"
    draft.write_text(json.dumps(used_bytes))
    draft.replace(home / FILE)


def reader_of(home: Path) -> HostReader:
    """Return what reads this machine, with the GPUs of the file if there is one."""
    return _FileDevices(home) if (home / FILE).exists() else DeviceReader()


class _FileDevices:
    """A `HostReader`."""

    def __init__(self, home: Path) -> None:
        self._path = home / FILE
        self._host = DeviceReader()

    def read(self) -> NodeResources:
        devices = tuple(
            Device(
                index=use.index,
                name="simulated",
                total_bytes=TOTAL_BYTES,
                used_bytes=use.used_bytes,
                utilization=0.0,
            )
            for use in self.uses()
        )
        return replace(self._host.read(), devices=devices)

    def uses(self) -> tuple[DeviceUse, ...]:
        used = json.loads(self._path.read_text())
        return tuple(DeviceUse(index=int(i), used_bytes=used[i]) for i in sorted(used))
