# SPDX-License-Identifier: Apache-2.0
"""A request for several answers: one sequence each, and one stream of events of all of them.

Inside the engine every answer is a request of its own, a *child*, with an id that no caller can
have chosen. Here the events of children become those of their request: with the answer's index,
and one `Finished` when the last of them has ended. If only the best are wanted, all is kept until
then. Pure: no scheduler, no tensors.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Finished,
    FinishReason,
    GenerationEvent,
    SamplingParams,
    TextDelta,
)

Event = tuple[RequestId, GenerationEvent]

MAX_RELEASED = 256
"""Pieces of kept answers that are told in one step; what one step tells must stay small."""
_SEPARATOR = "\0"


def child_id(request_id: RequestId, index: int) -> RequestId:
    """Return the id of an answer's sequence."""
    return RequestId(f"{request_id}{_SEPARATOR}{index}")


def is_child(request_id: RequestId) -> bool:
    """Return whether it is the id of one of several answers."""
    return _SEPARATOR in request_id


def child_sampling(sampling: SamplingParams, index: int) -> SamplingParams:
    """Return the parameters of one answer; `sampling` has a seed."""
    assert sampling.seed is not None, sampling
    logprobs = sampling.logprobs
    if logprobs is None and sampling.num_made > sampling.n:
        logprobs = 0  # they are chosen by it
    seed = (sampling.seed + index) % 2**64
    return replace(sampling, n=1, best_of=None, seed=seed, logprobs=logprobs)


@dataclass(slots=True)
class _Answer:
    deltas: list[TextDelta] = field(default_factory=list)
    """Kept, if only the best are told."""
    sum_logprobs: float = 0.0
    num_logprobs: int = 0
    end: Finished | None = None

    @property
    def mean_logprob(self) -> float:
        return self.sum_logprobs / self.num_logprobs if self.num_logprobs else float("-inf")


class Choices:
    """The answers of one request that asks for several."""

    def __init__(self, request_id: RequestId, sampling: SamplingParams) -> None:
        self.request_id = request_id
        self._n = sampling.n
        self._keeps = sampling.num_made > sampling.n
        self._tells_logprobs = sampling.logprobs is not None
        self._answers = [_Answer() for _ in range(sampling.num_made)]
        self._to_release: deque[TextDelta | Finished] = deque()

    @property
    def child_ids(self) -> list[RequestId]:
        """The ids of all answers, ended or not."""
        return [child_id(self.request_id, index) for index in range(len(self._answers))]

    @property
    def is_over(self) -> bool:
        """Whether all answers have ended."""
        return all(answer.end is not None for answer in self._answers)

    @property
    def is_releasing(self) -> bool:
        """Whether all answers have ended, and not all that was kept is told."""
        return bool(self._to_release)

    def take(self, child: RequestId, event: TextDelta | Finished) -> list[Event]:
        """Note an event of a child; return what the request is told."""
        index = int(child.rpartition(_SEPARATOR)[2])
        answer = self._answers[index]
        if isinstance(event, TextDelta):
            # Why the tokens: an echoed prompt has logprobs, too, and no tokens of the answer.
            if self._keeps and event.token_ids:
                answer.sum_logprobs += sum(one.logprob or 0.0 for one in event.logprobs)
                answer.num_logprobs += len(event.logprobs)
            delta = replace(event, choice_index=index)
            if not self._keeps:
                return [(self.request_id, delta)]
            answer.deltas.append(delta if self._tells_logprobs else replace(delta, logprobs=()))
            return []
        answer.end = event
        told: list[TextDelta | Finished] = []
        if not self._keeps and self._n > 1:
            told.append(TextDelta(text="", choice_index=index, reason=event.reason))
        if self.is_over:
            if self._keeps:
                self._to_release.extend(self._best())
                return self.release()
            told.append(self._finished(event.reason))
        return [(self.request_id, one) for one in told]

    def release(self) -> list[Event]:
        """Return the next part of what was kept."""
        count = min(MAX_RELEASED, len(self._to_release))
        return [(self.request_id, self._to_release.popleft()) for _ in range(count)]

    def abort(self, ends: Iterable[Finished]) -> Event:
        """Return the one end of a request whose living children have just ended so."""
        ended = [*ends, *(answer.end for answer in self._answers if answer.end is not None)]
        return self.request_id, self._finished_of(ended, FinishReason.ABORT)

    def _best(self) -> Iterable[TextDelta | Finished]:
        # Why sorted is enough: it is stable, so of equals the first are taken.
        best = sorted(self._answers, key=lambda answer: -answer.mean_logprob)[: self._n]
        for index, answer in enumerate(best):
            yield from (replace(delta, choice_index=index) for delta in answer.deltas)
            assert answer.end is not None, answer
            if self._n > 1:
                yield TextDelta(text="", choice_index=index, reason=answer.end.reason)
        assert best[-1].end is not None, best
        yield self._finished(best[-1].end.reason)

    def _finished(self, reason: FinishReason) -> Finished:
        ends = [answer.end for answer in self._answers if answer.end is not None]
        return self._finished_of(ends, reason)

    def _finished_of(self, ends: Iterable[Finished], reason: FinishReason) -> Finished:
        usages = [end.usage for end in ends]
        # Why the first answer's: the others find in the cache what it has computed.
        first = self._answers[0].end
        first_usage = usages[0] if first is None else first.usage
        usage = replace(
            first_usage,
            num_completion_tokens=sum(usage.num_completion_tokens for usage in usages),
        )
        return Finished(reason=reason, usage=usage)
