# SPDX-License-Identifier: Apache-2.0
"""The bodies of the batch routes, and of the lines of a batch."""

from typing import Any, Literal

from pydantic import Field

from xinference.api.fields import Body
from xinference.api.openai.schema import Metadata

Endpoint = Literal["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"]
MIN_LIFETIME_SECONDS = 3600
MAX_LIFETIME_SECONDS = 30 * 86400
MAX_CUSTOM_ID_LEN = 512


class Lifetime(Body):
    """When something is forgotten."""

    anchor: Literal["created_at"]
    seconds: int = Field(ge=MIN_LIFETIME_SECONDS, le=MAX_LIFETIME_SECONDS)


class BatchRequest(Body):
    """`POST /v1/batches`."""

    input_file_id: str = Field(min_length=1, max_length=256)
    """A file of the purpose batch."""
    endpoint: Endpoint
    """Where all its lines go."""
    completion_window: Literal["24h"]
    """What is not done by then is given up."""
    metadata: Metadata | None = None
    output_expires_after: Lifetime | None = None
    """Of the files with the results. Null: 30 days."""


class BatchLine(Body):
    """A line of the input."""

    custom_id: str = Field(min_length=1, max_length=MAX_CUSTOM_ID_LEN)
    """Names it in the results; no other line has it."""
    method: Literal["POST"]
    url: str
    """That of the batch."""
    body: dict[str, Any]
    """As the endpoint takes it, but not streamed."""
