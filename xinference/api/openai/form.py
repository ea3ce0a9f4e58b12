# SPDX-License-Identifier: Apache-2.0
"""The JSON of an answer in OpenAI's protocol: whole, or chunk by chunk.

What differs between chats and completions is how one choice looks; they say it in five methods.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any, ClassVar

import orjson

from xinference.api.errors import error_event
from xinference.api.generation import AnswerForm
from xinference.errors import XinferenceError
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    GenerationRequest,
    ReasoningDelta,
    TextDelta,
    TokenCandidate,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
    Usage,
)

from .obfuscation import padded

DONE = b"data: [DONE]\n\n"


class AnswerParts:
    """The deltas of one answer, put together."""

    def __init__(self, deltas: Iterable[Delta]) -> None:
        self.logprobs: list[TokenLogprob] = []
        self.reason: FinishReason | None = None
        """Why it ended, if that was told of it alone."""
        self._text: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[tuple[ToolCallStart, list[str]]] = []
        for delta in deltas:
            self._add(delta)

    def _add(self, delta: Delta) -> None:
        match delta:
            case TextDelta(text=text, logprobs=logprobs, reason=reason):
                self._text.append(text)
                self.logprobs += logprobs
                self.reason = reason or self.reason
            case ReasoningDelta(text=text):
                self._reasoning.append(text)
            case ToolCallStart():
                self._calls.append((delta, []))
            case ToolCallArguments(index=index, text=text):
                self._calls[index][1].append(text)

    @property
    def text(self) -> str:
        """What is said to the reader."""
        return "".join(self._text)

    @property
    def reasoning(self) -> str:
        """What was thought before."""
        return "".join(self._reasoning)

    @property
    def tool_calls(self) -> list[tuple[ToolCallStart, str]]:
        """The calls, with their arguments."""
        return [(start, "".join(arguments)) for start, arguments in self._calls]


class Form(AnswerForm):
    """Writes the answer of one request. The chunks are whole server-sent events."""

    id_prefix: ClassVar[str]
    whole_object: ClassVar[str]
    chunk_object: ClassVar[str]

    def __init__(
        self,
        asked: GenerationRequest,
        model: str,
        *,
        with_usage: bool,
        is_padded: bool = False,
        service_tier: str | None = None,
    ) -> None:
        """Take what is asked.

        Args:
            with_usage: a stream ends with the usage.
            is_padded: the sizes of a stream's chunks tell nothing of their text.
            service_tier: said with every answer and chunk; None: not a word.
        """
        self._with_usage = with_usage
        self._is_padded = is_padded
        self._num_choices = asked.num_choices
        self._with_logprobs = asked.sampling.logprobs is not None
        self._about: dict[str, Any] = {
            "id": f"{self.id_prefix}-{asked.request_id}",
            "created": int(time.time()),
            "model": model,
            **({} if service_tier is None else {"service_tier": service_tier}),
        }

    @cached_property
    def _around(self) -> list[tuple[bytes, bytes]]:
        """What is before and behind the text in the chunks of each choice.

        Why: one chunk is written per token, and all of it but the text is always the same.
        """
        # The text is the last NUL in it; a caller may have put one into the model's name.
        samples = [self._chunk(self.piece("\0"), index) for index in range(self._num_choices)]
        return [
            (before, after)
            for before, _, after in (one.rpartition(b'"\\u0000"') for one in samples)
        ]

    @property
    def answer_id(self) -> str:
        """The id of the answer."""
        return str(self._about["id"])

    def opening(self, accepted: Accepted) -> bytes:
        """Return what comes before the first text; may be empty."""
        piece = self.first_piece()
        if piece is None:
            return b""
        return b"".join(self._chunk(piece, index) for index in range(self._num_choices))

    @abstractmethod
    def first_piece(self) -> dict[str, Any] | None:
        """Return what a streamed choice says before its text, if anything."""

    @abstractmethod
    def piece(self, text: str) -> dict[str, Any]:
        """Return what a streamed choice says of a piece of text."""

    @abstractmethod
    def last_piece(self) -> dict[str, Any]:
        """Return what the choice says that has the finish reason."""

    @abstractmethod
    def answer(self, parts: AnswerParts) -> dict[str, Any]:
        """Return what a whole choice says."""

    def other_piece(self, delta: Delta) -> dict[str, Any] | None:
        """Return what a streamed choice says of a delta that is not text; None: nothing."""
        return None

    @abstractmethod
    def logprobs(self, told: Sequence[TokenLogprob]) -> dict[str, Any]:
        """Return what a choice says of the tokens it has, or of those of a chunk."""

    def delta(self, delta: Delta) -> bytes:
        """Return the chunks of a delta, and of the end of a choice that is not the only one.

        Nothing if it says nothing.
        """
        chunks = self._chunks_of(delta)
        if not self._is_padded or not chunks:
            return chunks
        return padded(chunks, delta.name if isinstance(delta, ToolCallStart) else delta.text)

    def _chunks_of(self, delta: Delta) -> bytes:
        index = delta.choice_index
        if not isinstance(delta, TextDelta):
            piece = self.other_piece(delta)
            return b"" if piece is None else self._chunk(piece, index)
        chunks = b""
        if delta.logprobs and self._with_logprobs:
            told = self.logprobs(delta.logprobs)
            chunks = self._chunk(self.piece(delta.text), index, logprobs=told)
        elif delta.text:
            before, after = self._around[index]
            chunks = before + orjson.dumps(delta.text) + after
        if delta.reason is not None and self._num_choices > 1:
            chunks += self._chunk(self.last_piece(), index, delta.reason)
        return chunks

    def ending(self, finished: Finished) -> bytes:
        """Return what comes after the last text of all choices, `[DONE]` included."""
        chunks = b""
        if self._num_choices == 1:
            chunks = self._chunk(self.last_piece(), 0, finished.reason)
        if self._with_usage:
            chunks += self._event([], _usage(finished.usage))
        return chunks + DONE

    def failure(self, error: XinferenceError) -> bytes:
        """Return the event of an error, after which there is no `[DONE]`."""
        return error_event(error)

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the body of the answer in one piece."""
        deltas_of: list[list[Delta]] = [[] for _ in range(self._num_choices)]
        for delta in deltas:
            deltas_of[delta.choice_index].append(delta)
        choices = [AnswerParts(own) for own in deltas_of]
        return orjson.dumps(
            {
                **self._about,
                "object": self.whole_object,
                "choices": [
                    {
                        "index": index,
                        **self.answer(choice),
                        "logprobs": self.logprobs(choice.logprobs) if self._with_logprobs else None,
                        "finish_reason": choice.reason or finished.reason,
                    }
                    for index, choice in enumerate(choices)
                ],
                "usage": _usage(finished.usage),
            }
        )

    def _chunk(
        self,
        piece: dict[str, Any],
        index: int,
        reason: FinishReason | None = None,
        logprobs: dict[str, Any] | None = None,
    ) -> bytes:
        choice = {"index": index, **piece, "logprobs": logprobs, "finish_reason": reason}
        return self._event([choice], None)

    def _event(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None) -> bytes:
        chunk = {**self._about, "object": self.chunk_object, "choices": choices}
        if self._with_usage:
            chunk["usage"] = usage
        return b"data: " + orjson.dumps(chunk) + b"\n\n"


def _usage(usage: Usage) -> dict[str, Any]:
    return {
        "prompt_tokens": usage.num_prompt_tokens,
        "completion_tokens": usage.num_completion_tokens,
        "total_tokens": usage.num_prompt_tokens + usage.num_completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.num_cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": usage.num_reasoning_tokens},
    }


def token_text(token: bytes) -> str:
    """Return a token's text; for a piece of a character, which has none, its bytes in words."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def candidate(one: TokenLogprob | TokenCandidate) -> dict[str, Any]:
    """Return a token that stood somewhere, or might have, and how likely that was."""
    return {
        "token": token_text(one.token),
        "logprob": one.logprob,
        "bytes": list(one.token),
    }


def with_top(one: TokenLogprob) -> dict[str, Any]:
    """Return a token with the likeliest ones in its place."""
    return {**candidate(one), "top_logprobs": [candidate(each) for each in one.top]}
