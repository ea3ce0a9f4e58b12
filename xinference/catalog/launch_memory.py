# SPDX-License-Identifier: Apache-2.0
"""What a launch needs at the least, and what of a family would fit where it does not.

The least is the process, weights, one step and the cache that was asked for: without
`max_model_len` the engine makes do with the context that memory is left for.
"""

from collections.abc import Iterable

from xinference.protocol.deployment import EngineOptions

from .family import Variant
from .memory import estimate, shape_of, typical_shape, weights_bytes
from .model_files import ModelFiles

MAX_SUGGESTIONS = 4


def least_memory_bytes(variant: Variant, options: EngineOptions, files: ModelFiles | None) -> int:
    """Return about how many bytes one replica takes.

    Args:
        files: its own, as far as they are visible here.
    """
    config = files and files.document("config.json")
    shape = (config and shape_of(config)) or typical_shape(variant.size)
    dtype = "float32" if options.deterministic else options.dtype
    weights = None if files is None else files.weights()
    num_weight_bytes = (
        weights_bytes(variant.size, variant.model_format, variant.quantization, shape, dtype=dtype)
        if weights is None
        else weights.bytes_as(dtype)
    )
    context = options.max_model_len or 1
    needed = estimate(shape, weights_bytes=num_weight_bytes, context_length=context)
    cache = options.kv_cache_bytes
    if cache is None:
        cache = needed.kv_cache_bytes if options.max_model_len is not None else 0
    return num_weight_bytes + needed.activation_bytes + needed.overhead_bytes + cache


def what_fits(variants: Iterable[Variant], options: EngineOptions, room_bytes: int) -> list[str]:
    """Return those of the variants that fit a room, in words, the largest first."""
    sizes = {
        str(one): need
        for one in variants
        if (need := least_memory_bytes(one, options, None)) <= room_bytes
    }
    return sorted(sizes, key=lambda words: -sizes[words])[:MAX_SUGGESTIONS]
