# SPDX-License-Identifier: Apache-2.0
"""The bodies of the Ollama routes, in and out.

Every parameter that Ollama's clients send to chat, generate and show is here, every option, too.
What is not honoured in this version is marked `Only(...)`: refused by name, but for the values
that ask for nothing. `doc/ollama.md` has the same tables; a test compares.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from xinference.api.fields import Answer, Body, Only, Shaped
from xinference.api.openai.schema import (
    MAX_MODEL_LEN,
    MAX_TOKEN_COUNT,
    MAX_TOOL_NAME_LEN,
    MAX_TOOLS,
    StopString,
    ToolDescription,
)
from xinference.protocol.generation import MAX_LOGPROBS, MAX_STOP_STRINGS

ModelName = Annotated[str, Field(min_length=1, max_length=MAX_MODEL_LEN)]
"""The uid of a running model, with or without `:latest`."""


class OllamaOptions(Body):
    """How to choose tokens, and when to end. Null leaves the choice to the model's defaults."""

    num_predict: int | None = Field(None, ge=-2, le=MAX_TOKEN_COUNT)
    """How many tokens at most. Below 0: as many as the context holds."""
    num_ctx: int | None = Field(None, ge=1, le=MAX_TOKEN_COUNT)
    """Prompt and answer together end here; not above the context of the launch."""
    temperature: float | None = Field(None, ge=0, le=2)
    top_k: int | None = Field(None, ge=-1, le=MAX_TOKEN_COUNT)
    top_p: float | None = Field(None, ge=0, le=1)
    min_p: float | None = Field(None, ge=0, le=1)
    typical_p: float | None = Field(None, gt=0, le=1)
    repeat_penalty: float | None = Field(None, gt=0, le=100)
    """Of all tokens of prompt and answer."""
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    seed: int | None = Field(None, ge=-(2**63), le=2**64 - 1)
    stop: Annotated[
        StopString
        | Annotated[list[StopString], Field(fail_fast=True, max_length=MAX_STOP_STRINGS)]
        | None,
        Shaped(f"a text or a list of up to {MAX_STOP_STRINGS} texts, none empty"),
    ] = None

    repeat_last_n: Annotated[object, Only(-1)] = None
    num_keep: Annotated[object, Only(0)] = None
    tfs_z: Annotated[object, Only(1)] = None
    mirostat: Annotated[object, Only(0)] = None
    mirostat_tau: Annotated[object, Only()] = None
    mirostat_eta: Annotated[object, Only()] = None
    penalize_newline: Annotated[object, Only(True)] = None
    numa: Annotated[object, Only(False)] = None
    num_batch: Annotated[object, Only()] = None
    num_gpu: Annotated[object, Only()] = None
    main_gpu: Annotated[object, Only()] = None
    num_thread: Annotated[object, Only()] = None
    low_vram: Annotated[object, Only(False)] = None
    f16_kv: Annotated[object, Only()] = None
    logits_all: Annotated[object, Only(False)] = None
    vocab_only: Annotated[object, Only(False)] = None
    use_mmap: Annotated[object, Only()] = None
    use_mlock: Annotated[object, Only(False)] = None
    embedding_only: Annotated[object, Only(False)] = None


KeepAlive = Annotated[float | str | None, Shaped("seconds, or a text such as 5m")]


class OllamaParameters(Body):
    """What chat and generate have in common."""

    model: ModelName
    stream: bool | None = None
    """Null: true."""
    options: OllamaOptions | None = None
    format: Annotated[
        Literal["", "json"] | dict[str, Any] | None, Shaped('"json" or a JSON Schema')
    ] = None
    """What the answer has to look like."""
    think: Annotated[bool | Literal["low", "medium", "high"] | None, Shaped("true or false")] = None
    """Whether to think before the answer. Null: as the model was launched."""
    keep_alive: KeepAlive = None
    """A model stays until it is terminated; only zero, which asks for its end, is refused."""
    logprobs: bool | None = None
    """Tell how likely each token was."""
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    """And so many of the likeliest in its place. Only with `logprobs`."""

    truncate: Annotated[object, Only(False)] = None
    shift: Annotated[object, Only(False)] = None


class OllamaEmbedOptions(Body):
    """None is honoured; clients send them all, those that ask for nothing as null."""


class OllamaEmbedRequest(Body):
    """`POST /api/embed`."""

    model: ModelName
    input: Annotated[
        str | Annotated[list[str], Field(fail_fast=True, min_length=1)],
        Shaped("a text or a list of texts"),
    ]
    truncate: bool | None = None
    """False: texts that are too long for the model are refused. Else they are cut."""
    dimensions: int | None = Field(None, ge=1, le=MAX_TOKEN_COUNT)
    """The first so many numbers of each vector, of unit length again."""
    keep_alive: KeepAlive = None
    """As of a chat."""
    options: OllamaEmbedOptions | None = None


class OllamaEmbeddingRequest(Body):
    """`POST /api/embeddings`."""

    model: ModelName
    prompt: str
    keep_alive: KeepAlive = None
    """As of a chat."""
    options: OllamaEmbedOptions | None = None


class OllamaEmbedAnswer(Answer):
    """The vectors of the texts, in their order."""

    model: str
    embeddings: list[list[float]]
    total_duration: int
    load_duration: int
    prompt_eval_count: int


class OllamaEmbeddingAnswer(Answer):
    """The vector of the text."""

    embedding: list[float]


class OllamaFunctionCall(Body):
    """A function with its arguments."""

    name: str = Field(min_length=1, max_length=MAX_TOOL_NAME_LEN)
    arguments: dict[str, Any]
    index: int | None = None
    """As it was received; it changes nothing."""


class OllamaToolCall(Body):
    """A call in an assistant's turn."""

    id: str | None = Field(None, min_length=1, max_length=MAX_TOOL_NAME_LEN)
    type: Literal["function"] | None = None
    function: OllamaFunctionCall


class OllamaMessage(Body):
    """One turn."""

    role: Literal["system", "user", "assistant", "tool"]
    content: str | None = None
    thinking: str | None = None
    """Of an assistant: what it thought."""
    tool_calls: Annotated[list[OllamaToolCall], Field(fail_fast=True)] | None = None
    """Of an assistant."""
    tool_name: str | None = Field(None, min_length=1, max_length=MAX_TOOL_NAME_LEN)
    """Of a tool: the function whose result this is."""
    tool_call_id: str | None = Field(None, min_length=1, max_length=MAX_TOOL_NAME_LEN)
    """Of a tool: the call whose result this is. Null: the first of that function without one."""

    images: Annotated[object, Only([])] = None


class OllamaChatRequest(OllamaParameters):
    """`POST /api/chat`."""

    messages: Annotated[list[OllamaMessage], Field(fail_fast=True)] | None = None
    """None: is the model loaded?"""
    tools: Annotated[list[ToolDescription], Field(fail_fast=True, max_length=MAX_TOOLS)] | None = (
        None
    )
    """What the model may call."""


class OllamaGenerateRequest(OllamaParameters):
    """`POST /api/generate`."""

    prompt: str | None = None
    """What a user says, or with `raw` a text to go on from. None: is the model loaded?"""
    system: str | None = None
    """What the system says before; not with `raw`."""
    raw: bool | None = None
    """Go on from the prompt as it stands, without the model's template."""

    suffix: Annotated[object, Only("")] = None
    images: Annotated[object, Only([])] = None
    template: Annotated[object, Only("")] = None
    context: Annotated[object, Only([])] = None
    width: Annotated[object, Only(0)] = None
    height: Annotated[object, Only(0)] = None
    steps: Annotated[object, Only(0)] = None


class OllamaShowRequest(Body):
    """`POST /api/show`."""

    model: ModelName | None = None
    name: ModelName | None = None
    """What older clients call the model."""
    verbose: bool | None = None
    """There is nothing more to tell."""

    system: Annotated[object, Only("")] = None
    template: Annotated[object, Only("")] = None
    options: Annotated[object, Only({})] = None


class OllamaEnd(Answer):
    """What the last line of a stream has, and the answer in one piece. Times are nanoseconds."""

    model: str
    created_at: str
    done: bool
    done_reason: Literal["stop", "length", "load"] | None = None
    total_duration: int | None = None
    load_duration: int | None = None
    """Until the model has taken the request."""
    prompt_eval_count: int | None = None
    prompt_eval_duration: int | None = None
    """From then to the first piece of the answer."""
    eval_count: int | None = None
    eval_duration: int | None = None


class OllamaAnswerMessage(Answer):
    """The assistant's turn, or a piece of it."""

    role: Literal["assistant"]
    content: str
    thinking: str | None = None
    tool_calls: list[dict[str, Any]] | None = None


class OllamaChatAnswer(OllamaEnd):
    """The answer of a chat."""

    message: OllamaAnswerMessage
    logprobs: list[dict[str, Any]] | None = None


class OllamaGenerateAnswer(OllamaEnd):
    """The answer to a prompt."""

    response: str
    thinking: str | None = None
    logprobs: list[dict[str, Any]] | None = None


class OllamaDetails(Answer):
    """What a model is."""

    parent_model: str
    format: str
    family: str
    families: list[str]
    parameter_size: str
    quantization_level: str


class OllamaModel(Answer):
    """A running model."""

    name: str
    model: str
    modified_at: str | None = None
    expires_at: str | None = None
    size: int
    """Zero: not known."""
    size_vram: int | None = None
    digest: str
    details: OllamaDetails
    context_length: int | None = None


class OllamaModels(Answer):
    """Those that can be asked now."""

    models: list[OllamaModel]


class OllamaShowAnswer(Answer):
    """One model."""

    modelfile: str
    parameters: str
    template: str
    license: str
    modified_at: str
    details: OllamaDetails
    model_info: dict[str, Any]
    capabilities: list[str]


class OllamaVersion(Answer):
    """Which Ollama's API this is."""

    version: str
    xinference: str


class OllamaErrorAnswer(Answer):
    """The body of every error of these routes, and the last line of a stream that has failed."""

    error: str
