# SPDX-License-Identifier: Apache-2.0
"""`xinference-local`, `xinference-supervisor`, `xinference-worker`, and `stop-cluster`.

A server command checks its words, settles key and ports, and becomes the guardian of the
processes of its host; `process.py` is what those run.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import click
from click.core import ParameterSource

from xinference.errors import InvalidSetting
from xinference.identifiers import Address
from xinference.settings import DEFAULT_ENDPOINT, DEFAULT_PORT, Settings

from .addresses import advertised_host, check_tls, is_loopback, port_to_listen_on, url_of
from .connection import CONTEXT_SETTINGS, connected, endpoint_options, read_settings
from .log_file import set_up_file_logging
from .output import say, show, show_json

if TYPE_CHECKING:
    from xinference.cluster.configuration import (
        GatewayConfig,
        RoleConfig,
        SupervisorConfig,
    )
    from xinference.cluster.guardian import OnReady

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")

LOG_LEVEL_OPTION = click.option(
    "--log-level",
    type=click.Choice(LOG_LEVELS, case_sensitive=False),
    help="[env: XINFERENCE_LOG_LEVEL; default: INFO]",
)
LOG_FORMAT_OPTION = click.option(
    "--log-format",
    type=click.Choice(("text", "json"), case_sensitive=False),
    help="[env: XINFERENCE_LOG_FORMAT; default: text]",
)
PORT_OPTION = click.option(
    "--port",
    "-p",
    type=click.IntRange(1, 65535),
    default=DEFAULT_PORT,
    show_default=True,
    help="Of HTTP. If the default is busy, a free one is taken.",
)
PORTS = click.IntRange(0, 65535)
MAX_API_WORKERS = 32
"""A replica takes 64 connections, of which each gateway process opens one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayOptions:
    """What the words of a command say of the gateway's port."""

    host: str
    port: int
    api_workers: int = 1
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None

    @property
    def endpoint(self) -> str:
        """Where this machine reaches it."""
        return self.endpoint_of(self.host)

    def endpoint_of(self, host: str) -> str:
        """Return where it is reached by this host."""
        return url_of(host, self.port, is_tls=self.ssl_certfile is not None)


def host_option(default: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make `--host`."""
    return click.option(
        "--host", "-H", default=default, show_default=True, help="The address to listen on."
    )


def gateway_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add what the gateway's processes and their port may be told."""
    for option in (
        click.option(
            "--ssl-keyfile",
            type=click.Path(exists=True, dir_okay=False, resolve_path=True),
            help="PEM; left out where the certificate's file has the key, too.",
        ),
        click.option(
            "--ssl-certfile",
            type=click.Path(exists=True, dir_okay=False, resolve_path=True),
            help="PEM; with it the port speaks HTTPS.",
        ),
        click.option(
            "--api-workers",
            type=click.IntRange(1, MAX_API_WORKERS),
            default=1,
            show_default=True,
            help="Gateway processes that share the port.",
        ),
    ):
        command = option(command)
    return command


def exporter_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options of a worker's own page for Prometheus."""
    command = click.option(
        "--metrics-exporter-port",
        "-mp",
        type=click.IntRange(1, 65535),
        help="Of the worker's own page for Prometheus; without it there is none.",
    )(command)
    return click.option(
        "--metrics-exporter-host",
        "-MH",
        default="127.0.0.1",
        show_default=True,
        help="The address that page listens on. It asks for no key.",
    )(command)


@click.command("xinference-local", context_settings=CONTEXT_SETTINGS)
@host_option("127.0.0.1")
@PORT_OPTION
@gateway_options
@LOG_LEVEL_OPTION
@LOG_FORMAT_OPTION
@exporter_options
def local_command(
    host: str,
    port: int,
    log_level: str | None,
    log_format: str | None,
    metrics_exporter_host: str,
    metrics_exporter_port: int | None,
    **words: Any,
) -> None:
    """Run a whole cluster on this host: supervisor, worker and gateway. Ctrl-C stops it."""
    settings = _logging(read_settings(), log_level, log_format)
    options = _listening(host, port, words, settings)
    exporter = _exporter_of(
        metrics_exporter_host, metrics_exporter_port, settings, http_port=options.port
    )
    code = guard(
        *local_configs(settings, options, **exporter),
        on_ready=lambda: show(gateway_banner(options.endpoint, settings.home)),
    )
    raise SystemExit(code)


@click.command("xinference-supervisor", context_settings=CONTEXT_SETTINGS)
@host_option("0.0.0.0")
@PORT_OPTION
@click.option("--supervisor-port", type=PORTS, default=0, help="Where workers reach it.")
@gateway_options
@LOG_LEVEL_OPTION
@LOG_FORMAT_OPTION
def supervisor_command(
    host: str,
    port: int,
    supervisor_port: int,
    log_level: str | None,
    log_format: str | None,
    **words: Any,
) -> None:
    """Run the supervisor and the gateway of a cluster. Ctrl-C stops them."""
    settings = _logging(read_settings(), log_level, log_format)
    told = advertised_host(host)
    options = _listening(host, port, words, settings)
    _check_listening("--supervisor-port", host, supervisor_port)
    key = _own_key(settings)
    supervisor = _supervisor_config(
        settings, key, listen_host=host, port=supervisor_port, advertised=told
    )
    gateways = _gateway_configs(settings, key, options)

    def ready() -> None:
        show(gateway_banner(options.endpoint, settings.home))
        show(worker_hint(options.endpoint_of(told), settings.home))

    code = guard(supervisor, *gateways, on_ready=ready)
    raise SystemExit(code)


def _logging(settings: Settings, level: str | None, log_format: str | None) -> Settings:
    """Return the settings with what the words of a command say of its log."""
    return replace(
        settings,
        log_level=level or settings.log_level,
        log_format=log_format or settings.log_format,
    )


def _listening(host: str, port: int, words: dict[str, Any], settings: Settings) -> GatewayOptions:
    """Return what a gateway is to be, after a look at whether it can.

    Raises:
        click.ClickException: nobody can listen there, or the certificate cannot be used.
    """
    options = GatewayOptions(
        host=host, port=port_to_listen_on(host, port, is_chosen=is_chosen("port")), **words
    )
    if options.ssl_keyfile is not None and options.ssl_certfile is None:
        raise click.UsageError("--ssl-keyfile is of no use without --ssl-certfile.")
    if options.ssl_certfile is not None:
        check_tls(options.ssl_certfile, options.ssl_keyfile)
    warn_if_open(host, settings.home)
    return options


@click.command("xinference-worker", context_settings=CONTEXT_SETTINGS)
@click.option("--endpoint", "-e", metavar="URL", help="Of the cluster to join.")
@host_option("0.0.0.0")
@click.option("--worker-port", type=PORTS, default=0, help="Where the supervisor reaches it.")
@LOG_LEVEL_OPTION
@LOG_FORMAT_OPTION
@exporter_options
def worker_command(
    endpoint: str | None,
    host: str,
    worker_port: int,
    log_level: str | None,
    log_format: str | None,
    metrics_exporter_host: str,
    metrics_exporter_port: int | None,
) -> None:
    """Run a worker that joins the cluster of a gateway. Ctrl-C stops it and its models.

    It needs the cluster's key: the file cluster.key of the supervisor's XINFERENCE_HOME in its own,
    or XINFERENCE_CLUSTER_KEY.
    """
    from xinference.cluster.cluster_key import check_cluster_key, key_refused, read_cluster_key
    from xinference.cluster.configuration import WorkerConfig

    settings = _logging(read_settings(), log_level, log_format)
    exporter = _exporter_of(metrics_exporter_host, metrics_exporter_port, settings)
    endpoint = (endpoint or settings.endpoint).rstrip("/")
    gateway_host = _host_of(endpoint)
    _check_listening("--worker-port", host, worker_port)
    try:
        key = (
            check_cluster_key(settings.cluster_key)
            if settings.cluster_key
            else read_cluster_key(settings.home)
        )
        if key is None:
            raise key_refused(endpoint, settings.home)
    except InvalidSetting as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{settings.home} cannot be used: {error}") from error
    ports = settings.replica_ports
    config = WorkerConfig(
        home=settings.home,
        cluster_key=key,
        log_level=settings.log_level,
        log_format=settings.log_format,
        listen=_listen(host, worker_port),
        advertised_host=advertised_host(host, towards=gateway_host),
        endpoint=endpoint,
        replica_ports=None if ports is None else (ports.first, ports.last),
        encrypts=settings.encrypt_data_plane,
        drain_seconds=settings.drain_seconds,
        downloads=settings.downloads,
        **_environment_policy(settings),
        **exporter,
    )
    code = guard(config, on_ready=lambda: show(f"The worker has joined the cluster at {endpoint}."))
    raise SystemExit(code)


def local_configs(
    settings: Settings, options: GatewayOptions, **of_worker: Any
) -> "list[RoleConfig]":
    """Return what the processes of a cluster on this host are told.

    Args:
        of_worker: what only the worker is told.

    Raises:
        click.ClickException: the cluster key cannot be made or is none.
    """
    from xinference.cluster.configuration import WorkerConfig

    key = _own_key(settings)
    worker = WorkerConfig(
        home=settings.home,
        cluster_key=key,
        log_level=settings.log_level,
        log_format=settings.log_format,
        drain_seconds=settings.drain_seconds,
        downloads=settings.downloads,
        **_environment_policy(settings),
        **of_worker,
    )
    # Only HTTP listens on the host of the options; the actors of one need no more than loopback.
    return [
        _supervisor_config(settings, key, expected_workers=1),
        worker,
        *_gateway_configs(settings, key, options),
    ]


def _environment_policy(settings: Settings) -> dict[str, Any]:
    """Return what a worker is told of virtual environments."""
    return {
        "env_skips_installed": settings.virtual_env_skip_installed,
        "env_is_offline": settings.virtual_env_offline,
        "env_find_links_roots": tuple(map(str, settings.virtual_env_find_links_roots)),
    }


def _supervisor_config(
    settings: Settings,
    key: str,
    *,
    listen_host: str = "127.0.0.1",
    port: int = 0,
    advertised: str | None = None,
    expected_workers: int | None = None,
) -> "SupervisorConfig":
    from xinference.cluster.configuration import SupervisorConfig

    return SupervisorConfig(
        home=settings.home,
        cluster_key=key,
        log_level=settings.log_level,
        log_format=settings.log_format,
        listen=_listen(listen_host, port),
        advertised_host=advertised,
        restart_limit=settings.restart_limit,
        launch_strategy=settings.launch_strategy,
        shares_gpus=settings.allow_multi_replica_per_gpu,
        expected_workers=expected_workers,
        drain_seconds=settings.drain_seconds,
        enables_virtual_env=settings.enable_virtual_env,
    )


def _gateway_configs(
    settings: Settings, key: str, options: GatewayOptions
) -> "list[GatewayConfig]":
    from xinference.cluster.configuration import GatewayConfig

    return [
        GatewayConfig(
            home=settings.home,
            cluster_key=key,
            log_level=settings.log_level,
            log_format=settings.log_format,
            host=options.host,
            port=options.port,
            disable_metrics=settings.disable_metrics,
            http_keep_alive_seconds=settings.http_keep_alive_seconds,
            answer_timeout_seconds=settings.answer_timeout_seconds,
            log_requests=settings.log_requests,
            continues_streams=settings.continue_streams,
            drain_seconds=settings.drain_seconds,
            ssl_certfile=options.ssl_certfile,
            ssl_keyfile=options.ssl_keyfile,
            number=number,
            num_processes=options.api_workers,
        )
        for number in range(1, options.api_workers + 1)
    ]


def _host_of(endpoint: str) -> str:
    """Return the host of a gateway's address.

    Raises:
        click.UsageError: it is no such address.
    """
    try:
        url = urlsplit(endpoint)
        host = url.hostname if url.port != 0 else None
    except ValueError:
        host = None
    if host is None or url.scheme not in {"http", "https"}:
        raise click.UsageError(f"{endpoint!r} is not an http:// or https:// address.")
    return host


def _check_listening(option: str, host: str, port: int) -> None:
    """Refuse a port, of this option, that a process to come could not listen on; 0 is any.

    Raises:
        click.ClickException
    """
    try:
        port_to_listen_on(host, port, is_chosen=True)
    except click.ClickException as error:
        named = option if port else "--host"
        raise click.ClickException(f"{named}: {error.message}") from error


def _listen(host: str, port: int) -> str:
    return str(Address(host, port))


def _own_key(settings: Settings) -> str:
    """Return the key of a cluster that this host founds; make it at the first start."""
    from xinference.cluster.cluster_key import check_cluster_key, make_cluster_key

    try:
        if settings.cluster_key is not None:
            return check_cluster_key(settings.cluster_key)
        return make_cluster_key(settings.home)
    except InvalidSetting as error:
        raise click.ClickException(str(error)) from error
    except OSError as error:
        raise click.ClickException(f"{settings.home} cannot be used: {error}") from error


def is_chosen(name: str) -> bool:
    """Return whether the option was given, so that its value is no default."""
    source = click.get_current_context().get_parameter_source(name)
    return source is not ParameterSource.DEFAULT


def _exporter_of(
    host: str, port: int | None, settings: Settings, *, http_port: int | None = None
) -> dict[str, Any]:
    """Return what a worker is told of its own page for Prometheus, after a look at whether it can.

    Args:
        http_port: of the gateway, where it is on this host.

    Raises:
        click.ClickException: the port is taken, or the words contradict each other.
    """
    if port is None:
        if is_chosen("metrics_exporter_host"):
            raise click.UsageError(
                "--metrics-exporter-host is of no use without --metrics-exporter-port."
            )
        return {}
    if settings.disable_metrics:
        raise click.UsageError(
            "--metrics-exporter-port contradicts XINFERENCE_DISABLE_METRICS=1; leave one out."
        )
    if port == http_port:
        raise click.UsageError(
            f"--metrics-exporter-port: {port} is the port of HTTP, where the cluster's /metrics "
            "is; the worker's own page needs another one."
        )
    _check_listening("--metrics-exporter-port", host, port)
    return {"exporter_host": host, "exporter_port": port}


def warn_if_open(host: str, home: Path) -> None:
    """Say loudly that others can reach what has no lock."""
    if not is_loopback(host) and not _has_api_keys(home):
        say(
            f"Warning: listening on {host} without API keys: whoever reaches this address can use "
            "and stop everything. Lock it: xinference keys create --offline -n admin -s admin"
        )


def _has_api_keys(home: Path) -> bool:
    import sqlite3

    from xinference.api.keys.store import FILE, KeyStore

    if not (home / FILE).exists():
        return False
    try:
        store = KeyStore.open(home)
    except (OSError, sqlite3.Error) as error:
        raise click.ClickException(f"the API keys in {home} cannot be used: {error}") from error
    try:
        return bool(store.all_keys())
    finally:
        store.close()


def gateway_banner(endpoint: str, home: Path) -> str:
    """Return what a person wants to know when a gateway is ready."""
    there = "" if endpoint == DEFAULT_ENDPOINT else f" -e {endpoint}"
    model = "xinference-guide"
    return f"""
Xinference is ready.

  Endpoint   {endpoint}
  API        {endpoint}/docs

  Launch     xinference launch{there} --model-engine transformers -n {model}
  Chat       xinference chat{there} --model-uid {model}
  Python     from xinference.client import Client
             model = Client("{endpoint}").get_model("{model}")
             model.chat([{{"role": "user", "content": "Hello"}}])
  OpenAI     OpenAI(base_url="{endpoint}/v1", api_key="not needed")
  curl       curl {endpoint}/v1/chat/completions -H "Content-Type: application/json" \\
                 -d '{{"model": "{model}", "messages": [{{"role": "user", "content": "Hello"}}]}}'

  Log        {home / "logs" / "xinference.log"}
  Stop       Ctrl-C
"""


def worker_hint(endpoint: str, home: Path) -> str:
    """Return how another host joins."""
    return f"""  Workers    On each host, with {home / "cluster.key"} in its XINFERENCE_HOME:
             xinference-worker -e {endpoint}
"""


def guard(*configs: "RoleConfig", on_ready: "OnReady") -> int:
    """Run the processes until they are told to stop; return the exit status."""
    from xinference.cluster import guardian

    home = configs[0].home
    try:
        set_up_file_logging(
            home,
            role="guardian",
            level=configs[0].log_level,
            log_format=configs[0].log_format,
        )
    except OSError as error:
        raise click.ClickException(f"{home} cannot be used: {error}") from error
    try:
        return guardian.run(configs, on_ready=on_ready)
    except InvalidSetting as error:
        raise click.ClickException(str(error)) from error


@click.command("stop-cluster", short_help="Stop a whole cluster.")
@endpoint_options
@click.option("--check", is_flag=True, help="Do not ask whether that is wanted.")
@click.option("--json", "as_json", is_flag=True, help="Print the reply as JSON.")
def stop_cluster_command(
    endpoint: str | None, api_key: str | None, check: bool, as_json: bool
) -> None:
    """Stop a whole cluster, models first; the next start brings its models back."""
    with connected(endpoint, api_key) as client:
        if not check:
            models = sorted(client.list_models())
            running = f", which runs {', '.join(models)}" if models else ""
            click.confirm(f"Stop the cluster at {client.base_url}{running}?", abort=True, err=True)
        reply = client.abort_cluster()
    if as_json:
        show_json(reply)
    else:
        show(f"Cluster stopped: {reply['result']}")
    if not reply["result"]:
        raise click.ClickException(f"the cluster at {client.base_url} did not stop")
