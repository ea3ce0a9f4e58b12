# SPDX-License-Identifier: Apache-2.0
"""From what a launch asked for, the model and the machine to one complete `EngineConfig`.

`resolve_placement` says where and in which type the weights go, before they are loaded;
`resolve` settles the rest afterwards, when it is known what a token costs and what memory is
left. Both are pure and log each choice with its reason. `free_memory_bytes` asks the machine.
"""

import importlib.util
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from xinference.errors import InvalidRequest, LoadFailed
from xinference.protocol.deployment import EngineOptions, SchedulerPolicy

logger = logging.getLogger(__name__)

CPU_BLOCK_SIZE = 128
"""Why: measured, smaller blocks cost the CPU attention a factor of 2 and more."""
CUDA_BLOCK_SIZE = 32
CPU_MAX_BATCHED_TOKENS = 512
CUDA_MAX_BATCHED_TOKENS = 2048
CPU_MAX_STEP_SECONDS = 0.5
CUDA_MAX_STEP_SECONDS = 0.04
CPU_MEMORY_SHARE = 0.25
CUDA_MEMORY_SHARE = 0.85
FALLBACK_MODEL_LEN = 2048
PADDED = "padded"
"""The attention of a model that runs in padded batches: its own."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """Everything about an engine that is decided at load. Never edited."""

    model_name: str
    device: str
    dtype: str
    """As torch spells it: "bfloat16"."""
    max_num_seqs: int
    max_model_len: int
    max_num_batched_tokens: int
    max_queue_size: int
    block_size: int
    num_blocks: int
    kv_cache_bytes: int
    attention: str
    """The backend, or `PADDED`."""
    num_threads: int
    enable_prefix_caching: bool
    scheduler_policy: SchedulerPolicy
    max_step_seconds: float | None
    """What a step with prompts in it may take beside running streams; None: however long."""
    chunk_size: int | None
    """Prompts are cut at multiples of it, whatever runs beside them; None: where a step is full."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelFacts:
    """What the loaded model says of itself."""

    max_positions: int | None
    """Positions it was made for; None if it does not say."""
    rope_limit: int | None
    """Beyond this its rotary frequencies depend on the longest sequence of the batch."""
    bytes_per_token: int
    """Keys and values of all layers."""
    attention: str
    """By which it was found to compute right; goes to the config."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Where the weights go."""

    device: torch.device
    dtype: torch.dtype


def resolve_placement(
    options: EngineOptions,
    *,
    model_name: str,
    stored_dtype: torch.dtype,
    has_cuda: bool,
    has_native_bfloat16: bool,
) -> Placement:
    """Choose the device and the type of the weights.

    Args:
        options: what the launch asked for.
        model_name: for messages.
        stored_dtype: of the weights in their files.
        has_cuda: whether torch sees a CUDA device.
        has_native_bfloat16: whether the chosen kind of device computes in it natively.

    Raises:
        InvalidRequest: the device is unknown.
        LoadFailed: the device is not there.
    """
    if options.device not in ("auto", "cpu", "cuda") and not options.device.startswith("cuda:"):
        raise InvalidRequest(
            field="device",
            problem=f"must be auto, cpu, cuda or cuda:<index>, got {options.device!r}",
        )
    if options.device.startswith("cuda") and not has_cuda:
        raise LoadFailed(model=model_name, problem=f"there is no {options.device} on this machine")
    name = options.device
    if name == "auto":
        name = "cuda" if has_cuda else "cpu"
        logger.info("device=%s: the machine has %s CUDA device", name, "a" if has_cuda else "no")
    if options.deterministic:
        logger.info("dtype=float32: deterministic")
        return Placement(device=torch.device(name), dtype=torch.float32)
    if options.dtype != "auto":
        return Placement(device=torch.device(name), dtype=getattr(torch, options.dtype))
    if stored_dtype == torch.float32:
        dtype, reason = torch.float32, "the weights are stored so"
    elif has_native_bfloat16:
        on_cuda = name.startswith("cuda")
        keeps = on_cuda and stored_dtype == torch.float16
        dtype = torch.float16 if keeps else torch.bfloat16
        reason = "the weights are stored so" if keeps else f"the {name} computes in it natively"
    elif name.startswith("cuda"):
        dtype, reason = torch.float16, "the device has no native bfloat16"
    else:
        dtype, reason = torch.float32, "this CPU has no native bfloat16"
    logger.info("dtype=%s: %s", dtype_name(dtype), reason)
    return Placement(device=torch.device(name), dtype=dtype)


def resolve(
    options: EngineOptions,
    *,
    model_name: str,
    placement: Placement,
    facts: ModelFacts,
    free_bytes: int,
    num_threads: int,
) -> EngineConfig:
    """Settle everything a launch left open. `free_bytes` is measured with the weights in place.

    Raises:
        InvalidRequest: `max_model_len` exceeds what the model can do, `kv_cache_bytes` does not
            hold one context, or a step is too small for `deterministic`.
        LoadFailed: the memory that is left does not hold one context.
    """
    on_cpu = placement.device.type == "cpu"
    block_size = options.block_size or default_block_size(placement)
    max_num_batched_tokens = options.max_num_batched_tokens or (
        CPU_MAX_BATCHED_TOKENS if on_cpu else CUDA_MAX_BATCHED_TOKENS
    )
    chunk_size = block_size if options.deterministic else None
    if chunk_size is not None and max_num_batched_tokens < chunk_size + options.max_num_seqs:
        raise InvalidRequest(
            field="max_num_batched_tokens",
            problem=f"deterministic computes prompts by whole blocks of {block_size} tokens beside "
            f"max_num_seqs={options.max_num_seqs} streams, which needs at least "
            f"{chunk_size + options.max_num_seqs}, got {max_num_batched_tokens}",
        )
    wanted_len = _wanted_model_len(options, facts)
    block_bytes = block_size * facts.bytes_per_token
    blocks_per_context = -(-wanted_len // block_size)
    enough_blocks = options.max_num_seqs * blocks_per_context
    if options.kv_cache_bytes is not None:
        num_blocks, reason = options.kv_cache_bytes // block_bytes, "as given"
    else:
        share = CPU_MEMORY_SHARE if on_cpu else CUDA_MEMORY_SHARE
        num_blocks = min(int(free_bytes * share) // block_bytes, enough_blocks)
        reason = (
            "as much as max_num_seqs contexts can use"
            if num_blocks == enough_blocks
            else f"{share:.0%} of {free_bytes / 2**20:.0f} MiB free"
        )
    max_model_len = min(wanted_len, num_blocks * block_size)
    if max_model_len < 1 or (options.max_model_len is not None and max_model_len < wanted_len):
        problem = (
            f"{num_blocks * block_bytes} bytes of KV cache ({reason}) hold {max_model_len} tokens; "
            f"one context of {wanted_len} needs {blocks_per_context * block_bytes}"
        )
        if options.kv_cache_bytes is not None:
            raise InvalidRequest(field="kv_cache_bytes", problem=problem)
        raise LoadFailed(model=model_name, problem=problem)
    if max_model_len < wanted_len:
        logger.warning(
            "max_model_len=%d instead of %d: the KV cache holds no more", max_model_len, wanted_len
        )
    config = EngineConfig(
        model_name=model_name,
        device=str(placement.device),
        dtype=dtype_name(placement.dtype),
        max_num_seqs=options.max_num_seqs,
        max_model_len=max_model_len,
        max_num_batched_tokens=max_num_batched_tokens,
        max_queue_size=options.max_queue_size,
        block_size=block_size,
        num_blocks=num_blocks,
        kv_cache_bytes=num_blocks * block_bytes,
        attention=facts.attention,
        num_threads=num_threads,
        enable_prefix_caching=options.enable_prefix_caching,
        scheduler_policy=options.scheduler_policy,
        max_step_seconds=_max_step_seconds(options, on_cpu=on_cpu),
        chunk_size=chunk_size,
    )
    logger.info(
        "KV cache: %d blocks of %d tokens, %.1f MiB: %s",
        num_blocks,
        block_size,
        config.kv_cache_bytes / 2**20,
        reason,
    )
    logger.info("%s", config)
    return config


def free_memory_bytes(device: torch.device, *, limit_bytes: int | None = None) -> int:
    """Return what this process could still allocate on the device, in bytes.

    Args:
        limit_bytes: of a CUDA device, what it may have in all, with what it has by now.
    """
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        if limit_bytes is None:
            return int(free)
        return max(0, min(int(free), limit_bytes - torch.cuda.memory_allocated(device)))
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def has_native_bfloat16(device: str) -> bool:
    """Return whether matrix products in bfloat16 have instructions of their own there."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    capabilities = torch.cpu.get_capabilities()
    names = ("avx512_bf16", "amx_bf16", "bf16", "arm_bf16")
    return any(bool(capabilities.get(name)) for name in names)


def default_block_size(placement: Placement) -> int:
    """Return the tokens of a block where the launch does not say."""
    return CPU_BLOCK_SIZE if placement.device.type == "cpu" else CUDA_BLOCK_SIZE


def backend_names(placement: Placement) -> tuple[str, ...]:
    """Return the attention backends of a device, the preferred one first."""
    if placement.device.type == "cpu":
        return ("native", "cpu")
    has_triton = importlib.util.find_spec("triton") is not None
    return ("triton", "reference") if has_triton else ("reference",)


def dtype_name(dtype: torch.dtype) -> str:
    """Return "bfloat16" for `torch.bfloat16`."""
    return str(dtype).removeprefix("torch.")


def _max_step_seconds(options: EngineOptions, *, on_cpu: bool) -> float | None:
    if options.scheduler_policy is SchedulerPolicy.PREFILL_FIRST or options.deterministic:
        return None
    return options.max_step_seconds or (CPU_MAX_STEP_SECONDS if on_cpu else CUDA_MAX_STEP_SECONDS)


def _wanted_model_len(options: EngineOptions, facts: ModelFacts) -> int:
    limit = facts.max_positions
    if facts.rope_limit is not None:
        limit = facts.rope_limit if limit is None else min(limit, facts.rope_limit)
    if options.max_model_len is not None:
        if limit is not None and options.max_model_len > limit:
            why = (
                ": beyond that one long request would change the rotary frequencies of all others"
                if limit == facts.rope_limit
                else ""
            )
            raise InvalidRequest(
                field="max_model_len",
                problem=f"the model's context is {limit} tokens, got {options.max_model_len}{why}",
            )
        return options.max_model_len
    if limit is None:
        logger.warning("max_model_len=%d: the model does not say its own", FALLBACK_MODEL_LEN)
        return FALLBACK_MODEL_LEN
    logger.info(
        "max_model_len=%d: %s",
        limit,
        "where its rotary frequencies would begin to depend on the batch"
        if limit == facts.rope_limit
        else "the model's own",
    )
    return limit
