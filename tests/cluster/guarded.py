# SPDX-License-Identifier: Apache-2.0
"""A guardian with supervisor, worker and gateway, for tests: `python -m tests.cluster.guarded`.

Takes one line of JSON on stdin with home, key and replica command; prints a line when ready. Told
the address of a supervisor, it has a worker alone.
"""

import json
import logging
import sys
from pathlib import Path

from xinference.cluster import guardian
from xinference.cluster.configuration import (
    GatewayConfig,
    RoleConfig,
    SupervisorConfig,
    WorkerConfig,
)


def argv_of(config: RoleConfig) -> list[str]:
    return [sys.executable, "-m", "tests.cluster.role", config.role]


def main() -> int:
    told = json.loads(sys.stdin.readline())
    logging.basicConfig(level="INFO", format="guardian %(levelname)s %(message)s")
    home, key = Path(told["home"]), told["key"]
    command = tuple(told["replica_command"])
    listen = told.get("listen", "127.0.0.1:0")
    drain_seconds = told.get("drain_seconds", 30.0)
    worker = WorkerConfig(
        home=home,
        cluster_key=key,
        listen=listen,
        replica_command=command,
        supervisor_address=told.get("supervisor_address"),
        drain_seconds=drain_seconds,
    )
    configs: list[RoleConfig] = [worker]
    if worker.supervisor_address is None:
        supervisor = SupervisorConfig(
            home=home,
            cluster_key=key,
            listen=listen,
            expected_workers=told.get("expected_workers", 1),
        )
        configs = [supervisor, worker, GatewayConfig(home=home, cluster_key=key)]

    def on_ready() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    return guardian.run(configs, on_ready=on_ready, argv_of=argv_of)


if __name__ == "__main__":
    sys.exit(main())
