# SPDX-License-Identifier: Apache-2.0
"""A worker that cannot belong to a cluster is told why, and so is whoever runs the cluster."""

import logging
from pathlib import Path

import pytest

from tests.cluster.local_cluster import SUPERVISOR_ADDRESS, LocalCluster, ScriptedReplica
from xinference.cluster import processes
from xinference.cluster.configuration import WorkerConfig
from xinference.cluster.local_bus import LocalBus
from xinference.errors import InvalidSetting


@pytest.mark.parametrize("version", [1, 2])
async def test_a_worker_joins_if_it_speaks_the_supervisors_version(
    version: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    local = LocalCluster(tmp_path, new_replica=ScriptedReplica)
    await local.start_supervisor(is_ticking=False)
    config = WorkerConfig(
        home=tmp_path, cluster_key="k" * 16, supervisor_address=SUPERVISOR_ADDRESS
    )
    bus = LocalBus(local.network, "10.0.0.2:7000")
    joining = processes._check_join(bus, processes._SupervisorDirectory(config), config)
    monkeypatch.setattr(processes, "CONTROL_VERSION", version)
    monkeypatch.setattr(processes, "__version__", "9.9")

    with caplog.at_level(logging.ERROR):
        if version == 1:
            await joining
            assert caplog.text == ""
        else:
            with pytest.raises(InvalidSetting, match="Install the same on both hosts"):
                await joining
            assert "worker at 10.0.0.2:7000 is xinference 9.9" in caplog.text
    await local.close()
