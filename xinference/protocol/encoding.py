# SPDX-License-Identifier: Apache-2.0
"""How models that embed and rerank are launched: what is theirs beside `EngineOptions`."""

from dataclasses import dataclass, fields, replace
from typing import Any, Self

from xinference.errors import InvalidRequest

SHARED_OPTIONS = (
    "context_length",
    "device",
    "dtype",
    "max_model_len",
    "max_queue_size",
    "num_threads",
    "trust_remote_code",
)
"""Options of the language engine that mean the same for these models."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderOptions:
    """What a launch may set of how texts are put into batches. None: see each."""

    batch_size: int | None = None
    """The most texts of one batch. None: `XINFERENCE_BATCH_SIZE`."""
    batch_interval: float | None = None
    """Where several callers ask at once, how many seconds a batch that is not full waits for
    the next text. None: `XINFERENCE_BATCH_INTERVAL`."""
    max_batch_tokens: int | None = None
    """The most tokens of one batch, its padding included. None: the model chooses."""
    max_batch_bytes: int | None = None
    """The most memory that computing one batch may take beside the weights. None: a quarter of
    what is free, and at most a GiB."""
    normalize_embeddings: bool = True
    """Vectors have unit length, whatever the files say."""

    def __post_init__(self) -> None:
        for name in ("batch_size", "max_batch_tokens", "max_batch_bytes"):
            value = getattr(self, name)
            if value is not None and (
                not isinstance(value, int) or isinstance(value, bool) or value < 1
            ):
                raise InvalidRequest(
                    field=name, problem=f"must be a whole number above 0, got {value!r}"
                )
        seconds = self.batch_interval
        if seconds is not None and (
            isinstance(seconds, bool)
            or not isinstance(seconds, int | float)
            or not 0 <= seconds <= 1
        ):
            raise InvalidRequest(
                field="batch_interval", problem=f"must be from 0 to 1 second, got {seconds!r}"
            )
        if not isinstance(self.normalize_embeddings, bool):
            raise InvalidRequest(
                field="normalize_embeddings",
                problem=f"must be true or false, got {self.normalize_embeddings!r}",
            )

    def completed(self, *, batch_size: int, batch_interval: float) -> Self:
        """Return these options, with the defaults of a process where the launch says nothing."""
        return replace(
            self,
            batch_size=batch_size if self.batch_size is None else self.batch_size,
            batch_interval=batch_interval if self.batch_interval is None else self.batch_interval,
        )


def split_options(given: dict[str, Any]) -> tuple[EncoderOptions, dict[str, Any]]:
    """Take the encoder's options out of launch keys; return the shared ones beside them.

    Raises:
        InvalidRequest: a key is none of either, or has a bad value.
    """
    own = {option.name for option in fields(EncoderOptions)}
    for name in given:
        if name not in own and name not in SHARED_OPTIONS:
            raise InvalidRequest(
                field=name,
                problem="is not an option of models that embed or rerank; those are "
                + ", ".join(sorted(own | set(SHARED_OPTIONS))),
            )
    options = EncoderOptions(**{name: value for name, value in given.items() if name in own})
    return options, {name: value for name, value in given.items() if name not in own}


@dataclass(frozen=True, slots=True, kw_only=True)
class RerankTemplate:
    """How a language model is asked whether a document is relevant, and where it says so.

    A prompt is prefix, query and document in their formats, then suffix; the score is what the
    model thinks of `yes` as its next token.
    """

    query: str
    """A format with {query}, and with {instruction} where the model takes one."""
    document: str
    """A format with {document}."""
    prefix: str = ""
    suffix: str = ""
    yes: str
    """A token."""
    no: str | None = None
    """A token: the score is the share of `yes` among the two. None: sigmoid of its logit."""
    instruction: str | None = None
    """Of requests that give none."""
