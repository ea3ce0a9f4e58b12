# SPDX-License-Identifier: Apache-2.0
"""Products with a matrix that stays, by a function in C (`linear.c`): bfloat16, where CPUs have it.

With 16 rows it takes four fifths of what PyTorch's own kernel does, with one two thirds, with
hundreds as long (`doc/experiments/engine-cpu.md`).
"""

import ctypes
import functools
import logging
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor, nn

from .compiled import compiled

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("linear.c")
_PANEL = 16
"""Outputs, as in the source."""
# As the arguments of `linear` stand in the source.
_LINEAR = (
    *(c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p, c_int),
    *(c_void_p, c_void_p, c_int),
)


class NativeWeights:
    """A matrix (out, in) and a bias (out), laid out for the kernel. Takes no more than they did.

    Raises:
        ValueError: this kernel is not for this machine; says why.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._num_out = len(weight)
        self._bias = None if bias is None else bias.detach().contiguous()
        self._packed = _panels(weight).contiguous()
        _kernel()

    def map(self, hidden: Tensor) -> Tensor:
        """Map (..., in) to (..., out)."""
        return _mapped(hidden, self._packed, self._num_out, self._bias)

    def plain(self) -> Tensor:
        """Return the matrix as it was, made anew."""
        num_in = 2 * self._packed.shape[1]
        return self._packed.transpose(1, 2).reshape(-1, num_in)[: self._num_out]


class GatedWeights:
    """Two matrices (out, in) of a gated layer; as `NativeWeights`."""

    def __init__(self, gate: Tensor, up: Tensor) -> None:
        self._num_out = len(gate)
        self._packed = torch.stack((_panels(gate), _panels(up)), dim=1)
        _kernel()

    def map(self, hidden: Tensor) -> Tensor:
        """Map (..., in) to SiLU(hidden @ gate.T) * (hidden @ up.T), (..., out)."""
        return _mapped(hidden, self._packed, self._num_out, None, is_gated=True)


@functools.cache
def is_native() -> bool:
    """Return whether the kernel runs here and is right, by trying it; the log says why not."""
    generator = torch.Generator().manual_seed(0)
    weight, hidden = (torch.randn(rows, 32, generator=generator).bfloat16() for rows in (24, 20))
    try:
        mapped = NativeWeights(weight, None).map(hidden)
    except ValueError as error:
        logger.info("linear layers are left to PyTorch's own kernel: %s", error)
        return False
    expected = hidden.float() @ weight.float().T
    is_right = torch.allclose(mapped.float(), expected, atol=0.05, rtol=0.02)
    if not is_right:
        logger.warning("linear layers are left to PyTorch's own kernel: ours is wrong here")
    return is_right


def can_be_native(weight: Tensor) -> bool:
    """Return whether a matrix can be one of `NativeWeights`."""
    return weight.dtype == torch.bfloat16 and weight.shape[1] % 2 == 0 and is_native()


def _panels(weight: Tensor) -> Tensor:
    """Show (out, in) as (panels, pairs of inputs, outputs of a panel, 2), the last filled up."""
    num_out, num_in = weight.shape
    filled = nn.functional.pad(weight.detach(), (0, 0, 0, -num_out % _PANEL))
    return filled.view(-1, _PANEL, num_in // 2, 2).transpose(1, 2)


def _mapped(
    hidden: Tensor, packed: Tensor, num_out: int, bias: Tensor | None, *, is_gated: bool = False
) -> Tensor:
    if hidden.dtype != packed.dtype:
        raise ValueError(f"rows are {hidden.dtype}, the matrix is {packed.dtype}")
    num_in = hidden.shape[-1]
    out = hidden.new_empty(*hidden.shape[:-1], num_out)
    if hidden.numel() == 0:
        return out
    hidden = hidden.contiguous()
    spread = torch.empty_like(hidden)
    _kernel().linear(
        hidden.data_ptr(),
        hidden.numel() // num_in,
        num_in,
        packed.data_ptr(),
        num_out,
        None if bias is None else bias.data_ptr(),
        is_gated,
        spread.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


@functools.cache
def _kernel() -> ctypes.CDLL:
    library = compiled(_SOURCE, ())
    library.linear.restype = None
    library.linear.argtypes = _LINEAR
    return library
