# SPDX-License-Identifier: Apache-2.0
"""The model handles under the names by which scripts of today import them."""

from .models import (
    AsyncChatModelHandle,
    AsyncEmbeddingModelHandle,
    AsyncGenerateModelHandle,
    AsyncRerankModelHandle,
    ChatModelHandle,
    EmbeddingModelHandle,
    GenerateModelHandle,
    RerankModelHandle,
)

RESTfulChatModelHandle = ChatModelHandle
RESTfulEmbeddingModelHandle = EmbeddingModelHandle
RESTfulGenerateModelHandle = GenerateModelHandle
RESTfulRerankModelHandle = RerankModelHandle
AsyncRESTfulChatModelHandle = AsyncChatModelHandle
AsyncRESTfulEmbeddingModelHandle = AsyncEmbeddingModelHandle
AsyncRESTfulGenerateModelHandle = AsyncGenerateModelHandle
AsyncRESTfulRerankModelHandle = AsyncRerankModelHandle

__all__ = [
    "AsyncChatModelHandle",
    "AsyncEmbeddingModelHandle",
    "AsyncGenerateModelHandle",
    "AsyncRESTfulChatModelHandle",
    "AsyncRESTfulEmbeddingModelHandle",
    "AsyncRESTfulGenerateModelHandle",
    "AsyncRESTfulRerankModelHandle",
    "AsyncRerankModelHandle",
    "ChatModelHandle",
    "EmbeddingModelHandle",
    "GenerateModelHandle",
    "RESTfulChatModelHandle",
    "RESTfulEmbeddingModelHandle",
    "RESTfulGenerateModelHandle",
    "RESTfulRerankModelHandle",
    "RerankModelHandle",
]
