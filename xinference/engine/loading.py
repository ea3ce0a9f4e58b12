# SPDX-License-Identifier: Apache-2.0
"""From a directory of files to an `Engine` that has proved it computes what the model does.

The order matters: the type of the weights is settled before they are read, the KV cache when they
are in place and the memory that is left is known, and nothing is returned before the self-test.
Whatever is wrong with the files or the model's class becomes one `LoadFailed` here.
"""

import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from xinference.errors import LoadFailed, XinferenceError
from xinference.protocol.deployment import EngineOptions

from .attention.cpu import CpuAttention
from .attention.interface import STATE_PROBLEM, AttentionBackend, register
from .attention.native import NativeAttention
from .attention.reference import ReferenceAttention
from .config import (
    PADDED,
    ModelFacts,
    Placement,
    backend_names,
    default_block_size,
    free_memory_bytes,
    has_native_bfloat16,
    resolve,
    resolve_placement,
)
from .engine import Engine
from .execution import CacheSize, Execution, PaddedExecution, RaggedExecution
from .load_problem import load_problem
from .native.layers import use_native_layers
from .packing import SharedInputs, can_pack, pack_linears
from .sampling_defaults import generation_defaults
from .self_test import StockAnswer, ask_stock, compare

logger = logging.getLogger(__name__)


def _triton_attention() -> AttentionBackend:
    # Why here: Triton is there only where torch was built for a GPU.
    from .attention.triton import TritonAttention

    return TritonAttention()


_BACKENDS: dict[str, Callable[[], AttentionBackend]] = {
    "cpu": CpuAttention,
    "native": NativeAttention,
    "reference": ReferenceAttention,
    "triton": _triton_attention,
}


def load_engine(
    path: str | Path,
    options: EngineOptions,
    *,
    on_progress: Callable[[float], None] | None = None,
    model_name: str = "",
) -> Engine:
    """Load tokenizer and weights from a local directory and make them ready to answer.

    Args:
        path: a directory as `save_pretrained` writes it.
        options: what the launch asked for; None in it is decided here and logged.
        on_progress: called with growing numbers from 0 to 1, in this thread.
        model_name: for messages; the directory's name if empty.

    Raises:
        LoadFailed: the files do not load, the class of the model is not supported, the memory does
            not hold one context, or the self-test found a difference.
        InvalidRequest: an option asks for what this model or machine cannot do.
    """
    name = model_name or Path(path).name
    report = on_progress or (lambda _: None)
    report(0.0)
    try:
        return _load(Path(path), options, name, report)
    except XinferenceError:
        raise
    except Exception as error:
        # Boundary: transformers, safetensors and the model's own code raise whatever they like.
        logger.exception("model %s could not be loaded", name)
        raise LoadFailed(model=name, problem=load_problem(Path(path), error)) from error


def _load(path: Path, options: EngineOptions, name: str, report: Callable[[float], None]) -> Engine:
    if not (path / "config.json").is_file():
        raise LoadFailed(model=name, problem=f"{path} has no config.json")
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)
    trust = options.trust_remote_code
    model_config = AutoConfig.from_pretrained(path, trust_remote_code=trust)
    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust)
    report(0.05)
    has_cuda = torch.cuda.is_available()
    on_cuda = has_cuda and options.device != "cpu"
    cuda_name = options.device if options.device.startswith("cuda") else "cuda"
    placement = resolve_placement(
        options,
        model_name=name,
        stored_dtype=getattr(model_config, "dtype", None) or torch.float32,
        has_cuda=has_cuda,
        has_native_bfloat16=has_native_bfloat16(cuda_name if on_cuda else "cpu"),
    )
    register()
    # Why Any: with `output_loading_info` it returns a pair, which its annotation does not say.
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        config=model_config,
        dtype=placement.dtype,
        attn_implementation="eager",
        trust_remote_code=trust,
        local_files_only=True,
        output_loading_info=True,
    )
    model: PreTrainedModel
    model, loading_info = loaded
    # Why: transformers draws what the files lack at random and goes on, with a warning.
    for what in ("missing_keys", "mismatched_keys"):
        if loading_info[what]:
            lacking = sorted(str(key) for key in loading_info[what])
            raise LoadFailed(
                model=name, problem=f"the weights have {what}: {', '.join(lacking[:5])}"
            )
    model.eval().requires_grad_(False).to(placement.device)
    report(0.6)
    return make_engine(model, tokenizer, options, placement=placement, name=name, report=report)


def make_engine(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    options: EngineOptions,
    *,
    placement: Placement,
    name: str,
    report: Callable[[float], None],
    backend: AttentionBackend | None = None,
) -> Engine:
    """Put a loaded model behind pages and test it. `backend` overrides the device's own.

    Raises:
        LoadFailed, InvalidRequest: as `load_engine`.
    """
    register()
    if model._is_stateful:
        raise LoadFailed(model=name, problem=f"{type(model).__name__}: {STATE_PROBLEM}")
    text_config = model.config.get_text_config(decoder=True)
    vocab_size = int(model.get_input_embeddings().num_embeddings)  # type: ignore[arg-type]  # always an nn.Embedding
    max_positions = getattr(
        text_config, "max_position_embeddings", getattr(text_config, "max_seq_len", None)
    )
    limits = (options.max_model_len, max_positions, rope_limit(text_config))
    block_size = options.block_size or default_block_size(placement)
    with SharedInputs(model) as shared_inputs:
        stock = ask_stock(
            model,
            vocab_size=vocab_size,
            max_len=min((limit for limit in limits if limit is not None), default=None),
            block_size=block_size,
            window=getattr(text_config, "sliding_window", None),
        )
    report(0.8)
    num_packed = use_native_layers(model) if placement.device.type == "cpu" else 0
    if can_pack(placement.device, placement.dtype):
        num_packed += pack_linears(model, shared_inputs.groups())
        # Why: it holds the plain weights, and the memory that is free is looked at below.
        del shared_inputs
        logger.info("%d linear layers are packed for the CPU", num_packed)
    report(0.9)
    names = backend_names(placement)
    backends = {names[0]: lambda: backend} if backend else {one: _BACKENDS[one] for one in names}
    ways: dict[str, Callable[[], Execution]] = {
        one: partial(_ragged, model, make_backend) for one, make_backend in backends.items()
    }
    ways[PADDED] = lambda: PaddedExecution(model)
    attention, execution = _first_that_is_right(
        ways, stock, name, type(model).__name__, placement, block_size
    )
    facts = ModelFacts(
        max_positions=max_positions,
        rope_limit=rope_limit(text_config),
        bytes_per_token=execution.num_elements_per_token * placement.dtype.itemsize,
        attention=attention,
    )
    config = resolve(
        options,
        model_name=name,
        placement=placement,
        facts=facts,
        free_bytes=free_memory_bytes(placement.device, limit_bytes=options.device_memory_bytes),
        num_threads=torch.get_num_threads(),
    )
    engine = Engine(
        config=config,
        model_config=model.config,
        runner=execution.make_runner(
            CacheSize(
                num_blocks=config.num_blocks,
                block_size=config.block_size,
                max_num_seqs=config.max_num_seqs,
                max_model_len=config.max_model_len,
            )
        ),
        tokenizer=tokenizer,
        vocab_size=vocab_size,
        generation_defaults=generation_defaults(model.generation_config),
        eos_token_ids=eos_token_ids_of(model, tokenizer),
    )
    report(1.0)
    return engine


def _ragged(model: PreTrainedModel, make_backend: Callable[[], AttentionBackend]) -> Execution:
    return RaggedExecution(model, make_backend())


def _first_that_is_right(
    ways: dict[str, Callable[[], Execution]],
    stock: StockAnswer,
    model_name: str,
    class_name: str,
    placement: Placement,
    block_size: int,
) -> tuple[str, Execution]:
    """Return the first way in which the model computes what it does on its own, with its name.

    Raises:
        LoadFailed: in none of them.
    """
    problems = []
    for name, prepare in ways.items():
        problem: str | None
        try:
            execution = prepare()
            problem = compare(execution, stock, dtype=placement.dtype, block_size=block_size)
        except Exception as error:  # boundary: the model's own code
            problem = str(error) if isinstance(error, ValueError) else repr(error)
            logger.debug("model %s cannot run with %s attention", model_name, name, exc_info=error)
        if problem is None:
            return name, execution
        logger.warning("model %s cannot run with %s attention: %s", model_name, name, problem)
        problems.append(f"with {name} attention: {problem}")
    raise LoadFailed(model=model_name, problem=f"{class_name}: {'; '.join(problems)}")


def eos_token_ids_of(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids that end a turn, from the first of these that names any: the generation
    config, the model's config, the tokenizer."""
    sources = (
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        tokenizer.eos_token_id,
    )
    for source in sources:
        if source is not None:
            return frozenset(source if isinstance(source, list | tuple) else [source])
    return frozenset()


def rope_limit(config: PreTrainedConfig) -> int | None:
    """Return up to which length the model's rotary frequencies are the same for every sequence.

    "dynamic" and "longrope" choose them by the longest sequence of the batch, so that one long
    request would change what all others see; None if the model does neither.
    """
    parameters: Any = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in parameters.values() if isinstance(value, dict)]
    limits = []
    for rope in nested or [parameters]:
        if rope.get("rope_type") in ("dynamic", "longrope"):
            original = rope.get("original_max_position_embeddings") or getattr(
                config, "original_max_position_embeddings", None
            )
            limits.append(int(original or config.max_position_embeddings))
    return min(limits, default=None)
