# SPDX-License-Identifier: Apache-2.0
"""An accepted request that has not ended: where it stands, and what a new token tells of it.

In: token ids and logprobs of one sequence. Out: events, without the request's id. It knows no
scheduler, no slots and no other request; who ends it is the engine.
"""

from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from xinference.errors import InternalError
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    Phases,
    SamplingParams,
    TextDelta,
    TokenLogprob,
    Usage,
)

from .detokenizer import TextStream
from .grammar import Matcher, grammar_failure
from .logit_adjustment import LogitAdjustment, needs_adjustment
from .logprobs import PromptLogprobs, RowLogprobs, TokenLogprobs
from .requests import ValidRequest
from .scheduler import Sequence
from .token_bytes import TokenBytes


@dataclass(slots=True, kw_only=True)
class LiveRequest:
    """An accepted request that has not ended."""

    sequence: Sequence
    sampling: SamplingParams
    chain_start: bytes
    stop_token_ids: frozenset[int]
    text: TextStream
    saved_tokens: npt.NDArray[np.int32] | None
    """Its tokens while it has no slot."""
    matcher: Matcher | None
    """Where it is in its grammar; a preemption changes nothing about that."""
    adjustment: LogitAdjustment | None
    """None: its logits stay as they are."""
    echo: str
    """What the answer begins with."""
    prompt: PromptLogprobs | None
    """None: nobody wants them."""
    is_echoed: bool
    """Whether that was told; true where there is none."""
    arrived_at: float
    admitted_at: float | None = None
    """When it first got a slot."""
    first_token_at: float | None = None

    @classmethod
    def of(
        cls,
        request: ValidRequest,
        tokenizer: PreTrainedTokenizerBase,
        eos_token_ids: frozenset[int],
    ) -> Self:
        """Return a request at its beginning; `eos_token_ids` end the model's turns."""
        sampling = request.sampling
        assert sampling.max_tokens is not None, request
        num_tokens = len(request.prompt)
        own_end_ids: frozenset[int] = frozenset() if sampling.ignore_eos else eos_token_ids
        end_token_ids = own_end_ids | frozenset(sampling.stop_token_ids)
        wants_prompt = sampling.echo and sampling.logprobs is not None
        return cls(
            sequence=Sequence(
                request_id=request.request_id,
                num_prompt_tokens=num_tokens,
                num_tokens=num_tokens,
                max_num_tokens=num_tokens + sampling.max_tokens,
                priority=request.priority,
                fairness_key=request.fairness_key,
                block_hashes=list(request.block_hashes),
                wants_prompt_logits=wants_prompt,
            ),
            sampling=sampling,
            chain_start=request.chain_start,
            stop_token_ids=end_token_ids,
            text=TextStream(
                tokenizer,
                request.prompt.tolist(),
                sampling.stop,
                kept_token_ids=request.kept_token_ids,
                includes_stop=sampling.include_stop_str_in_output,
            ),
            saved_tokens=request.prompt,
            matcher=request.matcher,
            adjustment=LogitAdjustment(
                sampling,
                prompt=request.prompt,
                end_token_ids=end_token_ids,
                bad_words=request.bad_words,
            )
            if needs_adjustment(sampling)
            else None,
            echo=request.echo,
            prompt=PromptLogprobs(request.prompt, tokenizer) if wants_prompt else None,
            is_echoed=not sampling.echo,
            arrived_at=request.arrived_at,
        )

    @property
    def usage(self) -> Usage:
        num_prompt_tokens = self.sequence.num_prompt_tokens
        return Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=min(self.sequence.num_tokens, self.sequence.max_num_tokens)
            - num_prompt_tokens,
            num_cached_tokens=self.sequence.num_cached_tokens or 0,
        )

    def phases(self, ended_at: float) -> Phases:
        """Return when it came how far; it ends now."""
        return Phases(
            arrived_at=self.arrived_at,
            admitted_at=self.admitted_at,
            first_token_at=self.first_token_at,
            ended_at=ended_at,
        )

    def tell(
        self, token_id: int, logprobs: TokenLogprobs | None, token_bytes: TokenBytes
    ) -> list[GenerationEvent]:
        """Turn a new token, which `sequence` counts by now, into text; maybe it was the last.

        Returns:
            Events of which the last is a `Finished` or `Failed` if it was.
        """
        if self.adjustment is not None:
            self.adjustment.note(token_id)
        if self.sequence.num_tokens > self.sequence.max_num_tokens:
            # Why only now: what a prompt of which nothing is to come draws is not told.
            end = Finished(reason=FinishReason.LENGTH, usage=self.usage)
            return [*self.take_echo(token_bytes), end]
        reason = None
        told: tuple[TokenLogprob, ...] = ()
        num_generated = self.sequence.num_tokens - self.sequence.num_prompt_tokens
        if token_id in self.stop_token_ids:
            # Why not pushed: the token that ends the text is not part of it.
            text, reason = self.text.flush(), FinishReason.STOP
        else:
            if self.matcher is not None:
                try:
                    self.matcher.accept(token_id)
                except Exception as error:  # noqa: BLE001  # boundary: foreign code
                    return [Failed(error=grammar_failure(self.sequence.request_id, error))]
            if logprobs is not None:
                offset = len(self.echo) + self.text.num_chars
                told = (logprobs.told(token_id, offset, token_bytes),)
            is_whole = self.matcher is not None and self.matcher.is_finished
            text = self.text.push(token_id, may_stop=num_generated >= self.sampling.min_tokens)
            is_full = self.sequence.num_tokens >= self.sequence.max_num_tokens
            if not self.text.is_stopped and (is_whole or is_full):
                reason = FinishReason.STOP if is_whole else FinishReason.LENGTH
                text += self.text.flush()
            if self.text.is_stopped:
                reason = FinishReason.STOP
        events: list[GenerationEvent] = self.take_echo(token_bytes)
        events.append(TextDelta(text=text, token_ids=(token_id,), logprobs=told))
        if reason is not None:
            stop_string = self.text.stop_string
            events.append(Finished(reason=reason, usage=self.usage, stop_string=stop_string))
        return events

    def tell_prompt(self, logprobs: RowLogprobs, token_bytes: TokenBytes) -> list[GenerationEvent]:
        """Return what became known of the next tokens of the prompt; a `Failed` if it is NaN."""
        assert self.prompt is not None, self
        if np.isnan(logprobs.token).any():
            return [Failed(error=unsound())]
        events = self.take_echo(token_bytes)
        events.append(TextDelta(text="", logprobs=self.prompt.tell(logprobs, token_bytes)))
        return events

    def take_echo(self, token_bytes: TokenBytes) -> list[GenerationEvent]:
        """Return what comes before everything else of an answer; once."""
        if self.is_echoed:
            return []
        self.is_echoed = True
        logprobs = () if self.prompt is None else (self.prompt.first(token_bytes),)
        return [TextDelta(text=self.echo, logprobs=logprobs)]


def unsound() -> InternalError:
    """Return why a request fails whose logits are no numbers."""
    problem = "this request made it compute NaN or infinity"
    return InternalError(where="the model", problem=problem)
