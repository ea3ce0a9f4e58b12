# SPDX-License-Identifier: Apache-2.0
"""The events of an answer: the engine's text becomes reasoning, calls of tools and content.

In: what the engine tells of one request. Out: what callers are told. Streamed answers and whole
ones are made of the same events, so nobody after this looks into the text.
"""

import logging
from collections.abc import Sequence
from dataclasses import replace

from xinference.protocol.generation import (
    Delta,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    ReasoningDelta,
    TextDelta,
    ToolCallStart,
)

from .parsing.grammars import Plain
from .parsing.reader import AnswerParser

logger = logging.getLogger(__name__)


class AnswerReaders:
    """Reads the answers of one request, each by itself. Belongs to the engine's thread."""

    def __init__(self, readers: Sequence["AnswerReader"]) -> None:
        """Take a new reader for each answer."""
        self._readers = readers
        self._ended: set[int] = set()
        self._to_end: list[int] = []

    def read(
        self, event: GenerationEvent, *, num_tokens: int | None = None
    ) -> list[GenerationEvent]:
        """Return what becomes of an event of the engine.

        Args:
            event: of the engine.
            num_tokens: of a piece, where it does not have its own tokens.
        """
        if isinstance(event, Finished | Failed):
            return self._finish(event)
        index = event.choice_index
        reader = self._readers[index]
        was_over = reader.is_over
        told = reader.read(event, num_tokens=num_tokens)
        if isinstance(event, TextDelta) and event.reason is not None:
            self._ended.add(index)
        elif reader.is_over and not was_over:
            self._to_end.append(index)
        return [replace(delta, choice_index=index) for delta in told] if index else [*told]

    def take_to_end(self) -> list[int]:
        """Return the answers that are over before the engine has ended them, each once."""
        to_end, self._to_end = self._to_end, []
        return to_end

    def _finish(self, event: Finished | Failed) -> list[GenerationEvent]:
        told: list[GenerationEvent] = []
        for index, reader in enumerate(self._readers):
            if index not in self._ended:
                told += [replace(delta, choice_index=index) for delta in reader.finish()]
        if isinstance(event, Finished):
            num_thought = sum(reader.num_reasoning_tokens for reader in self._readers)
            event = replace(event, usage=replace(event.usage, num_reasoning_tokens=num_thought))
            if len(self._readers) == 1:
                event = replace(event, reason=self._readers[0].reason(event.reason))
        return [*told, event]


class AnswerReader:
    """Reads one answer. Belongs to the engine's thread; never raises."""

    def __init__(self, parser: AnswerParser, *, one_call: bool) -> None:
        """Take a new parser, and whether the answer ends with its first call."""
        self._parser = parser
        self._one_call = one_call
        self._is_over = False
        self.num_reasoning_tokens = 0
        """Tokens of the thoughts so far, and of the tags around them."""

    def read(self, event: Delta, *, num_tokens: int | None = None) -> list[Delta]:
        """Return what becomes of a piece of the engine's.

        The tokens of a piece go with its first text; a piece without text gets an empty one.
        """
        if not isinstance(event, TextDelta):
            return [event]
        was_thinking = self._parser.is_thinking
        deltas = self._with_tokens(self._parse(event.text), replace(event, reason=None))
        if was_thinking or self._parser.is_thinking:
            self.num_reasoning_tokens += len(event.token_ids) if num_tokens is None else num_tokens
        if event.reason is None:
            return deltas
        return [*deltas, *self.finish(), TextDelta(text="", reason=self.reason(event.reason))]

    def finish(self) -> list[Delta]:
        """Return the rest, when no text will come any more; it may complete a call."""
        return self._parse(None)

    @property
    def is_over(self) -> bool:
        """Whether the answer ended before the engine's did, which is to be ended."""
        return self._is_over

    def reason(self, reason: FinishReason) -> FinishReason:
        """Return why the answer has ended, as callers are told."""
        has_called = self._parser.num_complete_calls > 0
        if has_called and (reason is FinishReason.STOP or self._is_over):
            return FinishReason.TOOL_CALLS
        return reason

    def _parse(self, text: str | None) -> list[Delta]:
        """Parse a piece, or with None what is left."""
        if self._is_over:
            return []
        try:
            deltas = self._parser.finish() if text is None else self._parser.push(text)
        except Exception:
            # Boundary: the text is whatever a model wrote, and the engine's thread must live.
            logger.exception("an answer could not be parsed; its text goes on as it is")
            self._parser = Plain()
            deltas = [TextDelta(text=text or "")]
        if self._one_call and self._parser.num_complete_calls > 0:
            self._is_over = True
            deltas = _up_to_second_call(deltas)
        return deltas

    def _with_tokens(self, deltas: list[Delta], source: TextDelta) -> list[Delta]:
        match deltas:
            case [TextDelta(text=text), *others]:
                return [replace(source, text=text), *others]
            case [ReasoningDelta() as first, *others]:
                thought = replace(first, token_ids=source.token_ids)
                told = [TextDelta(text="", logprobs=source.logprobs)] if source.logprobs else []
                return [*told, thought, *others]
        return [replace(source, text=""), *deltas]


def _up_to_second_call(deltas: list[Delta]) -> list[Delta]:
    for position, delta in enumerate(deltas):
        if isinstance(delta, ToolCallStart) and delta.index > 0:
            return deltas[:position]
    return deltas
