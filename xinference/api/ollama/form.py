# SPDX-License-Identifier: Apache-2.0
"""The JSON of an answer in Ollama's protocol: whole, or line by line.

Chats and prompts differ in where a piece stands; they say it in one method. A call of a tool comes
whole, in one line, when the model has written all of it.
"""

import time
from abc import abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import orjson
from pydantic_core import from_json

from xinference.api.error_shapes import ollama_body
from xinference.api.errors import told
from xinference.api.generation import AnswerForm
from xinference.api.inbox import AnswerEvent, Tick
from xinference.api.openai.form import token_text
from xinference.errors import XinferenceError
from xinference.protocol.generation import (
    Accepted,
    Delta,
    Finished,
    FinishReason,
    ReasoningDelta,
    TextDelta,
    TokenCandidate,
    TokenLogprob,
    ToolCallArguments,
    ToolCallStart,
)

FIELD_NAMES = {
    "enable_thinking": "think",
    "frequency_penalty": "options.frequency_penalty",
    "max_tokens": "options.num_predict",
    "max_total_tokens": "options.num_ctx",
    "min_p": "options.min_p",
    "presence_penalty": "options.presence_penalty",
    "reasoning_effort": "think",
    "repetition_penalty": "options.repeat_penalty",
    "seed": "options.seed",
    "stop": "options.stop",
    "temperature": "options.temperature",
    "top_k": "options.top_k",
    "top_p": "options.top_p",
    "typical_p": "options.typical_p",
}


@dataclass(slots=True)
class _Call:
    start: ToolCallStart
    arguments: list[str] = field(default_factory=list)

    def told(self) -> dict[str, Any]:
        # Why partial: what `num_predict` cut is told as far as it goes.
        text = "".join(self.arguments)
        function = {
            "index": self.start.index,
            "name": self.start.name,
            "arguments": from_json(text, allow_partial=True) if text else {},
        }
        return {"id": self.start.call_id, "function": function}


class _WholeCalls:
    """Holds a call back until all of it is there."""

    def __init__(self) -> None:
        self._open: _Call | None = None

    def take(self, delta: Delta) -> dict[str, Any] | None:
        """Note a delta; return the call that it shows to be whole."""
        if isinstance(delta, ToolCallArguments):
            if self._open is not None:
                self._open.arguments.append(delta.text)
            return None
        if not isinstance(delta, ToolCallStart) and not delta.text:
            return None
        whole = self.rest()
        if isinstance(delta, ToolCallStart):
            self._open = _Call(delta)
        return whole

    def rest(self) -> dict[str, Any] | None:
        """Return the call that is held, when nothing more comes for it."""
        held, self._open = self._open, None
        return None if held is None else held.told()


class OllamaForm(AnswerForm):
    """Writes the answer of one request."""

    stream_type = b"application/x-ndjson"
    field_names = FIELD_NAMES

    def __init__(self, model: str) -> None:
        self._about = {"model": model, "created_at": timestamp(time.time())}
        self._calls = _WholeCalls()
        self._started = time.perf_counter_ns()
        self._accepted = self._answered = self._started
        # Why: one line is written per token, and all of it but the text is always the same.
        # The text is the last NUL in it; a caller may have put one into the model's name.
        sample = self._line(self.piece("\0"))
        self._before, _, self._after = sample.rpartition(b'"\\u0000"')

    @abstractmethod
    def piece(self, content: str, **others: Any) -> dict[str, Any]:
        """Return where a piece of an answer stands.

        Args:
            others: `thinking` and `tool_calls`, if there are any.
        """

    def arrived(self, batch: Sequence[AnswerEvent]) -> None:
        """Note when the request was taken and when the answer began."""
        if self._answered > self._started:
            return
        for event in batch:
            if isinstance(event, Accepted):
                self._accepted = time.perf_counter_ns()
            elif not isinstance(event, Tick):
                self._answered = time.perf_counter_ns()

    def opening(self, accepted: Accepted) -> bytes:
        """Return nothing: a stream begins with its first piece."""
        return b""

    def delta(self, delta: Delta) -> bytes:
        """Return the line of a piece, and before it that of a call which is whole now."""
        line = self._call_line(self._calls.take(delta))
        match delta:
            case TextDelta(text=text, logprobs=()):
                return line + (self._before + orjson.dumps(text) + self._after if text else b"")
            case TextDelta(text=text, logprobs=logprobs):
                return line + self._line(self.piece(text) | {"logprobs": _logprobs(logprobs)})
            case ReasoningDelta(text=text) if text:
                return line + self._line(self.piece("", thinking=text))
        return line

    def ending(self, finished: Finished) -> bytes:
        """Return the last line, which has the reason, the counts and the times."""
        line = self._call_line(self._calls.rest())
        return line + orjson.dumps(self._about | self.piece("") | self._end(finished)) + b"\n"

    def failure(self, error: XinferenceError) -> bytes:
        """Return the line that Ollama's clients raise."""
        return orjson.dumps(ollama_body(told(error), "")) + b"\n"

    def whole(self, deltas: Sequence[Delta], finished: Finished) -> bytes:
        """Return the answer in one piece."""
        others: dict[str, Any] = {}
        thinking = "".join(one.text for one in deltas if isinstance(one, ReasoningDelta))
        if thinking:
            others["thinking"] = thinking
        calls = list(_told_calls(deltas))
        if calls:
            others["tool_calls"] = calls
        answer = self.piece(
            "".join(one.text for one in deltas if isinstance(one, TextDelta)), **others
        )
        logprobs = [
            logprob for one in deltas if isinstance(one, TextDelta) for logprob in one.logprobs
        ]
        if logprobs:
            answer["logprobs"] = _logprobs(logprobs)
        return orjson.dumps(self._about | answer | self._end(finished))

    def keep_alive(self) -> bytes:
        """Return a piece without text: clients read every line as JSON."""
        return self._line(self.piece(""))

    def _call_line(self, call: dict[str, Any] | None) -> bytes:
        return b"" if call is None else self._line(self.piece("", tool_calls=[call]))

    def _line(self, piece: dict[str, Any]) -> bytes:
        return orjson.dumps({**self._about, **piece, "done": False}) + b"\n"

    def _end(self, finished: Finished) -> dict[str, Any]:
        now = time.perf_counter_ns()
        answered = max(self._answered, self._accepted)
        return {
            "done": True,
            "done_reason": "length" if finished.reason is FinishReason.LENGTH else "stop",
            "total_duration": now - self._started,
            "load_duration": self._accepted - self._started,
            "prompt_eval_count": finished.usage.num_prompt_tokens,
            "prompt_eval_duration": answered - self._accepted,
            "eval_count": finished.usage.num_completion_tokens,
            "eval_duration": now - answered,
        }


class OllamaChatForm(OllamaForm):
    """Writes a chat's answer."""

    def piece(self, content: str, **others: Any) -> dict[str, Any]:
        """Return a message."""
        return {"message": {"role": "assistant", "content": content, **others}}


class OllamaGenerateForm(OllamaForm):
    """Writes the answer to a prompt."""

    def piece(self, content: str, **others: Any) -> dict[str, Any]:
        """Return the text itself."""
        return {"response": content, **others}


def _told_calls(deltas: Iterable[Delta]) -> Iterator[dict[str, Any]]:
    calls = _WholeCalls()
    for delta in deltas:
        call = calls.take(delta)
        if call is not None:
            yield call
    call = calls.rest()
    if call is not None:
        yield call


def _logprobs(given: Sequence[TokenLogprob]) -> list[dict[str, Any]]:
    return [
        {**_candidate(one), "top_logprobs": [_candidate(each) for each in one.top]} for one in given
    ]


def _candidate(one: TokenLogprob | TokenCandidate) -> dict[str, Any]:
    return {"token": token_text(one.token), "logprob": one.logprob, "bytes": list(one.token)}


def timestamp(seconds: float) -> str:
    """Return a time since the epoch as Ollama writes times."""
    return datetime.fromtimestamp(seconds, UTC).isoformat().replace("+00:00", "Z")
