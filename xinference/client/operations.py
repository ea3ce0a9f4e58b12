# SPDX-License-Identifier: Apache-2.0
"""Every call of the HTTP interface as a value: the request to send, and how to read its reply.

A function here takes what a caller of `Client` gives and returns an `Operation`, or a
`StreamOperation` whose reply arrives in pieces. Nothing is sent here: `Client` and `AsyncClient`
send the same values, so a call is written once for both. Names and fields are those that users of
Xinference know.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import quote

Json = dict[str, Any]
"""A JSON object of the HTTP interface."""
Result = TypeVar("Result", covariant=True)
Method = TypeVar("Method", bound=Callable[..., Any])

QUICK_SECONDS = 30.0
"""For calls that only look something up or write something down."""
STOP_SECONDS = 120.0
"""For calls that return when processes are gone."""
ANSWER_SECONDS = 1800.0
"""For the answer of a model, and for the pause between two pieces of it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """What to send."""

    purpose: str
    """What the caller wants, as an error says it: "Failed to <purpose>"."""
    method: str
    path: str
    query: Mapping[str, str | int | float | bool | list[str]] = field(default_factory=dict)
    body: Json | None = None
    timeout_seconds: float | None = QUICK_SECONDS
    """The longest silence of the server. None: no limit."""


@dataclass(frozen=True, slots=True)
class Operation(Generic[Result]):
    """A request and how to read its JSON reply."""

    request: Request
    parse: Callable[[Any], Result]


@dataclass(frozen=True, slots=True)
class StreamOperation:
    """A request whose reply is a stream of completion chunks."""

    request: Request


def list_models() -> Operation[dict[str, Json]]:
    """Return the running models: uid to description."""
    return Operation(
        Request(purpose="list the models", method="GET", path="/v1/models"),
        lambda reply: {model["id"]: model for model in reply["data"]},
    )


def launch_model(
    model_name: str | None = None,
    model_type: str = "LLM",
    model_engine: str | None = None,
    model_uid: str | None = None,
    model_size_in_billions: int | str | float | None = None,
    model_format: str | None = None,
    quantization: str | None = None,
    replica: int = 1,
    n_worker: int = 1,
    n_gpu: int | str | None = "auto",
    peft_model_config: Json | None = None,
    request_limits: int | None = None,
    worker_ip: str | None = None,
    gpu_idx: int | list[int] | None = None,
    replica_config: list[Json] | None = None,
    model_path: str | None = None,
    enable_thinking: bool | None = None,
    enable_virtual_env: bool | None = None,
    virtual_env_packages: list[str] | None = None,
    envs: dict[str, str] | None = None,
    virtual_env_find_links: list[str] | None = None,
    *,
    min_replicas: int | None = None,
    max_replicas: int | None = None,
    idle_timeout: float | None = None,
    autoload: bool | None = None,
    wait_ready: bool = True,
    **engine_options: Any,
) -> Operation[str]:
    """Launch a model and return its uid.

    What a server of this version cannot do it refuses by name; nothing is ignored.

    Args:
        model_name: A family, or the id of a repository; None: what the files of `model_path` say.
        model_engine: None: transformers, for embeddings and rerank sentence_transformers.
        model_uid: None: the server names it after the family.
        model_size_in_billions: Such as 7, "0_5" or 1.8.
        n_gpu: "auto" takes one if there is one; None keeps the model on the CPU.
        envs: Set in the model's process before it loads anything.
        min_replicas: With `max_replicas`: never fewer.
        max_replicas: Replicas are started and stopped with the load, up to so many.
        idle_timeout: After so many seconds without a request nothing of the model runs until the
            next one, which waits while it loads.
        autoload: It may be put to sleep to make room for another model; the next request starts it.
        wait_ready: Return when the model answers, however long that takes. Otherwise return at
            once; `get_launch_model_progress` tells how far it is.
        engine_options: Passed to the engine, such as `max_num_seqs` or `context_length`.

    Raises:
        BadRequest: a field is wrong or refused; nothing was started.
        Unavailable: the files do not load, or no node can hold it; nothing is left running.
        LaunchCancelled: somebody cancelled it.
    """
    body: Json = {
        "model_name": model_name,
        "model_type": model_type,
        "model_engine": model_engine,
        "model_uid": model_uid,
        "model_size_in_billions": _size(model_size_in_billions),
        "model_format": model_format,
        "quantization": quantization,
        "replica": replica,
        "n_worker": n_worker,
        "peft_model_config": peft_model_config,
        "request_limits": request_limits,
        "worker_ip": worker_ip,
        "gpu_idx": gpu_idx,
        "replica_config": replica_config,
        "model_path": model_path,
        "enable_thinking": enable_thinking,
        "enable_virtual_env": enable_virtual_env,
        "virtual_env_packages": virtual_env_packages,
        "envs": envs,
        "virtual_env_find_links": virtual_env_find_links,
        "min_replicas": min_replicas,
        "max_replicas": max_replicas,
        "idle_timeout": idle_timeout,
        "autoload": autoload,
    }
    # Why n_gpu apart: its None is a wish (the CPU), everywhere else None is no wish.
    given = {name: value for name, value in body.items() if value is not None} | {"n_gpu": n_gpu}
    return Operation(
        Request(
            purpose=f"launch {model_name or model_path}",
            method="POST",
            path="/v1/models",
            query={"wait_ready": wait_ready},
            body=given | engine_options,
            timeout_seconds=None if wait_ready else QUICK_SECONDS,
        ),
        lambda reply: str(reply["model_uid"]),
    )


def _size(given: int | str | float | None) -> int | str | None:
    """Spell a size as families do: 1.8 is "1_8", 7.0 is 7."""
    if isinstance(given, float):
        return int(given) if given.is_integer() else str(given).replace(".", "_")
    return given


def terminate_model(model_uid: str) -> Operation[None]:
    """Stop a model; return when no process of it is left.

    Raises:
        NotFound: no such model.
    """
    return Operation(
        Request(
            purpose=f"terminate {model_uid}",
            method="DELETE",
            path=f"/v1/models/{_segment(model_uid)}",
            timeout_seconds=STOP_SECONDS,
        ),
        _nothing,
    )


def describe_model(model_uid: str) -> Operation[Json]:
    """Return the description of a running model.

    Raises:
        NotFound: no such model.
    """
    return Operation(
        Request(
            purpose=f"describe {model_uid}",
            method="GET",
            path=f"/v1/models/{_segment(model_uid)}",
        ),
        _as_it_is,
    )


def get_launch_model_progress(model_uid: str) -> Operation[Json]:
    """Return how far a launch is: "progress" from 0 to 1, and "stage".

    An unknown uid is at 0, "pending".
    """
    return Operation(
        Request(
            purpose=f"get the progress of {model_uid}",
            method="GET",
            path=f"/v1/models/{_segment(model_uid)}/progress",
        ),
        _as_it_is,
    )


def cancel_launch_model(model_uid: str) -> Operation[None]:
    """Cancel a launch that is under way; return when nothing of it is left.

    Raises:
        NotFound: no such model. BadRequest: it is ready already.
    """
    return Operation(
        Request(
            purpose=f"cancel the launch of {model_uid}",
            method="POST",
            path=f"/v1/models/{_segment(model_uid)}/cancel",
            timeout_seconds=STOP_SECONDS,
        ),
        _nothing,
    )


def get_instance_info(
    model_name: str | None = None, model_uid: str | None = None
) -> Operation[list[Json]]:
    """Return the state of models and of their replicas, those that load or failed included.

    Args:
        model_name: Only models of this family; None: of any.
        model_uid: Only this one; None: all.
    """
    query = {"model_name": model_name, "model_uid": model_uid}
    return Operation(
        Request(
            purpose="get the state of the models",
            method="GET",
            path="/v1/models/instances",
            query={name: value for name, value in query.items() if value is not None},
        ),
        _as_it_is,
    )


def get_status() -> Operation[Json]:
    """Return how long the cluster has been up, and its workers: how each is, and how busy."""
    return Operation(
        Request(purpose="get the status of the cluster", method="GET", path="/status"), _as_it_is
    )


def get_model_events(model_uid: str) -> Operation[list[Json]]:
    """Return what happened to a model, oldest first: "event_type", "event_ts", "event_content".

    Raises:
        NotFound: no such model.
    """
    return Operation(
        Request(
            purpose=f"get the events of {model_uid}",
            method="GET",
            path=f"/v1/models/{_segment(model_uid)}/events",
        ),
        _as_it_is,
    )


def get_model_logs(
    model_uid: str,
    lines: int = 100,
    *,
    replica: int | None = None,
    level: str = "DEBUG",
    cursor: str | None = None,
) -> Operation[Json]:
    """Return what the replicas of a model logged, on every worker, by its time.

    Args:
        lines: At most; the last ones.
        replica: Only this one; None: all.
        level: The lowest that is wanted.
        cursor: Of an earlier reply: only what came since.

    Returns:
        "lines", each with "time", "level", "node", "replica", "process", "logger", "request_id"
        and "message"; "silent", the hosts that did not answer; and a "cursor".

    Raises:
        NotFound: neither such a model nor a log of one.
    """
    query = {"lines": lines, "replica": replica, "level": level, "cursor": cursor}
    return Operation(_model_log(model_uid, query), _as_it_is)


def follow_model_logs(
    model_uid: str,
    lines: int = 100,
    *,
    replica: int | None = None,
    level: str = "DEBUG",
    cursor: str | None = None,
) -> StreamOperation:
    """Return a stream of what `get_model_logs` returns, first what is there, then what comes.

    The server ends it after an hour; the last "cursor" is where to go on.

    Raises:
        NotFound: neither such a model nor a log of one.
    """
    query = {"lines": lines, "replica": replica, "level": level, "cursor": cursor}
    return StreamOperation(_model_log(model_uid, query | {"follow": True}))


def get_node_logs(
    node: str = "supervisor", lines: int = 100, *, level: str = "DEBUG", cursor: str | None = None
) -> Operation[Json]:
    """Return what supervisor, worker, gateways and downloads of a host logged, by its time.

    Args:
        node: A worker: its host, or "host:port"; or "supervisor".

    Returns:
        As `get_model_logs`.

    Raises:
        BadRequest: no worker is there.
    """
    query = {"lines": lines, "level": level, "cursor": cursor}
    return Operation(_node_log(node, query), _as_it_is)


def follow_node_logs(
    node: str = "supervisor", lines: int = 100, *, level: str = "DEBUG", cursor: str | None = None
) -> StreamOperation:
    """Return a stream of what `get_node_logs` returns, as `follow_model_logs` does.

    Raises:
        BadRequest: no worker is there.
    """
    query = {"lines": lines, "level": level, "cursor": cursor}
    return StreamOperation(_node_log(node, query | {"follow": True}))


def _model_log(model_uid: str, query: Mapping[str, Any]) -> Request:
    return Request(
        purpose=f"read the log of {model_uid}",
        method="GET",
        path=f"/v1/models/{_segment(model_uid)}/logs",
        query=_given(query),
    )


def _node_log(node: str, query: Mapping[str, Any]) -> Request:
    return Request(
        purpose=f"read the log of {node}",
        method="GET",
        path="/v1/cluster/logs",
        query=_given({"node": node, **query}),
    )


def get_model_replicas(model_uid: str) -> Operation[list[Json]]:
    """Return the replicas of a model: where each is, how, and why if it is down.

    Raises:
        NotFound: no such model.
    """
    return Operation(
        Request(
            purpose=f"list the replicas of {model_uid}",
            method="GET",
            path=f"/v1/models/{_segment(model_uid)}/replicas",
        ),
        _as_it_is,
    )


def get_autostart_config() -> Operation[Json]:
    """Return what is started by itself: under "models" each entry with its launch."""
    return Operation(
        Request(purpose="get the autostart list", method="GET", path="/v1/autostart/models"),
        _as_it_is,
    )


def get_autostart_model_summary() -> Operation[list[Json]]:
    """Return the same without the launches, but with how each model is."""
    return Operation(
        Request(
            purpose="get the autostart list",
            method="GET",
            path="/v1/autostart/models/summary",
        ),
        _as_it_is,
    )


def upsert_autostart_model(entry: Json) -> Operation[Json]:
    """Let a model be started by itself, or otherwise than before; return its entry.

    Args:
        entry: "launch", with the fields of `launch_model` and a "model_uid"; if you like
            "enabled" (True), "priority" (100, the lowest first), "max_retries" (3) and
            "retry_interval_seconds" (30).

    Raises:
        BadRequest: a field is wrong.
    """
    return Operation(
        Request(
            purpose="change the autostart list",
            method="POST",
            path="/v1/autostart/models",
            body=entry,
        ),
        _as_it_is,
    )


def remove_autostart_model(model_uid: str) -> Operation[None]:
    """Start a model by itself no more; it goes on if it runs.

    Raises:
        NotFound: it is not in the list.
    """
    return Operation(
        Request(
            purpose=f"remove {model_uid} from the autostart list",
            method="DELETE",
            path=f"/v1/autostart/models/{_segment(model_uid)}",
        ),
        lambda reply: None,
    )


def add_model_replica(
    model_uid: str,
    replica_config: Json | list[Json] | None = None,
    replica: int = 1,
    model_engine: str | None = None,
    n_gpu: int | str | None = "auto",
) -> Operation[Json]:
    """Add replicas to a running model; return when they are ready. The others serve meanwhile.

    Args:
        replica_config: Where each goes: {"devices": [{"worker_ip": …, "gpu_idx": …}]}.
        replica: How many; with `replica_config`, as many as that has.
        model_engine: Refused unless None: it is that of the model.
        n_gpu: "auto" takes a GPU if there is one; None keeps them on the CPU.

    Returns:
        "replica_id", "replica_model_uid" and "worker_address"; of more than one, a list of those
        under "replicas".

    Raises:
        NotFound: no such model. BadRequest: there is no such place.
        Unavailable: one does not load, or there is no room; it is dropped again.
    """
    body: Json = {"model_engine": model_engine}
    if replica_config is None:
        body |= {"n_gpu": n_gpu, "replica": replica}
    else:
        body |= {"replica_config": replica_config}
    return Operation(
        Request(
            purpose=f"add a replica to {model_uid}",
            method="POST",
            path=f"/v1/models/{_segment(model_uid)}/replicas",
            body=body,
            timeout_seconds=None,
        ),
        _as_it_is,
    )


def terminate_model_replica(model_uid: str, replica_id: int) -> Operation[int]:
    """Remove one replica; return how many remain. At 0 the model is gone.

    Raises:
        NotFound: no such model.
    """
    return Operation(
        Request(
            purpose=f"terminate replica {replica_id} of {model_uid}",
            method="DELETE",
            path=f"/v1/models/{_segment(model_uid)}/replicas/{replica_id}",
            timeout_seconds=STOP_SECONDS,
        ),
        lambda reply: int(reply["remaining_replicas"]),
    )


def abort_request(model_uid: str, request_id: str, block_duration: int = 30) -> Operation[Json]:
    """Abort a request by the id that its caller gave it; a request that has ended stays as it is.

    Args:
        block_duration: So many seconds the id is refused afterwards, so that an abort that
            overtakes its request still works. 0: not at all.

    Returns:
        {"msg": "DONE" | "NOT_FOUND" | "NO_OP"}
    """
    return Operation(
        Request(
            purpose=f"abort request {request_id}",
            method="POST",
            path=f"/v1/models/{_segment(model_uid)}/requests/{_segment(request_id)}/abort",
            body={"block_duration": block_duration},
        ),
        _as_it_is,
    )


def register_model(
    model_type: str, model: str, persist: bool, worker_ip: str | None = None
) -> Operation[None]:
    """Add a model of your own to the catalogue.

    Args:
        model: The family as JSON text.
        persist: Keep it over a restart.

    Raises:
        BadRequest: the JSON is not a family of this type, or its name is taken.
    """
    return Operation(
        Request(
            purpose="register the model",
            method="POST",
            path=f"/v1/model_registrations/{_segment(model_type)}",
            body={"model": model, "persist": persist, "worker_ip": worker_ip},
        ),
        _nothing,
    )


def unregister_model(model_type: str, model_name: str) -> Operation[None]:
    """Remove a registered model from the catalogue; what runs of it goes on."""
    return Operation(
        Request(
            purpose=f"unregister {model_name}",
            method="DELETE",
            path=f"/v1/model_registrations/{_segment(model_type)}/{_segment(model_name)}",
        ),
        _nothing,
    )


def list_model_registrations(
    model_type: str,
    detailed: bool = False,
    *,
    query: str | None = None,
    ability: list[str] | None = None,
    language: list[str] | None = None,
    model_format: str | None = None,
    min_size: float | None = None,
    max_size: float | None = None,
    fits: bool = False,
    cached: bool = False,
) -> Operation[list[Json]]:
    """Return the families of a type: name and "is_builtin", or with `detailed` everything.

    Args:
        query: Words of the name or the description.
        ability: All of these, such as "tools".
        min_size: Billions of parameters, as `max_size`. What is asked of specs narrows them, too.
        fits: Only what the cluster has memory for now.
        cached: Only what needs no download.
    """
    asked = {
        "query": query,
        "ability": ability,
        "language": language,
        "model_format": model_format,
        "min_size": min_size,
        "max_size": max_size,
        "fits": fits or None,
        "cached": cached or None,
    }
    return Operation(
        Request(
            purpose=f"list the {model_type} models of the catalogue",
            method="GET",
            path=f"/v1/model_registrations/{_segment(model_type)}",
            query={"detailed": detailed} | {name: one for name, one in asked.items() if one},
        ),
        _as_it_is,
    )


def get_model_registration(model_type: str, model_name: str) -> Operation[Json]:
    """Return a family of the catalogue."""
    return Operation(
        Request(
            purpose=f"get {model_name} from the catalogue",
            method="GET",
            path=f"/v1/model_registrations/{_segment(model_type)}/{_segment(model_name)}",
        ),
        _as_it_is,
    )


def query_engine_by_model_name(
    model_name: str, model_type: str = "LLM", enable_virtual_env: bool | None = None
) -> Operation[Json]:
    """Return, per engine, its parameter objects, or a text that says why it cannot be used."""
    return Operation(
        Request(
            purpose=f"get the engines of {model_name}",
            method="GET",
            path=f"/v1/engines/{_segment(model_type)}/{_segment(model_name)}",
            query={} if enable_virtual_env is None else {"enable_virtual_env": enable_virtual_env},
        ),
        _as_it_is,
    )


def vllm_models() -> Operation[dict[str, list[str]]]:
    """Return the names of the families that vLLM runs: those that "chat" and that "generate"."""
    return Operation(
        Request(purpose="list the models of vLLM", method="GET", path="/v1/models/vllm-supported"),
        _as_it_is,
    )


class CachedModels(list[Json]):
    """What workers keep of models. Not the whole of it if any are `unanswered`."""

    def __init__(self, models: Sequence[Json] = (), unanswered: Sequence[str] = ()) -> None:
        super().__init__(models)
        self.unanswered = list(unanswered)
        """The workers that did not say what they keep."""


def list_cached_models(
    model_name: str | None = None, worker_ip: str | None = None
) -> Operation[CachedModels]:
    """Return what the workers keep of models: version, path, size, who uses it.

    Workers that do not answer are in `unanswered` of the list.

    Args:
        model_name: Only of this family; None: of any.
        worker_ip: Only on this worker; None: on each.
    """
    return Operation(
        Request(
            purpose="list the cached models",
            method="GET",
            path="/v1/cache/models",
            query=_given({"model_name": model_name, "worker_ip": worker_ip}),
        ),
        lambda reply: CachedModels(reply["list"], reply.get("unanswered", ())),
    )


def list_deletable_models(model_version: str, worker_ip: str | None = None) -> Operation[Json]:
    """Return what a removal of a version would remove: "paths", "freed_bytes", "used_by".

    Raises:
        NotFound: no worker keeps it.
    """
    return Operation(
        Request(
            purpose=f"list the files of {model_version}",
            method="GET",
            path="/v1/cache/models/files",
            query=_given({"model_version": model_version, "worker_ip": worker_ip}),
        ),
        _as_it_is,
    )


def confirm_and_remove_model(
    model_version: str, worker_ip: str | None = None, *, force: bool = False
) -> Operation[bool]:
    """Remove what one version of a model alone needs.

    Args:
        force: Remove what a model runs from, too.

    Raises:
        NotFound: no worker keeps it. Conflict: a model runs from it, or it is being downloaded.
    """
    return Operation(
        Request(
            purpose=f"remove {model_version}",
            method="DELETE",
            path="/v1/cache/models",
            query=_given({"model_version": model_version, "worker_ip": worker_ip})
            | {"force": force},
            timeout_seconds=STOP_SECONDS,
        ),
        lambda reply: bool(reply["result"]),
    )


def download_model(
    model_name: str,
    model_type: str = "LLM",
    model_engine: str | None = None,
    model_size_in_billions: int | str | float | None = None,
    model_format: str | None = None,
    quantization: str | None = None,
    download_hub: str | None = None,
    worker_ip: str | None = None,
) -> Operation[str]:
    """Begin to download a model without launching it; return what to ask about it with.

    Args:
        download_hub: The only hub that is asked; None: whichever answers.
        worker_ip: The worker that is to have it; None: every one.

    Raises:
        BadRequest: a field is wrong, or nothing has to be downloaded. NotFound: no such family.
    """
    return Operation(
        Request(
            purpose=f"download {model_name}",
            method="POST",
            path="/v1/cache/models",
            body=_given(
                {
                    "model_name": model_name,
                    "model_type": model_type,
                    "model_engine": model_engine,
                    "model_size_in_billions": _size(model_size_in_billions),
                    "model_format": model_format,
                    "quantization": quantization,
                    "download_hub": download_hub,
                    "worker_ip": worker_ip,
                }
            ),
        ),
        lambda reply: str(reply["cache_uid"]),
    )


def get_download_progress(cache_uid: str) -> Operation[Json]:
    """Return how far a download is: "progress", "stage", "info", "download_files", "workers"."""
    return Operation(
        Request(
            purpose=f"get the progress of {cache_uid}",
            method="GET",
            path=f"/v1/cache/models/{_segment(cache_uid)}/progress",
        ),
        _as_it_is,
    )


def cancel_download(cache_uid: str) -> Operation[None]:
    """End a download. What has arrived is kept.

    Raises:
        NotFound: it does not run.
    """
    return Operation(
        Request(
            purpose=f"cancel the download of {cache_uid}",
            method="POST",
            path=f"/v1/cache/models/{_segment(cache_uid)}/cancel",
        ),
        _nothing,
    )


def get_supervisor_info() -> Operation[Json]:
    """Return where the supervisor is."""
    return Operation(
        Request(purpose="get the supervisor", method="GET", path="/v1/supervisor"), _as_it_is
    )


def get_workers_info() -> Operation[list[Json]]:
    """Return the workers, and the models that each runs."""
    return Operation(
        Request(purpose="get the workers", method="GET", path="/v1/workers"), _as_it_is
    )


def list_virtual_envs(
    model_name: str | None = None,
    model_engine: str | None = None,
    worker_ip: str | None = None,
) -> Operation[list[Json]]:
    """Return the virtual environments of models: where each is, what is in it, what runs in it."""
    query = {"model_name": model_name, "model_engine": model_engine, "worker_ip": worker_ip}
    return Operation(
        Request(
            purpose="list the virtual environments",
            method="GET",
            path="/v1/virtualenvs",
            query=_given(query),
        ),
        lambda reply: list(reply["list"]),
    )


def remove_virtual_envs(
    model_name: str,
    model_engine: str | None = None,
    python_version: str | None = None,
    worker_ip: str | None = None,
) -> Operation[bool]:
    """Remove the virtual environments of a model; return whether there were any.

    Raises:
        Conflict: a replica runs in one of them.
    """
    query = {
        "model_name": model_name,
        "model_engine": model_engine,
        "python_version": python_version,
        "worker_ip": worker_ip,
    }
    return Operation(
        Request(
            purpose=f"remove the virtual environments of {model_name}",
            method="DELETE",
            path="/v1/virtualenvs",
            query=_given(query),
            timeout_seconds=STOP_SECONDS,
        ),
        lambda reply: bool(reply["result"]),
    )


def abort_cluster() -> Operation[Json]:
    """Stop the whole cluster; return {"result": bool}. Its models come back at the next start."""
    return Operation(
        Request(
            purpose="stop the cluster",
            method="DELETE",
            path="/v1/clusters",
            timeout_seconds=STOP_SECONDS,
        ),
        _as_it_is,
    )


def needs_api_key() -> Operation[bool]:
    """Return whether the server asks for API keys."""
    return Operation(
        Request(purpose="ask about API keys", method="GET", path="/v1/cluster/auth"),
        lambda reply: bool(reply["auth"]),
    )


def login(username: str, password: str) -> Operation[str]:
    """Return the token of a login: `username` is the name or the id of an API key, `password` it.

    Raises:
        Unauthorized: it is none of this server.
    """
    return Operation(
        Request(
            purpose="log in",
            method="POST",
            path="/token",
            body={"username": username, "password": password},
        ),
        lambda reply: str(reply["access_token"]),
    )


def create_api_key(
    name: str,
    scopes: Sequence[str] | None = None,
    models: Sequence[str] | None = None,
    expires_in_seconds: int | None = None,
    requests_per_minute: int | None = None,
    tokens_per_minute: int | None = None,
) -> Operation[Json]:
    """Make an API key; its text is under "key" of the reply, this once.

    Args:
        scopes: Of "invoke" (the default), "monitor" and "admin". The first key needs "admin", and
            locks the server.
        models: The uids that it may ask; None: all.
        tokens_per_minute: Of prompts and answers together.

    Raises:
        BadRequest: a field is wrong, or an active key has the name.
    """
    body: Json = {
        "name": name,
        "scopes": None if scopes is None else list(scopes),
        "models": None if models is None else list(models),
        "expires_in_seconds": expires_in_seconds,
        "requests_per_minute": requests_per_minute,
        "tokens_per_minute": tokens_per_minute,
    }
    given = {field: value for field, value in body.items() if value is not None}
    return Operation(
        Request(
            purpose=f"make the API key {name}", method="POST", path="/v1/admin/keys", body=given
        ),
        _as_it_is,
    )


def list_api_keys(ended: bool = False) -> Operation[list[Json]]:
    """Return the active API keys; with `ended` those that expired or were revoked, too."""
    return Operation(
        Request(
            purpose="list the API keys",
            method="GET",
            path="/v1/admin/keys",
            query={"ended": ended},
        ),
        lambda reply: list(reply["data"]),
    )


def revoke_api_key(key_id: str) -> Operation[Json]:
    """Revoke an API key for good and return what it was.

    Raises:
        NotFound: no such key.
    """
    return Operation(
        Request(
            purpose=f"revoke the API key {key_id}",
            method="DELETE",
            path=f"/v1/admin/keys/{_segment(key_id)}",
        ),
        _as_it_is,
    )


def get_usage(since: str | None = None, until: str | None = None) -> Operation[list[Json]]:
    """Return what was used, by key and model: requests, and tokens by kind.

    Args:
        since: The first day, such as "2026-01-31", in UTC; None: from the beginning.
        until: The last day.
    """
    days = {"since": since, "until": until}
    return Operation(
        Request(
            purpose="get the usage",
            method="GET",
            path="/v1/usage",
            query={name: day for name, day in days.items() if day is not None},
        ),
        lambda reply: list(reply["data"]),
    )


def generate(
    model_uid: str, prompt: str, generate_config: Mapping[str, Any] | None = None
) -> Operation[Json] | StreamOperation:
    """Go on from a text.

    Args:
        generate_config: Fields of the request, such as `max_tokens`, `temperature`, `stop`,
            `request_id` or `stream`.

    Returns:
        A completion; with `stream`, an iterator of its chunks.
    """
    return _answer(
        "generate",
        "/v1/completions",
        {"model": model_uid, "prompt": prompt},
        generate_config,
    )


def chat(
    model_uid: str,
    messages: Sequence[Mapping[str, Any]],
    tools: Sequence[Mapping[str, Any]] | None = None,
    enable_thinking: bool | None = None,
    generate_config: Mapping[str, Any] | None = None,
) -> Operation[Json] | StreamOperation:
    """Answer a conversation.

    Args:
        messages: Objects with "role" and "content", oldest first.
        generate_config: Fields of the request, such as `max_tokens`, `temperature`, `stop`,
            `request_id` or `stream`.

    Returns:
        A chat completion; with `stream`, an iterator of its chunks.
    """
    body: Json = {"model": model_uid, "messages": list(messages)}
    if tools is not None:
        body["tools"] = list(tools)
    if enable_thinking is not None:
        body["enable_thinking"] = enable_thinking
    return _answer("chat", "/v1/chat/completions", body, generate_config)


def create_embedding(
    model_uid: str,
    /,
    input: str | Sequence[Any],  # noqa: A002  # the name that callers know
    **kwargs: Any,
) -> Operation[Json]:
    """Return the vectors of texts, in OpenAI's form.

    Args:
        input: A text, a list of texts, token ids, or a list of lists of token ids.
        kwargs: Further fields of the request, such as `dimensions`, `input_type`, `prompt`,
            `truncate_prompt_tokens` or `return_sparse`.
    """
    body: Json = {"model": model_uid, "input": input if isinstance(input, str) else list(input)}
    return Operation(
        Request(
            purpose="embed",
            method="POST",
            path="/v1/embeddings",
            body=kwargs | body,
            timeout_seconds=ANSWER_SECONDS,
        ),
        _as_it_is,
    )


def rerank(
    model_uid: str,
    /,
    documents: Sequence[str | Mapping[str, Any]],
    query: str,
    top_n: int | None = None,
    max_chunks_per_doc: int | None = None,
    return_documents: bool | None = None,
    return_len: bool | None = None,
    **kwargs: Any,
) -> Operation[Json]:
    """Return documents by their relevance to a query, the best first.

    Args:
        documents: Texts, or objects with a "text".
        top_n: So many of the best; None: all.
        max_chunks_per_doc: So many of the first chunks of a document that is too long for the
            model; None: all.
        return_documents: Say the texts as well.
        return_len: Say in "meta" how many tokens were read.
        kwargs: Further fields of the request, such as `instruction`.
    """
    body: Json = {
        "model": model_uid,
        "documents": list(documents),
        "query": query,
        "top_n": top_n,
        "max_chunks_per_doc": max_chunks_per_doc,
        "return_documents": return_documents,
        "return_len": return_len,
    }
    return Operation(
        Request(
            purpose="rerank",
            method="POST",
            path="/v1/rerank",
            body=kwargs | {name: value for name, value in body.items() if value is not None},
            timeout_seconds=ANSWER_SECONDS,
        ),
        _as_it_is,
    )


def _answer(
    purpose: str, path: str, body: Json, generate_config: Mapping[str, Any] | None
) -> Operation[Json] | StreamOperation:
    request = Request(
        purpose=purpose,
        method="POST",
        path=path,
        body=dict(generate_config or {}) | body,
        timeout_seconds=ANSWER_SECONDS,
    )
    if request.body and request.body.get("stream"):
        return StreamOperation(request)
    return Operation(request, _as_it_is)


def as_method(
    method: Method, describe: Callable[..., Any], *, leave_out: str | None = None
) -> Method:
    """Give `method` the name, docstring and signature of `describe`, with a `self` before them.

    Args:
        leave_out: The parameter that the method's owner fills in.
    """
    signature = inspect.signature(describe)
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    given = [one for one in signature.parameters.values() if one.name != leave_out]
    method.__name__ = describe.__name__
    method.__qualname__ = describe.__name__
    method.__doc__ = describe.__doc__
    method.__signature__ = signature.replace(  # type: ignore[attr-defined]  # functions take it
        parameters=[itself, *given],
        return_annotation=inspect.Signature.empty,
    )
    return method


def _segment(text: str) -> str:
    return quote(text, safe="")


def _given(fields: Mapping[str, Any]) -> Json:
    """Return the fields that are not None."""
    return {name: value for name, value in fields.items() if value is not None}


def _as_it_is(reply: Any) -> Any:
    return reply


def _nothing(_reply: Any) -> None:
    return None
