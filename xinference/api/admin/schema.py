# SPDX-License-Identifier: Apache-2.0
"""The bodies of Xinference's own routes, in and out.

A field that is not honoured in this version is marked `Only(...)`, as in `openai/schema.py`.
"""

from dataclasses import fields
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from xinference.api.fields import Answer, Body, Only, Shaped
from xinference.api.keys.key import MAX_LIMIT, MAX_MODELS, MAX_NAME_LEN
from xinference.protocol.autostart import MAX_RETRIES, MAX_RETRY_SECONDS
from xinference.protocol.deployment import MAX_REPLICAS, EngineOptions
from xinference.protocol.encoding import EncoderOptions

MAX_BLOCK_SECONDS = 3600
MAX_UID_LEN = 100
MAX_GPUS = 1023
MAX_REQUEST_LIMIT = 2**31 - 1
MAX_IDLE_SECONDS = 10.0**9
MAX_LIFETIME_SECONDS = 100 * 366 * 86400


def _as_number(given: object) -> object:
    """Read a number that is written as a text, as forms and old clients do."""
    return int(given) if isinstance(given, str) and given.isascii() and given.isdecimal() else given


Count = Annotated[int, BeforeValidator(_as_number), Field(ge=1, le=MAX_REPLICAS)]
Index = Annotated[int, Field(ge=0, le=MAX_GPUS)]
GpuCount = Annotated[
    int | Literal["auto"] | None,
    BeforeValidator(_as_number),
    Shaped('"auto", null, or a whole number of GPUs'),
]
GpuIndices = Annotated[Index | list[Index], Shaped("the number of a GPU, or a list of them")]


class DeviceConfig(Body):
    """Where one replica goes."""

    worker_ip: str | None = None
    """The host of a worker, or its "host:port"."""
    n_gpu: GpuCount = "auto"
    gpu_idx: GpuIndices | None = None


class ReplicaConfig(Body):
    """One replica of a launch."""

    devices: list[DeviceConfig] = Field(min_length=1, max_length=1)
    """Exactly one: a replica runs on one worker."""
    replica_uid: Annotated[object, Only()] = None
    """Replicas are named <model uid>-rep<number>."""


class LaunchRequest(Body):
    """`POST /v1/models`. Any other key is an option of the engine; the last ones are those."""

    model_config = ConfigDict(
        extra="allow",
        json_schema_extra=lambda schema: schema["properties"].update(
            {option.name: {"description": "An engine option."} for option in fields(EngineOptions)}
            | {
                option.name: {"description": "An option of models that embed or rerank."}
                for option in fields(EncoderOptions)
            }
            | {"context_length": {"description": "Another name of max_model_len."}}
        ),
    )

    model_name: str | None = Field(None, min_length=1)
    """A family, as the registrations list it, or the id of a repository.
    Null with model_path: what the files say."""
    model_engine: str | None = None
    """Null: transformers; upper and lower case are the same."""
    model_type: str = "LLM"
    """LLM, embedding or rerank."""
    model_uid: str | None = None
    """Null: the model's name, with random characters behind it if that is taken."""
    model_size_in_billions: int | float | str | None = None
    """4, 0.5, "0.5" or "0_5"."""
    size_in_billions: int | float | str | None = None
    """Another name of it."""
    model_format: str | None = None
    quantization: str | None = None
    model_path: str | None = None
    """A directory on the worker, used instead of the family's source."""
    worker_ip: str | None = None
    envs: dict[str, Any] | None = None
    """Environment of the model's process; the values are texts."""
    enable_virtual_env: bool | None = None
    """Whether the model's processes run in a virtual environment. Null: where there are packages
    for one, and the cluster does not say otherwise."""
    virtual_env_packages: list[str] | None = None
    """What is in it, as pip reads it, beside the family's."""
    virtual_env_find_links: list[str] | None = None
    """Directories of the worker with packages."""
    request_limits: int | None = Field(None, ge=1, le=MAX_REQUEST_LIMIT)
    """Requests that each replica has at once; one more is refused with a 429."""
    enable_thinking: bool | None = None
    """Of hybrid models: whether they think where a request does not say."""
    replica: Count | None = None
    """Copies of the model, 1 by default."""
    n_gpu: GpuCount = "auto"
    """How many GPUs the replicas are spread over; "auto": all; null or 0: the CPU."""
    gpu_idx: GpuIndices | None = None
    """One GPU for each replica."""
    replica_config: list[ReplicaConfig] | None = None
    """Where each replica goes, instead of worker_ip, n_gpu and gpu_idx."""
    download_hub: str | None = None
    """huggingface or modelscope; auto: whichever has the files and answers."""
    min_replicas: Count | None = None
    """With max_replicas: never fewer; replica by default."""
    max_replicas: Count | None = None
    """Replicas are started and stopped with the load, up to so many."""
    idle_timeout: float | None = Field(None, gt=0, le=MAX_IDLE_SECONDS)
    """After so many seconds without a request nothing of the model runs until the next one."""
    autoload: bool | None = None
    """It may be put to sleep to make room for another model; the next request starts it."""

    n_worker: Annotated[object, Only(1)] = None
    peft_model_config: Annotated[object, Only({})] = None
    quantization_config: Annotated[object, Only({})] = None
    # Why both pass: thoughts are always told apart; false is what a launch that says all sends.
    reasoning_content: Annotated[object, Only(True, False)] = None
    multimodal_projector: Annotated[object, Only()] = None
    enable_mtp: Annotated[object, Only(False)] = None


class InstanceRequest(LaunchRequest):
    """`POST /v1/models/instance`: a launch of the variant that `model_version` names."""

    model_version: str = Field(min_length=1)
    """As `GET /v1/models/{model_type}/{model_name}/versions` has it. It takes the place of name,
    size, format and quantization."""


class DownloadBody(Body):
    """`POST /v1/cache/models`: the variant, as a launch names it."""

    model_name: str = Field(min_length=1)
    """A family, as the registrations list it."""
    model_type: str = "LLM"
    """LLM, embedding or rerank."""
    model_engine: str | None = None
    """The engine that it is for; null: the default one."""
    model_size_in_billions: int | float | str | None = None
    """4, 0.5, "0.5" or "0_5"."""
    size_in_billions: int | float | str | None = None
    """Another name of it."""
    model_format: str | None = None
    quantization: str | None = None
    download_hub: str | None = None
    """huggingface or modelscope; auto: whichever has the files and answers."""
    worker_ip: str | None = None
    """The worker that is to have it; null: every one."""


class AutostartRequest(Body):
    """`POST /v1/autostart/models`."""

    launch: LaunchRequest
    """As in `POST /v1/models`; with a model_uid. Of an entry that is sent back as it was listed,
    what is hidden stays as it is."""
    model_uid: str | None = None
    """Of such an entry, as the next two: that of the launch."""
    num_attempts: int | None = None
    """Begins anew."""
    problem: str | None = None
    """Begins anew."""
    enabled: bool = True
    """False: it is kept, and not launched."""
    priority: int = Field(100, ge=-1_000_000, le=1_000_000)
    """The lowest is launched first."""
    max_retries: int = Field(3, ge=0, le=MAX_RETRIES)
    """After the first attempt."""
    retry_interval_seconds: float = Field(30.0, gt=0, le=MAX_RETRY_SECONDS)


class AutostartItem(Answer):
    """An entry of the list. `launch` has what differs from the defaults, values of envs masked."""

    model_uid: str
    enabled: bool
    priority: int
    max_retries: int
    retry_interval_seconds: float
    num_attempts: int
    problem: str
    launch: dict[str, Any]


class AutostartList(Answer):
    """`GET /v1/autostart/models`."""

    models: list[AutostartItem]


class AutostartSummary(Answer):
    """An entry without its launch; `status` is the model's, null if there is none."""

    model_uid: str
    model_name: str
    enabled: bool
    priority: int
    num_attempts: int
    problem: str
    status: str | None


class AbortRequest(Body):
    """`POST /v1/models/{model_uid}/requests/{request_id}/abort`."""

    block_duration: float = Field(30.0, ge=0, le=MAX_BLOCK_SECONDS)
    """For so many seconds the id is refused afterwards, should the request arrive late."""


class ScaleRequest(Body):
    """`POST /v1/models/{model_uid}/replicas`."""

    replica: Count | None = None
    """How many to add, 1 by default."""
    replica_config: (
        Annotated[
            ReplicaConfig | list[ReplicaConfig],
            Shaped("an object, or a list of objects, with devices"),
        ]
        | None
    ) = None
    """Where each goes."""
    n_gpu: GpuCount = "auto"
    """Null or 0: run on the CPU."""
    model_engine: Annotated[object, Only()] = None
    """All replicas of a model run on the engine that it was launched with."""


class AddedReplica(Answer):
    """A replica that was added and is ready."""

    replica_id: int
    replica_model_uid: str
    worker_address: str | None


class ScaleAnswer(AddedReplica):
    """One added replica; of more than one, "replica" is their number and "replicas" lists them."""

    replica: int
    replicas: list[AddedReplica]


class RegistrationRequest(Body):
    """`POST /v1/model_registrations/{model_type}`."""

    model: str = Field(min_length=1)
    """The family as JSON text."""
    persist: bool = False
    """Keep it over restarts."""
    worker_ip: Annotated[object, Only()] = None
    """A registration is for the whole cluster."""


class LaunchAnswer(Answer):
    """The uid under which the model runs, or will."""

    model_uid: str


class ModelItem(Answer):
    """A model, with what its family says of it."""

    id: str
    object: str
    created: int
    owned_by: str
    status: str
    model_uid: str
    model_type: str
    model_name: str
    model_engine: str
    model_format: str
    model_size_in_billions: int | str | None
    quantization: str
    model_family: str
    model_lang: list[str] | None = None
    """Of a language model."""
    model_ability: list[str]
    model_description: str
    model_hub: str
    revision: str | None = None
    """Of a language model."""
    context_length: int | None = None
    """Of a language model."""
    max_tokens: int | None = None
    """Of one that embeds or reranks, as the next two."""
    language: list[str] | None = None
    model_revision: str | None = None
    dimensions: int | None = None
    """Of one that embeds."""
    type: str | None = None
    """Of one that reranks."""
    replica: int
    address: str | None
    accelerators: list[str]


class ModelList(Answer):
    """The models that can be asked now."""

    object: str
    data: list[ModelItem]


class FileItem(Answer):
    """A file of a download."""

    file_name: str
    size_bytes: int
    downloaded_bytes: int


class ReplicaProgressItem(Answer):
    """How far one replica of a launch is."""

    replica_id: int
    replica_model_uid: str
    progress: float
    stage: str
    info: str
    download_files: list[FileItem]


class ProgressAnswer(Answer):
    """How far a launch is: as far as the replica that is the furthest behind."""

    progress: float
    stage: str
    info: str
    download_files: list[FileItem]
    replicas: list[ReplicaProgressItem]


class CachedItem(Answer):
    """What one worker keeps of a variant."""

    model_name: str
    model_type: str
    model_size_in_billions: int | str | None
    model_format: str
    quantization: str
    model_version: str
    path: str
    real_path: str
    actor_ip_address: str
    model_hub: str
    model_id: str
    revision: str | None
    size_bytes: int
    """On disk."""
    freed_bytes: int
    """Of them, what a removal frees: the rest is shared."""
    is_complete: bool
    used_by: list[str]
    """The models that run from it."""


class VersionItem(Answer):
    """A variant of a family."""

    model_version: str
    """In one word."""
    model_file_location: dict[str, str] | None
    """The directory, by worker; null where no worker has downloaded it."""
    cache_status: bool
    """A launch downloads nothing."""
    model_format: str
    model_size_in_billions: int | str | None
    quantization: str


class CachedList(Answer):
    """`GET /v1/cache/models`."""

    items: list[CachedItem] = Field(alias="list")
    unanswered: list[str]


class DeletableAnswer(Answer):
    """What a removal would remove."""

    model_version: str
    worker_ip: str | None
    paths: list[str]
    freed_bytes: int
    used_by: list[str]
    unanswered: list[str]


class RemovedAnswer(Answer):
    """What a removal did."""

    result: bool
    freed_bytes: int
    unanswered: list[str]


class DownloadAnswer(Answer):
    """What to ask about the download with."""

    cache_uid: str


class WorkerDownload(Answer):
    """A download on one worker."""

    worker_ip: str
    progress: float
    stage: str
    info: str


class DownloadProgressAnswer(Answer):
    """How far a download is: on the worker that is the furthest behind, and on each."""

    progress: float
    stage: str
    info: str
    download_files: list[FileItem]
    workers: list[WorkerDownload]


class ReplicaItem(Answer):
    """One copy of a model."""

    replica_id: int
    replica_model_uid: str
    replica_uid: str
    worker_address: str | None
    model_address: str | None
    accelerators: list[str]
    gpu_idx: list[int] | None
    status: str
    model_state: str
    state: str
    instance: str | None
    num_restarts: int
    created_ts: int
    error_message: str
    virtual_env_packages: dict[str, str] | None
    """Of a ready one in a virtual environment: versions of what its process found in that."""


class VirtualEnvItem(Answer):
    """A virtual environment."""

    model_name: str
    model_engine: str
    path: str
    real_path: str
    python_version: str
    actor_ip_address: str
    packages: dict[str, str]
    replicas: list[str]
    """Those that run in it."""


class VirtualEnvList(Answer):
    """The virtual environments on the workers."""

    list: list[VirtualEnvItem]


class ResultAnswer(Answer):
    """Whether anything was done."""

    result: bool


class InstanceItem(Answer):
    """A model and how its replicas are."""

    model_name: str
    model_uid: str
    model_version: str
    model_ability: list[str]
    replica: int
    status: str
    instance_created_ts: int
    n_worker: int
    replica_statuses: list[ReplicaItem]


class RemainingAnswer(Answer):
    """How many replicas are left."""

    remaining_replicas: int


class AbortAnswer(Answer):
    """DONE, NOT_FOUND or NO_OP."""

    msg: str


class EventItem(Answer):
    """One line of a model's story."""

    event_type: str
    event_ts: int
    event_content: str


class KeyRequest(Body):
    """`POST /v1/admin/keys`."""

    name: str = Field(min_length=1, max_length=MAX_NAME_LEN)
    """What to call it; no other active key may have the name."""
    scopes: list[Literal["invoke", "monitor", "admin"]] | None = Field(None, min_length=1)
    """Default: invoke. The first key needs admin."""
    models: list[str] | None = Field(None, min_length=1, max_length=MAX_MODELS)
    """The uids that it may ask; null: all."""
    expires_in_seconds: int | None = Field(None, ge=1, le=MAX_LIFETIME_SECONDS)
    """Null: never."""
    requests_per_minute: int | None = Field(None, ge=1, le=MAX_LIMIT)
    tokens_per_minute: int | None = Field(None, ge=1, le=MAX_LIMIT)
    """Of prompts and answers together."""


class LoginRequest(Body):
    """`POST /token`."""

    username: str
    """The name or the id of an API key."""
    password: str
    """The key."""


class TokenAnswer(Answer):
    """What a client sends as `Authorization: Bearer` from then on."""

    access_token: str
    token_type: str


class KeyItem(Answer):
    """An API key, without its secret."""

    id: str
    object: str
    name: str
    status: str
    scopes: list[str]
    models: list[str] | None
    requests_per_minute: int | None
    tokens_per_minute: int | None
    created_at: int
    expires_at: int | None
    revoked_at: int | None


class MadeKey(KeyItem):
    """A key that was just made."""

    key: str
    """The only time that it is told."""


class KeyList(Answer):
    """`GET /v1/admin/keys`."""

    object: str
    data: list[KeyItem]


class UsageItem(Answer):
    """What was used of one model with one key."""

    key_id: str | None
    """Null: while the gateway was open."""
    key_name: str | None
    model: str
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    reasoning_tokens: int
    total_tokens: int


class UsageList(Answer):
    """`GET /v1/usage`."""

    object: str
    data: list[UsageItem]


class LogItem(Answer):
    """One record of a log: a line, with the lines of a traceback behind it."""

    time: float
    """In seconds since 1970, by the clock of the host that wrote it."""
    level: str
    node: str
    """The host that it was read on."""
    replica: str | None
    """Whose log it is from; null: that of the host's own processes."""
    process: str
    """Such as "gateway[812]"."""
    logger: str
    request_id: str | None
    message: str


class SilentHost(Answer):
    """A host whose lines are missing."""

    node: str
    problem: str


class LogAnswer(Answer):
    """`GET /v1/models/{model_uid}/logs` and `GET /v1/cluster/logs`."""

    lines: list[LogItem]
    """By their time."""
    silent: list[SilentHost]
    cursor: str
    """To ask for what comes later."""
