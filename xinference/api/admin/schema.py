# SPDX-License-Identifier: Apache-2.0
"""The bodies of Xinference's own routes, in and out.

A field that is not honoured in this version is marked `Only(...)`, as in `openai/schema.py`.
"""

from dataclasses import fields
from typing import Annotated, Any

from pydantic import ConfigDict, Field

from xinference.api.fields import Answer, Body, Only
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.encoding import EncoderOptions

MAX_BLOCK_SECONDS = 3600
MAX_UID_LEN = 100
MAX_REQUEST_LIMIT = 2**31 - 1


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

    model_name: str = Field(min_length=1)
    """A family, as the registrations list it."""
    model_engine: str | None = None
    """Required for language models; upper and lower case are the same."""
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
    request_limits: int | None = Field(None, ge=1, le=MAX_REQUEST_LIMIT)
    """Requests that each replica has at once; one more is refused with a 429."""
    enable_thinking: bool | None = None
    """Of hybrid models: whether they think where a request does not say."""
    n_gpu: Annotated[object, Only("auto", 0)] = "auto"
    """Null or 0: run on the CPU."""

    replica: Annotated[object, Only(1, "1")] = None
    n_worker: Annotated[object, Only(1)] = None
    gpu_idx: Annotated[object, Only([])] = None
    replica_config: Annotated[object, Only([])] = None
    peft_model_config: Annotated[object, Only({})] = None
    quantization_config: Annotated[object, Only({})] = None
    download_hub: Annotated[object, Only("auto")] = None
    reasoning_content: Annotated[object, Only(False)] = None
    multimodal_projector: Annotated[object, Only()] = None
    enable_mtp: Annotated[object, Only(False)] = None
    enable_virtual_env: Annotated[object, Only(False)] = None
    virtual_env_packages: Annotated[object, Only([])] = None
    virtual_env_find_links: Annotated[object, Only([])] = None


class AbortRequest(Body):
    """`POST /v1/models/{model_uid}/requests/{request_id}/abort`."""

    block_duration: float = Field(30.0, ge=0, le=MAX_BLOCK_SECONDS)
    """For so many seconds the id is refused afterwards, should the request arrive late."""


class ScaleRequest(Body):
    """`POST /v1/models/{model_uid}/replicas`."""

    replica: Annotated[object, Only(1)] = None
    replica_config: Any = None
    model_engine: str | None = None
    n_gpu: Any = None


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
    model_size_in_billions: str
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


class ProgressAnswer(Answer):
    """How far a launch is."""

    progress: float
    stage: str
    info: str
    download_files: list[Any]
    replicas: list[Any]


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
