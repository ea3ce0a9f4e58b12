# SPDX-License-Identifier: Apache-2.0
"""A request for text, and what comes back of it.

In: a `GenerationRequest`. Out: any number of deltas, then exactly one `Finished` or `Failed`.
The same events feed streaming and non-streaming answers of every HTTP protocol, so the two cannot
differ.
"""

import secrets
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from xinference.errors import InvalidRequest, XinferenceError
from xinference.identifiers import RequestId

from .tracing import TraceContext

MAX_STOP_STRINGS = 16
MAX_SEED = 2**64
SEED_BITS = 63
"""Of seeds that are drawn: languages with signed integers can read them back."""
LEAST_TOP_P = 1e-6
"""What samplers that want it above 0 take for 0: it keeps the likeliest token alone."""
MAX_PRIORITY = 2**31 - 1
MAX_GRAMMAR_CHARS = 256 * 1024
MAX_CHOICES = 128
MAX_PROMPTS = 128
MAX_ANSWERS = 1024
"""Made for one request: prompts, times the answers of each."""
MAX_LOGPROBS = 20
MAX_BAD_WORDS = 1024
MAX_LOGIT_BIAS = 4096


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
    """None: as many as the context holds. 0: only the prompt is computed, and maybe echoed."""
    temperature: float | None = None
    """0 is greedy and draws nothing."""
    top_p: float | None = None
    """0 keeps the likeliest token alone."""
    top_k: int | None = None
    """0 or -1 keeps every token."""
    stop: tuple[str, ...] = ()
    """The text ends before the first of these; they are not part of the answer."""
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    """Draws are a function of (seed, position) alone. None takes a random one."""
    grammar: Grammar | None = None
    """What the answer is held to."""
    min_p: float | None = None
    """Tokens less likely than this share of the likeliest are never drawn. 0 keeps every token."""
    typical_p: float | None = None
    """Of the tokens whose surprise is nearest to the expected one, as many as make this mass. 1
    keeps every token."""
    repetition_penalty: float | None = None
    """Divides positive and multiplies negative logits of the tokens of prompt and answer."""
    presence_penalty: float = 0.0
    """Taken once from the logit of every token of the answer."""
    frequency_penalty: float = 0.0
    """Taken from a token's logit as often as the answer has it."""
    logit_bias: dict[int, float] = field(default_factory=dict)
    """Added to the logits of these token ids."""
    bad_words: tuple[str, ...] = ()
    """Texts whose token sequences the answer does not get."""
    min_tokens: int = 0
    """Before so many nothing ends the answer: end tokens are not drawn, stop strings not heeded."""
    ignore_eos: bool = False
    """Only what the request itself names ends the answer."""
    include_stop_str_in_output: bool = False
    """The stop string that ended the answer is part of it."""
    n: int = 1
    """Answers. Answer i draws with `seed` + i."""
    best_of: int | None = None
    """Answers made, of which the `n` with the highest mean logprob are told. None: `n`."""
    logprobs: int | None = None
    """Tell each token's logprob, and so many of the likeliest in its place. None: nothing. They are
    of the model's own distribution, before anything above changes it."""
    echo: bool = False
    """The answer begins with the prompt, with its logprobs if those are wanted."""

    @property
    def num_made(self) -> int:
        """How many answers are generated."""
        return self.n if self.best_of is None else self.best_of

    def __post_init__(self) -> None:
        if self.max_tokens is not None and self.max_tokens < 0:
            raise InvalidRequest(
                field="max_tokens", problem=f"must not be negative, got {self.max_tokens}"
            )
        if self.temperature is not None and not 0.0 <= self.temperature <= 2.0:
            raise InvalidRequest(
                field="temperature", problem=f"must be from 0 to 2, got {self.temperature}"
            )
        if self.top_p is not None and not 0.0 <= self.top_p <= 1.0:
            raise InvalidRequest(field="top_p", problem=f"must be from 0 to 1, got {self.top_p}")
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
        self._check_shaping()
        self._check_answers()

    def _check_shaping(self) -> None:
        """Check what shapes the distribution."""
        _check_range("min_p", self.min_p, 0.0, 1.0)
        if self.typical_p is not None and not 0.0 < self.typical_p <= 1.0:
            raise InvalidRequest(
                field="typical_p", problem=f"must be above 0 and at most 1, got {self.typical_p}"
            )
        if self.repetition_penalty is not None and not 0.0 < self.repetition_penalty <= 100.0:
            raise InvalidRequest(
                field="repetition_penalty",
                problem=f"must be above 0 and at most 100, got {self.repetition_penalty}",
            )
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        if len(self.logit_bias) > MAX_LOGIT_BIAS:
            raise InvalidRequest(
                field="logit_bias", problem=f"takes at most {MAX_LOGIT_BIAS} tokens"
            )
        for bias in self.logit_bias.values():
            _check_range("logit_bias", bias, -100.0, 100.0)
        if len(self.bad_words) > MAX_BAD_WORDS or not all(self.bad_words):
            raise InvalidRequest(
                field="bad_words", problem=f"takes up to {MAX_BAD_WORDS} texts, none of them empty"
            )

    def _check_answers(self) -> None:
        """Check how many answers there are, how long, and what is told of them."""
        _check_range("n", self.n, 1, MAX_CHOICES)
        if self.best_of is not None:
            _check_range("best_of", self.best_of, self.n, MAX_CHOICES)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.min_tokens < 0 or self.min_tokens > (self.max_tokens or self.min_tokens):
            raise InvalidRequest(
                field="min_tokens", problem=f"must be from 0 to max_tokens, got {self.min_tokens}"
            )


def new_seed() -> int:
    """Return a seed for a request whose caller gave none."""
    return secrets.randbits(SEED_BITS)


def _check_range(name: str, value: float | None, lowest: float, highest: float) -> None:
    # Why `not <=`: a NaN is out of every range.
    if value is not None and not lowest <= value <= highest:
        raise InvalidRequest(
            field=name, problem=f"must be from {lowest:g} to {highest:g}, got {value}"
        )


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
    """Of a tool: the function that was called. Of others: who speaks."""
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
    """How much to think, in the words of the model's template; "none" is not at all."""

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
    resume_token_ids: tuple[int, ...] = ()
    """The tokens that a replica which is gone had generated of the only answer. It goes on after
    them; with the same seed, by the same draws."""
    count_only: bool = False
    """Accept it, which tells how long the prompt is, and end: nothing is computed."""
    max_total_tokens: int | None = None
    """Where prompt and answer together end. None: where the model's context does."""
    more_prompts: tuple[TextPrompt | TokenPrompt, ...] = ()
    """Of a completion: prompts that are answered as well, each by itself and with the same seed.
    `choice_index` counts the answers of all, prompt after prompt."""
    trace: TraceContext | None = None
    """None: nobody wants a trace."""

    @property
    def num_choices(self) -> int:
        """How many answers are told."""
        return (1 + len(self.more_prompts)) * self.sampling.n

    @property
    def num_made(self) -> int:
        """How many answers are generated."""
        return (1 + len(self.more_prompts)) * self.sampling.num_made

    def __post_init__(self) -> None:
        num_prompts = 1 + len(self.more_prompts)
        if num_prompts > 1 and isinstance(self.prompt, ChatPrompt):
            raise InvalidRequest(field="prompt", problem="a chat has one")
        if num_prompts > 1 and self.max_total_tokens is not None:
            raise InvalidRequest(field="max_total_tokens", problem="is for a single prompt")
        if num_prompts > MAX_PROMPTS or self.num_made > MAX_ANSWERS:
            raise InvalidRequest(
                field="prompt",
                problem=f"may be {MAX_PROMPTS} at most, with {MAX_ANSWERS} answers in all, "
                f"got {num_prompts} with {self.sampling.num_made} each",
            )
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
class TokenCandidate:
    """A token that might stand in some place, and how likely the model found it there."""

    token_id: int
    token: bytes
    """What it adds to the text; a piece of a character, maybe."""
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """A token of the text, and how likely the model found it there."""

    token_id: int
    token: bytes
    logprob: float | None
    """None for the first token of a prompt, which nothing comes before."""
    text_offset: int
    """The characters of the text before it."""
    top: tuple[TokenCandidate, ...] = ()
    """The likeliest tokens in this place, best first; the token itself need not be one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TextDelta:
    """The next piece of an answer. May be empty while a stop string is being ruled out."""

    text: str
    token_ids: tuple[int, ...] = ()
    """The tokens this piece was decoded from, as they were generated."""
    choice_index: int = 0
    """Which of the answers it is of; the same below."""
    logprobs: tuple[TokenLogprob, ...] = ()
    """If they are wanted, one for each token that is part of the text; those of an echoed prompt
    come first. The token that ends a turn is not text."""
    reason: FinishReason | None = None
    """Why this answer ends here, if it does and there are others; a single one has it in
    `Finished`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReasoningDelta:
    """The next piece of what the model thinks before it answers."""

    text: str
    token_ids: tuple[int, ...] = ()
    """As of a `TextDelta`."""
    choice_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallStart:
    """The model calls a tool; its arguments follow."""

    index: int
    """Of this call among those of the answer, from 0."""
    call_id: str
    name: str
    choice_index: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ToolCallArguments:
    """The next piece of a call's arguments, which together are JSON."""

    index: int
    text: str
    choice_index: int = 0


Delta = TextDelta | ReasoningDelta | ToolCallStart | ToolCallArguments
"""A piece of an answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """When a request came how far where it was computed, by `time.monotonic` there.

    It does not travel: it is for the process that computes.
    """

    arrived_at: float
    """Checked, and in the queue."""
    admitted_at: float | None = None
    """Out of the queue for the first time. None below: it never came so far."""
    first_token_at: float | None = None
    ended_at: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """Every answer is whole."""

    reason: FinishReason
    """Of the only answer; of several the last one's, if they were not aborted."""
    usage: Usage
    """Of all: the prompt once, and every token that was generated."""
    stop_string: str | None = None
    """The one that ended the only answer: of the request, or of the model itself."""
    phases: Phases | None = field(default=None, compare=False)
    """None: it is not known, or was computed elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failed:
    """The answer ends here without being whole."""

    error: XinferenceError
    phases: Phases | None = field(default=None, compare=False)
    """As of `Finished`."""


GenerationEvent = Delta | Finished | Failed
"""A stream is any number of deltas, then exactly one Finished or Failed."""
