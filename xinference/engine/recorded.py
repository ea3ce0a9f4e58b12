# SPDX-License-Identifier: Apache-2.0
"""Steps of single tokens as recordings, so that Python and kernel launches cost them nothing.

A step of a small model is mostly launches: hundreds of kernels, each of a few microseconds. A CUDA
graph replays them all at once, but with the addresses and shapes of its recording. So every such
step is padded to one of a few numbers of rows, its inputs are copied to where the recording reads
them, and attention works by a plan that stays where it is. Rows that fill up store nothing, see
nothing, and their logits are not looked at.

How to record is an argument: `CudaGraphs` does it on CUDA, and a test can do without.
"""

import bisect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from .attention.interface import AttentionBackend
from .batch import Batch
from .model_runner import ModelRunner, run_model

logger = logging.getLogger(__name__)

Replay = Callable[[], Tensor]
Record = Callable[[Replay], Replay]
"""Takes what computes logits from inputs in fixed places; returns what does it again."""


@runtime_checkable
class RecordableBackend(AttentionBackend, Protocol):
    """A backend that can also work by a plan whose tensors stay where they are."""

    def fixed_plan(
        self, num_rows: int, *, max_blocks: int, block_size: int, device: torch.device
    ) -> Any:
        """Return the plan of a step of `num_rows` single tokens which store and see nothing."""
        ...

    def refill(self, plan: Any, batch: Batch) -> None:
        """Let a fixed plan be of this step of single tokens, which has at most its rows."""
        ...


def row_counts(max_num_rows: int) -> list[int]:
    """Return the numbers of rows that steps are padded to, ascending."""
    some = [1, 2, 4, *range(8, 256, 8), *range(256, max_num_rows, 32)]
    return [count for count in some if count < max_num_rows] + [max_num_rows]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Recording:
    token_ids: Tensor
    """(rows,) int64"""
    positions: Tensor
    """(rows,) int64"""
    plan: Any
    replay: Replay


class RecordedRunner:
    """A `ModelRunner` that replays steps of single tokens, and runs all others itself."""

    def __init__(
        self,
        runner: ModelRunner,
        backend: RecordableBackend,
        record: Record,
        *,
        max_num_rows: int,
        max_blocks: int,
        block_size: int,
    ) -> None:
        """Record every number of rows.

        Args:
            runner: what runs the steps that are not replayed, over the same cache.
            backend: of its attention.
            record: how.
            max_num_rows: steps of more rows are not replayed.
            max_blocks: the most of one row.
            block_size: tokens of a block.
        """
        self._runner = runner
        self._backend = backend
        self._counts = row_counts(max_num_rows)
        self._recordings: dict[int, _Recording] = {}
        # Why the largest first: the others then find room in its memory.
        for count in reversed(self._counts):
            plan = backend.fixed_plan(
                count, max_blocks=max_blocks, block_size=block_size, device=runner.model.device
            )
            self._recordings[count] = self._record(count, plan, record)
        logger.info("steps of %s single tokens are recorded", self._counts)

    def forward(self, batch: Batch) -> Tensor:
        """As `Runner.forward`."""
        num_rows = len(batch.context_lens)
        if batch.num_decode_rows < num_rows or num_rows > self._counts[-1]:
            return self._runner.forward(batch)
        recording = self._recordings[self._counts[bisect.bisect_left(self._counts, num_rows)]]
        recording.token_ids[:num_rows] = torch.from_numpy(batch.token_ids)
        recording.positions[:num_rows] = torch.from_numpy(batch.positions)
        self._backend.refill(recording.plan, batch)
        logits = recording.replay()
        return logits[torch.from_numpy(batch.sample_tokens).to(logits.device)]

    def _record(self, count: int, plan: Any, record: Record) -> _Recording:
        model, cache = self._runner.model, self._runner.cache
        token_ids = torch.zeros(count, dtype=torch.int64, device=model.device)
        positions = torch.zeros_like(token_ids)
        every_row = torch.arange(count, device=model.device)

        def run() -> Tensor:
            cache.begin_with(plan)
            return run_model(model, cache, token_ids, positions, every_row)

        return _Recording(token_ids=token_ids, positions=positions, plan=plan, replay=record(run))


class CudaGraphs:
    """Records CUDA graphs, all in one pool of memory."""

    def __init__(self) -> None:
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Replay) -> Replay:
        """Record what `run` launches."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            # Why before: kernels are compiled and libraries made ready in it; a graph forbids that.
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            logits = run()

        def replay() -> Tensor:
            graph.replay()
            return logits

        return replay
