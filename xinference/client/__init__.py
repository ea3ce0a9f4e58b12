# SPDX-License-Identifier: Apache-2.0
"""The Python client: calls of the HTTP interface as methods, plain and awaited.

`Client` and `AsyncClient` have the same methods, because both send the same `Operation` values
(`operations.py`). `get_model` returns a handle that chats, generates, embeds or reranks. Errors
are subclasses of `ClientError`, which is a `RuntimeError`. Knows HTTP only: neither torch nor
actors are imported.
"""

from xinference.client._async import AsyncClient
from xinference.client._sync import Client
from xinference.client.errors import (
    BadRequest,
    ClientError,
    Conflict,
    ConnectionFailed,
    ConnectionLost,
    LaunchCancelled,
    NotFound,
    ReplyTimeout,
    ServerFault,
    StreamFailed,
    Unauthorized,
    Unavailable,
)
from xinference.client.models import (
    AsyncChatModelHandle,
    AsyncEmbeddingModelHandle,
    AsyncGenerateModelHandle,
    AsyncRerankModelHandle,
    AsyncStream,
    ChatModelHandle,
    EmbeddingModelHandle,
    GenerateModelHandle,
    RerankModelHandle,
    Stream,
)

RESTfulClient = Client
AsyncRESTfulClient = AsyncClient

__all__ = [
    "AsyncChatModelHandle",
    "AsyncClient",
    "AsyncEmbeddingModelHandle",
    "AsyncGenerateModelHandle",
    "AsyncRESTfulClient",
    "AsyncRerankModelHandle",
    "AsyncStream",
    "BadRequest",
    "ChatModelHandle",
    "Client",
    "ClientError",
    "Conflict",
    "ConnectionFailed",
    "ConnectionLost",
    "EmbeddingModelHandle",
    "GenerateModelHandle",
    "LaunchCancelled",
    "NotFound",
    "RESTfulClient",
    "ReplyTimeout",
    "RerankModelHandle",
    "ServerFault",
    "Stream",
    "StreamFailed",
    "Unauthorized",
    "Unavailable",
]
