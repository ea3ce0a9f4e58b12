# SPDX-License-Identifier: Apache-2.0
"""Xinference's bodies ⇄ protocol values. Pure; raises `InvalidRequest` alone.

The names on the HTTP side are those that Xinference's users know.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, fields, replace
from typing import Any

from xinference.errors import InvalidRequest
from xinference.identifiers import Address, NodeId, family_name, model_uid
from xinference.protocol.autostart import AutostartEntry, AutostartStatus
from xinference.protocol.deployment import (
    EngineOptions,
    LaunchProgress,
    LaunchSpec,
    ModelDescription,
    ModelState,
    ModelStatus,
    ReplicaPlacement,
    ReplicaProgress,
    ReplicaState,
    ReplicaStatus,
)
from xinference.protocol.downloads import (
    HUBS,
    CachedModel,
    DownloadStage,
    DownloadStatus,
    KeptModels,
)
from xinference.protocol.encoding import EncoderOptions, split_options
from xinference.protocol.environments import VirtualEnvironment
from xinference.protocol.nodes import ClusterInfo, Device, NodeResources, NodeStatus
from xinference.protocol.servers import (
    HIDDEN,
    SERVER_FORMATS,
    ServerEngine,
    ServerOptions,
    server_engine_named,
)

from .schema import (
    AutostartRequest,
    DownloadBody,
    InstanceRequest,
    LaunchRequest,
    ReplicaConfig,
    ScaleRequest,
)

LANGUAGE = "LLM"
ENCODERS = ("embedding", "rerank")

_SIZE = re.compile(r"(\d{1,6})(?:[._](\d{1,6}))?")
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}", re.ASCII)
_MIB = 2**20

REPLICA_STATES = {
    ReplicaState.PENDING: ("CREATING", "registering"),
    ReplicaState.STARTING: ("CREATING", "registering"),
    ReplicaState.DOWNLOADING: ("CREATING", "downloading"),
    ReplicaState.LOADING: ("LOADING", "loading"),
    ReplicaState.READY: ("READY", "ready"),
    ReplicaState.BACKING_OFF: ("ERROR", "error"),
    ReplicaState.STOPPING: ("TERMINATING", "stopping"),
    ReplicaState.FAILED: ("ERROR", "error"),
}
"""The two words that Xinference's clients know for each."""


def launch_spec(body: LaunchRequest) -> LaunchSpec:
    """Return what a launch asks for."""
    model_type = _model_type(body.model_type)
    options = _options(body)
    encoder_options, server_options = EncoderOptions(), None
    server = server_engine_named(body.model_engine)
    if model_type in ENCODERS:
        encoder_options, options = split_options(options)
    elif server is not None:
        ours = {option.name for option in fields(EngineOptions)}
        server_options, options = ServerOptions.split(server, options, known=ours)
    return LaunchSpec(
        model_uid=None if body.model_uid is None else model_uid(body.model_uid),
        model_name=_model_name(body),
        model_type=model_type,
        model_engine=body.model_engine or None,
        model_size_in_billions=_size(body),
        model_format=body.model_format,
        quantization=body.quantization,
        model_path=body.model_path,
        replica=body.replica or 1,
        worker_ip=body.worker_ip,
        n_gpu=_num_gpus(body.n_gpu),
        gpu_idx=_gpu_indices(body.gpu_idx),
        replica_config=tuple(map(placement, body.replica_config or ())),
        envs=_envs(body.envs),
        enable_virtual_env=body.enable_virtual_env,
        virtual_env_packages=tuple(body.virtual_env_packages or ()),
        virtual_env_find_links=tuple(body.virtual_env_find_links or ()),
        engine_options=EngineOptions.from_mapping(options),
        encoder_options=encoder_options,
        server_options=server_options,
        request_limits=body.request_limits,
        download_hub=_hub(body.download_hub),
        min_replicas=body.min_replicas,
        max_replicas=body.max_replicas,
        idle_timeout=body.idle_timeout,
        autoload=bool(body.autoload),
    )


def _model_name(body: LaunchRequest) -> str:
    """Return the name of a family, the id of a repository, or "" where the files say it."""
    if body.model_name is None:
        if body.model_path is None:
            problem = "is required, or model_path of files that say what they are"
            raise InvalidRequest(field="model_name", problem=problem)
        return ""
    return _name_or_id(body.model_name)


def _name_or_id(given: str) -> str:
    """Return the name of a family, or the id of a repository."""
    return given if _HUB_ID.fullmatch(given) else family_name(given)


def autostart_entry(body: AutostartRequest) -> AutostartEntry:
    """Return an entry of the autostart list."""
    try:
        launch = launch_spec(body.launch)
    except InvalidRequest as error:
        raise InvalidRequest(
            field=f"launch.{error.field}".rstrip("."), problem=error.problem
        ) from error
    if body.model_uid not in (None, launch.model_uid):
        raise InvalidRequest(field="model_uid", problem="is not that of the launch")
    return AutostartEntry(
        launch=launch,
        enabled=body.enabled,
        priority=body.priority,
        max_retries=body.max_retries,
        retry_interval_seconds=body.retry_interval_seconds,
    )


def with_secrets_of(entry: AutostartEntry, known: Iterable[AutostartEntry]) -> AutostartEntry:
    """Return an entry that was listed and sent back with its secrets, which lists do not show.

    Args:
        known: the list.

    Raises:
        InvalidRequest: a value is hidden that is not known.
    """
    before = next((one.launch for one in known if one.model_uid == entry.model_uid), None)
    launch = entry.launch
    envs = _with_secrets("launch.envs.", launch.envs, before.envs if before else {})
    server = launch.server_options
    if server is not None:
        kept = before.server_options if before else None
        flags = _with_secrets("launch.", server.flags, kept.flags if kept else {})
        server = replace(server, flags=flags)
    return replace(entry, launch=replace(launch, envs=envs, server_options=server))


def _with_secrets(path: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    for name, value in given.items():
        if value == HIDDEN and name not in known:
            raise InvalidRequest(
                field=path + name[:60], problem=f"is {HIDDEN}, and there is no value to keep"
            )
    return {name: known[name] if value == HIDDEN else value for name, value in given.items()}


def autostart_item(status: AutostartStatus) -> dict[str, Any]:
    """Return an entry of the autostart list, and how far it is."""
    entry = status.entry
    return {
        "model_uid": entry.model_uid,
        "enabled": entry.enabled,
        "priority": entry.priority,
        "max_retries": entry.max_retries,
        "retry_interval_seconds": entry.retry_interval_seconds,
        "num_attempts": status.num_attempts,
        "problem": status.problem,
        "launch": launch_item(entry.launch),
    }


def autostart_summary(status: AutostartStatus, state: ModelState | None) -> dict[str, Any]:
    """Return an entry of the autostart list without its launch, and how its model is."""
    item = autostart_item(status)
    names = ("model_uid", "enabled", "priority", "num_attempts", "problem")
    about = {name: item[name] for name in names}
    return {**about, "model_name": status.entry.launch.model_name, "status": state}


def launch_item(spec: LaunchSpec) -> dict[str, Any]:
    """Return what a launch says beside the defaults; values of `envs` and secrets are masked."""
    given = _changed(spec, LaunchSpec(model_name=spec.model_name))
    options = given.pop("engine_options", {}) | given.pop("encoder_options", {})
    given.pop("server_options", None)
    options |= {} if spec.server_options is None else spec.server_options.shown_flags
    if "envs" in given:
        given["envs"] = dict.fromkeys(given["envs"], HIDDEN)
    if "replica_config" in given:
        given["replica_config"] = [{"devices": [device]} for device in given["replica_config"]]
    return {"model_name": spec.model_name, **given, **options}


def _changed(value: LaunchSpec, default: LaunchSpec) -> dict[str, Any]:
    """Return the fields that differ, of values in values too."""
    plain, usual = asdict(value), asdict(default)
    changed = {name: one for name, one in plain.items() if one != usual[name]}
    for name in ("engine_options", "encoder_options"):
        if name in changed:
            options = {key: one for key, one in plain[name].items() if one != usual[name][key]}
            changed[name] = options
    return changed


def placements(body: ScaleRequest) -> list[ReplicaPlacement]:
    """Return where each replica goes that is to be added."""
    given = body.replica_config
    if given is None:
        return [ReplicaPlacement(n_gpu=_num_gpus(body.n_gpu))] * (body.replica or 1)
    configs = given if isinstance(given, list) else [given]
    if len(configs) != (body.replica or len(configs)):
        problem = f"has {len(configs)} entries for {body.replica} replicas"
        raise InvalidRequest(field="replica_config", problem=problem)
    if body.n_gpu != "auto":
        problem = "means nothing beside replica_config; give one of them"
        raise InvalidRequest(field="n_gpu", problem=problem)
    return [placement(config) for config in configs]


def placement(config: ReplicaConfig) -> ReplicaPlacement:
    """Return where one replica goes."""
    (device,) = config.devices
    gpu_idx = _gpu_indices(device.gpu_idx)
    return ReplicaPlacement(
        worker_ip=device.worker_ip, n_gpu=_num_gpus(device.n_gpu), gpu_idx=gpu_idx
    )


def _hub(given: str | None) -> str | None:
    hub = (given or "auto").casefold()
    if hub not in ("auto", *HUBS):
        problem = f"must be one of auto, {', '.join(HUBS)}, got {hub[:60]!r}"
        raise InvalidRequest(field="download_hub", problem=problem)
    return None if hub == "auto" else hub


def _num_gpus(given: int | str | None) -> int | None:
    """Return a number, or None for "auto"; null means none."""
    if given == "auto":
        return None
    return 0 if given is None else int(given)


def _gpu_indices(given: int | list[int] | None) -> tuple[int, ...] | None:
    if given is None or given == []:
        return None
    return (given,) if isinstance(given, int) else tuple(given)


def download_spec(body: DownloadBody) -> LaunchSpec:
    """Return the launch that would need what is to be downloaded."""
    return LaunchSpec(
        model_name=_name_or_id(body.model_name),
        model_type=_model_type(body.model_type),
        model_engine=body.model_engine,
        model_size_in_billions=_size(body),
        model_format=body.model_format,
        quantization=body.quantization,
        download_hub=_hub(body.download_hub),
        worker_ip=body.worker_ip,
    )


def _model_type(given: str) -> str:
    types = {one.casefold(): one for one in (LANGUAGE, *ENCODERS)}
    model_type = types.get(given.casefold())
    if model_type is None:
        known = ", ".join(types.values())
        problem = f"must be one of {known} in this version, got {given[:60]!r}"
        raise InvalidRequest(field="model_type", problem=problem)
    return model_type


def _size(body: LaunchRequest | DownloadBody) -> str | None:
    """Return the size as families spell it: 4 → "4"; 0.5, "0.5" and "0_5" → "0_5"."""
    names = ("model_size_in_billions", "size_in_billions")
    given = {name: getattr(body, name) for name in names if getattr(body, name) is not None}
    sizes = {name: _normal_size(name, size) for name, size in given.items()}
    if len(set(sizes.values())) > 1:
        problem = "differs from model_size_in_billions; give one of them"
        raise InvalidRequest(field="size_in_billions", problem=problem)
    return next(iter(sizes.values()), None)


def _normal_size(name: str, given: int | float | str) -> str:
    found = _SIZE.fullmatch(str(given).strip())
    if found is None:
        problem = f"must be a number of billions, such as 4, 0.5 or '0_5', got {str(given)[:60]!r}"
        raise InvalidRequest(field=name, problem=problem)
    whole, part = found.groups()
    part = (part or "").rstrip("0")
    return f"{int(whole)}_{part}" if part else str(int(whole))


def _envs(given: dict[str, Any] | None) -> dict[str, str]:
    for name, value in (given or {}).items():
        if not isinstance(value, str) or not name or "=" in name or "\0" in name + value:
            raise InvalidRequest(
                field=f"envs.{name[:60]}", problem="must be a variable and a text for it"
            )
    return dict(given or {})


def _options(body: LaunchRequest) -> dict[str, Any]:
    given = {name: value for name, value in (body.model_extra or {}).items() if value is not None}
    if _num_gpus(body.n_gpu) == 0:
        if given.get("device", "cpu") != "cpu":
            problem = "null and 0 mean the CPU, but device says otherwise; give one of them"
            raise InvalidRequest(field="n_gpu", problem=problem)
        given["device"] = "cpu"
    if body.enable_thinking is not None:
        given["enable_thinking"] = body.enable_thinking
    return given


def model_item(model: ModelStatus) -> dict[str, Any]:
    """Return a model as OpenAI lists it, with what its family says of it."""
    return {
        "id": model.model_uid,
        "object": "model",
        "created": model.created_ts,
        "owned_by": "xinference",
        "status": model.state,
        **description_item(model.description),
    }


def description_item(what: ModelDescription) -> dict[str, Any]:
    """Return what a model is, in the words that are known for its type."""
    fields = asdict(what)
    fields["model_size_in_billions"] = _size_shown(what.model_size_in_billions)
    dimensions, rerank_type = fields.pop("dimensions"), fields.pop("rerank_type")
    # Why not shown: an estimate for placing it, which readers would take for a measurement.
    del fields["memory_bytes"]
    if what.model_type in ENCODERS:
        fields["max_tokens"] = fields.pop("context_length")
        fields["language"] = fields.pop("model_lang")
        fields["model_revision"] = fields.pop("revision")
    if what.model_type == "embedding":
        fields["dimensions"] = dimensions
    if what.model_type == "rerank":
        fields["type"] = rerank_type
    return fields


def instance_item(model: ModelStatus) -> dict[str, Any]:
    """Return a model and how its replicas are."""
    what = model.description
    return {
        "model_name": what.model_name,
        "model_uid": model.model_uid,
        "model_version": _version(description_item(what)),
        "model_ability": what.model_ability,
        "replica": what.replica,
        "status": model.state,
        "instance_created_ts": model.created_ts,
        "n_worker": 1,
        "replica_statuses": [replica_item(model, replica) for replica in model.replicas],
    }


_NUM_WORDS = {LANGUAGE: 3, "embedding": 4, "rerank": 2}
"""Of a version, behind the name."""


def _version(about: Mapping[str, Any]) -> str:
    """Return a variant in one word; its parts have the names they have in a description."""
    words = [about["model_name"]]
    match about["model_type"]:
        case "embedding":
            words += [str(about["max_tokens"]), str(about["dimensions"])]
        case "LLM":
            words.append(f"{about['model_size_in_billions'] or 0}B")
    return "--".join((*words, about["model_format"], about["quantization"]))


def version_items(
    model_type: str, family: Mapping[str, Any], kept: KeptModels
) -> list[dict[str, Any]]:
    """Return the variants of a family, with where workers keep them.

    Args:
        family: as registrations show it, with `cache_status` in its specs.
    """
    items: dict[str, dict[str, Any]] = {}
    for spec in family["model_specs"]:
        version = _version({**family, **spec, "model_type": _model_type(model_type)})
        paths = {
            str(node): model.path
            for node, models in kept.models.items()
            for model in models
            if model.model_version == version
        }
        names = ("cache_status", "model_format", "model_size_in_billions", "quantization")
        # Why setdefault: hubs that have the same variant are specs of their own.
        items.setdefault(
            version,
            {
                "model_version": version,
                "model_file_location": paths or None,
                **{name: spec[name] for name in names},
            },
        )
    return list(items.values())


def launch_of_version(body: InstanceRequest) -> LaunchRequest:
    """Return the launch of the variant that a version names.

    Raises:
        InvalidRequest: it is no version of such a model, or the variant is named twice.
    """
    for name in ("model_name", "model_size_in_billions", "model_format", "quantization"):
        if getattr(body, name) is not None:
            raise InvalidRequest(field=name, problem="is part of model_version; leave it out")
    model_type = _model_type(body.model_type)
    name, *words = body.model_version.rsplit("--", _NUM_WORDS[model_type])
    if len(words) != _NUM_WORDS[model_type]:
        raise InvalidRequest(
            field="model_version",
            problem=f"is no version of a model of type {model_type}: {body.model_version!r:.100}",
        )
    size = words[0].removesuffix("B") if model_type == LANGUAGE else None
    return body.model_copy(
        update={
            "model_name": name,
            "model_size_in_billions": size,
            "model_format": words[-2],
            "quantization": words[-1],
        }
    )


def replica_item(model: ModelStatus, replica: ReplicaStatus) -> dict[str, Any]:
    """Return one copy of a model."""
    status, model_state = REPLICA_STATES[replica.state]
    if model.state is ModelState.ASLEEP and replica.state is ReplicaState.PENDING:
        status, model_state = "ASLEEP", "asleep"
    return {
        "replica_id": replica.replica.index,
        "replica_model_uid": str(replica.replica),
        "replica_uid": str(replica.replica),
        "worker_address": replica.node,
        "model_address": replica.address,
        "accelerators": [str(index) for index in replica.gpu_idx or ()],
        "gpu_idx": None if replica.gpu_idx is None else list(replica.gpu_idx),
        "status": status,
        "model_state": model_state,
        "state": replica.state,
        "instance": replica.instance,
        "num_restarts": replica.num_restarts,
        "created_ts": replica.created_ts,
        "error_message": replica.error_message,
        "virtual_env_packages": replica.virtual_env_packages,
    }


def virtual_env_item(environment: VirtualEnvironment) -> dict[str, Any]:
    """Return one virtual environment, under the names that Xinference's users know."""
    return {
        "model_name": environment.model_name,
        "model_engine": environment.model_engine,
        "path": environment.path,
        "real_path": environment.real_path,
        "python_version": environment.python_version,
        "actor_ip_address": environment.worker_ip,
        "packages": environment.packages,
        "replicas": list(environment.users),
    }


def added_item(added: Sequence[ReplicaStatus]) -> dict[str, Any]:
    """Return what `POST …/replicas` answers: one replica, or how many and which."""
    items = [
        {
            "replica_id": replica.replica.index,
            "replica_model_uid": str(replica.replica),
            "worker_address": replica.node,
        }
        for replica in added
    ]
    return items[0] if len(items) == 1 else {"replica": len(items), "replicas": items}


def progress(launch: LaunchProgress) -> dict[str, Any]:
    """Return how far a launch is."""
    replicas = [
        {
            "replica_id": one.replica.index,
            "replica_model_uid": str(one.replica),
            **_how_far(one),
        }
        for one in launch.replicas
    ]
    return {**_how_far(launch), "replicas": replicas}


def _how_far(launch: LaunchProgress | ReplicaProgress) -> dict[str, Any]:
    return {
        "progress": launch.progress,
        "stage": launch.stage,
        "info": launch.info,
        "download_files": [asdict(file) for file in launch.download_files],
    }


def cached_item(node: NodeId, model: CachedModel) -> dict[str, Any]:
    """Return what a worker keeps of a variant."""
    return {
        "model_name": model.model_name,
        "model_type": model.model_type,
        "model_size_in_billions": _size_shown(model.model_size_in_billions),
        "model_format": model.model_format,
        "quantization": model.quantization,
        "model_version": model.model_version,
        "path": model.path,
        "real_path": model.path,
        "actor_ip_address": node,
        "model_hub": model.source.hub,
        "model_id": model.source.model_id,
        "revision": model.source.revision,
        "size_bytes": model.size_bytes,
        "freed_bytes": model.freed_bytes,
        "is_complete": model.is_complete,
        "used_by": model.used_by,
    }


def _size_shown(size: str) -> int | str | None:
    """Return a size as registrations show it: 7, "0_5"; None where it is not known."""
    if size in ("", "0"):
        return None
    return int(size) if size.isdecimal() else size


def deletable(models: Sequence[CachedModel], version: str, worker_ip: str | None) -> dict[str, Any]:
    """Return what a removal of a version would remove."""
    return {
        "model_version": version,
        "worker_ip": worker_ip,
        "paths": [path for model in models for path in model.files],
        "freed_bytes": sum(model.freed_bytes for model in models),
        "used_by": sorted({user for model in models for user in model.used_by}),
    }


STAGES = (
    DownloadStage.ERROR,
    DownloadStage.DOWNLOADING,
    DownloadStage.CANCELLED,
    DownloadStage.COMPLETED,
)
"""Of a download on several workers the first that one of them is at is that of all."""


def download_progress(statuses: Mapping[NodeId, DownloadStatus]) -> dict[str, Any]:
    """Return how far a download is; one that nobody knows is at 0, pending."""
    if not statuses:
        return {
            "progress": 0.0,
            "stage": "pending",
            "info": "",
            "download_files": [],
            "workers": [],
        }
    last = min(statuses.values(), key=lambda one: (STAGES.index(one.stage), _share(one)))
    return {
        "progress": min(map(_share, statuses.values())),
        "stage": last.stage,
        "info": last.error_message or last.progress.info,
        "download_files": last.progress.files,
        "workers": [
            {
                "worker_ip": node,
                "progress": _share(status),
                "stage": status.stage,
                "info": status.error_message or status.progress.info,
            }
            for node, status in statuses.items()
        ],
    }


def _share(status: DownloadStatus) -> float:
    return 1.0 if status.stage is DownloadStage.COMPLETED else status.progress.fraction


def status_page(info: ClusterInfo, *, now: float) -> dict[str, Any]:
    """Return `GET /status`.

    Args:
        now: seconds since the epoch.
    """
    return {
        "uptime": info.uptime_seconds,
        "workers": {
            worker.node: {
                "update_time": now - worker.seconds_since_report,
                "state": worker.state,
                "num_replicas": worker.num_replicas,
                "status": _node_status(worker.resources),
            }
            for worker in info.workers
        },
    }


def _node_status(node: NodeResources) -> dict[str, dict[str, Any]]:
    cpu = {
        "usage": node.cpu_utilization,
        "total": node.cpu_count,
        "memory_used": node.memory_used_bytes,
        "memory_available": node.memory_available_bytes,
        "memory_total": node.memory_total_bytes,
    }
    return {"cpu": cpu} | {str(device.index): _device(device) for device in node.devices}


def _device(device: Device) -> dict[str, Any]:
    return {
        "name": device.name,
        "mem_total": device.total_bytes,
        "mem_free": device.total_bytes - device.used_bytes,
        "mem_used": device.used_bytes,
        "mem_usage": device.used_bytes / device.total_bytes if device.total_bytes else 0.0,
        "gpu_util": device.utilization,
        "quarantine": device.quarantine,
    }


def cluster_nodes(info: ClusterInfo, *, detailed: bool) -> list[dict[str, Any]]:
    """Return the supervisor and every worker, with what they have."""
    supervisor = _node("Supervisor", info.supervisor_address, info.supervisor_resources, detailed)
    return [supervisor] + [
        _node("Worker", worker.node, worker.resources, detailed) for worker in info.workers
    ]


def _node(kind: str, address: str, node: NodeResources, detailed: bool) -> dict[str, Any]:
    total = sum(device.total_bytes for device in node.devices)
    about: dict[str, Any] = {
        "node_type": kind,
        "ip_address": host_of(address),
        "gpu_count": len(node.devices),
        "gpu_vram_total": total if detailed else f"{total // _MIB}MiB",
    }
    if detailed:
        used = sum(device.used_bytes for device in node.devices)
        busy = sum(device.utilization for device in node.devices)
        about |= {
            "cpu_available": node.cpu_count * (1 - node.cpu_utilization),
            "cpu_count": node.cpu_count,
            "mem_used": node.memory_used_bytes,
            "mem_available": node.memory_available_bytes,
            "mem_total": node.memory_total_bytes,
            "gpu_utilization": busy / len(node.devices) if node.devices else 0.0,
            "gpu_vram_available": total - used,
        }
    return about


def worker_item(worker: NodeStatus, models: list[ModelStatus]) -> dict[str, Any]:
    """Return a worker and the replicas on it."""
    return {
        "work-ip": worker.node,
        "models": {
            str(replica.replica): description_item(model.description)
            for model in models
            for replica in model.replicas
            if replica.node == worker.node
        },
    }


def host_of(address: str) -> str:
    """Return the host of "host:port"."""
    return Address.parse(address).host


def prompts_of(families: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return how each chat family is prompted and stopped."""
    names = ("chat_template", "stop_token_ids", "stop", "reasoning_start_tag",
             "reasoning_end_tag", "tool_parser")  # fmt: skip
    return {
        family["model_name"]: {name: family[name] for name in names if name in family}
        for family in families
        if family.get("chat_template")
    }


ABILITIES = ("chat", "generate", "tools", "vision", "reasoning", "audio", "omni", "hybrid")
SENSES = frozenset({"vision", "audio", "omni"})
"""Of families that no engine runs here: text alone is served."""


def families_by_ability(families: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the families that can chat, that can use tools, and so on."""
    return {
        ability: [
            family["model_name"]
            for family in families
            if ability in family.get("model_ability", ())
        ]
        for ability in ABILITIES
    }


def families_of_vllm(families: list[dict[str, Any]]) -> dict[str, list[str]]:
    """Return the families that vLLM can run, of those that chat and of those that generate."""
    formats = SERVER_FORMATS[ServerEngine.VLLM]
    by_ability = families_by_ability(
        [
            family
            for family in families
            if any(spec["model_format"] in formats for spec in family.get("model_specs", ()))
            and SENSES.isdisjoint(family.get("model_ability", ()))
        ]
    )
    return {ability: by_ability[ability] for ability in ("chat", "generate")}
