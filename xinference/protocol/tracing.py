# SPDX-License-Identifier: Apache-2.0
"""What travels with a request of which somebody wants a trace."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceContext:
    """The span that a request is part of, wherever it goes."""

    traceparent: str
    """As the W3C's header of that name has it."""
    request_id: str
    """As its caller knows the request."""
