# SPDX-License-Identifier: Apache-2.0
"""A request for several answers: one sequence each, and one stream of events of all of them.

Several answers to one prompt, one answer to each of several prompts, or both.

Inside the engine every answer is a request of its own, a *child*, with an id that no caller can
have chosen. Here the events of children become those of their request: with the answer's index,
and one `Finished` when the last of them has ended. If only the best are wanted, all is kept until
then. Pure: no scheduler, no tensors.
"""

from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Finished,
    FinishReason,
    GenerationEvent,
    Phases,
    SamplingParams,
    TextDelta,
    Usage,
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
    """The answers of one request that has several: to its prompts, one group after another."""

    def __init__(
        self, request_id: RequestId, sampling: SamplingParams, *, prompt_lens: Sequence[int]
    ) -> None:
        """Note what is wanted of each prompt, and how many tokens these have."""
        self.request_id = request_id
        self._n, self._num_made = sampling.n, sampling.num_made
        self._keeps = sampling.num_made > sampling.n
        self._tells_logprobs = sampling.logprobs is not None
        self._prompt_lens = prompt_lens
        self._answers = [_Answer() for _ in range(len(prompt_lens) * sampling.num_made)]
        self._to_release: deque[TextDelta | Finished] = deque()

    @property
    def child_ids(self) -> list[RequestId]:
        """The ids of all answers, ended or not."""
        return [child_id(self.request_id, index) for index in range(len(self._answers))]

    def child_ids_of(self, prompt: int) -> list[RequestId]:
        """The ids of the answers to one of the prompts."""
        return self.child_ids[prompt * self._num_made : (prompt + 1) * self._num_made]

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
        index = _index_of(child)
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
        if not self._keeps:
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

    def abort(self, ends: Mapping[RequestId, Finished]) -> Event:
        """Return the one end of a request whose living children have just ended so."""
        for child, end in ends.items():
            self._answers[_index_of(child)].end = end
        return self.request_id, self._finished(FinishReason.ABORT)

    def _best(self) -> Iterable[TextDelta | Finished]:
        """Return the deltas of the best answers to each prompt, best first."""
        is_only = self._n * len(self._prompt_lens) == 1
        reason = FinishReason.STOP
        for prompt in range(len(self._prompt_lens)):
            made = self._answers[prompt * self._num_made : (prompt + 1) * self._num_made]
            # Why sorted is enough: it is stable, so of equals the first are taken.
            best = sorted(made, key=lambda answer: -answer.mean_logprob)[: self._n]
            for index, answer in enumerate(best, prompt * self._n):
                yield from (replace(delta, choice_index=index) for delta in answer.deltas)
                assert answer.end is not None, answer
                reason = answer.end.reason
                if not is_only:
                    yield TextDelta(text="", choice_index=index, reason=reason)
        yield self._finished(reason)

    def _finished(self, reason: FinishReason) -> Finished:
        usages = [None if answer.end is None else answer.end.usage for answer in self._answers]
        # Why the first of each prompt: the others find in the cache what it has computed.
        firsts = usages[:: self._num_made]
        usage = Usage(
            num_prompt_tokens=sum(self._prompt_lens),
            num_completion_tokens=sum(one.num_completion_tokens for one in usages if one),
            num_cached_tokens=sum(one.num_cached_tokens for one in firsts if one),
        )
        phases = [answer.end.phases for answer in self._answers if answer.end is not None]
        return Finished(reason=reason, usage=usage, phases=_together(phases))


def _together(phases: Iterable[Phases | None]) -> Phases | None:
    """Return when the first of several answers came how far, and the last one ended."""
    known = [one for one in phases if one is not None]
    if not known:
        return None
    return Phases(
        arrived_at=min(one.arrived_at for one in known),
        admitted_at=_first(one.admitted_at for one in known),
        first_token_at=_first(one.first_token_at for one in known),
        ended_at=max(one.ended_at for one in known),
    )


def _first(times: Iterable[float | None]) -> float | None:
    return min((time for time in times if time is not None), default=None)


def _index_of(child: RequestId) -> int:
    return int(child.rpartition(_SEPARATOR)[2])
