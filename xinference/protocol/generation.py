# SPDX-License-Identifier: Apache-2.0
"""A request for text, and what comes back of it.

In: a `GenerationRequest`. Out: any number of deltas, then exactly one `Finished` or `Failed`.
The same events feed streaming and non-streaming answers of every HTTP protocol, so the two cannot
differ.
"""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from xinference.errors import InvalidRequest, XinferenceError
from xinference.identifiers import RequestId

MAX_STOP_STRINGS = 16
MAX_SEED = 2**64
MAX_PRIORITY = 2**31 - 1
MAX_GRAMMAR_CHARS = 256 * 1024


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    """The model ended its turn, or a stop string came up."""
    TOOL_CALLS = "tool_calls"
    """The model ended its turn, and called at least one tool in it."""
    LENGTH = "length"
    """`max_tokens`, or the end of the context, was reached."""
    ABORT = "abort"
    """Somebody aborted it: by id, by disconnecting, or by stopping the replica."""


class GrammarKind(StrEnum):
    """How a grammar is written."""

    JSON_SCHEMA = "json_schema"
    """A JSON Schema, as JSON."""
    REGEX = "regex"
    """A regular expression that the whole answer matches."""
    CHOICE = "choice"
    """A JSON list of texts, of which the answer is one."""
    GRAMMAR = "grammar"
    """A context-free grammar, in Lark's notation or in llama.cpp's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Grammar:
    """What an answer has to look like: only tokens that can still lead there are drawn."""

    kind: GrammarKind
    text: str
    field: str = "response_format"
    """The field of the request that asks for it; an error names it."""

    def __post_init__(self) -> None:
        if len(self.text) > MAX_GRAMMAR_CHARS:
            raise InvalidRequest(
                field=self.field,
                problem=f"is {len(self.text)} characters long, more than {MAX_GRAMMAR_CHARS}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens, and when to end. None leaves the choice to the model's defaults."""

    max_tokens: int | None = None
    """None: as many as the context holds."""
    temperature: float | None = None
    """0 is greedy and draws nothing."""
    top_p: float | None = None
    top_k: int | None = None
    """0 or -1 keeps every token."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; they are not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """Draws are a function of (seed, position) alone. None takes a random one."""
    grammar: Grammar | None = None
    """What the answer is held to."""

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 1:
            raise InvalidRequest(
                field="max_tokens", problem=f"must be at least 1, got {self.max_tokens}"
            )
        if self.temperature is not None and not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequest(
                field="temperature", problem=f"must be from 0 to 2, got {self.temperature}"
            )
        if self.top_p is not None and not 0.0 < self.top_p <= 1.0:
            raise InvalidRequest(
                field="top_p", problem=f"must be above 0 and at most 1, got {self.top_p}"
            )
        if self.top_k is not None and self.top_k < -1:
            raise InvalidRequest(
                field="top_k", problem=f"must be at least 1, or 0 or -1 for all, got {self.top_k}"
            )
        if len(self.stop) > MAX_STOP_STRINGS or not all(self.stop):
            raise InvalidRequest(
                field="stop", problem=f"takes up to {MAX_STOP_STRINGS} texts, none of them empty"
            )
        if self.seed is not None and not -(MAX_SEED // 2) <= self.seed < MAX_SEED:
            raise InvalidRequest(field="seed", problem=f"must fit 64 bits, got {self.seed}")


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCall:
    """A call that an assistant's turn has made."""

    call_id: str
    name: str
    arguments: str
    """As the model wrote them; a JSON object, unless it was cut short."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Message:
    """One turn of a chat. Content is text; other parts come with the vision models."""

    role: str
    content: str | None
    """None only beside `tool_calls`."""
    tool_calls: tuple[ToolCall, ...] = ()
    """Of an assistant."""
    tool_call_id: str | None = None
    """Of a tool: the call whose result this is."""
    name: str | None = None
    """Of a tool: the function that was called."""
    reasoning_content: str | None = None
    """Of an assistant: what it thought before."""


class ToolChoice(StrEnum):
    """Whether an answer may, must not or must call tools."""

    NONE = "none"
    AUTO = "auto"
    REQUIRED = "required"
    """At least one, or with `ChatPrompt.tool_name` that one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation; the replica renders it with the model's chat template."""

    messages: tuple[Message, ...]
    template_options: dict[str, Any] = field(default_factory=dict)
    """Passed to the template as variables (`chat_template_kwargs`)."""
    tools: tuple[dict[str, Any], ...] = ()
    """As OpenAI describes functions: {"type": "function", "function": {"name", …}}."""
    tool_choice: ToolChoice = ToolChoice.AUTO
    tool_name: str | None = None
    """The one tool that REQUIRED means; None: any."""
    parallel_tool_calls: bool = True
    """False: the answer ends with its first call."""
    enable_thinking: bool | None = None
    """None: as the model was launched."""
    allowed_tools: tuple[str, ...] | None = None
    """The names of those that may be called; the model knows all. None: any."""
    thinking_budget: int | None = None
    """Tokens that the model may think before it has to answer. None: as it was launched."""
    reasoning_effort: str | None = None
    """How long it should think, in words that its template knows. None: the template's choice."""

    def __post_init__(self) -> None:
        if self.thinking_budget is not None and self.thinking_budget < 0:
            raise InvalidRequest(
                field="thinking_budget", problem=f"must be at least 0, got {self.thinking_budget}"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPrompt:
    """A text to go on from, as it stands; no template."""

    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenPrompt:
    """Token ids to go on from, as they stand."""

    token_ids: tuple[int, ...]


Prompt = ChatPrompt | TextPrompt | TokenPrompt


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """What a caller wants a language model to do. Checked at the edge, never edited after."""

    request_id: RequestId
    prompt: Prompt
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Lower is earlier."""
    fairness_key: str = ""
    """Requests of one priority take turns by it: a caller with many does not hold up the others."""
    cache_salt: str = ""
    """Only requests with the same one share what is cached of their prompts."""

    def __post_init__(self) -> None:
        if not -MAX_PRIORITY <= self.priority <= MAX_PRIORITY:
            raise InvalidRequest(
                field="priority",
                problem=f"must be from {-MAX_PRIORITY} to {MAX_PRIORITY}, got {self.priority}",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What a request cost, in tokens."""

    num_prompt_tokens: int
    num_completion_tokens: int
    """Every token the engine generated for it, an end-of-turn token included."""
    num_cached_tokens: int = 0
    """Of the prompt: tokens that were in the KV cache already."""
    num_reasoning_tokens: int = 0
    """Of the completion: the tokens of its thoughts, and of the tags around them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted:
    """The replica validated the request and took it into its bounded queue."""

    num_prompt_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """The next piece of the answer. May be empty while a stop string is being ruled out."""

    text: str
    token_ids: tuple[int, ...] = ()
    """The tokens this piece was decoded from, as they were generated."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers."""

    text: str
    token_ids: tuple[int, ...] = ()
    """As of a `TextDelta`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallStart:
    """The model calls a tool; its arguments follow."""

    index: int
    """Of this call among those of the answer, from 0."""
    call_id: str
    name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallArguments:
    """The next piece of a call's arguments, which together are JSON."""

    index: int
    text: str


Delta = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments
"""A piece of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The answer is whole."""

    reason: FinishReason
    usage: Usage


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The answer ends here without being whole."""

    error: XinferenceError


GenerationEvent = Delta | Finished | Failed
"""A stream is any number of deltas, then exactly one Finished or Failed."""
