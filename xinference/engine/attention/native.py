# SPDX-License-Identifier: Apache-2.0
"""`CpuAttention` whose single tokens go through a kernel in C (`decode.c`).

One pass over the pages instead of three batched products and a score of small operations between
them (`doc/experiments/engine-cpu.md`). Needs a C compiler; layers with soft caps, and all chunks,
go the way of `CpuAttention`.
"""

import ctypes
import functools
from ctypes import c_float, c_int, c_int64, c_void_p
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from xinference.engine.native.compiled import compiled
from xinference.engine.native.layers import layer_kernels

from .cpu import CpuAttention, CpuPlan
from .interface import Pages, Scoring

_SOURCE = Path(__file__).parents[1] / "native" / "decode.c"
_PART = 256
"""Tokens. Why not a whole context: a long one would keep one thread busy, and others wait."""
_TYPES = (torch.float32, torch.bfloat16)
# As the arguments of `decode` stand in the source: where tensors begin, and numbers.
_DECODE = (
    *(c_void_p, c_int64, c_int64, c_void_p, c_void_p),
    *(c_void_p, c_int64, c_void_p, c_void_p, c_void_p, c_int64, c_void_p, c_int64),
    *(c_float, c_void_p, c_void_p, c_void_p, c_int),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Parts:
    """The parts of the decoding rows, for one window; int64 all."""

    tables: Tensor
    """(rows, most blocks of a row)"""
    ends: Tensor
    """(rows,)"""
    rows: Tensor
    """(parts,)"""
    begins: Tensor
    """(parts,)"""
    of_row: Tensor
    """(rows + 1,)"""


@dataclass(slots=True, kw_only=True)
class NativePlan(CpuPlan):
    """One step."""

    parts: dict[int | None, _Parts] = field(default_factory=dict)
    """By window, made on first use."""
    slots: Tensor | None = None
    """(T,) int64, likewise."""


class NativeAttention(CpuAttention):
    """See the module's text.

    Raises:
        ValueError: on use, where nothing can be compiled.
    """

    plan_type = NativePlan

    def store(self, pages: Pages, plan: CpuPlan, key: Tensor, value: Tensor) -> None:
        if key.dtype not in _TYPES or key.stride(3) != 1 or value.stride(3) != 1:
            super().store(pages, plan, key, value)
            return
        assert isinstance(plan, NativePlan), plan
        if plan.slots is None:
            plan.slots = torch.from_numpy(plan.batch.cache_slots)
        self._clear_fresh(pages, plan)
        _, num_kv_heads, num_tokens, key_dim = key.shape
        layer_kernels(key.dtype).store(
            key.data_ptr(),
            key.stride(2),
            key.stride(1),
            key_dim,
            value.data_ptr(),
            value.stride(2),
            value.stride(1),
            value.shape[3],
            plan.slots.data_ptr(),
            num_tokens,
            num_kv_heads,
            plan.batch.block_size,
            pages.key.data_ptr(),
            pages.value.data_ptr(),
            torch.get_num_threads(),
        )

    def _decode(self, pages: Pages, plan: CpuPlan, query: Tensor, scoring: Scoring) -> Tensor:
        if scoring.softcap is not None or query.dtype not in _TYPES or query.stride(2) != 1:
            return super()._decode(pages, plan, query, scoring)
        assert isinstance(plan, NativePlan), plan
        parts = plan.parts.get(scoring.window)
        if parts is None:
            parts = plan.parts[scoring.window] = _cut(plan, scoring.window)
        num_heads, num_rows, key_dim = query.shape
        num_kv_heads, block_size, value_dim = pages.value.shape[1:]
        kernel = _kernel(
            is_bfloat16=query.dtype == torch.bfloat16,
            key_dim=key_dim,
            value_dim=value_dim,
            num_kv_heads=num_kv_heads,
            group=num_heads // num_kv_heads,
            block_size=block_size,
        )
        sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
        num_bytes = len(parts.rows) * num_kv_heads * kernel.partial_bytes()
        partials = torch.empty(num_bytes, dtype=torch.uint8)
        out = query.new_empty(num_rows, num_heads * value_dim)
        kernel.decode(
            query.data_ptr(),
            query.stride(1),
            query.stride(0),
            pages.key.data_ptr(),
            pages.value.data_ptr(),
            parts.tables.data_ptr(),
            parts.tables.stride(0),
            parts.ends.data_ptr(),
            parts.rows.data_ptr(),
            parts.begins.data_ptr(),
            len(parts.rows),
            parts.of_row.data_ptr(),
            num_rows,
            scoring.scaling,
            None if sinks is None else sinks.data_ptr(),
            partials.data_ptr(),
            out.data_ptr(),
            torch.get_num_threads(),
        )
        return out


@functools.cache
def _kernel(
    *,
    is_bfloat16: bool,
    key_dim: int,
    value_dim: int,
    num_kv_heads: int,
    group: int,
    block_size: int,
) -> ctypes.CDLL:
    constants = (
        ("BFLOAT16", int(is_bfloat16)),
        ("KEY_DIM", key_dim),
        ("VALUE_DIM", value_dim),
        ("NUM_KV_HEADS", num_kv_heads),
        ("GROUP", group),
        ("BLOCK_SIZE", block_size),
        ("PART", _PART),
    )
    library = compiled(_SOURCE, constants)
    library.partial_bytes.restype = c_int64
    library.decode.restype = None
    library.decode.argtypes = _DECODE
    return library


def _cut(plan: CpuPlan, window: int | None) -> _Parts:
    batch, num_rows = plan.batch, plan.num_decode_rows
    ends = batch.context_lens[:num_rows].astype(np.int64)
    starts = np.zeros_like(ends) if window is None else np.maximum(ends - window, 0)
    counts = -(-(ends - starts) // _PART)
    of_row = np.concatenate(([0], np.cumsum(counts)))
    rows = np.repeat(np.arange(num_rows), counts)
    begins = starts[rows] + (np.arange(of_row[-1]) - of_row[rows]) * _PART
    tables = np.ascontiguousarray(batch.block_tables[:num_rows], dtype=np.int64)
    return _Parts(
        tables=torch.from_numpy(tables),
        ends=torch.from_numpy(ends),
        rows=torch.from_numpy(rows),
        begins=torch.from_numpy(begins),
        of_row=torch.from_numpy(of_row),
    )
