# SPDX-License-Identifier: Apache-2.0
"""What models that embed and models that rerank have in common: everything but what is computed."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

from xinference.engine.config import Placement, free_memory_bytes
from xinference.identifiers import RequestId
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import Accepted
from xinference.protocol.vectors import ModelRequest

from .base import Sink
from .encoder_loading import context_length
from .encoder_loop import EncoderLoop, Job, Texts
from .encoder_memory import batch_limits

Described = str | int | float | bool | None


class EncoderModel(ABC):
    """A loaded model that computes texts in batches. Implements `Model`.

    Any thread may call any method.
    """

    def __init__(
        self,
        spec: ReplicaSpec,
        placement: Placement,
        config: Any,
        *,
        max_tokens: int,
        bytes_per_row: int = 0,
    ) -> None:
        """Settle the limits of batches and texts.

        Args:
            config: of the model, as transformers has it.
            max_tokens: of a text, by the files.
            bytes_per_row: memory that a text takes whatever its length.

        Raises:
            InvalidRequest: the launch wants longer texts than the model or the memory takes.
        """
        self._name = str(spec.replica.model)
        self._placement = placement
        self._max_queue_size = spec.engine_options.max_queue_size
        self._interval_seconds = spec.encoder_options.batch_interval or 0.0
        self._limits = batch_limits(
            spec.encoder_options,
            config,
            item_bytes=placement.dtype.itemsize,
            free_bytes=free_memory_bytes(placement.device),
            on_cpu=placement.device.type == "cpu",
            bytes_per_row=bytes_per_row,
        )
        self._context_length = context_length(
            self._name, max_tokens, spec.engine_options.max_model_len, self._limits
        )
        self._loop: EncoderLoop | None = None

    @property
    def context_length(self) -> int:
        """Of one text, in tokens."""
        return self._context_length

    @property
    def max_num_seqs(self) -> int:
        """Texts that are computed at once."""
        return self._limits.max_items

    @property
    def is_alive(self) -> bool:
        """Whether the model's thread runs."""
        return self._loop is not None and self._loop.alive

    def description(self) -> Mapping[str, Described]:
        """Return what was chosen at load, by name."""
        return {
            "device": str(self._placement.device),
            "dtype": str(self._placement.dtype).removeprefix("torch."),
            "max_tokens": self._context_length,
            "batch_size": self._limits.max_items,
            "batch_interval": self._interval_seconds,
            "max_batch_tokens": self._limits.max_tokens,
            "max_batch_bytes": self._limits.max_bytes,
            "max_queue_size": self._max_queue_size,
            **self.about(),
        }

    def counters(self) -> dict[str, float]:
        """Return what has been done and has to be done, by name."""
        return {} if self._loop is None else self._loop.counters()

    def start(self, sink: Sink) -> None:
        """Start the model's thread; events go to `sink`, in that thread."""
        assert self._loop is None, "start() was called before"
        self._loop = EncoderLoop(
            self.compute,
            limits=self._limits,
            interval_seconds=self._interval_seconds,
            max_queue_size=self._max_queue_size,
            model_name=self._name,
            sink=sink,
        )
        self._loop.start()

    def submit(self, request: ModelRequest) -> Accepted:
        """Turn the texts into tokens and enqueue them. Takes time that grows with the texts.

        Raises:
            AbilityMissing: the request is not for what this model does.
            InvalidRequest: a text is longer than the model takes, say.
            ModelOverloaded, DuplicateRequest
            In every case nothing was enqueued.
        """
        assert self._loop is not None, "start() comes first"
        return self._loop.submit(self.prepare(request))

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a request, within one batch; return whether it was live."""
        return self._loop is not None and self._loop.abort(request_id)

    def stop(self, timeout_seconds: float) -> None:
        """End every request and the model's thread.

        Raises:
            TimeoutError: a batch did not end in time.
        """
        if self._loop is not None:
            self._loop.stop(timeout_seconds)

    @abstractmethod
    def about(self) -> Mapping[str, Described]:
        """Return what else there is to say of this kind of model."""

    @abstractmethod
    def prepare(self, request: ModelRequest) -> Job:
        """Return what is to be computed. Changes nothing.

        Raises:
            AbilityMissing, InvalidRequest
        """

    @abstractmethod
    def compute(self, texts: Texts) -> Sequence[Any]:
        """Return one result for each text; they are computed together, in the model's thread."""
