# SPDX-License-Identifier: Apache-2.0
"""Small parts of transformers' models, each a function in C in place of a chain of operations.

Most families write the same norm, the same gated MLP and the same rotary positions, in classes of
their own. `use_native_layers` finds them by their shape and replaces only what computes the same
when it is tried, module by module; what differs stays as it is.
"""

import ctypes
import functools
import logging
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_void_p
from pathlib import Path
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from .compiled import compiled
from .linear import GatedWeights, NativeWeights, can_be_native

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("layers.c")
_TYPES = (torch.float32, torch.bfloat16)
_ROTARY = "apply_rotary_pos_emb"
# As the arguments of the functions stand in the source.
_NORMALIZE = (
    *(c_void_p, c_int64, c_int64, c_int64, c_int64, c_int64),
    *(c_void_p, c_float, c_void_p, c_int),
)
_ROTATE = (
    *(c_void_p, c_int64, c_int64, c_int64) * 2,
    *(c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int),
)
_STORE = (
    *(c_void_p, c_int64, c_int64, c_int64) * 2,
    *(c_void_p, c_int64, c_int64, c_int64, c_void_p, c_void_p, c_int),
)


@functools.cache
def layer_kernels(dtype: torch.dtype) -> ctypes.CDLL:
    """Return `layers.c` for a type of numbers, float32 or bfloat16.

    Raises:
        ValueError: it cannot be compiled here; says why.
    """
    library = compiled(_SOURCE, (("BFLOAT16", int(dtype == torch.bfloat16)),))
    for name, types in (("normalize", _NORMALIZE), ("rotate", _ROTATE), ("store", _STORE)):
        function = getattr(library, name)
        function.restype = None
        function.argtypes = types
    return library


class NativeNorm(nn.Module):
    """Computes what a root mean square norm did, one that rounds before it scales."""

    def __init__(self, stock: nn.Module, weight: nn.Parameter, epsilon: float) -> None:
        super().__init__()
        self.stock = stock
        self.weight = weight
        self.variance_epsilon = epsilon
        self._kernels = layer_kernels(weight.dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        if hidden.dtype != self.weight.dtype or hidden.stride(-1) != 1 or hidden.numel() == 0:
            normalized: Tensor = self.stock(hidden)
            return normalized
        # Why three dimensions: heads that lie in a wider tensor are not copied.
        rows = hidden.reshape(-1, *hidden.shape[-2:]) if hidden.dim() > 1 else hidden[None, None]
        out = torch.empty(hidden.shape, dtype=hidden.dtype)
        self._kernels.normalize(
            rows.data_ptr(),
            rows.shape[0],
            rows.shape[1],
            rows.stride(0),
            rows.stride(1),
            rows.shape[2],
            self.weight.data_ptr(),
            self.variance_epsilon,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


class GatedMlp(nn.Module):
    """Computes what an MLP did that gates by SiLU: down(SiLU(gate(x)) * up(x))."""

    def __init__(self, gate: nn.Linear, up: nn.Linear, down: nn.Linear) -> None:
        super().__init__()
        self._gated = GatedWeights(gate.weight, up.weight)
        self._down = NativeWeights(down.weight, down.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """Map (..., D) to (..., D)."""
        return self._down.map(self._gated.map(hidden))


def use_native_layers(model: nn.Module) -> int:
    """Replace what is known and right below a model on the CPU; return how many linear layers are
    part of that.

    The model may not be saved or trained afterwards. Without a compiler nothing is replaced.
    """
    dtype = next(model.parameters()).dtype
    if dtype not in _TYPES:
        return 0
    try:
        layer_kernels(dtype)
    except ValueError as error:
        logger.info("the small parts of layers are left to PyTorch: %s", error)
        return 0
    num_norms = num_mlps = num_rotaries = 0
    with torch.inference_mode():
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if norm := _native_norm(child):
                    setattr(parent, name, norm)
                    num_norms += 1
                elif mlp := _gated_mlp(child):
                    setattr(parent, name, mlp)
                    num_mlps += 1
        rotating_of = {kind: _rotating(kind, dtype) for kind in set(map(type, model.modules()))}
        for module in model.modules():
            rotating = rotating_of[type(module)]
            if rotating is not None:
                module.__class__ = rotating
                num_rotaries += 1
    logger.info(
        "%d norms, %d MLPs and %d rotary positions are in C", num_norms, num_mlps, num_rotaries
    )
    return 3 * num_mlps


def _native_norm(module: nn.Module) -> NativeNorm | None:
    parameters = dict(module.named_parameters())
    weight = parameters.get("weight")
    epsilon = getattr(module, "variance_epsilon", getattr(module, "eps", None))
    if (
        not type(module).__name__.endswith("RMSNorm")
        or weight is None
        or len(parameters) > 1
        or weight.dim() != 1
        or weight.dtype not in _TYPES
        or not isinstance(epsilon, float)
    ):
        return None
    norm = NativeNorm(module, weight, epsilon)
    # Why small ones too: the epsilon shows in them.
    scales = torch.tensor([[1e-4], [1e-2], [1.0], [30.0]])
    hidden = (_random(4, len(weight)) * scales).to(weight.dtype)
    return norm if _agree(module, norm, hidden) else None


def _gated_mlp(module: nn.Module) -> GatedMlp | None:
    parts = dict(module.named_children())
    if parts.keys() != {"gate_proj", "up_proj", "down_proj", "act_fn"}:
        return None
    gate, up, down = parts["gate_proj"], parts["up_proj"], parts["down_proj"]
    for linear in (gate, up, down):
        # Why the exact type: a subclass may compute something else.
        if type(linear) is not nn.Linear or not can_be_native(linear.weight):
            return None
    assert isinstance(gate, nn.Linear), gate
    assert isinstance(up, nn.Linear), up
    assert isinstance(down, nn.Linear), down
    if gate.bias is not None or up.bias is not None or gate.weight.shape != up.weight.shape:
        return None
    # Why apart: with small weights most activations are nearly the same in the whole.
    if not _agree(parts["act_fn"], nn.functional.silu, torch.linspace(-9, 9, 99)):
        return None
    mlp = GatedMlp(gate, up, down)
    hidden = _random(3, gate.in_features).to(gate.weight.dtype)
    return mlp if _agree(module, mlp, hidden, rounds_alike=False) else None


def _rotating(kind: type[nn.Module], dtype: torch.dtype) -> type[nn.Module] | None:
    """Return a class of attention that rotates by our function, and else is the one given.

    Why a copy of its forward: the function is a global of its module, which others use as well.
    """
    forward = kind.forward
    if not isinstance(forward, FunctionType) or _ROTARY not in forward.__code__.co_names:
        return None
    stock = forward.__globals__.get(_ROTARY)
    if stock is None:
        return None
    rotate = _rotate_like(stock, dtype)
    query, key = _random(1, 3, 5, 16).to(dtype), _random(1, 2, 5, 16).to(dtype)
    angles = (_random(1, 5, 16).to(dtype), _random(1, 5, 16).sigmoid().to(dtype))
    if not _agree(_joined(stock), _joined(rotate), query, key, *angles):
        return None
    ours = FunctionType(
        forward.__code__,
        {**forward.__globals__, _ROTARY: rotate},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    return type(kind.__name__, (kind,), {"forward": ours, "__module__": kind.__module__})


def _rotate_like(
    stock: Callable[..., tuple[Tensor, Tensor]], dtype: torch.dtype
) -> Callable[..., tuple[Tensor, Tensor]]:
    kernels = layer_kernels(dtype)

    def rotate(
        query: Tensor, key: Tensor, cosine: Tensor, sine: Tensor, *others: Any, **named: Any
    ) -> tuple[Tensor, Tensor]:
        """Turn query (1, H, T, D) and key (1, Hkv, T, D) by (1, T, D) each."""
        _, num_heads, num_tokens, dim = query.shape
        shape = (1, num_tokens, dim)
        if (
            others
            or named
            or not query.dtype == key.dtype == cosine.dtype == sine.dtype == dtype
            or not cosine.shape == sine.shape == shape
            or key.shape != (1, key.shape[1], num_tokens, dim)
            or dim % 2
            or query.stride(3) != 1
            or key.stride(3) != 1
            or not cosine.is_contiguous()
            or not sine.is_contiguous()
        ):
            return stock(query, key, cosine, sine, *others, **named)
        num_kv_heads = key.shape[1]
        out = query.new_empty(num_tokens * (num_heads + num_kv_heads) * dim)
        kernels.rotate(
            query.data_ptr(),
            query.stride(2),
            query.stride(1),
            num_heads,
            key.data_ptr(),
            key.stride(2),
            key.stride(1),
            num_kv_heads,
            cosine.data_ptr(),
            sine.data_ptr(),
            num_tokens,
            dim,
            out.data_ptr(),
            torch.get_num_threads(),
        )
        turned = out.split((num_tokens * num_heads * dim, num_tokens * num_kv_heads * dim))
        rotated = [part.view(1, num_tokens, -1, dim).transpose(1, 2) for part in turned]
        return rotated[0], rotated[1]

    return rotate


def _joined(rotate: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., Tensor]:
    """Return a function of one result: queries and keys as heads of one tensor."""
    return lambda *given: torch.cat(rotate(*given), dim=1)


def _random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def _agree(
    stock: Callable[..., Tensor],
    ours: Callable[..., Tensor],
    *given: Tensor,
    rounds_alike: bool = True,
) -> bool:
    """Return whether both map some tensors to the same.

    Args:
        rounds_alike: all but a few numbers must be the same to the last digit, in bfloat16.
    """
    try:
        expected = stock(*given)
    except Exception as error:  # boundary: the model's own code
        logger.debug("%s is left as it is", stock, exc_info=error)
        return False
    found = ours(*given)
    if found.shape != expected.shape or found.dtype != expected.dtype:
        return False
    is_short = expected.dtype == torch.bfloat16
    if is_short and rounds_alike and float((found == expected).float().mean()) < 0.95:
        return False
    digits = 0.02 if is_short else 1e-5
    close = torch.isclose(
        found.float(), expected.float(), rtol=digits, atol=digits * float(expected.abs().max())
    )
    return bool(close.all())
