# SPDX-License-Identifier: Apache-2.0
"""What loading a model that embeds or reranks has in common: files, device, type of the weights."""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig

from xinference.engine.config import Placement, has_native_bfloat16, resolve_placement
from xinference.engine.load_problem import load_problem
from xinference.engine.packing import SharedInputs, can_pack, pack_linears
from xinference.errors import InvalidRequest, LoadFailed, XinferenceError
from xinference.protocol.deployment import EngineOptions, ReplicaSpec

from .base import OnProgress
from .batching import BatchLimits
from .files import model_directory

logger = logging.getLogger(__name__)

IMPORTS_SHARE = 0.5
"""Of the time that loading takes, what the imports before it take."""


@contextmanager
def loading(spec: ReplicaSpec, name: str, on_progress: OnProgress) -> Iterator[Path]:
    """Give the model's directory to the block, and turn what it raises into `LoadFailed`.

    Raises:
        LoadFailed: the files are not there or do not load.
        XinferenceError: what the block raises of these, as it is.
    """
    on_progress(IMPORTS_SHARE, "loading", "reading the weights")
    path = model_directory(spec.source.path, model_name=name)
    if not (path / "config.json").is_file():
        raise LoadFailed(model=name, problem=f"{path} has no config.json")
    try:
        yield path
    except XinferenceError:
        raise
    except Exception as error:
        # Boundary: the libraries and the model's own code raise whatever they like.
        logger.exception("model %s could not be loaded", name)
        raise LoadFailed(model=name, problem=load_problem(path, error)) from error
    on_progress(1.0, "loading", "loaded")


def place(path: Path, spec: ReplicaSpec, name: str) -> Placement:
    """Choose the device and the type of the weights.

    Raises:
        InvalidRequest: the device is unknown. LoadFailed: it is not there.
    """
    options = spec.engine_options
    config = AutoConfig.from_pretrained(
        path, trust_remote_code=options.trust_remote_code, local_files_only=True
    )
    has_cuda = torch.cuda.is_available()
    on_cuda = has_cuda and options.device != "cpu"
    cuda_name = options.device if options.device.startswith("cuda") else "cuda"
    return resolve_placement(
        options,
        model_name=name,
        stored_dtype=getattr(config, "dtype", None) or torch.float32,
        has_cuda=has_cuda,
        has_native_bfloat16=has_native_bfloat16(cuda_name if on_cuda else "cpu"),
    )


def check_complete(found: Mapping[str, Any], name: str) -> None:
    """Refuse weights that transformers has made up because the files lack them.

    Args:
        found: what `from_pretrained` says with `output_loading_info`.

    Raises:
        LoadFailed: naming some of them.
    """
    for what in ("missing_keys", "mismatched_keys"):
        if found[what]:
            lacking = ", ".join(sorted(str(key) for key in found[what])[:5])
            raise LoadFailed(model=name, problem=f"the weights have {what}: {lacking}")


def set_threads(options: EngineOptions) -> None:
    """Compute on the CPU with as many threads as the launch says."""
    if options.num_threads is not None:
        torch.set_num_threads(options.num_threads)


def pack(model: nn.Module, placement: Placement, try_out: Callable[[], object]) -> None:
    """Lay the weights of linear layers out for the CPU's matrix kernels, where it has them.

    Args:
        model: below it layers are replaced.
        try_out: computes something with it, to find out which layers map the same tensor.
    """
    if not can_pack(placement.device, placement.dtype):
        return
    with SharedInputs(model) as shared_inputs, torch.inference_mode():
        try_out()
    num_packed = pack_linears(model, shared_inputs.groups())
    logger.info("%d linear layers are packed for the CPU", num_packed)


def context_length(name: str, own: int, wanted: int | None, limits: BatchLimits) -> int:
    """Return how many tokens a text may have.

    Args:
        own: what the files say.
        wanted: what the launch says, if it does.

    Raises:
        InvalidRequest: the launch wants more than the model or the memory has room for.
    """
    fitting = limits.longest_alone()
    if wanted is not None and wanted > min(own, fitting):
        reason = f"the model takes {own}" if own < wanted else f"the memory holds {fitting}"
        raise InvalidRequest(field="max_model_len", problem=f"is {wanted}, but {reason}")
    if fitting < own and wanted is None:
        logger.warning(
            "%s: texts may have %d tokens instead of %d: the %d bytes of a batch hold no more",
            name,
            fitting,
            own,
            limits.max_bytes,
        )
    return wanted or min(own, fitting)
