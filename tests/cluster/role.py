# SPDX-License-Identifier: Apache-2.0
"""A process of a role, as the guardian starts it in tests: no command line, no HTTP.

    python -m tests.cluster.role ROLE

The gateway of these tests only follows the routes.
"""

import asyncio
import logging
import signal
import sys

from tests.fakes.catalog import FakeCatalog
from tests.fakes.devices import reader_of
from xinference.cluster.configuration import (
    GatewayConfig,
    SupervisorConfig,
    WorkerConfig,
    config_from_line,
    private_directory,
)
from xinference.cluster.processes import (
    forbid_heavy_modules,
    report_ready,
    supervisor_main,
    worker_main,
)
from xinference.cluster.remote import RemoteCluster


async def gateway(config: GatewayConfig) -> None:
    assert config.run_directory is not None
    assert config.supervisor_address is not None
    cluster = await RemoteCluster.connect(
        config.supervisor_address,
        cluster_key=config.cluster_key,
        socket_directory=private_directory(config.run_directory, "gateway"),
    )
    told_to_end = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, told_to_end.set)
    report_ready()
    await told_to_end.wait()
    await cluster.aclose()


def main() -> None:
    config = config_from_line(sys.argv[1], sys.stdin.readline())
    logging.basicConfig(level=config.log_level, format=f"{config.role} %(levelname)s %(message)s")
    match config:
        case SupervisorConfig():
            supervisor_main(config, load_catalog=lambda home: FakeCatalog())
        case WorkerConfig():
            worker_main(config, new_reader=lambda: reader_of(config.home))
        case GatewayConfig():
            forbid_heavy_modules()
            asyncio.run(gateway(config))


if __name__ == "__main__":
    main()
