# SPDX-License-Identifier: Apache-2.0
"""How each process of a cluster is configured: frozen values that travel as one line of JSON.

The guardian writes the line to a child's stdin, so that no key is ever seen in an argument or an
environment. Standard library only.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Self

from xinference.identifiers import Address
from xinference.settings import DownloadSettings

MAX_RUN_DIRECTORY_LEN = 48
"""Sockets below it, up to 58 characters on, must fit the 108 bytes of a unix address."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleConfig:
    """What every child of the guardian is told."""

    role: ClassVar[str]

    home: Path
    cluster_key: str = field(repr=False)
    log_level: str = "INFO"
    log_format: str = "text"
    """Of its lines, and of what it starts: a `protocol.logs.LogFormat`."""
    run_directory: Path | None = None
    """For sockets; private to one guardian, which fills it in."""
    supervisor_address: str | None = None
    """Of its actor, "host:port"; None: the guardian's own supervisor."""
    drain_seconds: float = 30.0
    """After SIGTERM, so long may running requests go on."""

    @property
    def name(self) -> str:
        """Return what to call this process; no other of the guardian's has the name."""
        return self.role

    def to_json(self) -> str:
        """Return one line."""
        plain = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in dataclasses.asdict(self).items()
        }
        return json.dumps(plain)

    @classmethod
    def from_json(cls, line: str) -> Self:
        """Read what `to_json` wrote."""
        plain: dict[str, Any] = json.loads(line)
        for name in ("home", "run_directory"):
            plain[name] = None if plain.get(name) is None else Path(plain[name])
        if "downloads" in plain:
            plain["downloads"] = DownloadSettings(**plain["downloads"])
        plain.update({name: tuple(v) for name, v in plain.items() if isinstance(v, list)})
        return cls(**plain)


@dataclass(frozen=True, slots=True, kw_only=True)
class SupervisorConfig(RoleConfig):
    """The process of the supervisor actor."""

    role: ClassVar[str] = "supervisor"

    listen: str = "127.0.0.1:0"
    """Of its actor. Port 0: the guardian chooses one that stays over restarts."""
    advertised_host: str | None = None
    """What peers are told; None: the host of `listen`."""
    restart_limit: int = 5
    expected_workers: int | None = None
    """After a start, so many workers' reports end the wait for what runs; None: time does."""
    launch_strategy: str = "idle_first"
    """A `placement.LaunchStrategy`."""
    shares_gpus: bool = True
    """Whether a GPU may hold more than one replica."""
    enables_virtual_env: bool = True
    """Whether models that want packages run in virtual environments, where a launch is silent."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig(RoleConfig):
    """The process of a worker actor and its model actors."""

    role: ClassVar[str] = "worker"

    listen: str = "127.0.0.1:0"
    advertised_host: str | None = None
    endpoint: str | None = None
    """A gateway that is asked for the supervisor's address; None: `supervisor_address` holds."""
    replica_ports: tuple[int, int] | None = None
    """Where replicas listen for other hosts, both included; None: any free port."""
    encrypts: bool = True
    """Whether what other hosts send to a replica, and get, is encrypted."""
    env_skips_installed: bool = True
    """What the host has is not installed in a virtual environment once more."""
    env_is_offline: bool = False
    """Nothing is fetched for one."""
    env_find_links_roots: tuple[str, ...] = ()
    """Below these directories, and nowhere else, packages may be looked for on this host."""
    replica_command: tuple[str, ...] = ("-m", "xinference.cluster.replica")
    """What the interpreter of a replica is given."""
    lifeline: int | None = None
    """A file descriptor that ends with the guardian, which fills it in. Replicas live by it and
    not by the worker, so that they go on when it is replaced."""
    downloads: DownloadSettings = field(default_factory=DownloadSettings)
    exporter_host: str = "127.0.0.1"
    exporter_port: int | None = None
    """Of its own page for Prometheus; None: it has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GatewayConfig(RoleConfig):
    """The HTTP process."""

    role: ClassVar[str] = "gateway"

    host: str = "127.0.0.1"
    port: int = 9997
    disable_metrics: bool = False
    http_keep_alive_seconds: float = 5.0
    answer_timeout_seconds: float = 600.0
    """How long a request may wait for the beginning of its answer, if its caller does not say."""
    log_requests: str = "none"
    """What is logged of each request: none, summary or prompts."""
    continues_streams: bool = True
    """Whether an answer that was begun goes on at another replica when its own dies."""
    ssl_certfile: str | None = None
    """PEM; with it the port speaks HTTPS."""
    ssl_keyfile: str | None = None
    """PEM; None: the key is in the file of the certificate."""
    number: int = 1
    """Of this process among the gateway's, from 1."""
    num_processes: int = 1
    """They share the port."""

    @property
    def name(self) -> str:
        """Return what to call this process."""
        return self.role if self.num_processes == 1 else f"{self.role}-{self.number}"


CONFIGS: dict[str, type[RoleConfig]] = {
    config.role: config for config in (SupervisorConfig, WorkerConfig, GatewayConfig)
}


def config_from_line(role: str, line: str) -> RoleConfig:
    """Read the configuration of a role from the line on its stdin."""
    return CONFIGS[role].from_json(line)


def advertised_address(config: SupervisorConfig | WorkerConfig) -> str:
    """Return the address that peers are told."""
    listen = Address.parse(config.listen)
    return str(Address(config.advertised_host or listen.host, listen.port))


def make_run_directory(home: Path) -> Path:
    """Make this process's directory for sockets, mode 0700; remove those of dead processes.

    It is `<home>/run/<pid>`, or below the temporary directory where that path is too long for a
    socket.

    Raises:
        OSError: it cannot be made.
    """
    parent = home / "run"
    if len(str(parent)) > MAX_RUN_DIRECTORY_LEN - 8:
        name = hashlib.sha256(os.fsencode(home)).hexdigest()[:12]
        parent = Path(tempfile.gettempdir()) / f"xinference-{name}"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if not _is_private(parent):
        # Somebody else was there first, who may do what they like to what is below it.
        return Path(tempfile.mkdtemp(prefix="xinference-"))
    for old in parent.iterdir():
        if old.name.isdecimal() and not _is_alive(int(old.name)):
            shutil.rmtree(old, ignore_errors=True)
    mine = parent / str(os.getpid())
    shutil.rmtree(mine, ignore_errors=True)
    mine.mkdir(mode=0o700)
    return mine


def _is_private(directory: Path) -> bool:
    """Return whether a directory is ours, and no link to another one."""
    found = directory.lstat()
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def private_directory(parent: Path, name: str, *, keep: bool = False) -> Path:
    """Return a directory of mode 0700 below a run directory; an empty one, unless it is kept."""
    made = parent / name
    if not keep:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(made)
    made.mkdir(mode=0o700, exist_ok=keep)
    return made


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
