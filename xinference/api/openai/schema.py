# SPDX-License-Identifier: Apache-2.0
"""The bodies of the OpenAI routes, in and out.

Every parameter of OpenAI's two text APIs is here, with Xinference's own and those that clients
of other servers send. What is not honoured in this version is marked `Only(...)`: refused by
name, but for the values that ask for nothing. `doc/api.md` has the same tables; a test compares.
"""

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag

from xinference.api.fields import Answer, Body, Only, Shaped
from xinference.protocol.generation import (
    MAX_BAD_WORDS,
    MAX_CHOICES,
    MAX_LOGIT_BIAS,
    MAX_LOGPROBS,
    MAX_PRIORITY,
    MAX_PROMPTS,
    MAX_STOP_STRINGS,
)

MAX_TOKEN_COUNT = 2**31 - 1
MAX_TOKEN_ID = 2**31 - 1
MAX_MODEL_LEN = 256
MAX_SALT_LEN = 1024
MAX_TOOL_NAME_LEN = 256
MAX_TOOLS = 1024
MAX_GUIDED_CHOICES = 1024
MAX_COMPLETION_LOGPROBS = 5

TokenIds = Annotated[list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(fail_fast=True)]
StopString = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[str], Field(fail_fast=True)]

Metadata = Annotated[
    dict[Annotated[str, Field(max_length=64)], Annotated[str, Field(max_length=512)]],
    Field(max_length=16),
]
"""Labels: up to 16 names of up to 64 characters, with texts of up to 512."""
ReasoningEffort = Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"]
ServiceTier = Literal["auto", "default", "flex", "priority", "fast"]


class StreamOptions(Body):
    """How to stream."""

    include_usage: bool | None = None
    """One more chunk before the end, without choices, with the usage."""
    include_obfuscation: bool | None = None
    """Random characters beside each piece, so that its size tells nothing. Null: none."""


class JsonSchemaFormat(Body):
    """A JSON Schema and what it is called."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    """A label, as the description is."""
    description: str | None = None
    definition: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """The schema is followed to the letter whatever this says."""


class ResponseFormat(Body):
    """What the answer has to look like."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchemaFormat | None = None
    """Only with the type json_schema."""


class GuidedParameters(Body):
    """What the answer has to look like, as Xinference's users say it. One of them at most."""

    guided_json: Annotated[
        dict[str, Any] | str | None, Shaped("a JSON Schema, as an object or as JSON text")
    ] = None
    guided_json_object: bool | None = None
    """Any JSON object."""
    guided_regex: str | None = Field(None, min_length=1)
    """The whole answer matches it."""
    guided_choice: Annotated[Texts, Field(min_length=1, max_length=MAX_GUIDED_CHOICES)] | None = (
        None
    )
    """The answer is one of these."""
    guided_grammar: str | None = Field(None, min_length=1)
    """In Lark's notation, or in llama.cpp's (GBNF)."""

    guided_decoding_backend: Annotated[object, Only("auto", "guidance")] = None
    guided_whitespace_pattern: Annotated[object, Only()] = None


class ExtraBody(GuidedParameters):
    """Fields that a client has sent one level too deep."""


class SharedParameters(GuidedParameters):
    """What chat completions and completions have in common."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_LEN)
    """The uid of a running model."""
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_COUNT)
    """Null: as many as the context holds."""
    temperature: float | None = Field(None, ge=0, le=2)
    """0 is greedy. Null: the model's own default, as for the other sampling parameters."""
    top_p: float | None = Field(None, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN_COUNT)
    """0 or -1 keeps every token."""
    stop: Annotated[
        StopString
        | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
        | None,
        Shaped(f"a text or a list of up to {MAX_STOP_STRINGS} texts, none empty"),
    ] = None
    """The answer ends before the first of these."""
    stop_token_ids: Annotated[TokenIds, Field(max_length=1024)] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    """The same seed draws the same tokens. Null: a random one."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    """Only with `stream`."""
    request_id: str | None = Field(None, pattern=r"^[!-~]{1,128}$")
    """Names the request, so that it can be aborted: 1 to 128 visible ASCII characters, unique among
    the live ones of the model."""
    user: str | None = None
    """On whose behalf: those who wait with one priority take turns by it."""
    priority: int | None = Field(None, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    """Lower is earlier. Null: 0."""
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_LEN)
    """Only requests with the same one share what is cached of their prompts."""

    response_format: ResponseFormat | None = None
    """Beside this, none of the `guided_` fields."""
    extra_body: ExtraBody | None = None
    """The `guided_` fields may be in here, too."""

    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """How many answers. The prompt is computed once; answer i draws with seed + i."""
    best_of: int | None = Field(None, ge=1, le=MAX_CHOICES)
    """Make so many, answer with the n of the highest mean logprob. More than n: not streamed."""
    min_p: float | None = Field(None, ge=0, le=1)
    """Tokens less likely than this share of the likeliest are not drawn."""
    typical_p: float | None = Field(None, gt=0, le=1)
    repetition_penalty: float | None = Field(None, gt=0, le=100)
    """Of the tokens of prompt and answer. 1 is none."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    """Of the tokens of the answer, once each."""
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    """Of the tokens of the answer, each time."""
    logit_bias: Annotated[
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,10}$")],
                Annotated[float, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_LOGIT_BIAS),
        ]
        | None,
        Shaped("an object of token ids, each with a number from -100 to 100"),
    ] = None
    """Added to the logits of these tokens."""
    bad_words: Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_BAD_WORDS)] | (
        None
    ) = None
    """Texts whose tokens the answer does not get."""
    min_tokens: int | None = Field(None, ge=0, le=MAX_TOKEN_COUNT)
    """The answer does not end before so many."""
    ignore_eos: bool | None = None
    """Go on to `max_tokens`, or what the request itself stops at."""
    include_stop_str_in_output: bool | None = None

    length_penalty: Annotated[object, Only(1)] = None
    skip_special_tokens: Annotated[object, Only(True)] = None
    stream_interval: Annotated[object, Only(1)] = None
    use_beam_search: Annotated[object, Only(False)] = None
    prompt_logprobs: Annotated[object, Only()] = None
    truncate_prompt_tokens: Annotated[object, Only()] = None
    lora_name: Annotated[object, Only()] = None


class ContentPart(Body):
    """A piece of a message. Text only; images and audio come with the models that take them."""

    type: Literal["text"]
    text: str

    image_url: Annotated[object, Only()] = None
    input_audio: Annotated[object, Only()] = None
    video_url: Annotated[object, Only()] = None
    file: Annotated[object, Only()] = None
    refusal: Annotated[object, Only()] = None
    cache_control: Annotated[object, Only()] = None


def _kind_of_content(given: object) -> str:
    return "none" if given is None else "parts" if isinstance(given, list) else "text"


class CalledFunction(Body):
    """A function with the arguments that a model has written."""

    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    arguments: str
    parsed_arguments: Any = None
    """What OpenAI's client has made of them; a label."""


class MessageToolCall(Body):
    """A call in an assistant's turn."""

    id: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None
    """As in a stream; it changes nothing."""


class ChatMessage(Body):
    """One turn. An assistant's turn may be sent back as it was received."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    """A developer speaks as the system does."""
    content: Annotated[
        Annotated[str, Tag("text")]
        | Annotated[list[ContentPart], Field(fail_fast=True, min_length=1), Tag("parts")]
        | Annotated[None, Tag("none")],
        Discriminator(_kind_of_content),
    ] = None
    """A text, or parts of one, which are joined as they are. Null only beside `tool_calls`."""
    tool_calls: Annotated[list[MessageToolCall], Field(fail_fast=True)] | None = None
    """Of an assistant."""
    tool_call_id: str | None = Field(None, min_length=1, max_length=MAX_TOOL_NAME_LEN)
    """Of a tool: the call whose result this is."""
    reasoning_content: str | None = None
    """Of an assistant: what it thought; templates show it or leave it out."""
    name: str | None = Field(None, min_length=1, max_length=MAX_TOOL_NAME_LEN)
    """Of a tool: the function, by default that of the call. Of others: who speaks; templates show
    it or leave it out."""
    provider_specific_fields: dict[str, Any] | None = None
    """What LiteLLM's conversations carry along; a label."""
    parsed: Any = None
    """What OpenAI's client has made of a structured answer; a label."""

    refusal: Annotated[object, Only("")] = None
    annotations: Annotated[object, Only([])] = None
    audio: Annotated[object, Only()] = None
    function_call: Annotated[object, Only()] = None


class FunctionDescription(Body):
    """A function that a model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_.-]{1,256}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of an object. Null: it takes none."""
    strict: bool | None = None
    """The arguments of its calls keep to the schema to the letter, also where a call is free."""


class ToolDescription(Body):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: FunctionDescription


class NamedFunction(Body):
    """A function, by its name."""

    name: str = Field(min_length=1)


class NamedToolChoice(Body):
    """The one tool to call."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTool(Body):
    """A function that may be called, by its name."""

    type: Literal["function"]
    function: NamedFunction


class AllowedTools(Body):
    """Those of the tools that may be called, and whether one must be."""

    mode: Literal["auto", "required"]
    tools: Annotated[list[AllowedTool], Field(fail_fast=True, min_length=1, max_length=MAX_TOOLS)]


class AllowedToolChoice(Body):
    """Some of the tools; the model knows them all, so that the prompt stays as it is."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


class ChatExtras(ExtraBody):
    """What clients of OpenAI's kind send beside its parameters, should they not unpack it."""

    enable_thinking: bool | None = None
    thinking_budget: int | None = Field(None, ge=0, le=MAX_TOKEN_COUNT)
    thinking_token_budget: int | None = Field(None, ge=0, le=MAX_TOKEN_COUNT)
    chat_template_kwargs: Annotated[
        dict[str, Any] | str | None, Shaped("an object, or an object as JSON text")
    ] = None


class ChatRequest(SharedParameters):
    """`POST /v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(fail_fast=True, min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKEN_COUNT)
    """Wins over `max_tokens`."""
    chat_template_kwargs: Annotated[
        dict[str, Any] | str | None, Shaped("an object, or an object as JSON text")
    ] = None
    """Variables for the model's chat template."""
    enable_thinking: bool | None = None
    """Whether to think before the answer. Null: as the model was launched."""
    thinking_budget: int | None = Field(None, ge=0, le=MAX_TOKEN_COUNT)
    """Tokens that the model may think before it has to answer. Null: as the model was launched."""
    thinking_token_budget: int | None = Field(None, ge=0, le=MAX_TOKEN_COUNT)
    """Another name of `thinking_budget`."""
    reasoning_effort: ReasoningEffort | None = None
    """How much to think, of models whose template has it; of hybrid ones only "none"."""
    tools: Annotated[list[ToolDescription], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = (
        None
    )
    """What the model may call."""
    tool_choice: Annotated[
        Literal["none", "auto", "required"] | NamedToolChoice | AllowedToolChoice | None,
        Shaped(
            '"none", "auto", "required", {"type": "function", "function": {"name": …}} or '
            '{"type": "allowed_tools", "allowed_tools": {"mode": …, "tools": […]}}'
        ),
    ] = None
    """Null: auto. Required, or one by its name: the answer is calls alone."""
    parallel_tool_calls: bool | None = None
    """False: the answer ends with its first call."""
    extra_body: ChatExtras | None = None
    """The same fields once more, one level down."""
    store: bool | None = None
    """Whether to keep the answer, for a time."""
    metadata: Metadata | None = None
    """Labels that are kept with it."""
    service_tier: ServiceTier | None = None
    """Who is served first: priority (or fast), then auto and default, then flex."""
    safety_identifier: str | None = None
    """Stands for `user` where that is missing."""
    prompt_cache_key: str | None = None
    """A label that is kept with it: prompts that begin alike share what is cached anyway."""

    logprobs: bool | None = None
    """Tell how likely each token was."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """And so many of the likeliest in its place. Only with `logprobs`."""

    echo: Annotated[object, Only(False)] = None
    functions: Annotated[object, Only([])] = None
    function_call: Annotated[object, Only("none", "auto")] = None
    verbosity: Annotated[object, Only("medium")] = None
    modalities: Annotated[object, Only(["text"])] = None
    audio: Annotated[object, Only()] = None
    prediction: Annotated[object, Only()] = None
    web_search_options: Annotated[object, Only()] = None
    moderation: Annotated[object, Only()] = None
    prompt_cache_options: Annotated[object, Only()] = None
    prompt_cache_retention: Annotated[object, Only()] = None
    documents: Annotated[object, Only([])] = None
    chat_template: Annotated[object, Only()] = None
    add_generation_prompt: Annotated[object, Only(True)] = None
    continue_final_message: Annotated[object, Only(False)] = None
    mm_processor_kwargs: Annotated[object, Only({})] = None


class RelabelRequest(Body):
    """`POST /v1/chat/completions/{completion_id}`."""

    metadata: Metadata | None
    """In place of what it had."""


class CompletionRequest(SharedParameters):
    """`POST /v1/completions`."""

    prompt: Annotated[
        str
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[Texts, Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]],
            Field(fail_fast=True, min_length=1, max_length=MAX_PROMPTS),
        ],
        Shaped(f"a text, a list of token ids, or a list of up to {MAX_PROMPTS} of either"),
    ]
    """Each has `n` answers, in the order of the prompts."""
    max_tokens: int | None = Field(None, ge=0, le=MAX_TOKEN_COUNT)
    """Null: as many as the context holds. 0: the prompt alone, for `echo`."""

    echo: bool | None = None
    """Begin the answer with the prompt; with `logprobs`, tell of its tokens, too."""
    logprobs: int | None = Field(None, ge=0, le=MAX_COMPLETION_LOGPROBS)
    """Tell how likely each token was, and so many of the likeliest in its place."""

    suffix: Annotated[object, Only("")] = None


class PromptTokensDetails(Answer):
    """Of the prompt's tokens."""

    cached_tokens: int
    """Those that were not computed again, since another request had begun alike."""


class CompletionTokensDetails(Answer):
    """Of the answer's tokens."""

    reasoning_tokens: int
    """Those that the model has thought, with the tags around them."""


class UsageAnswer(Answer):
    """In tokens."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class AnswerFunction(Answer):
    """A function with its arguments."""

    name: str
    arguments: str
    """JSON, unless the answer was cut short."""


class AnswerToolCall(Answer):
    """A call."""

    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(Answer):
    """The assistant's turn."""

    role: Literal["assistant"]
    content: str | None
    """Null if there are only calls."""
    refusal: None
    reasoning_content: str | None = None
    """Only if the model has thought."""
    tool_calls: list[AnswerToolCall] | None = None
    """Only if there are any."""


class AnswerCandidate(Answer):
    """A token that might have stood there."""

    token: str
    """Its text; `bytes:\\xf0\\x9f` for a piece of a character."""
    logprob: float
    bytes: list[int]


class AnswerToken(AnswerCandidate):
    """A token of the answer."""

    top_logprobs: list[AnswerCandidate]


class ChatLogprobs(Answer):
    """How likely the tokens of the answer were."""

    content: list[AnswerToken]
    refusal: None


class ChatChoice(Answer):
    """One of the answers."""

    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class ChatAnswer(Answer):
    """The answer of a chat, in one piece."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: UsageAnswer


class CompletionLogprobs(Answer):
    """How likely the tokens of the answer were; four lists of one length."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of an echoed prompt."""
    top_logprobs: list[dict[str, float] | None]
    """The likeliest, and the token itself."""
    text_offset: list[int]


class CompletionChoice(Answer):
    """One of the answers."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"]


class CompletionAnswer(Answer):
    """The answer of a completion, in one piece."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: UsageAnswer


class ErrorDetail(Answer):
    """What went wrong, as OpenAI's clients read it."""

    message: str
    type: Literal["invalid_request_error", "rate_limit_error", "server_error"]
    param: str | None
    """The field that is wrong."""
    code: str
    """Stable; `doc/api.md` lists them."""


class ErrorAnswer(Answer):
    """The body of every error of every route."""

    error: ErrorDetail
    detail: str
    """The message once more, where Xinference's clients look for it."""
