# SPDX-License-Identifier: Apache-2.0
"""The bodies of the Anthropic routes, in and out.

Every parameter of the Messages API is here. What is not honoured in this version is marked
`Only(...)`: refused by name, but for the values that ask for nothing. Blocks of kinds that no
model here can read (images, documents, results of Anthropic's own tools) are refused by their
type. `doc/api.md` has the same tables; a test compares.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from xinference.api.fields import Answer, Body, Only, Shaped
from xinference.api.openai.schema import (
    MAX_MODEL_LEN,
    MAX_TOKEN_COUNT,
    MAX_TOOL_NAME_LEN,
    MAX_TOOLS,
    StopString,
)
from xinference.protocol.generation import MAX_STOP_STRINGS

MIN_BUDGET = 1024


class CacheControl(Body):
    """Where a prefix to keep ends: a label, since every prefix is kept while there is room."""

    type: Literal["ephemeral"]
    ttl: Literal["5m", "1h"] | None = None


class TextBlock(Body):
    """Text."""

    type: Literal["text"]
    text: str
    cache_control: CacheControl | None = None

    citations: Annotated[object, Only([])] = None


class ThinkingBlock(Body):
    """Of an assistant: what it thought, as it was received."""

    type: Literal["thinking"]
    thinking: str
    signature: str | None = None
    """As it was received; it says nothing."""


class ToolUseBlock(Body):
    """Of an assistant: a call of a tool."""

    type: Literal["tool_use"]
    id: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    input: dict[str, Any]
    cache_control: CacheControl | None = None

    caller: Annotated[object, Only({"type": "direct"})] = None
    toolset_name: Annotated[object, Only()] = None


def _kind_of_content(given: object) -> str:
    return "none" if given is None else "blocks" if isinstance(given, list) else "text"


Texts = Annotated[list[TextBlock], Field(fail_fast=True)]
TextOrTexts = Annotated[
    Annotated[str, Tag("text")] | Annotated[Texts, Tag("blocks")] | Annotated[None, Tag("none")],
    Discriminator(_kind_of_content),
]


class ToolResultBlock(Body):
    """Of a user: what a call has given."""

    type: Literal["tool_result"]
    tool_use_id: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    content: TextOrTexts = None
    is_error: bool | None = None
    """True: the model reads `Error: ` before the content."""
    cache_control: CacheControl | None = None

    toolset_name: Annotated[object, Only()] = None


Block = Annotated[
    TextBlock | ThinkingBlock | ToolUseBlock | ToolResultBlock, Field(discriminator="type")
]


class TurnMessage(Body):
    """One turn, or a part of one: neighbours of one role are one turn."""

    role: Literal["user", "assistant", "system"]
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[Block], Field(fail_fast=True, min_length=1), Tag("blocks")],
        Discriminator(lambda given: "blocks" if isinstance(given, list) else "text"),
    ]


class CustomTool(Body):
    """A function that the model may call. Anthropic's own tools run at Anthropic."""

    type: Literal["custom"] | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")
    description: str | None = None
    input_schema: dict[str, Any]
    """A JSON schema of an object."""
    cache_control: CacheControl | None = None
    eager_input_streaming: bool | None = None
    """Arguments are streamed as they are written, whatever this says."""
    strict: bool | None = None
    """The arguments of its calls keep to the schema to the letter, also where a call is free."""

    input_examples: Annotated[object, Only([])] = None
    allowed_callers: Annotated[object, Only(["direct"])] = None
    defer_loading: Annotated[object, Only(False)] = None


class ToolChoiceParameter(Body):
    """Whether the answer may, must or must not call tools."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(None, min_length=1)
    """With the type tool: which."""
    disable_parallel_tool_use: bool | None = None
    """True: the answer ends with its first call."""


class Thinking(Body):
    """Whether to think before the answer."""

    type: Literal["enabled", "disabled", "adaptive"]
    """Adaptive: as the model was launched."""
    budget_tokens: int | None = Field(None, ge=MIN_BUDGET, le=MAX_TOKEN_COUNT)
    """With the type enabled: tokens to think at most."""

    display: Annotated[object, Only("summarized")] = None


class OutputFormat(Body):
    """A JSON Schema that the answer keeps to."""

    type: Literal["json_schema"]
    definition: dict[str, Any] = Field(alias="schema")


class OutputConfig(Body):
    """What the answer has to look like."""

    format: OutputFormat | None = None
    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    """How much to think, of models whose template has it."""


class Metadata(Body):
    """Of a request."""

    user_id: str | None = None
    """On whose behalf: those who wait take turns by it."""


class PromptParameters(Body):
    """What the answer and the count of a prompt's tokens have in common."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_LEN)
    """The uid of a running model."""
    messages: Annotated[list[TurnMessage], Field(fail_fast=True, min_length=1)]
    system: TextOrTexts = None
    tools: Annotated[list[CustomTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """What the model may call."""
    tool_choice: ToolChoiceParameter | None = None
    """Null: auto."""
    thinking: Thinking | None = None
    """Null: as the model was launched."""
    output_config: OutputConfig | None = None
    cache_control: CacheControl | None = None

    container: Annotated[object, Only()] = None
    context_management: Annotated[object, Only()] = None
    mcp_servers: Annotated[object, Only([])] = None
    speed: Annotated[object, Only("standard")] = None
    user_profile_id: Annotated[object, Only()] = None


class CountTokensRequest(PromptParameters):
    """`POST /v1/messages/count_tokens`."""


class MessagesRequest(PromptParameters):
    """`POST /v1/messages`."""

    max_tokens: int = Field(ge=1, le=MAX_TOKEN_COUNT)
    """Thoughts and calls count."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy. Null: the model's own default, as for the other two."""
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN_COUNT)
    """0 or -1 keeps every token."""
    stop_sequences: (
        Annotated[
            list[StopString],
            Field(fail_fast=True, max_length=MAX_STOP_STRINGS),
            Shaped(f"a list of up to {MAX_STOP_STRINGS} texts, none empty"),
        ]
        | None
    ) = None
    """The answer ends before the first of these."""
    stream: bool | None = None
    metadata: Metadata | None = None

    service_tier: Annotated[object, Only("auto", "standard_only")] = None
    inference_geo: Annotated[object, Only()] = None
    diagnostics: Annotated[object, Only()] = None
    thread: Annotated[object, Only()] = None


class OutputTokensDetails(Answer):
    """Of the answer's tokens."""

    thinking_tokens: int


class MessageUsage(Answer):
    """In tokens. The prompt had `input_tokens` and `cache_read_input_tokens`."""

    input_tokens: int
    """Those of the prompt that were computed."""
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    """Those that were not, since another request had begun alike."""
    output_tokens: int
    output_tokens_details: OutputTokensDetails


class AnswerBlock(Answer):
    """Text, a thought or a call; the type says which fields there are."""

    type: Literal["text", "thinking", "tool_use"]
    text: str | None = None
    thinking: str | None = None
    signature: str | None = None
    """Always empty."""
    id: str | None = None
    name: str | None = None
    input: dict[str, Any] | None = None


class MessageAnswer(Answer):
    """The answer, in one piece."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[AnswerBlock]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    """The one that ended the answer."""
    usage: MessageUsage


class CountAnswer(Answer):
    """How long a prompt is."""

    input_tokens: int


class AnthropicErrorDetail(Answer):
    """What went wrong, as Anthropic's clients read it."""

    type: str
    message: str


class AnthropicErrorAnswer(Answer):
    """The body of every error of these routes."""

    type: Literal["error"]
    error: AnthropicErrorDetail
    request_id: str
