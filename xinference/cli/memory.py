# SPDX-License-Identifier: Apache-2.0
"""`cal-model-mem`: the memory that a model takes, and whether this machine has it; no server."""

import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import click

from xinference.errors import XinferenceError

from .output import show, show_json

_MIB, _GIB = 2**20, 2**30


@click.command(
    "cal-model-mem", short_help="Estimate the memory that a model takes; asks no server."
)
@click.option("--model-name", "-n", help="A family of the catalogue. [default: a typical model]")
@click.option(
    "--size-in-billions",
    "--model-size-in-billions",
    "-s",
    required=True,
    help="Of the parameters: 7, 0_5, 1.8.",
)
@click.option("--model-format", "-f", required=True, help="Such as pytorch, gptq or ggufv2.")
@click.option("--quantization", "-q", help="Such as Int4 or Q4_K_M.")
@click.option(
    "--context-length",
    "-c",
    type=click.IntRange(min=1),
    required=True,
    help="Prompt and answer, in tokens.",
)
@click.option(
    "--kv-cache-dtype",
    type=click.Choice(["8", "16", "32"]),
    default="16",
    show_default=True,
    help="Bits of a number in the cache.",
)
@click.option(
    "--max-num-seqs",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="Requests of that context at once.",
)
@click.option(
    "--model-path",
    "-mp",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="Files of the model: the numbers are taken from them.",
)
@click.option("--json", "as_json", is_flag=True, help="Print bytes, as JSON.")
def cal_model_mem_command(
    model_name: str | None,
    size_in_billions: str,
    model_format: str,
    quantization: str | None,
    context_length: int,
    kv_cache_dtype: str,
    max_num_seqs: int,
    model_path: Path | None,
    as_json: bool,
) -> None:
    """Estimate the memory that a model takes: weights, keys and values, and computing.

    The cache is for --max-num-seqs requests of --context-length tokens each.
    """
    from xinference.catalog.memory import estimate, typical_shape, weights_bytes
    from xinference.catalog.model_files import shape_in, weights_in

    size, directory = _variant(model_name, size_in_billions, model_format, quantization)
    directory = model_path or directory
    found = None if directory is None else shape_in(directory)
    shape = found or typical_shape(size)
    weights = None if directory is None else weights_in(directory)
    needed = estimate(
        shape,
        weights_bytes=weights_bytes(size, model_format, quantization or "none", shape)
        if weights is None
        else weights.num_bytes,
        context_length=context_length,
        num_sequences=max_num_seqs,
        kv_bits=int(kv_cache_dtype),
    )
    free_bytes, place = _free_here()
    answer = {
        "model_name": model_name,
        "model_size_in_billions": float(size),
        "model_format": model_format,
        "quantization": quantization,
        "context_length": context_length,
        "max_num_seqs": max_num_seqs,
        "kv_cache_dtype": int(kv_cache_dtype),
        "shape": "typical" if found is None else "config.json",
        "weights_bytes": needed.weights_bytes,
        "kv_cache_bytes": needed.kv_cache_bytes,
        "activation_bytes": needed.activation_bytes,
        "overhead_bytes": needed.overhead_bytes,
        "total_bytes": needed.total_bytes,
        "free_bytes": free_bytes,
        "place": place,
        "fits": needed.total_bytes <= free_bytes,
    }
    if as_json:
        show_json(answer)
    else:
        _show(answer)


def _variant(
    model_name: str | None, size: str, model_format: str, quantization: str | None
) -> tuple[Decimal, Path | None]:
    """Return the size of what is asked for, and where its files are if they are here."""
    from xinference.catalog import directory_of
    from xinference.catalog.builtin_families import builtin_families
    from xinference.catalog.matching import Wish, find
    from xinference.catalog.schema import did_you_mean

    try:
        wish = Wish.of(size=size, model_format=model_format, quantization=quantization)
        assert wish.size is not None
        if model_name is None:
            return wish.size, None
        families = builtin_families()
        if model_name not in families:
            hint = did_you_mean(model_name, families)
            raise click.UsageError(f"There is no built-in model {model_name!r}{hint}")
        variant = find(families[model_name], wish)
    except XinferenceError as error:
        raise click.UsageError(str(error)) from error
    return variant.size, None if variant.path is None else directory_of(variant.path)


def _free_here() -> tuple[int, str]:
    """Return the free bytes of the roomiest GPU, or of the main memory, and which of them."""
    from xinference.cluster.devices import DeviceReader

    machine = DeviceReader().read()
    if machine.devices:
        free, index = max((one.total_bytes - one.used_bytes, one.index) for one in machine.devices)
        return free, f"GPU {index}"
    return machine.memory_available_bytes, "main memory"


def _show(answer: dict[str, Any]) -> None:
    def mib(name: str) -> str:
        return f"{math.ceil(answer[name] / _MIB)} MB"

    show(f"model_name: {answer['model_name']}")
    show(f"kv_cache_dtype: {answer['kv_cache_dtype']}")
    size = answer["model_size_in_billions"]
    show(f"model size: {size:.1f} B" if size >= 0.1 else f"model size: {size:g} B")
    show(f"quant: {answer['quantization']}")
    show(f"context: {answer['context_length']}")
    show("gpu mem usage:")
    show(f"  model mem: {mib('weights_bytes')}")
    show(f"  kv_cache: {mib('kv_cache_bytes')}")
    show(f"  overhead: {mib('overhead_bytes')}")
    show(f"  active: {mib('activation_bytes')}")
    show(f"  total: {mib('total_bytes')} ({math.ceil(answer['total_bytes'] / _GIB)} GB)")
    verdict = "fits" if answer["fits"] else "does not fit"
    show(f"this machine: {verdict}; {answer['place']} has {mib('free_bytes')} free")
