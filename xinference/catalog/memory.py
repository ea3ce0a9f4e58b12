# SPDX-License-Identifier: Apache-2.0
"""How much memory a model takes: its weights, the keys and values of contexts, and computing.

Pure arithmetic over the numbers of a `config.json`, or over those of a typical model of the size
where there is none at hand. The cache is counted as this package's engine keeps it, the weights
as they lie in the files of each format.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

MIB = 2**20
OVERHEAD_BYTES = 650 * MIB
"""Of the process itself: Python, PyTorch and what it loads before any model."""
DEFAULT_BATCHED_TOKENS = 512
"""Of one step, where nothing else is said."""

_FULL_BITS = {"float32": 32, "fp32": 32, "f32": 32}
_SCALES = 0.25
"""Bits of a weight that the scale and the zero of its group of 128 take."""
_MLX_SCALES = 0.5
"""The same in groups of 64, for embeddings too."""

GGUF_BITS = {
    "iq1_s": 2.0, "iq1_m": 2.15, "iq2_xxs": 2.38, "iq2_xs": 2.59, "iq2_s": 2.74, "iq2_m": 2.93,
    "iq3_xxs": 3.25, "iq3_xs": 3.5, "iq3_s": 3.66, "iq3_m": 3.76, "iq4_xs": 4.46, "iq4_nl": 4.68,
    "q2_k": 3.16, "q2_k_s": 2.97, "q3_k_s": 3.64, "q3_k_m": 4.0, "q3_k_l": 4.3, "q4_0": 4.66,
    "q4_1": 5.1, "q4_k_s": 4.67, "q4_k_m": 4.89, "q5_0": 5.57, "q5_1": 6.0, "q5_k_s": 5.57,
    "q5_k_m": 5.7, "q6_k": 6.56, "q8_0": 8.5, "f16": 16, "fp16": 16, "bf16": 16, "f32": 32,
}  # fmt: skip
"""Bits of a weight, whole files of an 8B model considered, as llama.cpp's quantizer reports."""

_BITS = re.compile(r"(?:int|w|q)_?(\d)|(\d)[-_ ]?bit|(?:fp|mxfp|nvfp)(\d)", re.IGNORECASE)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelShape:
    """What of a `config.json` decides how much memory computing takes."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    vocab_size: int
    kv_elements_per_token: int
    """Numbers that the cache keeps of a token, all layers together."""
    has_tied_embeddings: bool = False

    @property
    def num_embedding_parameters(self) -> int:
        """Parameters that quantized formats leave as they are."""
        copies = 1 if self.has_tied_embeddings else 2
        return copies * self.vocab_size * self.hidden_size


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """What a replica takes, in bytes."""

    weights_bytes: int
    kv_cache_bytes: int
    activation_bytes: int
    overhead_bytes: int = OVERHEAD_BYTES

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return (
            self.weights_bytes + self.kv_cache_bytes + self.activation_bytes + self.overhead_bytes
        )


def shape_of(config: Mapping[str, Any]) -> ModelShape | None:
    """Read the shape of a language model from its `config.json`; None if it is not all there."""
    text = config.get("text_config")
    if isinstance(text, Mapping):
        config = {**config, **text}
    numbers = _Numbers(config)
    num_layers = numbers.first("num_hidden_layers", "n_layer", "num_layers", "n_layers")
    hidden_size = numbers.first("hidden_size", "n_embd", "d_model")
    num_heads = numbers.first("num_attention_heads", "n_head", "num_heads", "n_heads")
    vocab_size = numbers.first("vocab_size")
    if num_layers is None or hidden_size is None or num_heads is None or vocab_size is None:
        return None
    head_dim = numbers.first("head_dim") or hidden_size // num_heads
    intermediate = numbers.first("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    return ModelShape(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate or 4 * hidden_size,
        num_heads=num_heads,
        vocab_size=vocab_size,
        kv_elements_per_token=num_layers * _kv_elements(config, numbers, num_heads, head_dim),
        has_tied_embeddings=bool(config.get("tie_word_embeddings")),
    )


def typical_shape(size: Decimal) -> ModelShape:
    """Return the shape that a dense model of so many billions would have today."""
    billions = max(float(size), 0.001)
    known = min(_TYPICAL, key=lambda one: abs(math.log(one / billions)))
    layers, hidden, intermediate, heads, kv_heads = _TYPICAL[known]
    return ModelShape(
        num_layers=layers,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_heads=heads,
        vocab_size=_TYPICAL_VOCAB,
        kv_elements_per_token=layers * 2 * kv_heads * _TYPICAL_HEAD_DIM,
        has_tied_embeddings=billions < 3,
    )


def weights_bytes(
    size: Decimal, model_format: str, quantization: str, shape: ModelShape, *, dtype: str = "auto"
) -> int:
    """Return what the weights take.

    Args:
        size: billions of parameters.
        quantization: as the format names it; "none" for none.
        shape: says which part of the weights is embeddings.
        dtype: in which weights that are not quantized are computed; "auto" is 16 bits.
    """
    num_parameters = float(size) * 1e9
    if model_format == "ggufv2":
        return int(num_parameters * gguf_bits(quantization) / 8)
    bits = bits_of(quantization)
    if bits is None or bits >= 16:
        return int(num_parameters * _FULL_BITS.get(dtype, 16) / 8)
    if model_format == "mlx":
        return int(num_parameters * (bits + _MLX_SCALES) / 8)
    embeddings = min(shape.num_embedding_parameters, num_parameters / 2)
    scales = 0.0 if model_format == "fp8" else _SCALES
    return int(((num_parameters - embeddings) * (bits + scales) + embeddings * 16) / 8)


def bits_of(quantization: str) -> int | None:
    """Return the bits that the name of a quantization stands for; None if it says nothing."""
    found = _BITS.search(quantization)
    return int(next(group for group in found.groups() if group)) if found else None


def estimate(
    shape: ModelShape,
    *,
    weights_bytes: int,
    context_length: int,
    num_sequences: int = 1,
    kv_bits: int = 16,
    num_batched_tokens: int = DEFAULT_BATCHED_TOKENS,
) -> MemoryEstimate:
    """Return what a replica takes that serves so many sequences of that context at once."""
    num_tokens = context_length * num_sequences
    step_tokens = min(num_batched_tokens, num_tokens)
    # Of the widest layer: what flows through, queries with keys and values, and both halves of
    # the gate; then the logits of the rows that sample, in float32, before and after sampling.
    width = 4 * shape.hidden_size + 2 * shape.intermediate_size
    activation = step_tokens * width * 2 + num_sequences * shape.vocab_size * 4 * 2
    return MemoryEstimate(
        weights_bytes=weights_bytes,
        kv_cache_bytes=num_tokens * shape.kv_elements_per_token * kv_bits // 8,
        activation_bytes=activation,
    )


class _Numbers:
    """The whole numbers above 0 of a config, by the names that its authors chose."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def first(self, *names: str) -> int | None:
        for name in names:
            value = self._config.get(name)
            if isinstance(value, int) and not isinstance(value, bool) and value > 0:
                return value
        return None


def _kv_elements(
    config: Mapping[str, Any], numbers: _Numbers, num_heads: int, head_dim: int
) -> int:
    """Return the numbers that one layer keeps of a token, keys and values."""
    latent = numbers.first("kv_lora_rank")
    if latent is not None:
        return latent + (numbers.first("qk_rope_head_dim") or 0)
    if config.get("multi_query") is True and not config.get("new_decoder_architecture"):
        return 2 * head_dim
    kv_heads = numbers.first("num_key_value_heads", "num_kv_heads", "multi_query_group_num")
    return 2 * (kv_heads or num_heads) * head_dim


def gguf_bits(quantization: str) -> float:
    """Return the bits of a weight in a GGUF file of a quantization; 16 where that says nothing."""
    name = quantization.casefold().removeprefix("ud-").removesuffix("_xl")
    known = GGUF_BITS.get(name)
    if known is not None:
        return known
    found = re.search(r"q(\d)", name)
    return int(found[1]) + 0.75 if found else 16


_TYPICAL_VOCAB = 151_936
_TYPICAL_HEAD_DIM = 128
_TYPICAL: dict[float, tuple[int, int, int, int, int]] = {
    0.5: (24, 1024, 3072, 16, 4),
    1.5: (28, 1536, 8960, 12, 8),
    4.0: (36, 2560, 9728, 32, 8),
    8.0: (32, 4096, 14_336, 32, 8),
    14.0: (40, 5120, 17_408, 40, 8),
    32.0: (64, 5120, 25_600, 64, 8),
    70.0: (80, 8192, 28_672, 64, 8),
    235.0: (94, 8192, 28_672, 64, 8),
    405.0: (126, 16_384, 53_248, 128, 8),
    1000.0: (61, 7168, 18_432, 64, 16),
}
"""By billions of parameters: layers, hidden and intermediate size, heads, heads of keys."""
