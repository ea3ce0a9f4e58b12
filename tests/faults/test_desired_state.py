# SPDX-License-Identifier: Apache-2.0
"""What becomes of a cluster whose desired state cannot be written, or has been damaged."""

import asyncio
import signal
import sqlite3
import sys
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.cluster.guarded_cluster import (
    MODEL,
    GuardedCluster,
    guarded,
    spec,
    until,
    until_answered,
)
from tests.cluster.local_cluster import LocalCluster, ScriptedReplica
from tests.faults.load import Load
from xinference.cluster.messages import InstanceState
from xinference.errors import StateUnwritable
from xinference.identifiers import ModelUid

__all__ = ["guarded"]

OTHER = replace(spec(), model_uid=ModelUid("other"))
LOCKED_SECONDS = 1.5

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")


@on_linux
async def test_f37_while_the_file_is_locked_what_runs_is_served(guarded: GuardedCluster) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    load = Load(cluster, MODEL)
    load.start()
    await load.wait_good(10)

    other_program = sqlite3.connect(guarded.home / "cluster.sqlite3", isolation_level=None)
    other_program.execute("BEGIN IMMEDIATE")
    with pytest.raises(StateUnwritable, match="locked"):
        await cluster.launch(OTHER, wait_ready=True)
    await asyncio.sleep(LOCKED_SECONDS)  # the fault
    other_program.execute("COMMIT")
    other_program.close()

    await cluster.launch(OTHER, wait_ready=True)
    await load.stop()
    assert load.failures() == {}
    assert load.count("hung", "wrong") == 0
    assert load.count("good") == len(load.sent)
    assert (await cluster.model(MODEL)).replicas[0].num_restarts == 0


@on_linux
async def test_f37_damaged_it_comes_back_from_its_copy(
    guarded: GuardedCluster, long_only: None
) -> None:
    cluster = await guarded.start()
    await cluster.launch(spec(), wait_ready=True)
    await guarded.stop()
    cluster = await guarded.start()  # each start makes a copy
    await until_answered(cluster)

    await guarded.stop(signal.SIGKILL)
    for name in ("cluster.sqlite3", "cluster.sqlite3-wal"):
        if (path := guarded.home / name).exists():
            path.write_bytes(b"\xa5" * 8192)
    cluster = await guarded.start()

    await until_answered(cluster)
    assert "Its last copy takes its place" in (guarded.home / "guardian.log").read_text()


@pytest.fixture
async def local(tmp_path: Path) -> AsyncIterator[LocalCluster]:
    local = LocalCluster(tmp_path, new_replica=ScriptedReplica)
    await local.start_supervisor()
    await local.start_worker()
    yield local
    for replica in local.replicas:
        if not replica.ended.is_set():
            replica.move(InstanceState.EXITED)
    await local.close()


async def test_f37_on_a_full_disk_nothing_begins_and_nothing_is_forgotten(
    local: LocalCluster,
) -> None:
    supervisor, store = local.supervisor, local._stores[-1]
    assert supervisor is not None
    connection = store._connection
    await until(lambda: supervisor._state.nodes(now=supervisor._clock()), "the worker joined")
    await supervisor.launch(spec())
    await until(lambda: local.replicas, "its replica is there")

    connection.execute("PRAGMA query_only = 1")  # as a disk that has become read-only
    local.replicas[0].move(InstanceState.READY)
    await until(lambda: supervisor._unwritten, "that it is ready cannot be written")
    assert supervisor._state.routes.models[MODEL].routes
    connection.execute("PRAGMA query_only = 0")
    await until(lambda: not supervisor._unwritten, "it is written now")
    (kept,) = store.models()
    assert kept.has_been_ready

    fill_disk(connection)
    with pytest.raises(StateUnwritable, match="full"):
        await supervisor.launch(replace(OTHER, envs={"FILLER": "x" * 100_000}))
    assert len(local.replicas) == 1
    assert len(store.models()) == 1
    connection.execute("PRAGMA max_page_count = 1000000")
    await supervisor.launch(OTHER)
    await until(lambda: len(local.replicas) == 2, "the other one is started")


def fill_disk(connection: sqlite3.Connection) -> None:
    """Leave no page of the file free, and let it have no more."""
    connection.execute("CREATE TABLE filler (some TEXT)")
    connection.execute("INSERT INTO filler VALUES ('x')")
    (num_pages,) = connection.execute("PRAGMA page_count").fetchone()
    connection.execute(f"PRAGMA max_page_count = {num_pages}")
    for _ in range(10_000):
        try:
            connection.execute("INSERT INTO filler VALUES (hex(randomblob(100)))")
        except sqlite3.OperationalError:
            return
    raise AssertionError("it is not full")
