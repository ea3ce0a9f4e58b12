# SPDX-License-Identifier: Apache-2.0
"""The only reader of the process environment: `XINFERENCE_*` becomes one frozen `Settings`.

`Settings.from_environ` is called once, by the command line, and the value is passed down.
Flags override it there. A malformed value is an error; an unknown or obsolete name is a
warning with the nearest known one, returned so that the caller can show it.
"""

import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Self

from xinference.errors import InvalidSetting

DEFAULT_PORT = 9997
DEFAULT_ENDPOINT = f"http://127.0.0.1:{DEFAULT_PORT}"

OBSOLETE = {
    "XINFERENCE_TRANSFORMERS_ENABLE_BATCHING": "continuous batching is always on; remove it",
}


@dataclass(frozen=True, slots=True)
class PortRange:
    """The TCP ports, both ends included, that replicas may listen on between hosts."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How this process is configured. Precedence: flag, then environment, then default."""

    home: Path = field(default_factory=lambda: Path.home() / ".xinference")
    """Everything that is kept: state, keys, logs, registrations. Nothing outside is deleted."""
    endpoint: str = DEFAULT_ENDPOINT
    """Where the client commands look for the gateway."""
    api_key: str | None = None
    """Sent by the client commands as a bearer token."""
    cluster_key: str | None = None
    """Shared by the hosts of a cluster. None: the file `cluster.key` under `home`."""
    log_level: str = "INFO"
    disable_metrics: bool = False
    restart_limit: int = 5
    """Deaths of one replica within five minutes before it is given up."""
    launch_strategy: str = "idle_first"
    """Where replicas go when there is a choice: idle_first or least_models."""
    allow_multi_replica_per_gpu: bool = True
    replica_ports: PortRange | None = None
    """None: any free port."""
    encrypt_data_plane: bool = True
    """Whether requests and answers are encrypted on their way between hosts."""
    drain_seconds: float = 30.0
    """After SIGTERM, and when a replica is stopped, so long may running requests go on."""
    continue_streams: bool = True
    """Whether an answer that was begun goes on at another replica when its own dies."""
    http_keep_alive_seconds: float = 5.0
    answer_timeout_seconds: float = 600.0
    """How long a request may wait for the beginning of its answer, if its caller does not say."""
    enable_virtual_env: bool = True
    """Whether models that want packages run in virtual environments, where a launch is silent."""
    virtual_env_skip_installed: bool = True
    """What the host has, as it is required, is not installed in one once more."""
    virtual_env_offline: bool = False
    virtual_env_find_links_roots: tuple[Path, ...] = field(
        default_factory=lambda: (Path.home() / "wheels",)
    )
    """Below these, and nowhere else, a launch may have packages looked for."""
    batch_size: int = 32
    """The most texts that a model embeds or reranks at once, where its launch does not say."""
    batch_interval_seconds: float = 0.003
    """How long such a batch waits for the next text while several callers ask at once."""

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> tuple[Self, list[str]]:
        """Read `XINFERENCE_*`; return the settings and a warning per name that is not one.

        Raises:
            InvalidSetting: naming the variable, its value and what was expected.
        """
        given: dict[str, object] = {}
        warnings: list[str] = []
        for name, value in environ.items():
            if not name.startswith("XINFERENCE_"):
                continue
            if name in VARIABLES:
                variable = VARIABLES[name]
                given[variable.setting] = variable.parse(name, value)
            elif name in OBSOLETE:
                warnings.append(f"{name} is obsolete: {OBSOLETE[name]}.")
            else:
                near = difflib.get_close_matches(name, VARIABLES, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                warnings.append(f"{name} is not a setting of this version and has no effect.{hint}")
        return cls(**given), warnings  # type: ignore[arg-type]  # each parser returns its field's type


def _text(name: str, value: str) -> str:
    if not value.strip():
        raise InvalidSetting(name=name, value=value, expected="a text that is not empty")
    return value.strip()


def _path(name: str, value: str) -> Path:
    return Path(_text(name, value)).expanduser().absolute()


def _paths(name: str, value: str) -> tuple[Path, ...]:
    return tuple(_path(name, one) for one in value.split(os.pathsep) if one.strip())


def _flag(name: str, value: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if value.strip().lower() not in words:
        raise InvalidSetting(name=name, value=value, expected="1 or 0")
    return words[value.strip().lower()]


def _count(name: str, value: str) -> int:
    if not value.strip().isdecimal():
        raise InvalidSetting(name=name, value=value, expected="a whole number, 0 or more")
    return int(value)


def _positive(name: str, value: str) -> int:
    if not value.strip().isdecimal() or int(value) < 1:
        raise InvalidSetting(name=name, value=value, expected="a whole number above 0")
    return int(value)


def _pause(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0.0 <= seconds <= 1.0:
        raise InvalidSetting(name=name, value=value, expected="seconds, from 0 to 1")
    return seconds


def _seconds(name: str, value: str) -> float:
    try:
        seconds = float(value)
    except ValueError:
        seconds = -1.0
    if not 0.0 < seconds < float("inf"):
        raise InvalidSetting(name=name, value=value, expected="seconds, above 0")
    return seconds


def _launch_strategy(name: str, value: str) -> str:
    words = {"idlefirst": "idle_first", "leastmodels": "least_models"}
    plain = re.sub(r"[^a-z]", "", value.lower()).removesuffix("launchstrategy")
    if plain not in words:
        raise InvalidSetting(name=name, value=value, expected="idle_first or least_models")
    return words[plain]


def _log_level(name: str, value: str) -> str:
    levels = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
    if value.strip().upper() not in levels:
        raise InvalidSetting(name=name, value=value, expected="one of " + ", ".join(levels))
    return value.strip().upper()


def _ports(name: str, value: str) -> PortRange:
    first, _, last = value.partition("-")
    if first.isdecimal() and last.isdecimal() and 0 < int(first) <= int(last) < 65536:
        return PortRange(int(first), int(last))
    raise InvalidSetting(name=name, value=value, expected="two ports, such as 40000-40099")


@dataclass(frozen=True, slots=True)
class Variable:
    """One environment variable: the setting it fills, how it is read, what it is for."""

    setting: str
    parse: Callable[[str, str], object]
    meaning: str


VARIABLES: Mapping[str, Variable] = {
    "XINFERENCE_HOME": Variable("home", _path, "where everything is kept"),
    "XINFERENCE_ENDPOINT": Variable("endpoint", _text, "the gateway the client commands use"),
    "XINFERENCE_API_KEY": Variable("api_key", _text, "sent by the client commands"),
    "XINFERENCE_CLUSTER_KEY": Variable("cluster_key", _text, "shared by the hosts of a cluster"),
    "XINFERENCE_LOG_LEVEL": Variable("log_level", _log_level, "DEBUG to CRITICAL"),
    "XINFERENCE_DISABLE_METRICS": Variable("disable_metrics", _flag, "1: no /metrics"),
    "XINFERENCE_MODEL_ACTOR_AUTO_RECOVER_LIMIT": Variable(
        "restart_limit", _count, "deaths within five minutes before a replica is given up"
    ),
    "XINFERENCE_LAUNCH_STRATEGY": Variable(
        "launch_strategy", _launch_strategy, "where replicas go: idle_first or least_models"
    ),
    "XINFERENCE_ALLOW_MULTI_REPLICA_PER_GPU": Variable(
        "allow_multi_replica_per_gpu", _flag, "0: no more than one replica on a GPU"
    ),
    "XINFERENCE_REPLICA_PORTS": Variable(
        "replica_ports", _ports, "ports of the data plane between hosts"
    ),
    "XINFERENCE_ENCRYPT_DATA_PLANE": Variable(
        "encrypt_data_plane", _flag, "0: no TLS for requests and answers between hosts"
    ),
    "XINFERENCE_DRAIN_SECONDS": Variable(
        "drain_seconds", _seconds, "how long running requests may go on when something is stopped"
    ),
    "XINFERENCE_CONTINUE_STREAMS": Variable(
        "continue_streams", _flag, "0: a stream whose replica dies ends with an error"
    ),
    "XINFERENCE_HTTP_TIMEOUT_KEEP_ALIVE": Variable(
        "http_keep_alive_seconds", _seconds, "how long an idle HTTP connection is kept"
    ),
    "XINFERENCE_ANSWER_TIMEOUT": Variable(
        "answer_timeout_seconds", _seconds, "how long an answer may take to begin"
    ),
    "XINFERENCE_ENABLE_VIRTUAL_ENV": Variable(
        "enable_virtual_env", _flag, "0: models run in the host's own environment"
    ),
    "XINFERENCE_VIRTUAL_ENV_SKIP_INSTALLED": Variable(
        "virtual_env_skip_installed", _flag, "0: install what the host has once more"
    ),
    "XINFERENCE_VIRTUAL_ENV_OFFLINE_INSTALL": Variable(
        "virtual_env_offline", _flag, "1: install from the cache and directories alone"
    ),
    "XINFERENCE_VIRTUAL_ENV_FIND_LINKS_ALLOWED_ROOTS": Variable(
        "virtual_env_find_links_roots", _paths, "where a launch may have packages looked for"
    ),
    "XINFERENCE_BATCH_SIZE": Variable(
        "batch_size", _positive, "texts that a model embeds or reranks at once, at most"
    ),
    "XINFERENCE_BATCH_INTERVAL": Variable(
        "batch_interval_seconds", _pause, "how long such a batch waits for the next text"
    ),
}
