# SPDX-License-Identifier: Apache-2.0
"""The logs of a cluster: real actors on the in-process bus, files on two workers."""

import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.local_cluster import SUPERVISOR_ADDRESS, LocalCluster, ScriptedReplica
from xinference.cluster import logs
from xinference.cluster.control_bus import Endpoint
from xinference.cluster.local_bus import LocalBus
from xinference.cluster.worker import LOGS
from xinference.errors import InvalidRequest, ModelNotFound
from xinference.identifiers import ModelUid, NodeId
from xinference.protocol.logs import SUPERVISOR_NODE, LogBatch, LogQuery

ONE, OTHER = NodeId("127.0.0.1:2000"), NodeId("127.0.0.2:2000")
QWEN = LogQuery(model=ModelUid("qwen"))

Ask = Callable[[LogQuery], Awaitable[LogBatch]]


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    local = LocalCluster(tmp_path, new_replica=ScriptedReplica)
    await local.start_supervisor()
    for address in (ONE, OTHER):
        await (await local.start_worker(address)).joined.wait()
    yield local
    await local.close()


@pytest.fixture
def ask(local: LocalCluster) -> Ask:
    bus = LocalBus(local.network, None)

    async def read(query: LogQuery) -> LogBatch:
        batch: LogBatch = await bus.call(
            Endpoint(SUPERVISOR_ADDRESS, LOGS), "read", query, returns=LogBatch, timeout_seconds=10
        )
        return batch

    return read


def log(tmp_path: Path, node: str, name: str, *numbers: int) -> None:
    """Write lines to a log of a host."""
    path = tmp_path / node / "logs" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        for number in numbers:
            file.write(f"2026-11-21 10:00:{number:02},000 INFO a.b: {number}\n")


def messages(batch: LogBatch) -> list[str]:
    return [line.message for line in batch.lines]


async def test_the_lines_of_all_workers_are_merged_and_followed(tmp_path: Path, ask: Ask) -> None:
    log(tmp_path, ONE, "qwen-rep0.log", 1, 3)
    log(tmp_path, OTHER, "qwen-rep1.log", 2, 4)

    first = await ask(replace(QWEN, num_lines=3))
    log(tmp_path, OTHER, "qwen-rep1.log", 6)
    log(tmp_path, ONE, "qwen-rep0.log", 5)
    second = await ask(replace(QWEN, positions=first.positions))
    third = await ask(replace(QWEN, positions=second.positions))

    assert [(line.message, line.node, line.replica) for line in first.lines] == [
        ("2", OTHER, "qwen-rep1"),
        ("3", ONE, "qwen-rep0"),
        ("4", OTHER, "qwen-rep1"),
    ]
    assert messages(second) == ["5", "6"]
    assert messages(third) == []
    assert not first.silent


async def test_a_worker_that_does_not_answer_is_named_and_the_others_lines_come(
    tmp_path: Path, ask: Ask, local: LocalCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "CALL_TIMEOUT_SECONDS", 2.0)
    log(tmp_path, ONE, "qwen-rep0.log", 1)
    log(tmp_path, OTHER, "qwen-rep1.log", 2)
    before = await ask(QWEN)
    local.network.hang(OTHER)
    log(tmp_path, ONE, "qwen-rep0.log", 3)

    since = time.monotonic()
    found = await ask(replace(QWEN, positions=before.positions))

    assert messages(found) == ["3"]
    assert set(found.silent) == {OTHER}
    assert time.monotonic() - since < 8
    local.network.resume(OTHER)
    log(tmp_path, OTHER, "qwen-rep1.log", 4)
    back = await ask(replace(QWEN, positions=found.positions))
    assert (messages(back), dict(back.silent)) == (["4"], {})


async def test_a_log_outlives_its_model_and_without_one_there_is_none(
    tmp_path: Path, ask: Ask
) -> None:
    log(tmp_path, ONE, "gone-rep0.log", 1)

    assert messages(await ask(LogQuery(model=ModelUid("gone")))) == ["1"]
    with pytest.raises(ModelNotFound):
        await ask(LogQuery(model=ModelUid("never")))


async def test_a_hosts_own_log_is_read_there(tmp_path: Path, ask: Ask) -> None:
    log(tmp_path, "", "xinference.log", 1)
    log(tmp_path, OTHER, "xinference.log", 2)

    assert messages(await ask(LogQuery(node=SUPERVISOR_NODE))) == ["1"]
    assert messages(await ask(LogQuery(node=NodeId("127.0.0.2")))) == ["2"]
    with pytest.raises(InvalidRequest, match=r"no worker is at 10\.0\.0\.9"):
        await ask(LogQuery(node=NodeId("10.0.0.9")))
