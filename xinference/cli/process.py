# SPDX-License-Identifier: Apache-2.0
"""`python -m xinference.cli.process ROLE`: a process that the guardian started.

In: its configuration, one line of JSON on stdin. Out: one line of JSON on stdout when it does its
work; log lines on stderr and in the log file. Supervisor and worker are put together in
`xinference.cluster.processes`, the gateway here: it is the one place where cluster and HTTP meet.
"""

import functools
import gc
import logging
import os
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from xinference.cluster.configuration import (
    GatewayConfig,
    RoleConfig,
    SupervisorConfig,
    WorkerConfig,
    config_from_line,
    private_directory,
)
from xinference.errors import XinferenceError
from xinference.tracing import open_tracer

from .log_file import set_up_file_logging

if TYPE_CHECKING:
    from xinference.cluster import processes

logger = logging.getLogger("xinference.cli.process")  # not "__main__"

EXIT_FAILED = 1
GC_THRESHOLD = 20_000
"""Objects between two looks for garbage; Python's 700 are a fraction of one request."""
STORE_FILE = "store.db"
"""What callers asked to keep; all gateways of a home share it."""


def main() -> None:
    """Run the role that the first argument names."""
    (role,) = sys.argv[1:]
    run(config_from_line(role, sys.stdin.readline()))


def run(config: RoleConfig) -> None:
    """Run the process of a role until it is told to end."""
    set_up_file_logging(
        config.home, role=config.role, level=config.log_level, log_format=config.log_format
    )
    # Why here: each process pays for its own part only.
    from xinference.cluster import processes

    match config:
        case SupervisorConfig():
            processes.supervisor_main(config)
        case WorkerConfig():
            processes.worker_main(config, export=_exporter_of(config))
        case GatewayConfig():
            processes.forbid_heavy_modules()
            gateway_main(config)
        case _:
            raise AssertionError(f"no role {config.role}")


def _exporter_of(config: WorkerConfig) -> "processes.Export | None":
    """Return what gives a worker its own page for Prometheus; None: it has none."""
    port = config.exporter_port
    if port is None:
        return None
    from xinference.api.worker_exporter import WorkerExporter

    return functools.partial(WorkerExporter, config.exporter_host, port)


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
    assert config.run_directory is not None, "the guardian fills it in"
    assert config.supervisor_address is not None, "the guardian fills it in"
    metrics_directory = None
    if config.num_processes > 1:
        metrics_directory = _shared_metrics(config.run_directory)
    # Why after that: the library looks for the directory when it is imported.
    from xinference.api.app import create_app
    from xinference.api.keys.store import KeyStore
    from xinference.api.store.store import Store
    from xinference.cluster.processes import report_ready
    from xinference.cluster.remote import RemoteCluster

    from . import http_server

    with _listener(config.host, config.port, is_shared=config.num_processes > 1) as listener:
        cluster = await RemoteCluster.connect(
            config.supervisor_address,
            cluster_key=config.cluster_key,
            socket_directory=private_directory(config.run_directory, config.name),
            continues_streams=config.continues_streams,
        )
        app = create_app(
            cluster,
            key_store=KeyStore.open(config.home),
            store=Store(config.home / STORE_FILE),
            disable_metrics=config.disable_metrics,
            metrics_directory=metrics_directory,
            answer_timeout_seconds=config.answer_timeout_seconds,
            log_requests=config.log_requests,
            tracer=open_tracer("gateway"),
            on_shutdown=cluster.aclose,
        )
        logger.info("Gateway at %s:%d", *listener.getsockname()[:2])
        # Connections wait in the backlog for the moment that the server still takes.
        listener.listen(http_server.BACKLOG)
        # Why: what is there now stays, and need not be looked through again and again; and what a
        # request leaves is mostly freed by its reference counts.
        gc.collect()
        gc.freeze()
        gc.set_threshold(GC_THRESHOLD)
        report_ready(host=config.host, port=config.port)
        server = http_server.server_of(
            app,
            keep_alive_seconds=config.http_keep_alive_seconds,
            drain_seconds=config.drain_seconds,
            ssl_certfile=config.ssl_certfile,
            ssl_keyfile=config.ssl_keyfile,
        )
        await server.serve(sockets=[listener])


def _shared_metrics(run_directory: Path) -> Path:
    """Make the metrics library keep its numbers where the other gateway processes find them."""
    directory = run_directory / "metrics"
    directory.mkdir(exist_ok=True)
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = str(directory)
    return directory


def _listener(host: str, port: int, *, is_shared: bool) -> socket.socket:
    """Bind the port, before anything that takes time.

    Args:
        is_shared: with the other gateway processes; the kernel spreads connections over them.

    Raises:
        OSError: it is taken, or `host` is not of this machine; says which.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(
        host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listener


if __name__ == "__main__":
    main()
