# SPDX-License-Identifier: Apache-2.0
"""A guardian with supervisor, worker and gateway, for tests: `python -m tests.cluster.guarded`.

Takes one line of JSON on stdin with home, key and replica command; prints a line when ready.
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
    supervisor = SupervisorConfig(
        home=home,
        cluster_key=key,
        listen=told.get("listen", "127.0.0.1:0"),
        expected_workers=1,
    )
    worker = WorkerConfig(home=home, cluster_key=key, replica_command=command)
    gateway = GatewayConfig(home=home, cluster_key=key)

    def on_ready() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    return guardian.run([supervisor, worker, gateway], on_ready=on_ready, argv_of=argv_of)


if __name__ == "__main__":
    sys.exit(main())
