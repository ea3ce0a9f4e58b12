# SPDX-License-Identifier: Apache-2.0
"""Which GPUs ended replicas still hold, as far as a driver's readings tell."""

from tests.cluster.simulation import GIB, gpu, resources
from xinference.cluster.device_ledger import SLACK_BYTES, DeviceLedger, DeviceUse
from xinference.identifiers import InstanceId

ONE, TWO = InstanceId("one"), InstanceId("two")


class Driver:
    """Two GPUs; a test says what is on them."""

    def __init__(self) -> None:
        self.used = {0: 1 * GIB, 1: 1 * GIB}
        self.pids: dict[int, set[int]] = {0: set(), 1: set()}

    def read(self) -> list[DeviceUse]:
        return [
            DeviceUse(index=index, used_bytes=used, pids=frozenset(self.pids[index]))
            for index, used in self.used.items()
        ]


def quarantined(ledger: DeviceLedger) -> list[int]:
    marked = ledger.marked(resources(devices=(gpu(0), gpu(1))))
    return [device.index for device in marked.devices if device.quarantine]


def test_a_device_is_free_when_its_memory_is_back_to_what_it_was() -> None:
    driver = Driver()
    ledger = DeviceLedger(driver.read)
    ledger.started(ONE, (0,))
    driver.used[0] = 40 * GIB

    assert not ledger.is_free_of(ONE)

    driver.used[0] = 1 * GIB + SLACK_BYTES
    assert ledger.is_free_of(ONE)
    assert ledger.quarantine(ONE) == ""
    assert quarantined(ledger) == []


def test_a_device_that_stays_held_is_quarantined_until_it_is_free() -> None:
    driver = Driver()
    ledger = DeviceLedger(driver.read)
    ledger.started(ONE, (0,))
    driver.used[0] = 40 * GIB
    assert not ledger.is_free_of(ONE)

    assert ledger.quarantine(ONE) == (
        "GPU 0 has 39.0 GiB more in use than before the replica that ended there"
    )
    ledger.sweep()
    assert quarantined(ledger) == [0]

    driver.used[0] = 1 * GIB
    ledger.sweep()
    assert quarantined(ledger) == []
    assert ledger.is_free_of(ONE)


def test_where_the_driver_lists_our_processes_they_alone_tell() -> None:
    driver = Driver()
    ledger = DeviceLedger(driver.read)
    ledger.started(ONE, (1,))
    driver.pids[1] = {41, 42, 77}
    ledger.saw(ONE, [41, 42, 43])
    driver.used[1] = 60 * GIB  # another program's

    driver.pids[1] = {42, 77}
    assert not ledger.is_free_of(ONE)
    assert "process 42" in ledger.quarantine(ONE)
    assert quarantined(ledger) == [1]

    driver.pids[1] = {77}
    ledger.sweep()
    assert quarantined(ledger) == []


def test_memory_tells_nothing_while_another_replica_lives_there() -> None:
    driver = Driver()
    ledger = DeviceLedger(driver.read)
    ledger.started(ONE, (0,))
    driver.used[0] = 20 * GIB
    assert ledger.started(TWO, (0,)) == {0: 1 * GIB}  # before the first of ours
    driver.used[0] = 40 * GIB

    assert ledger.is_free_of(ONE)

    assert not ledger.is_free_of(TWO)  # and now nobody else explains it
    driver.used[0] = 1 * GIB
    assert ledger.is_free_of(TWO)


def test_an_adopted_replica_brings_what_was_known_when_it_was_started() -> None:
    driver = Driver()
    earlier = DeviceLedger(driver.read)
    before = earlier.started(ONE, (0,))
    driver.used[0] = 40 * GIB
    ledger = DeviceLedger(driver.read)

    ledger.started(ONE, (0,), used_before=before)

    assert not ledger.is_free_of(ONE)


def test_a_replica_without_a_gpu_holds_none() -> None:
    driver = Driver()
    ledger = DeviceLedger(driver.read)
    for gpu_idx in ((), None):
        assert ledger.started(ONE, gpu_idx) == {}
        driver.used[0] += 10 * GIB
        assert ledger.is_free_of(ONE)
