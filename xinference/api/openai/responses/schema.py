# SPDX-License-Identifier: Apache-2.0
"""The bodies of the Responses API, in and out.

As in `openai/schema.py`: every parameter is here, and what is not honoured is marked `Only(...)`.
"""

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Discriminator, Field, Tag
from pydantic_core import PydanticCustomError

from xinference.api.fields import Body, Only, Shaped
from xinference.api.openai.schema import (
    MAX_MODEL_LEN,
    MAX_SALT_LEN,
    MAX_TOKEN_COUNT,
    MAX_TOOL_NAME_LEN,
    MAX_TOOLS,
    Metadata,
    ReasoningEffort,
    ServiceTier,
)
from xinference.protocol.generation import MAX_LOGPROBS, MAX_PRIORITY

MAX_ITEMS = 100_000
MAX_ID_LEN = 256

ItemStatus = Literal["in_progress", "completed", "incomplete"]
Id = Annotated[str, Field(min_length=1, max_length=MAX_ID_LEN)]


class InputText(Body):
    """A piece of text; of what a model said before, too."""

    type: Literal["input_text", "output_text", "text"]
    text: str

    annotations: Annotated[object, Only([])] = None
    logprobs: list[Any] | None = None
    """As they came with the answer; they change nothing."""
    parsed: Any = None
    """What OpenAI's client has made of it; a label."""
    prompt_cache_breakpoint: Annotated[object, Only()] = None


def _kind_of_content(given: object) -> str:
    return "parts" if isinstance(given, list) else "text"


Content = Annotated[
    Annotated[str, Tag("text")] | Annotated[list[InputText], Field(fail_fast=True), Tag("parts")],
    Discriminator(_kind_of_content),
]
"""A text, or parts of one, which are joined as they are."""


class Item(Body):
    """What all items of a conversation have."""

    id: Id | None = None
    """As the item came; a new one has none."""
    status: ItemStatus | None = None
    """As the item came; it changes nothing."""


class MessageItem(Item):
    """A turn of a role."""

    type: Literal["message"] = "message"
    role: Literal["user", "assistant", "system", "developer"]
    content: Content

    phase: Annotated[object, Only()] = None


class FunctionCallItem(Item):
    """A call that the model has made."""

    type: Literal["function_call"]
    call_id: Id
    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    arguments: str
    parsed_arguments: Any = None
    """What OpenAI's client has made of them; a label."""

    namespace: Annotated[object, Only()] = None
    caller: Annotated[object, Only()] = None
    runs_later: Annotated[object, Only(False)] = Field(None, alias="async")


class FunctionOutputItem(Item):
    """What a call has come to."""

    type: Literal["function_call_output"]
    call_id: Id
    output: Content

    name: Annotated[object, Only()] = None
    namespace: Annotated[object, Only()] = None
    caller: Annotated[object, Only()] = None


class SummaryText(Body):
    """A piece of a summary."""

    type: Literal["summary_text"]
    text: str


class ReasoningText(Body):
    """A piece of a thought."""

    type: Literal["reasoning_text"]
    text: str


class ReasoningItem(Item):
    """What the model has thought."""

    type: Literal["reasoning"]
    summary: list[SummaryText] | None = None
    """Stands for `content` where that is missing."""
    content: list[ReasoningText] | None = None
    encrypted_content: str | None = None
    """As it came with the answer; stands for `content` where that is missing."""


ITEM_TYPES = ("message", "function_call", "function_call_output", "reasoning")


def _type_of_item(given: object) -> object:
    return given.get("type", "message") if isinstance(given, dict) else "message"


def _check_type(given: object) -> object:
    # Why not left to the discriminator: its complaint does not name the field.
    if _type_of_item(given) not in ITEM_TYPES:
        raise PydanticCustomError(
            "item_type",
            "must be {types}, which are the only items here",
            {"field": "type", "types": ", ".join(ITEM_TYPES)},
        )
    return given


InputItem = Annotated[
    Annotated[MessageItem, Tag("message")]
    | Annotated[FunctionCallItem, Tag("function_call")]
    | Annotated[FunctionOutputItem, Tag("function_call_output")]
    | Annotated[ReasoningItem, Tag("reasoning")],
    Discriminator(_type_of_item),
    BeforeValidator(_check_type),
]


def _kind_of_input(given: object) -> str:
    return "items" if isinstance(given, list) else "text"


class FunctionTool(Body):
    """A function that the model may call."""

    type: Literal["function"]
    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object. Null: it takes none."""

    strict: bool | None = None
    """The arguments of its calls keep to the schema to the letter, also where a call is free."""
    allowed_callers: Annotated[object, Only(["direct"])] = None
    defer_loading: Annotated[object, Only(False)] = None
    output_schema: Annotated[object, Only()] = None
    runs_later: Annotated[object, Only(False)] = Field(None, alias="async")


class NamedTool(Body):
    """The one function to call."""

    type: Literal["function"]
    name: str = Field(min_length=1)


class AllowedTools(Body):
    """Those of the functions that may be called, and whether one must be."""

    type: Literal["allowed_tools"]
    mode: Literal["auto", "required"]
    tools: Annotated[list[NamedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class TextFormat(Body):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    name: str | None = Field(None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    """Of a json_schema, like the rest: a label, as the description is."""
    description: str | None = None
    definition: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None
    """The schema is followed to the letter whatever this says."""


class TextOptions(Body):
    """How the text of an answer is written."""

    format: TextFormat | None = None
    verbosity: Annotated[object, Only("medium")] = None


class ReasoningOptions(Body):
    """How the model thinks."""

    effort: ReasoningEffort | None = None
    summary: Annotated[object, Only()] = None
    generate_summary: Annotated[object, Only()] = None
    context: Annotated[object, Only("auto")] = None
    mode: Annotated[object, Only("standard")] = None


class ResponseStreamOptions(Body):
    """How to stream."""

    include_obfuscation: bool | None = None
    """Random characters beside each piece, so that its size tells nothing. Null: none."""


Includable = Literal["message.output_text.logprobs", "reasoning.encrypted_content"]


class ResponsePrompt(Body):
    """What makes the prompt of a response."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_LEN)
    """The uid of a running model."""
    input: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[
            list[InputItem], Field(fail_fast=True, min_length=1, max_length=MAX_ITEMS), Tag("items")
        ],
        Discriminator(_kind_of_input),
    ]
    """What the user says, or the items of a conversation."""
    instructions: str | None = None
    """What the system says before it. Not carried over by `previous_response_id`."""
    previous_response_id: Id | None = None
    """A stored response that this one goes on from."""
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    tools: Annotated[list[FunctionTool], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = None
    """What the model may call."""
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedTool | AllowedTools | None,
        Shaped(
            '"none", "auto", "required", {"type": "function", "name": …} or '
            '{"type": "allowed_tools", "mode": …, "tools": […]}'
        ),
    ] = None
    """Null: auto."""
    parallel_tool_calls: bool | None = None
    """False: the answer ends with its first call."""
    enable_thinking: bool | None = None
    """Whether to think before the answer. Null: as the model was launched."""

    conversation: Annotated[object, Only()] = None
    truncation: Annotated[object, Only("disabled")] = None


class InputTokensRequest(ResponsePrompt):
    """`POST /v1/responses/input_tokens`."""

    personality: Annotated[object, Only()] = None


class ResponseRequest(ResponsePrompt):
    """`POST /v1/responses`."""

    store: bool | None = None
    """Whether to keep the response, for a time. Null: true."""
    metadata: Metadata | None = None
    """Labels that are kept with it."""
    max_output_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_COUNT)
    """Null: as many as the context holds."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy. Null: the model's own default, as for `top_p` and `top_k`."""
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN_COUNT)
    """0 or -1 keeps every token."""
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    """The same seed draws the same tokens. Null: a random one."""
    include: Annotated[list[Includable], Field(fail_fast=True, max_length=16)] | None = None
    """What to tell in addition."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """Tell of each token of the text how likely it was, and so many others in its place."""
    stream: bool | None = None
    stream_options: ResponseStreamOptions | None = None
    service_tier: ServiceTier | None = None
    """Who is served first: priority (or fast), then auto and default, then flex."""
    user: str | None = None
    """On whose behalf: those who wait with one priority take turns by it."""
    safety_identifier: str | None = None
    """Stands for `user` where that is missing."""
    prompt_cache_key: str | None = None
    """A label that is kept with it: prompts that begin alike share what is cached anyway."""
    request_id: str | None = Field(None, pattern=r"^[!-~]{1,128}$")
    """Names the request, so that it can be aborted."""
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower is earlier. Null: as `service_tier` says."""
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_LEN)
    """Only requests with the same one share what is cached of their prompts."""

    background: Annotated[object, Only(False)] = None
    background_options: Annotated[object, Only()] = None
    prompt: Annotated[object, Only()] = None
    max_tool_calls: Annotated[object, Only()] = None
    moderation: Annotated[object, Only()] = None
    prompt_cache_options: Annotated[object, Only()] = None
    prompt_cache_retention: Annotated[object, Only()] = None
    context_management: Annotated[object, Only([])] = None
    access_programs: Annotated[object, Only()] = None
    image: Annotated[object, Only()] = None
