# SPDX-License-Identifier: Apache-2.0
"""`DeviceLedger`: which of a host's GPUs ended replicas still hold, and must not be used again.

In: readings of the driver, the starts and the ends of instances. Out: what an ended instance
holds, and which devices are quarantined. A process that was killed may leave its memory in the
driver for a while, or for good; what is started there then runs out of memory while it loads.

An instance holds a device for as long as the driver lists a process of it. In a container the
driver lists none that can be recognised; then the memory tells, of a device where no other
replica of ours is: it has to go down to what it was before the first one.

It waits for nothing, kills nothing, and knows no actors.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from xinference.identifiers import InstanceId
from xinference.protocol.nodes import NodeResources

logger = logging.getLogger(__name__)

SLACK_BYTES = 256 * 2**20
"""What a device may have in use more than before without being held: a context, other programs."""
GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceUse:
    """A reading of one device's memory, and of who is there."""

    index: int
    used_bytes: int
    pids: frozenset[int] = frozenset()
    """Processes that the driver lists, as far as they can be told from here."""


@dataclass(slots=True, kw_only=True)
class _Stay:
    """One instance on its devices, until they are free of it."""

    gpu_idx: tuple[int, ...]
    used_before: dict[int, int]
    """By device: what was in use when no replica of ours was there. Devices that nothing is known
    of have none."""
    pids: set[int] = field(default_factory=set)
    """Its processes that the driver has listed."""
    has_ended: bool = False


class DeviceLedger:
    """The devices of one host. Belongs to one event loop; a reading takes milliseconds."""

    def __init__(self, read: Callable[[], Sequence[DeviceUse]]) -> None:
        """Know of no instance.

        Args:
            read: returns a reading of each device.
        """
        self._read = read
        self._stays: dict[InstanceId, _Stay] = {}
        self._quarantined: dict[int, str] = {}

    def started(
        self,
        instance: InstanceId,
        gpu_idx: tuple[int, ...] | None,
        *,
        used_before: Mapping[int, int] | None = None,
    ) -> dict[int, int]:
        """Note an instance that is about to use devices; return what was in use there before.

        Args:
            gpu_idx: as its `ReplicaSpec` says.
            used_before: of one that runs already: what this returned when it was started.
        """
        if not gpu_idx:
            return {}
        known = dict(used_before or {})
        if used_before is None:
            uses = self._by_index()
            for index in set(gpu_idx) & uses.keys():
                others = [stay for stay in self._stays.values() if index in stay.gpu_idx]
                earlier = [stay.used_before[index] for stay in others if index in stay.used_before]
                if earlier or not others:
                    known[index] = min(earlier, default=uses[index].used_bytes)
        self._stays[instance] = _Stay(gpu_idx=tuple(gpu_idx), used_before=known)
        return known

    def saw(self, instance: InstanceId, pids: Sequence[int]) -> None:
        """Note which processes of a living instance the driver lists."""
        stay = self._stays.get(instance)
        if stay is not None:
            uses = self._by_index()
            listed = [uses[index].pids for index in stay.gpu_idx if index in uses]
            stay.pids.update(*(one.intersection(pids) for one in listed))

    def is_free_of(self, instance: InstanceId) -> bool:
        """Return whether no device is held by an instance whose processes are gone.

        Then nothing is known of it any more.
        """
        stay = self._stays.get(instance)
        if stay is None:
            return True
        stay.has_ended = True
        if any(self._holds(stay, use) for use in self._read()):
            return False
        del self._stays[instance]
        return True

    def quarantine(self, instance: InstanceId) -> str:
        """Let nothing be placed on the devices that an ended instance holds; say which they are.

        Returns an empty text if it holds none.
        """
        stay = self._stays.get(instance)
        if stay is None:
            return ""
        told = []
        for use in self._read():
            if self._holds(stay, use):
                told.append(_problem(stay, use))
                self._quarantined[use.index] = told[-1]
        if not told:
            del self._stays[instance]
            return ""
        problem = "; ".join(told)
        logger.error("%s: %s. Nothing is placed there until it is free", instance, problem)
        return problem

    def sweep(self) -> None:
        """Free the devices that are held no longer."""
        if not self._quarantined:
            return
        uses = self._by_index()
        ended = {name: stay for name, stay in self._stays.items() if stay.has_ended}
        held: dict[int, str] = {}
        for name, stay in ended.items():
            holding = [uses[i] for i in stay.gpu_idx if i in uses and self._holds(stay, uses[i])]
            held |= {use.index: _problem(stay, use) for use in holding}
            # Why only the quarantined: of the others somebody still waits for `is_free_of`.
            if not holding and self._quarantined.keys() & stay.gpu_idx:
                del self._stays[name]
        for index in self._quarantined.keys() - held.keys():
            logger.warning("GPU %d is free again", index)
        self._quarantined = {i: held[i] for i in self._quarantined if i in held}

    def marked(self, resources: NodeResources) -> NodeResources:
        """Return a reading of the host in which the quarantined devices say so."""
        if not self._quarantined:
            return resources
        devices = tuple(
            replace(device, quarantine=self._quarantined.get(device.index, ""))
            for device in resources.devices
        )
        return replace(resources, devices=devices)

    def _holds(self, stay: _Stay, use: DeviceUse) -> bool:
        if use.index not in stay.gpu_idx:
            return False
        if stay.pids:
            return bool(stay.pids & use.pids)
        is_alone = not any(
            use.index in other.gpu_idx and not other.has_ended for other in self._stays.values()
        )
        before = stay.used_before.get(use.index)
        return is_alone and before is not None and use.used_bytes > before + SLACK_BYTES

    def _by_index(self) -> dict[int, DeviceUse]:
        return {use.index: use for use in self._read()}


def _problem(stay: _Stay, use: DeviceUse) -> str:
    listed = sorted(stay.pids & use.pids)
    if listed:
        return (
            f"GPU {use.index} is still held by process {', '.join(map(str, listed))}, which ended"
        )
    more = (use.used_bytes - stay.used_before[use.index]) / GIB
    return (
        f"GPU {use.index} has {more:.1f} GiB more in use than before the replica that ended there"
    )
