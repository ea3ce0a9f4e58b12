# SPDX-License-Identifier: Apache-2.0
"""How much memory a forward of an encoder takes, and the limits of batches that follow. Pure."""

from typing import Any

from xinference.protocol.encoding import EncoderOptions

from .batching import BatchLimits

MAX_BATCH_BYTES = 2**30
FREE_MEMORY_SHARE = 0.25
CPU_BATCH_TOKENS = 8192
CUDA_BATCH_TOKENS = 65536
DEFAULT_HIDDEN_SIZE = 1024
MASK_BYTES_PER_PAIR = 8
"""The mask of a padded batch, as truth values and as numbers, and a copy of it."""
CPU_PAIR_BYTES = 32 * 2**20
"""Of the rows of one batch. Why: long texts gain nothing from company on a CPU, and their mask, the
square of their length, would be most of what a batch takes."""
HIDDEN_COPIES = 8
"""Of the hidden states: queries, keys, values, attention's result, the residual and copies."""
INTERMEDIATE_COPIES = 3


def batch_limits(
    options: EncoderOptions,
    config: Any,
    *,
    item_bytes: int,
    free_bytes: int,
    on_cpu: bool,
    bytes_per_row: int = 0,
) -> BatchLimits:
    """Return the limits of batches for a model.

    Args:
        config: of the model, as transformers has it.
        item_bytes: of one number of its activations.
        free_bytes: on the device, with the weights in place.
        bytes_per_row: that a text takes whatever its length.
    """
    assert options.batch_size is not None, "the process has completed the options"
    max_bytes = options.max_batch_bytes or min(MAX_BATCH_BYTES, int(free_bytes * FREE_MEMORY_SHARE))
    hidden = _first(config, "hidden_size", "dim", "d_model") or DEFAULT_HIDDEN_SIZE
    intermediate = _first(config, "intermediate_size", "hidden_dim", "d_ff") or 4 * hidden
    heads = _first(config, "num_attention_heads", "n_heads", "num_heads") or 1
    is_fused = getattr(config, "_attn_implementation", None) in ("sdpa", "flash_attention_2")
    return BatchLimits(
        max_items=options.batch_size,
        max_tokens=options.max_batch_tokens or (CPU_BATCH_TOKENS if on_cpu else CUDA_BATCH_TOKENS),
        max_bytes=max_bytes,
        bytes_per_token=(HIDDEN_COPIES * hidden + INTERMEDIATE_COPIES * intermediate) * item_bytes,
        bytes_per_pair=MASK_BYTES_PER_PAIR if is_fused else 3 * heads * item_bytes,
        has_pairs_alone=not is_fused,
        max_pair_bytes=CPU_PAIR_BYTES if on_cpu else None,
        bytes_per_row=bytes_per_row,
    )


def _first(config: Any, *names: str) -> int | None:
    for name in names:
        value = getattr(config, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return None
