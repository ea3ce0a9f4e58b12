# SPDX-License-Identifier: Apache-2.0
"""The model handles under the names by which scripts of today import them."""

from .models import (
    AsyncChatModelHandle,
    AsyncGenerateModelHandle,
    ChatModelHandle,
    GenerateModelHandle,
)

RESTfulChatModelHandle = ChatModelHandle
RESTfulGenerateModelHandle = GenerateModelHandle
AsyncRESTfulChatModelHandle = AsyncChatModelHandle
AsyncRESTfulGenerateModelHandle = AsyncGenerateModelHandle

__all__ = [
    "AsyncChatModelHandle",
    "AsyncGenerateModelHandle",
    "AsyncRESTfulChatModelHandle",
    "AsyncRESTfulGenerateModelHandle",
    "ChatModelHandle",
    "GenerateModelHandle",
    "RESTfulChatModelHandle",
    "RESTfulGenerateModelHandle",
]
