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
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self
from urllib.parse import urlsplit

from xinference.errors import InvalidSetting

DEFAULT_PORT = 9997
DEFAULT_ENDPOINT = f"http://127.0.0.1:{DEFAULT_PORT}"

OBSOLETE = {
    "XINFERENCE_TRANSFORMERS_ENABLE_BATCHING": "continuous batching is always on; remove it",
    "XINFERENCE_ALLOWED_IPS": "no address is kept out; listen on loopback, use a firewall, or make "
    "API keys",
    "XINFERENCE_TRUST_REMOTE_CODE": "each launch says it with trust_remote_code",
    "XINFERENCE_MAX_TOKENS": "each request says it with max_tokens",
}
"""Of Xinference, and what to do instead."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """The TCP ports, both ends included, that replicas may listen on between hosts."""

    first: int
    last: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DownloadSettings:
    """Where a worker downloads models from, and how."""

    model_src: str = "auto"
    """The hub that is asked, where it has a model; auto: the first that answers."""
    hf_endpoint: str = "https://huggingface.co"
    hf_token: str | None = field(default=None, repr=False)
    modelscope_endpoint: str = "https://www.modelscope.cn"
    modelscope_token: str | None = field(default=None, repr=False)
    is_offline: bool = False
    """What is not here is not downloaded."""
    is_hf_offline: bool = False
    """The same, as Hugging Face's own tools say it."""
    hub_timeout_seconds: float = 3.0
    """For a connection. After so long another hub is asked."""
    stall_seconds: float = 30.0
    """A connection that brings nothing for so long is given up, and another one goes on."""
    max_attempts: int = 3
    """In a row, that bring nothing."""
    num_workers: int = 4
    """Files that are fetched at once."""
    max_models: int = 4
    """That are downloaded at once; others wait."""

    @property
    def offline_by(self) -> str | None:
        """The variable that forbids to ask a hub; None: it is allowed."""
        if self.is_offline:
            return "XINFERENCE_OFFLINE"
        return "HF_HUB_OFFLINE" if self.is_hf_offline else None


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
    log_format: str = "text"
    """How log lines are written: text or json."""
    log_requests: str = "none"
    """What the gateway logs of each request: none, summary, or prompts, which is its body, too."""
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
    downloads: DownloadSettings = field(default_factory=DownloadSettings)

    @classmethod
    def from_environ(cls, environ: Mapping[str, str]) -> tuple[Self, list[str]]:
        """Read `XINFERENCE_*` and the hubs' own; return the settings, and warnings.

        There is one for each `XINFERENCE_*` that is none.

        Raises:
            InvalidSetting: naming the variable, its value and what was expected.
        """
        given: dict[str, object] = {}
        warnings: list[str] = []
        for name, value in environ.items():
            is_ours = name.startswith("XINFERENCE_")
            if name in VARIABLES and (is_ours or value.strip()):
                variable = VARIABLES[name]
                given[variable.setting] = variable.parse(name, value)
            elif not is_ours:
                continue
            elif name in OBSOLETE:
                warnings.append(f"{name} is obsolete: {OBSOLETE[name]}.")
            else:
                near = difflib.get_close_matches(name, VARIABLES, n=1)
                hint = f" Did you mean {near[0]}?" if near else ""
                warnings.append(f"{name} is not a setting of this version and has no effect.{hint}")
        of_downloads = {
            one.name: given.pop(one.name) for one in fields(DownloadSettings) if one.name in given
        }
        given["downloads"] = DownloadSettings(**of_downloads)  # type: ignore[arg-type]  # see below
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


def _hub(name: str, value: str) -> str:
    hubs = ("auto", "huggingface", "modelscope")
    if value.strip().lower() not in hubs:
        raise InvalidSetting(name=name, value=value, expected="one of " + ", ".join(hubs))
    return value.strip().lower()


def _url(name: str, value: str) -> str:
    """Read an address, or a host alone, as the hubs' own tools do."""
    text = _text(name, value).rstrip("/")
    url = urlsplit(text if "://" in text else f"https://{text}")
    if url.scheme not in {"http", "https"} or not url.hostname:
        raise InvalidSetting(name=name, value=value, expected="an http:// or https:// address")
    return url.geturl()


def _hub_flag(name: str, value: str) -> bool:
    """Read a flag as Hugging Face's tools do: anything else is no."""
    return value.strip().lower() in {"1", "true", "yes", "on"}


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


def _log_format(name: str, value: str) -> str:
    return _one_of(("text", "json"), name, value)


def _log_requests(name: str, value: str) -> str:
    return _one_of(("none", "summary", "prompts"), name, value)


def _one_of(words: tuple[str, ...], name: str, value: str) -> str:
    if value.strip().lower() not in words:
        raise InvalidSetting(name=name, value=value, expected="one of " + ", ".join(words))
    return value.strip().lower()


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
    "XINFERENCE_LOG_FORMAT": Variable("log_format", _log_format, "text or json"),
    "XINFERENCE_LOG_REQUESTS": Variable(
        "log_requests", _log_requests, "of each request: none, summary or prompts"
    ),
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
    "XINFERENCE_MODEL_SRC": Variable("model_src", _hub, "auto, huggingface or modelscope"),
    "XINFERENCE_OFFLINE": Variable("is_offline", _flag, "1: no hub is asked"),
    "XINFERENCE_HUB_DETECT_TIMEOUT": Variable(
        "hub_timeout_seconds", _seconds, "for a connection; then another hub is asked"
    ),
    "XINFERENCE_DOWNLOAD_STALL_SECONDS": Variable(
        "stall_seconds", _seconds, "a download that gets nothing for so long connects anew"
    ),
    "XINFERENCE_DOWNLOAD_MAX_ATTEMPTS": Variable(
        "max_attempts", _positive, "for a file, in a row, that bring nothing"
    ),
    "XINFERENCE_MODEL_DOWNLOAD_WORKERS": Variable(
        "num_workers", _positive, "files of a model that are downloaded at once"
    ),
    "XINFERENCE_DOWNLOAD_MAX_MODELS": Variable(
        "max_models", _positive, "models that a worker downloads at once; others wait"
    ),
    "HF_ENDPOINT": Variable("hf_endpoint", _url, "Hugging Face, or a mirror of it"),
    "HF_TOKEN": Variable("hf_token", _text, "for gated and private repositories"),
    "HF_HUB_OFFLINE": Variable("is_hf_offline", _hub_flag, "1: no hub is asked"),
    "MODELSCOPE_DOMAIN": Variable("modelscope_endpoint", _url, "ModelScope"),
    "MODELSCOPE_API_TOKEN": Variable("modelscope_token", _text, "for private repositories there"),
}
