# SPDX-License-Identifier: Apache-2.0
"""A replica's part of a request's trace, told once the request has ended.

    the gateway's HTTP request ── the replica's part ─┬─ prepare   template, tokens, grammar
                                                      ├─ queued
                                                      ├─ prefill   of vectors and scores: compute
                                                      └─ decode

In: when the request came, and the `Phases` of its end. Nothing is done before that, so a trace
costs a token nothing.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

from xinference.identifiers import InstanceId, ReplicaUid
from xinference.protocol.generation import (
    ChatPrompt,
    Failed,
    Finished,
    GenerationRequest,
    Phases,
)
from xinference.protocol.tracing import TraceContext
from xinference.protocol.vectors import EmbeddingRequest, ModelRequest
from xinference.tracing import MODEL_UID, AttributeValue, Tracer


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """What is kept of a request that is traced, until it ends."""

    context: TraceContext
    operation: str
    """As OpenTelemetry's conventions have it."""

    @classmethod
    def of(cls, request: ModelRequest) -> "Traced | None":
        """Return it; None if nobody wants a trace."""
        if request.trace is None:
            return None
        return cls(context=request.trace, operation=_operation(request))


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestTracer:
    """Tells of the requests of one replica."""

    tracer: Tracer
    replica: ReplicaUid
    instance: InstanceId

    def tell(self, traced: Traced, end: Finished | Failed, *, submitted_at: float) -> None:
        """Tell of a request that has just ended.

        Args:
            submitted_at: when it came, by `time.monotonic`.
        """
        now = time.monotonic()
        unix = time.time() - now
        span = self.tracer.begin(
            f"{traced.operation} {self.replica.model}",
            {"traceparent": traced.context.traceparent},
            {
                MODEL_UID: self.replica.model,
                "xinference.replica": str(self.replica),
                "xinference.instance": self.instance,
                "gen_ai.operation.name": traced.operation,
                "gen_ai.request.model": self.replica.model,
            },
            at=unix + submitted_at,
        )
        span.name_request(traced.context.request_id)
        match end:
            case Finished():
                span.set(_of_answer(end))
            case Failed(error=error):
                span.set({"error.type": error.code})
                span.fail(str(error))
        if end.phases is not None:
            is_text = traced.operation in _TEXT
            for name, start, stop in _parts(end.phases, submitted_at, is_text=is_text):
                span.child(name, unix + start, unix + stop)
        span.end(at=unix + now)


_TEXT = frozenset({"chat", "text_completion"})


def _operation(request: ModelRequest) -> str:
    match request:
        case GenerationRequest(prompt=ChatPrompt()):
            return "chat"
        case GenerationRequest():
            return "text_completion"
        case EmbeddingRequest():
            return "embeddings"
    return "rerank"


def _of_answer(end: Finished) -> dict[str, AttributeValue]:
    return {
        "gen_ai.response.finish_reasons": [str(end.reason)],
        "gen_ai.usage.input_tokens": end.usage.num_prompt_tokens,
        "gen_ai.usage.output_tokens": end.usage.num_completion_tokens,
        "xinference.usage.cached_tokens": end.usage.num_cached_tokens,
    }


def _parts(
    phases: Phases, submitted_at: float, *, is_text: bool
) -> Iterator[tuple[str, float, float]]:
    """Yield what a request went through: its name, beginning and end."""
    ended_at = phases.ended_at
    yield "prepare", submitted_at, phases.arrived_at
    yield "queued", phases.arrived_at, phases.admitted_at or ended_at
    if phases.admitted_at is None:
        return
    first_token_at = phases.first_token_at
    yield "prefill" if is_text else "compute", phases.admitted_at, first_token_at or ended_at
    if first_token_at is not None:
        yield "decode", first_token_at, ended_at
