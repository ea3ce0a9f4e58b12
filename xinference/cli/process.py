# SPDX-License-Identifier: Apache-2.0
"""`python -m xinference.cli.process ROLE`: a process that the guardian started.

In: its configuration, one line of JSON on stdin. Out: one line of JSON on stdout when it does its
work; log lines on stderr and in the log file. Supervisor and worker are put together in
`xinference.cluster.processes`, the gateway here: it is the one place where cluster and HTTP meet.
"""

import logging
import socket
import sys

from xinference.cluster.configuration import (
    GatewayConfig,
    RoleConfig,
    SupervisorConfig,
    WorkerConfig,
    config_from_line,
    private_directory,
)
from xinference.errors import XinferenceError

from .logs import set_up_logging

logger = logging.getLogger("xinference.cli.process")  # not "__main__"

EXIT_FAILED = 1
GRACE_SECONDS = 3.0
"""After SIGTERM, so long may running requests go on."""
BACKLOG = 2048
STORE_FILE = "store.db"
"""What callers asked to keep; all gateways of a home share it."""


def main() -> None:
    """Run the role that the first argument names."""
    (role,) = sys.argv[1:]
    run(config_from_line(role, sys.stdin.readline()))


def run(config: RoleConfig) -> None:
    """Run the process of a role until it is told to end."""
    set_up_logging(config.home, role=config.role, level=config.log_level)
    # Why here: each process pays for its own part only.
    from xinference.cluster import processes

    match config:
        case SupervisorConfig():
            processes.supervisor_main(config)
        case WorkerConfig():
            processes.worker_main(config)
        case GatewayConfig():
            processes.forbid_heavy_modules()
            gateway_main(config)
        case _:
            raise AssertionError(f"no role {config.role}")


def gateway_main(config: GatewayConfig) -> None:
    """Serve HTTP until SIGTERM; running requests get a moment to end."""
    import sqlite3

    import uvloop

    try:
        uvloop.run(_serve(config))
    except (XinferenceError, OSError, sqlite3.Error) as error:
        logger.critical("The gateway cannot run: %s", error)
        raise SystemExit(EXIT_FAILED) from None


async def _serve(config: GatewayConfig) -> None:
    import uvicorn

    from xinference.api.app import create_app
    from xinference.api.keys.store import KeyStore
    from xinference.api.store.store import Store
    from xinference.cluster.processes import report_ready
    from xinference.cluster.remote import RemoteCluster

    assert config.run_directory is not None, "the guardian fills it in"
    assert config.supervisor_address is not None, "the guardian fills it in"
    with _listener(config.host, config.port) as listener:
        cluster = await RemoteCluster.connect(
            config.supervisor_address,
            cluster_key=config.cluster_key,
            socket_directory=private_directory(config.run_directory, config.role),
        )
        app = create_app(
            cluster,
            key_store=KeyStore.open(config.home),
            store=Store(config.home / STORE_FILE),
            disable_metrics=config.disable_metrics,
            on_shutdown=cluster.aclose,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                loop="none",
                http="httptools",
                ws="none",
                lifespan="on",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                timeout_keep_alive=config.http_keep_alive_seconds,  # type: ignore[arg-type]  # any number does
                timeout_graceful_shutdown=GRACE_SECONDS,  # type: ignore[arg-type]  # as above
            )
        )
        # Connections wait in the backlog for the moment that the server still takes.
        listener.listen(BACKLOG)
        logger.info("Gateway at http://%s:%d", *listener.getsockname()[:2])
        report_ready(host=config.host, port=config.port)
        await server.serve(sockets=[listener])


def _listener(host: str, port: int) -> socket.socket:
    """Bind the port, before anything that takes time.

    Raises:
        OSError: it is taken, or `host` is not of this machine; says which.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


if __name__ == "__main__":
    main()
