# SPDX-License-Identifier: Apache-2.0
"""The events of one answer: the engine's text becomes reasoning, calls of tools and content.

In: what the engine tells of one sequence. Out: what callers are told. Streamed answers and whole
ones are made of the same events, so nobody after this looks into the text.
"""

import logging
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


class AnswerReader:
    """Reads one answer. Belongs to the engine's thread; never raises."""

    def __init__(self, parser: AnswerParser, *, one_call: bool) -> None:
        """Take a new parser, and whether the answer ends with its first call."""
        self._parser = parser
        self._one_call = one_call
        self._is_over = False

    def read(self, event: GenerationEvent) -> list[GenerationEvent]:
        """Return what becomes of an event of the engine.

        The tokens of a piece go with its first text; a piece without text gets an empty one.
        """
        match event:
            case TextDelta():
                deltas = self._with_tokens(self._parse(event.text), event)
                return [*deltas]
            case Finished():
                # Why first: the last text may complete a call.
                rest = self._parse(None)
                return [*rest, replace(event, reason=self._reason(event.reason))]
            case Failed():
                return [*self._parse(None), event]
        return [event]

    @property
    def is_over(self) -> bool:
        """Whether the answer ended before the engine did; its request is to be aborted."""
        return self._is_over

    def _reason(self, reason: FinishReason) -> FinishReason:
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
                return [replace(first, token_ids=source.token_ids), *others]
        return [replace(source, text=""), *deltas]


def _up_to_second_call(deltas: list[Delta]) -> list[Delta]:
    for position, delta in enumerate(deltas):
        if isinstance(delta, ToolCallStart) and delta.index > 0:
            return deltas[:position]
    return deltas
