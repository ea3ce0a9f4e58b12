# SPDX-License-Identifier: Apache-2.0
"""One step at a time: schedule, build, run, sample, append, tell.

`Engine` owns the scheduler, the slots, the model runner and the text of every live request. It is
synchronous and belongs to one thread; `loop.py` gives it that thread. Requests come in as token
ids, events go out in the words of `xinference.protocol.generation`.
"""

import logging
import secrets
import time
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from xinference.errors import (
    ContextLengthExceeded,
    InternalError,
    InvalidRequest,
    XinferenceError,
)
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    SamplingParams,
    TextDelta,
    TokenLogprob,
    Usage,
)

from .block_pool import BlockPool
from .choices import Choices, child_sampling, is_child
from .config import EngineConfig
from .detokenizer import TextStream
from .logit_adjustment import LogitAdjustment, adjust, needs_adjustment
from .logprobs import (
    PromptLogprobs,
    PromptRows,
    RowLogprobs,
    TokenLogprobs,
    logprobs_of_rows,
    row_logprobs,
    with_prompt_rows,
)
from .model_runner import ModelRunner
from .sampler import SamplingRows, sample
from .sampling_defaults import resolve_sampling
from .scheduler import Schedule, Scheduler, Sequence
from .slots import SlotTable
from .token_bytes import TokenBytes, word_tokens

logger = logging.getLogger(__name__)

Event = tuple[RequestId, GenerationEvent]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What the engine is asked. `sampling` may leave things open."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...] | list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    prompt_text: str | None = None
    """What `sampling.echo` repeats. None: what the tokenizer makes of the prompt."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that was checked and completed by `Engine.validate`."""

    request_id: RequestId
    prompt: npt.NDArray[np.int32]
    sampling: SamplingParams
    """Complete: of what has a default nothing is None."""
    echo: str = ""
    """What the answer begins with."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """The token sequences of `sampling.bad_words`."""


@dataclass(slots=True, kw_only=True)
class EngineCounters:
    """Totals since the engine was made. Written by its thread only."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    """Computed tokens of rows that had more than one to compute, recomputation included."""
    num_decode_tokens: int = 0
    """Rows that had one token to compute."""
    num_generated_tokens: int = 0
    num_preemptions: int = 0
    num_aborts: int = 0
    num_failed_steps: int = 0
    last_step_seconds: float = 0.0


@dataclass(slots=True, kw_only=True)
class _Live:
    """An accepted request that has not ended."""

    sequence: Sequence
    sampling: SamplingParams
    stop_token_ids: frozenset[int]
    max_num_tokens: int
    """Prompt and answer."""
    text: TextStream
    saved_tokens: npt.NDArray[np.int32] | None
    """Its tokens while it has no slot."""
    adjustment: LogitAdjustment | None
    """None: its logits stay as they are."""
    echo: str
    """What the answer begins with."""
    prompt: PromptLogprobs | None
    """None: nobody wants them."""
    is_echoed: bool = False

    @property
    def usage(self) -> Usage:
        num_prompt_tokens = self.sequence.num_prompt_tokens
        return Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=self.sequence.num_tokens - num_prompt_tokens,
        )


class Engine:
    """A loaded model with everything a step needs. Made by `load_engine`.

    `validate` may be called from any thread; everything else belongs to the engine's thread.
    Invariant: every request that was added ends in exactly one `Finished` or `Failed`, returned by
    the call that ended it, and holds no slot and no block after that.
    """

    def __init__(
        self,
        *,
        config: EngineConfig,
        model_config: PreTrainedConfig,
        runner: ModelRunner,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        generation_defaults: SamplingParams,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.generation_defaults = generation_defaults
        """What a request that leaves temperature, top_p or top_k open gets."""
        self.eos_token_ids = eos_token_ids
        self.counters = EngineCounters()
        self._vocab_size = vocab_size
        self._runner = runner
        self._pool = BlockPool(config.num_blocks)
        self._scheduler = Scheduler(
            self._pool,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
        )
        self._slots = SlotTable(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
        )
        self._live: dict[RequestId, _Live] = {}
        self._choices: dict[RequestId, Choices] = {}
        """Of the requests for several answers, under their own ids."""
        self._parents: dict[RequestId, Choices] = {}
        """The same, under the ids of the children that have not ended."""
        self._siblings: dict[RequestId, list[ValidRequest]] = {}
        """Children that wait until the first, under whose id they are, has computed the prompt."""
        self._token_bytes = TokenBytes(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it. Never changes."""
        return self._vocab_size

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work or self._is_releasing

    @property
    def num_running(self) -> int:
        return self._scheduler.num_running

    @property
    def num_waiting(self) -> int:
        return self._scheduler.num_waiting

    @property
    def num_blocks_used(self) -> int:
        return self._pool.num_used

    def validate(self, request: EngineRequest) -> ValidRequest:
        """Check a request against the model and fill in what it leaves open. Changes nothing.

        Raises:
            InvalidRequest: the prompt is empty, or a token id is not the model's.
            ContextLengthExceeded: prompt and answer do not fit; they then would not fit the KV
                cache either, which holds at least one whole context.
        """
        num_prompt_tokens = len(request.prompt_token_ids)
        given = request.sampling
        max_model_len = self.config.max_model_len
        if num_prompt_tokens == 0:
            raise InvalidRequest(field="prompt", problem="must have at least one token")
        max_tokens = given.max_tokens
        if num_prompt_tokens + (max_tokens or 1) > max_model_len:
            raise ContextLengthExceeded(
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens or 1,
                max_model_len=max_model_len,
            )
        if max_tokens is None:
            max_tokens = max_model_len - num_prompt_tokens
        lowest, highest = min(request.prompt_token_ids), max(request.prompt_token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InvalidRequest(
                field="prompt",
                problem=f"{wrong} is not a token id; those are 0 to {self._vocab_size - 1}",
            )
        for token_id in given.stop_token_ids:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    field="stop_token_ids",
                    problem=f"{token_id} is not a token id; those are 0 to {self._vocab_size - 1}",
                )
        for token_id in given.logit_bias:
            if not 0 <= token_id < self._vocab_size:
                raise InvalidRequest(
                    field="logit_bias",
                    problem=f"{token_id} is not a token id; those are 0 to {self._vocab_size - 1}",
                )
        if given.min_tokens > max_tokens:
            raise InvalidRequest(
                field="min_tokens", problem=f"the context has room for {max_tokens} tokens"
            )
        bad_words: set[tuple[int, ...]] = set()
        for word in given.bad_words:
            bad_words |= word_tokens(self.tokenizer, word)
        sampling = replace(
            resolve_sampling(given, self.generation_defaults),
            max_tokens=max_tokens,
            seed=secrets.randbits(64) if given.seed is None else given.seed,
        )
        return ValidRequest(
            request_id=request.request_id,
            prompt=np.asarray(request.prompt_token_ids, np.int32),
            sampling=sampling,
            echo=self._echo_of(request),
            bad_words=tuple(sorted(bad_words)),
        )

    def add(self, request: ValidRequest) -> None:
        """Take a request into the waiting queue. Its id must not be live."""
        assert request.request_id not in self._choices, request.request_id
        if request.sampling.num_made == 1:
            self._add_one(request)
            return
        choices = self._choices[request.request_id] = Choices(request.request_id, request.sampling)
        first, *others = [
            replace(request, request_id=child, sampling=child_sampling(request.sampling, index))
            for index, child in enumerate(choices.child_ids)
        ]
        self._parents |= dict.fromkeys(choices.child_ids, choices)
        # Why not all at once: the others find in the cache what the first has computed.
        self._siblings[first.request_id] = others
        self._add_one(first)

    def _add_one(self, request: ValidRequest) -> None:
        assert request.request_id not in self._live, request.request_id
        sampling = request.sampling
        assert sampling.max_tokens is not None, request
        num_tokens = len(request.prompt)
        own_end_ids: frozenset[int] = frozenset() if sampling.ignore_eos else self.eos_token_ids
        end_token_ids = own_end_ids | frozenset(sampling.stop_token_ids)
        wants_prompt = sampling.echo and sampling.logprobs is not None
        live = _Live(
            sequence=Sequence(
                request_id=request.request_id,
                num_prompt_tokens=num_tokens,
                num_tokens=num_tokens,
                wants_prompt_logits=wants_prompt,
            ),
            sampling=sampling,
            stop_token_ids=end_token_ids,
            max_num_tokens=num_tokens + sampling.max_tokens,
            text=TextStream(
                self.tokenizer,
                request.prompt.tolist(),
                sampling.stop,
                includes_stop=sampling.include_stop_str_in_output,
            ),
            saved_tokens=request.prompt,
            adjustment=LogitAdjustment(
                sampling,
                prompt=request.prompt,
                end_token_ids=end_token_ids,
                bad_words=request.bad_words,
            )
            if needs_adjustment(sampling)
            else None,
            echo=request.echo,
            prompt=PromptLogprobs(request.prompt, self.tokenizer) if wants_prompt else None,
        )
        self._scheduler.add(live.sequence)
        self._live[request.request_id] = live

    def abort(self, request_id: RequestId) -> list[Event]:
        """End a request, waiting or running; its slot and blocks are free when this returns.

        Returns:
            Its last events; none if it is not live.
        """
        choices = self._choices.get(request_id)
        if choices is not None:
            self.counters.num_aborts += 1
            return [choices.abort(self._forget_choices(choices))]
        live = self._live.get(request_id)
        if live is None or request_id in self._parents:
            return []
        self.counters.num_aborts += 1
        return self._end(live, Finished(reason=FinishReason.ABORT, usage=live.usage))

    def fail_all(self, error: XinferenceError) -> list[Event]:
        """End every live request with `error`."""
        failed = Failed(error=error)
        events: list[Event] = []
        for choices in list(self._choices.values()):
            self._forget_choices(choices)
            events.append((choices.request_id, failed))
        events += [event for live in list(self._live.values()) for event in self._end(live, failed)]
        return events

    def step(self) -> list[Event]:
        """Compute one step for whoever is to run, and return what it brought.

        A forward that raises fails the requests of this step, each with the cause, and no others.
        """
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        self._place(schedule)
        released = self._release() if self._choices else []
        if not schedule.rows:
            return released
        batch = self._slots.build(schedule.rows)
        # Hazard: `samples` must be asked before the commit moves what it is computed from.
        sampling = [row.sequence for row in schedule.rows if row.samples]
        prompt_rows = self._prompt_rows(schedule)
        if prompt_rows:
            batch = replace(batch, sample_tokens=with_prompt_rows(batch, prompt_rows))
        try:
            logits = self._runner.forward(batch)
            token_ids, logprobs = self._sample(logits[: len(sampling)], sampling)
            told = self._prompt_logprobs(schedule, prompt_rows, logits[len(sampling) :])
        except Exception as error:  # noqa: BLE001  # boundary: foreign model code, logged below
            events = self._fail_step(schedule, error)
        else:
            self._scheduler.commit(schedule)
            events = self._tell_prompts(told)
            events += self._tell_all(sampling, token_ids, logprobs)
        if self._choices:
            events = self._merge(events)
        self._count(schedule, time.perf_counter() - started)
        return released + events

    def check_invariants(self) -> None:
        """Raise `AssertionError` if queues, slots, blocks and live requests contradict."""
        self._scheduler.check_invariants()
        known = {sequence.request_id for sequence in self._scheduler.sequences()}
        assert known == self._live.keys(), (known, self._live.keys())
        for live in self._live.values():
            assert (live.saved_tokens is None) == (live.sequence.slot is not None), live
        waiting = {child.request_id for group in self._siblings.values() for child in group}
        assert self._siblings.keys() <= self._live.keys(), self._siblings.keys()
        assert self._parents.keys() - waiting == self._parents.keys() & self._live.keys()
        for choices in self._parents.values():
            assert choices is self._choices[choices.request_id], choices.request_id

    def _place(self, schedule: Schedule) -> None:
        """Move tokens out of the slots that were lost and into those that were won."""
        for sequence, slot in zip(schedule.preempted, schedule.freed_slots, strict=True):
            live = self._live[sequence.request_id]
            live.saved_tokens = self._slots.token_ids_of(slot, sequence.num_tokens)
            self.counters.num_preemptions += 1
            logger.info(
                "request %s is preempted at %d tokens", sequence.request_id, sequence.num_tokens
            )
        for sequence in schedule.admitted:
            live = self._live[sequence.request_id]
            assert live.saved_tokens is not None, sequence
            self._slots.fill(sequence, live.saved_tokens, live.sampling)
            live.saved_tokens = None

    def _sample(
        self, logits: Tensor, sequences: list[Sequence]
    ) -> tuple[npt.NDArray[np.int64], dict[int, TokenLogprobs]]:
        """Draw the next token of each sequence, in order, and append it to its slot.

        Returns:
            (sequences,) token ids, and the logprobs of those that want them, by place.
        """
        if not sequences:
            return np.empty(0, np.int64), {}
        slots = np.array([sequence.slot for sequence in sequences])
        positions = np.array([sequence.num_tokens for sequence in sequences])
        table = self._slots
        token_ids = sample(
            self._adjusted(logits, sequences, np.flatnonzero(table.adjusts[slots])),
            SamplingRows(
                temperature=table.temperature[slots],
                top_p=table.top_p[slots],
                top_k=table.top_k[slots],
                seed=table.seed[slots],
                position=positions,
                min_p=table.min_p[slots],
                typical_p=table.typical_p[slots],
            ),
        )
        # Why not the last token of a context: nothing will ever read it, and it has no place.
        inside = positions < self.config.max_model_len
        table.append(slots[inside], positions[inside], token_ids[inside])
        return token_ids, logprobs_of_rows(logits, token_ids, table.num_logprobs[slots])

    def _adjusted(
        self, logits: Tensor, sequences: list[Sequence], rows: npt.NDArray[np.int64]
    ) -> Tensor:
        """Return the logits as the requests of these rows want them changed."""
        adjustments = []
        for row in rows.tolist():
            adjustment = self._live[sequences[row].request_id].adjustment
            assert adjustment is not None, sequences[row]
            adjustments.append((row, adjustment))
        return adjust(logits, adjustments) if adjustments else logits

    def _tell_all(
        self,
        sequences: list[Sequence],
        token_ids: npt.NDArray[np.int64],
        logprobs: dict[int, TokenLogprobs],
    ) -> list[Event]:
        """Turn each sequence's new token into text, and end what is at its end."""
        events: list[Event] = []
        for row, (sequence, token_id) in enumerate(zip(sequences, token_ids.tolist(), strict=True)):
            self.counters.num_generated_tokens += 1
            events += self._tell(self._live[sequence.request_id], token_id, logprobs.get(row))
        return events

    def _tell(
        self, live: _Live, token_id: int, logprobs: TokenLogprobs | None = None
    ) -> list[Event]:
        """Return the events of one new token of one request."""
        request_id = live.sequence.request_id
        if live.adjustment is not None:
            live.adjustment.note(token_id)
        reason = None
        told: tuple[TokenLogprob, ...] = ()
        num_generated = live.sequence.num_tokens - live.sequence.num_prompt_tokens
        if token_id in live.stop_token_ids:
            # Why not pushed: the token that ends the text is not part of it.
            text, reason = live.text.flush(), FinishReason.STOP
        else:
            if logprobs is not None:
                offset = len(live.echo) + live.text.num_chars
                told = (logprobs.told(token_id, offset, self._token_bytes),)
            text = live.text.push(token_id, may_stop=num_generated >= live.sampling.min_tokens)
            if not live.text.is_stopped and live.sequence.num_tokens >= live.max_num_tokens:
                text, reason = text + live.text.flush(), FinishReason.LENGTH
            if live.text.is_stopped:
                reason = FinishReason.STOP
        delta = TextDelta(text=text, token_ids=(token_id,), logprobs=told)
        events: list[Event] = [*self._echo(live), (request_id, delta)]
        if reason is not None:
            events += self._end(live, Finished(reason=reason, usage=live.usage))
        return events

    def _echo(self, live: _Live) -> list[Event]:
        """Return what comes before everything else of an answer, once."""
        if live.is_echoed or not live.sampling.echo:
            return []
        live.is_echoed = True
        logprobs = () if live.prompt is None else (live.prompt.first(self._token_bytes),)
        return [(live.sequence.request_id, TextDelta(text=live.echo, logprobs=logprobs))]

    def _echo_of(self, request: EngineRequest) -> str:
        if not request.sampling.echo:
            return ""
        if request.prompt_text is not None:
            return request.prompt_text
        return str(self.tokenizer.decode(list(request.prompt_token_ids), skip_special_tokens=True))

    def _prompt_rows(self, schedule: Schedule) -> list[PromptRows]:
        """Return which of this step's tokens tell how likely the prompt's next ones are."""
        found = []
        for row, scheduled in enumerate(schedule.rows):
            sequence = scheduled.sequence
            if sequence.wants_prompt_logits:
                prompt = self._live[sequence.request_id].prompt
                assert prompt is not None, sequence
                start = max(sequence.num_computed, prompt.num_told)
                stop = min(sequence.num_computed + scheduled.num_new, prompt.num_to_tell)
                if start < stop:
                    first = start - sequence.num_computed
                    found.append(PromptRows(row=row, first=first, count=stop - start))
        return found

    def _prompt_logprobs(
        self, schedule: Schedule, rows: list[PromptRows], logits: Tensor
    ) -> list[tuple[_Live, RowLogprobs]]:
        """Return what the logits, row after row, say of the prompts."""
        found = []
        for row in rows:
            live = self._live[schedule.rows[row.row].sequence.request_id]
            assert live.prompt is not None, row
            own, logits = logits[: row.count], logits[row.count :]
            next_ids = live.prompt.next_ids(row.count)
            found.append((live, row_logprobs(own, next_ids, live.sampling.logprobs or 0)))
        return found

    def _tell_prompts(self, found: list[tuple[_Live, RowLogprobs]]) -> list[Event]:
        events: list[Event] = []
        for live, logprobs in found:
            assert live.prompt is not None, live
            events += self._echo(live)
            told = live.prompt.tell(logprobs, self._token_bytes)
            events.append((live.sequence.request_id, TextDelta(text="", logprobs=told)))
        return events

    @property
    def _is_releasing(self) -> bool:
        return any(choices.is_releasing for choices in self._choices.values())

    def _release(self) -> list[Event]:
        """Return the next part of the answers that were kept until all had ended."""
        events: list[Event] = []
        for request_id, choices in list(self._choices.items()):
            if choices.is_releasing:
                events += choices.release()
                if not choices.is_releasing:
                    del self._choices[request_id]
        return events

    def _merge(self, events: list[Event]) -> list[Event]:
        """Turn the events of children into those of their requests."""
        merged: list[Event] = []
        for request_id, event in events:
            choices = self._parents.get(request_id)
            if choices is None:
                # A child without a parent is one of several that failed in this step.
                if not is_child(request_id):
                    merged.append((request_id, event))
            elif isinstance(event, Failed):
                self._forget_choices(choices)
                merged.append((choices.request_id, event))
            else:
                for sibling in self._siblings.pop(request_id, ()):
                    self._add_one(sibling)
                merged += choices.take(request_id, event)
                if isinstance(event, Finished):
                    del self._parents[request_id]
                    if choices.is_over and not choices.is_releasing:
                        del self._choices[choices.request_id]
        return merged

    def _forget_choices(self, choices: Choices) -> list[Finished]:
        """End the children that live; return how those that ran or waited here ended."""
        del self._choices[choices.request_id]
        ends = []
        for child in choices.child_ids:
            self._parents.pop(child, None)
            self._siblings.pop(child, None)
            live = self._live.get(child)
            if live is not None:
                ends.append(Finished(reason=FinishReason.ABORT, usage=live.usage))
                self._end(live, ends[-1])
        return ends

    def _fail_step(self, schedule: Schedule, error: Exception) -> list[Event]:
        logger.error("a step of %d requests failed", len(schedule.rows), exc_info=error)
        self.counters.num_failed_steps += 1
        cause = InternalError(where="the engine's step", problem=f"{type(error).__name__}: {error}")
        return [
            event
            for row in schedule.rows
            for event in self._fail(self._live[row.sequence.request_id], cause)
        ]

    def _fail(self, live: _Live, error: XinferenceError) -> list[Event]:
        return self._end(live, Failed(error=error))

    def _end(self, live: _Live, event: Finished | Failed) -> list[Event]:
        request_id = live.sequence.request_id
        self._scheduler.remove(request_id)
        del self._live[request_id]
        return [(request_id, event)]

    def _count(self, schedule: Schedule, seconds: float) -> None:
        counters = self.counters
        for row in schedule.rows:
            if row.num_new == 1:
                counters.num_decode_tokens += 1
            else:
                counters.num_prefill_tokens += row.num_new
        counters.num_steps += 1
        counters.last_step_seconds = seconds
