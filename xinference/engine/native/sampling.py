# SPDX-License-Identifier: Apache-2.0
"""Sums over the vocabulary by a function in C (`sampling.c`), which makes no tensor of its size."""

import ctypes
import functools
import logging
from ctypes import c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from .compiled import compiled

logger = logging.getLogger(__name__)

_SOURCE = Path(__file__).with_name("sampling.c")
_TYPES = (torch.float32, torch.bfloat16)
# As the arguments of `chunk_sums` stand in the source.
_CHUNK_SUMS = (c_void_p, *(c_int64,) * 4, *(c_void_p,) * 3, c_int)


def native_chunk_sums(
    logits: Tensor, highest: Tensor, temperature: Tensor, *, chunk: int
) -> Tensor | None:
    """Return the sums of exp((logit - highest) / temperature) over chunks of tokens.

    Args:
        logits: (R, V).
        highest: (R,) of each row.
        temperature: (R,).
        chunk: tokens.

    Returns:
        (R, chunks) float64; None where there is nothing native for these.
    """
    if logits.device.type != "cpu" or logits.dtype not in _TYPES or logits.stride(1) != 1:
        return None
    kernel = _kernel(logits.dtype)
    if kernel is None:
        return None
    num_rows, vocab_size = logits.shape
    highest, temperature = highest.float().contiguous(), temperature.float().contiguous()
    sums = torch.empty(num_rows, -(-vocab_size // chunk), dtype=torch.float64)
    kernel.chunk_sums(
        logits.data_ptr(),
        logits.stride(0),
        num_rows,
        vocab_size,
        chunk,
        highest.data_ptr(),
        temperature.data_ptr(),
        sums.data_ptr(),
        torch.get_num_threads(),
    )
    return sums


@functools.cache
def _kernel(dtype: torch.dtype) -> ctypes.CDLL | None:
    try:
        library = compiled(_SOURCE, (("BFLOAT16", int(dtype == torch.bfloat16)),))
    except ValueError as error:
        logger.info("sums over the vocabulary are left to PyTorch: %s", error)
        return None
    library.chunk_sums.restype = None
    library.chunk_sums.argtypes = _CHUNK_SUMS
    return library
