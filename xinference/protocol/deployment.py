# SPDX-License-Identifier: Apache-2.0
"""What someone wants to run, what a replica is told to run, and how it goes.

`LaunchSpec` is a caller's wish, built once at the edge. The catalogue turns it into a
`ReplicaSpec`, which names exact files and options and is what a replica's process is started
with. `ModelStatus` and its parts are snapshots of how it goes.
"""

import re
from dataclasses import dataclass, field, fields
from enum import StrEnum
from typing import Any, Self

from xinference.errors import InvalidRequest
from xinference.identifiers import InstanceId, ModelUid, NodeId, ReplicaUid

from .downloads import DownloadRequest, FileProgress
from .encoding import EncoderOptions, RerankTemplate
from .environments import EnvironmentSpec, FamilyEnvironment, check_packages
from .servers import ServerOptions

MAX_REPLICAS = 1000
DTYPES = ("auto", "float32", "bfloat16", "float16")
MIN_STEP_SECONDS, MAX_STEP_SECONDS = 0.001, 60.0
_DEVICE = re.compile(r"auto|cpu|cuda(:\d{1,3})?")


class SchedulerPolicy(StrEnum):
    """Who goes first in a step."""

    FIFO = "fifo"
    """Running streams get their token in every step; prompts get what is left of its time."""
    PREFILL_FIRST = "prefill_first"
    """Prompts are computed in chunks as large as may be, and streams wait while there are any."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """What a launch may set of the `transformers` engine. None lets the engine choose."""

    max_num_seqs: int = 16
    """Requests that run at once."""
    max_model_len: int | None = None
    """Prompt and answer, in tokens. None: what the model's config says."""
    max_num_batched_tokens: int | None = None
    """The most tokens of one step, prompt chunks and decoding together."""
    max_queue_size: int = 1024
    """Requests that wait; one more is refused with `ModelOverloaded`."""
    dtype: str = "auto"
    """One of `DTYPES`."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<index>."""
    kv_cache_bytes: int | None = None
    block_size: int | None = None
    """Tokens in a block of the KV cache."""
    num_threads: int | None = None
    """Threads of the engine on CPU."""
    trust_remote_code: bool = False
    enable_prefix_caching: bool = True
    """Requests whose prompts begin alike compute the beginning once."""
    scheduler_policy: SchedulerPolicy = SchedulerPolicy.FIFO
    max_step_seconds: float | None = None
    """Beside running streams, prompts are computed in chunks that keep a step about this short.
    Not with `prefill_first`."""
    deterministic: bool = False
    """The same tokens whatever runs beside a request: float32, and prompts in chunks that depend on
    no clock and no neighbour. Costs speed."""
    enable_thinking: bool | None = None
    """Of hybrid models: whether they think where a request does not say. None: the template's
    choice."""
    thinking_budget: int | None = None
    """Of models that think: after how many tokens they have to answer where a request does not
    say. None: no limit."""
    device_memory_bytes: int | None = None
    """Of a CUDA device, what weights and KV cache may take together. None: what is free; replicas
    that are launched onto one device together share it evenly."""

    def __post_init__(self) -> None:
        for name in (
            "max_num_seqs",
            "max_model_len",
            "max_num_batched_tokens",
            "max_queue_size",
            "kv_cache_bytes",
            "block_size",
            "num_threads",
            "thinking_budget",
            "device_memory_bytes",
        ):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise InvalidRequest(
                    field=name, problem=f"must be a whole number above 0, got {value!r}"
                )
        if self.dtype not in DTYPES:
            raise InvalidRequest(
                field="dtype", problem=f"must be one of {', '.join(DTYPES)}, got {self.dtype!r}"
            )
        if not isinstance(self.device, str) or not _DEVICE.fullmatch(self.device):
            raise InvalidRequest(
                field="device",
                problem=f"must be auto, cpu, cuda or cuda:<index>, got {self.device!r}",
            )
        for name in ("trust_remote_code", "enable_prefix_caching", "deterministic"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidRequest(
                    field=name, problem=f"must be true or false, got {getattr(self, name)!r}"
                )
        if self.scheduler_policy not in tuple(SchedulerPolicy):
            raise InvalidRequest(
                field="scheduler_policy",
                problem=f"must be one of {', '.join(SchedulerPolicy)}, "
                f"got {self.scheduler_policy!r}",
            )
        if not isinstance(self.enable_thinking, bool | None):
            raise InvalidRequest(
                field="enable_thinking",
                problem=f"must be true or false, got {self.enable_thinking!r}",
            )
        # Why: a launch gives its word, and the engine compares by identity.
        object.__setattr__(self, "scheduler_policy", SchedulerPolicy(self.scheduler_policy))
        self._check_max_step_seconds()
        if self.deterministic and self.dtype not in ("auto", "float32"):
            raise InvalidRequest(
                field="dtype",
                problem=f"must be auto or float32 with deterministic, got {self.dtype!r}",
            )

    def _check_max_step_seconds(self) -> None:
        seconds = self.max_step_seconds
        if seconds is None:
            return
        if isinstance(seconds, bool) or not isinstance(seconds, int | float):
            problem = f"must be a number of seconds, got {seconds!r}"
        elif not MIN_STEP_SECONDS <= seconds <= MAX_STEP_SECONDS:
            problem = f"must be from {MIN_STEP_SECONDS} to {MAX_STEP_SECONDS:g}, got {seconds!r}"
        elif self.scheduler_policy is SchedulerPolicy.PREFILL_FIRST:
            problem = "means nothing with scheduler_policy prefill_first; leave one of them out"
        elif self.deterministic:
            problem = "makes chunks depend on the clock, which deterministic forbids; leave one out"
        else:
            return
        raise InvalidRequest(field="max_step_seconds", problem=problem)

    @classmethod
    def from_mapping(cls, given: dict[str, Any]) -> Self:
        """Build from launch keys; `context_length` is another name of `max_model_len`.

        Raises:
            InvalidRequest: a key is unknown, given twice under both names, or has a bad value.
        """
        known = {option.name for option in fields(cls)}
        options = dict(given)
        if "context_length" in options:
            if options.get("max_model_len") not in (None, options["context_length"]):
                raise InvalidRequest(
                    field="context_length", problem="differs from max_model_len; give one of them"
                )
            options["max_model_len"] = options.pop("context_length")
        for name in options:
            if name not in known:
                raise InvalidRequest(
                    field=name,
                    problem="is not an option of the transformers engine; those are "
                    + ", ".join(sorted(known | {"context_length"})),
                )
        return cls(**options)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaPlacement:
    """Where one replica may go. What is None is for the cluster to choose."""

    worker_ip: str | None = None
    """The host of a worker, or its "host:port"."""
    n_gpu: int | None = None
    """0: the CPU; 1: a GPU. None: a GPU where there is one."""
    gpu_idx: tuple[int, ...] | None = None
    """These GPUs of the worker."""

    def __post_init__(self) -> None:
        _check_gpus(self.n_gpu, self.gpu_idx)


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchSpec:
    """What a caller wants to run. Written to the store before anything is done."""

    model_uid: ModelUid | None = None
    """None: the supervisor names it after the family."""
    model_name: str
    """A family, or the id of a repository. "": what the files of `model_path` say."""
    model_type: str = "LLM"
    model_engine: str | None = None
    """None: the default one of the type."""
    model_size_in_billions: str | None = None
    """As families spell it: "4", "0_5"."""
    model_format: str | None = None
    quantization: str | None = None
    model_path: str | None = None
    """Files on the worker, used instead of the family's source."""
    replica: int = 1
    worker_ip: str | None = None
    envs: dict[str, str] = field(default_factory=dict)
    engine_options: EngineOptions = field(default_factory=EngineOptions)
    encoder_options: EncoderOptions = field(default_factory=EncoderOptions)
    """Of models that embed or rerank."""
    request_limits: int | None = None
    """Requests that each replica has at once; one more is refused. None: as many as queue up."""
    n_gpu: int | None = None
    """How many GPUs the replicas are spread over; 0: none, the CPU. None: all there are."""
    gpu_idx: tuple[int, ...] | None = None
    """One GPU for each replica, in their order; one may be there more than once."""
    replica_config: tuple[ReplicaPlacement, ...] = ()
    """Where each replica goes, instead of `worker_ip`, `n_gpu` and `gpu_idx`."""
    download_hub: str | None = None
    """The only hub that its files may come from. None: whichever has them and answers."""
    enable_virtual_env: bool | None = None
    """Whether the replicas run in a virtual environment. None: where there are packages for one,
    and the cluster does not say otherwise."""
    virtual_env_packages: tuple[str, ...] = ()
    """What is in it, as pip reads it, beside the family's."""
    virtual_env_find_links: tuple[str, ...] = ()
    """Directories of the worker with packages."""
    server_options: ServerOptions | None = None
    """Of engines that are servers of their own; None: the engine is none of them."""
    min_replicas: int | None = None
    """With `max_replicas`: never fewer. None: `replica`."""
    max_replicas: int | None = None
    """Replicas come and go with the load, up to so many. None: their number stays."""
    idle_timeout: float | None = None
    """After so many seconds without a request the model sleeps: nothing of it runs until the next
    one. None: it stays."""
    autoload: bool = False
    """It may be put to sleep to make room for another model."""

    @property
    def names_repository(self) -> bool:
        """Whether what it names is the id of a repository on a hub."""
        return "/" in self.model_name and self.model_path is None

    def __post_init__(self) -> None:
        if isinstance(self.replica, bool) or not 1 <= self.replica <= MAX_REPLICAS:
            raise InvalidRequest(
                field="replica",
                problem=f"must be a whole number from 1 to {MAX_REPLICAS}, got {self.replica!r}",
            )
        _check_gpus(self.n_gpu, self.gpu_idx)
        if self.gpu_idx is not None and len(self.gpu_idx) % self.replica:
            raise InvalidRequest(
                field="gpu_idx",
                problem=f"names {len(self.gpu_idx)} GPUs, which is no multiple of the "
                f"{self.replica} replicas",
            )
        if self.replica_config:
            self._check_replica_config()
        check_packages("virtual_env_packages", self.virtual_env_packages)
        check_packages("virtual_env_find_links", self.virtual_env_find_links)
        self._check_scaling()
        limit = self.request_limits
        if limit is not None and (isinstance(limit, bool) or limit < 1):
            raise InvalidRequest(
                field="request_limits", problem=f"must be a whole number above 0, got {limit!r}"
            )

    def _check_scaling(self) -> None:
        if self.idle_timeout is not None and not self.idle_timeout > 0:
            raise InvalidRequest(
                field="idle_timeout",
                problem=f"must be a number of seconds above 0, got {self.idle_timeout!r}",
            )
        lowest, highest = self.min_replicas, self.max_replicas
        if highest is None:
            if lowest is not None:
                raise InvalidRequest(
                    field="min_replicas", problem="means nothing without max_replicas; give both"
                )
            return
        for name in ("gpu_idx", "replica_config"):
            if getattr(self, name):
                raise InvalidRequest(
                    field="max_replicas",
                    problem=f"cannot scale replicas that {name} puts in place; give one of them",
                )
        if not 1 <= (self.replica if lowest is None else lowest) <= self.replica:
            raise InvalidRequest(
                field="min_replicas",
                problem=f"must be from 1 to the {self.replica} of replica, got {lowest!r}",
            )
        if not self.replica <= highest <= MAX_REPLICAS:
            raise InvalidRequest(
                field="max_replicas",
                problem=f"must be from the {self.replica} of replica to {MAX_REPLICAS}, "
                f"got {highest!r}",
            )

    def _check_replica_config(self) -> None:
        for name in ("worker_ip", "n_gpu", "gpu_idx"):
            if getattr(self, name) is not None:
                raise InvalidRequest(
                    field=name, problem="means nothing beside replica_config; give one of them"
                )
        if len(self.replica_config) != self.replica:
            raise InvalidRequest(
                field="replica_config",
                problem=f"has {len(self.replica_config)} entries for {self.replica} replicas",
            )


def _check_gpus(n_gpu: int | None, gpu_idx: tuple[int, ...] | None) -> None:
    if n_gpu is not None and (isinstance(n_gpu, bool) or n_gpu < 0):
        raise InvalidRequest(
            field="n_gpu", problem=f"must be a whole number, 0 or more, got {n_gpu!r}"
        )
    if gpu_idx is None:
        return
    if not gpu_idx or any(isinstance(one, bool) or one < 0 for one in gpu_idx):
        raise InvalidRequest(
            field="gpu_idx", problem=f"must be numbers of GPUs, from 0 on, got {list(gpu_idx)!r}"
        )
    if n_gpu is not None and n_gpu != len(set(gpu_idx)):
        raise InvalidRequest(
            field="gpu_idx", problem=f"names {len(set(gpu_idx))} GPUs, but n_gpu says {n_gpu}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelDescription:
    """What a model is: what `GET /v1/models` shows of it."""

    model_uid: ModelUid
    model_type: str
    model_name: str
    model_engine: str
    model_format: str
    model_size_in_billions: str
    quantization: str
    model_family: str
    model_lang: tuple[str, ...]
    model_ability: tuple[str, ...]
    model_description: str
    model_hub: str
    revision: str | None
    context_length: int
    replica: int
    address: str | None = None
    """Where its process listens; None until it is ready."""
    accelerators: tuple[str, ...] = ()
    dimensions: int | None = None
    """Of a model that embeds: how many numbers a vector has."""
    rerank_type: str | None = None
    """Of a model that reranks: how it scores, in the catalogue's words."""
    memory_bytes: int = 0
    """About what a replica takes at the least; 0: nobody knows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSource:
    """Where the files are, and what the family says that the files do not."""

    path: str
    """A directory on the worker, or "package:guide" for the one inside this package. Empty: where
    `download` leads."""
    chat_template: str | None = None
    """None: the tokenizer's own."""
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    tool_parser: str | None = None
    """How its calls of tools are written; None: it makes none."""
    reasoning_start_tag: str | None = None
    reasoning_end_tag: str | None = None
    prompts: dict[str, str] = field(default_factory=dict)
    """Of a model that embeds: what is put before texts, by the name of what they are for."""
    rerank_template: RerankTemplate | None = None
    """Of a language model that reranks."""
    download: DownloadRequest | None = None
    """What the worker has to have first; `path` then says where that is."""
    virtual_env: FamilyEnvironment | None = None
    """What its replicas' processes want beside what the host has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSpec:
    """Everything a replica's process is told. A restart gets a new `instance`."""

    replica: ReplicaUid
    instance: InstanceId
    source: ModelSource
    abilities: tuple[str, ...]
    engine_options: EngineOptions
    python_executable: str
    """The interpreter of the process, so that a model can have an environment of its own. Empty:
    that of `virtual_env`, or else the worker's."""
    envs: dict[str, str] = field(default_factory=dict)
    """Set before torch is imported."""
    request_limits: int | None = None
    """Requests at once; one more is refused with `ModelOverloaded`."""
    gpu_idx: tuple[int, ...] | None = None
    """The GPUs of the node that the process sees; none of them if empty. None: as it finds it."""
    model_type: str = "LLM"
    encoder_options: EncoderOptions = field(default_factory=EncoderOptions)
    """Of models that embed or rerank."""
    virtual_env: EnvironmentSpec | None = None
    """What its process runs in; its worker makes it first. None: the host's own."""
    server_options: ServerOptions | None = None
    """Of an engine that is a server of its own, which the process then starts and asks."""
    model_name: str = ""
    """This and what follows is for those who watch; nothing is decided by it."""
    model_engine: str = ""
    model_format: str = ""
    quantization: str = ""


class ModelState(StrEnum):
    """Of a model, as `GET /v1/models/instances` shows it."""

    CREATING = "CREATING"
    LOADING = "LOADING"
    READY = "READY"
    ASLEEP = "ASLEEP"
    """Nothing of it runs; the next request starts it."""
    ERROR = "ERROR"
    TERMINATING = "TERMINATING"
    TERMINATED = "TERMINATED"


class ReplicaState(StrEnum):
    """Of one replica. The reconcile loop moves it; only the replica itself can say READY."""

    PENDING = "pending"
    STARTING = "starting"
    DOWNLOADING = "downloading"
    LOADING = "loading"
    READY = "ready"
    BACKING_OFF = "backing off"
    """It died; it is started again when the delay is over."""
    STOPPING = "stopping"
    FAILED = "failed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaStatus:
    """A snapshot of one replica."""

    replica: ReplicaUid
    state: ReplicaState
    node: NodeId | None
    address: str | None
    """Of its data plane: "unix:<path>", "tcp:host:port" or "tls:host:port"; None until known."""
    instance: InstanceId | None
    created_ts: int
    num_restarts: int
    error_message: str
    """Why it is FAILED or BACKING_OFF; empty otherwise."""
    gpu_idx: tuple[int, ...] | None = None
    """The GPUs of the node that it was given; None: it was not given any in particular."""
    virtual_env_packages: dict[str, str] | None = None
    """Of a ready one in a virtual environment: versions of what its process found in that, by
    name."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelStatus:
    """A snapshot of one model."""

    model_uid: ModelUid
    description: ModelDescription
    state: ModelState
    created_ts: int
    replicas: tuple[ReplicaStatus, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaProgress:
    """How far one replica of a launch is; the fields are those of `LaunchProgress`."""

    replica: ReplicaUid
    progress: float
    stage: str
    info: str
    download_files: tuple[FileProgress, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class LaunchProgress:
    """How far a launch is. An unknown model is at 0, "pending"."""

    progress: float
    """From 0 to 1."""
    stage: str
    """pending, launching, downloading, loading, completed, cancelled or error."""
    info: str = ""
    download_files: tuple[FileProgress, ...] = ()
    """Of the replica that is the furthest behind; empty where nothing has to be downloaded."""
    replicas: tuple[ReplicaProgress, ...] = ()
    """Empty where none is wanted any more, or yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelEvent:
    """One line of a model's story."""

    event_type: str
    """INFO, WARNING or ERROR."""
    event_ts: int
    event_content: str


class AbortOutcome(StrEnum):
    """What an abort by request id did."""

    DONE = "DONE"
    NOT_FOUND = "NOT_FOUND"
    NO_OP = "NO_OP"
    """The request had already ended."""
