# SPDX-License-Identifier: Apache-2.0
"""The bodies of `/v1/embeddings`, `/v1/rerank` and `/v2/rerank`, in and out.

The fields of OpenAI's embeddings, of Cohere's and Jina's rerank, and Xinference's own; what is
not honoured is marked `Only(...)` and refused by name.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from xinference.api.fields import Answer, Body, Only, Shaped

MAX_MODEL_LEN = 256
MAX_TOKEN_ID = 2**31 - 1
MAX_COUNT = 2**31 - 1

RequestName = Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]
TokenIds = Annotated[
    list[Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]], Field(fail_fast=True, min_length=1)
]
Texts = Annotated[list[str], Field(fail_fast=True, min_length=1)]


class EmbeddingsRequest(Body):
    """`POST /v1/embeddings`."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_LEN)
    """The uid of a running model."""
    input: Annotated[
        str | Texts | TokenIds | Annotated[list[TokenIds], Field(fail_fast=True, min_length=1)],
        Shaped("a text, a list of texts, token ids, or a list of lists of token ids"),
    ]
    """Token ids are of the model's own vocabulary and are taken as they stand."""
    encoding_format: Literal["float", "base64"] | None = None
    """base64: of the little-endian float32 numbers. Null: float."""
    dimensions: int | None = Field(None, ge=1, le=MAX_COUNT)
    """The first so many numbers of each vector, of unit length again. Null: all."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=MAX_COUNT)
    """Longer texts are cut to so many tokens; -1: to what the model takes. Null: they are
    refused."""
    prompt: str | None = None
    """Put before each text."""
    prompt_name: str | None = Field(None, min_length=1)
    """Of a prompt that the model brings."""
    input_type: Literal["query", "document", "search_query", "search_document"] | None = None
    """What the texts are for: takes the prompt that the model has for it."""
    return_dense: bool | None = None
    """One vector for each text. Null: unless another kind is asked for."""
    return_sparse: bool | None = None
    """The weight of each token, by its id; where the model can (bge-m3)."""
    return_multi_vector: bool | None = None
    """A vector for each token; where the model can (bge-m3)."""
    request_id: RequestName | None = None
    """Names the request, so that it can be aborted."""
    user: str | None = None
    """A label of the caller's own."""


class RerankBody(Body):
    """`POST /v1/rerank` and `POST /v2/rerank`."""

    model: str = Field(min_length=1, max_length=MAX_MODEL_LEN)
    """The uid of a running model."""
    query: str
    documents: Annotated[
        list[str | dict[str, Any]],
        Shaped("a list of texts, or of objects with a text"),
    ]
    top_n: int | None = Field(None, ge=1, le=MAX_COUNT)
    """So many of the best. Null: all."""
    return_documents: bool | None = None
    """Say the text of each with its score."""
    return_len: bool | None = None
    """Say in `meta.tokens` how many tokens were read."""
    max_chunks_per_doc: int | None = Field(None, ge=1, le=MAX_COUNT)
    """A document that is too long for the model is scored chunk by chunk, and has the best score
    of these; so many of the first ones. Null: all."""
    max_tokens_per_doc: int | None = Field(None, ge=1, le=MAX_COUNT)
    """Longer documents are cut to so many tokens first."""
    instruction: str | None = Field(None, min_length=1)
    """Of models that take one: what makes a document relevant."""
    kwargs: str | None = None
    """Further fields as JSON text, as Xinference's client sends them: `instruction`."""
    request_id: RequestName | None = None
    """Names the request, so that it can be aborted."""
    user: str | None = None
    """A label of the caller's own."""
    priority: Annotated[object, Only(0)] = None
    rank_fields: Annotated[object, Only(["text"])] = None
    truncation: Annotated[object, Only(False)] = None
    return_embeddings: Annotated[object, Only(False)] = None


class EmbeddingItem(Answer):
    """The vectors of one text."""

    index: int
    object: str
    embedding: list[float] | str | dict[str, float]
    """Base64 as a text; where only the sparse kind is asked for, weights by token id."""
    sparse_embedding: dict[str, float] | None = None
    multi_vector: list[list[float]] | str | None = None


class TokenUsage(Answer):
    """What was read."""

    prompt_tokens: int
    total_tokens: int


class EmbeddingsAnswer(Answer):
    """The vectors of every text, in their order."""

    object: str
    model: str
    data: list[EmbeddingItem]
    usage: TokenUsage


class RerankItem(Answer):
    """One document."""

    index: int
    relevance_score: float
    document: dict[str, str] | None


class RerankAnswer(Answer):
    """The best documents first."""

    id: str
    model: str
    results: list[RerankItem]
    meta: dict[str, Any]
    usage: TokenUsage
