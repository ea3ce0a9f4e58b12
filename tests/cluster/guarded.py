# SPDX-License-Identifier: Apache-2.0
"""A guardian with supervisor, worker and gateway, for tests: `python -m tests.cluster.guarded`.

Takes one line of JSON on stdin with home, key and replica command; prints a line when ready. Told
the address of a supervisor, it has a worker alone; told that it has no worker, the others; told a
port for HTTP, two real gateways that share it. Where the supervisor is, it writes into its home.
"""

import dataclasses
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
    assert config.supervisor_address is not None
    # Why renamed: whoever waits for it must not find it empty.
    written = config.home / "supervisor.address.new"
    written.write_text(config.supervisor_address)
    written.rename(config.home / "supervisor.address")
    is_real = isinstance(config, GatewayConfig) and config.num_processes > 1
    module = "xinference.cli.process" if is_real else "tests.cluster.role"
    return [sys.executable, "-m", module, config.role]


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
        workers = [worker] if told.get("has_worker", True) else []
        gateways = [GatewayConfig(home=home, cluster_key=key)]
        if port := told.get("http_port"):
            gateways = [
                dataclasses.replace(gateways[0], port=port, number=number, num_processes=2)
                for number in (1, 2)
            ]
        configs = [supervisor, *workers, *gateways]

    def on_ready() -> None:
        sys.stdout.write("ready\n")
        sys.stdout.flush()

    return guardian.run(configs, on_ready=on_ready, argv_of=argv_of)


if __name__ == "__main__":
    sys.exit(main())
