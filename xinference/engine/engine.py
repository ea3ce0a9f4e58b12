# SPDX-License-Identifier: Apache-2.0
"""One step at a time: schedule, compute, commit, tell.

`Engine` owns the scheduler, the slots, the model runner and every live request, and says when one
ends. It is synchronous and belongs to one thread; `loop.py` gives it that thread. Requests come in
as token ids, events go out in the words of `xinference.protocol.generation`.
"""

import logging
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from xinference.errors import InternalError, XinferenceError
from xinference.identifiers import RequestId
from xinference.protocol.generation import (
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    SamplingParams,
    TextDelta,
)
from xinference.protocol.histograms import COUNTS, SECONDS, Histogram

from .block_pool import BlockPool
from .choices import Choices, child_id, child_sampling, is_child
from .computation import Computation, Computed, Drawn
from .config import EngineConfig
from .grammar import Constrained, GrammarCompiler, MaskFiller, StepMasks
from .isolation import run_apart
from .live_request import LiveRequest, unsound
from .logprobs import RowLogprobs
from .model_runner import Runner
from .pace import StepPace
from .prefix_hash import next_hashes
from .requests import EngineRequest, RequestChecker, ValidRequest
from .scheduler import Schedule, ScheduledRow, Scheduler
from .slots import SlotTable
from .token_bytes import TokenBytes

logger = logging.getLogger(__name__)

Event = tuple[RequestId, GenerationEvent]

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_FATAL = (torch.AcceleratorError,)
"""After one of these the device computes nothing more in this process."""


@dataclass(slots=True, kw_only=True)
class EngineCounters:
    """Totals since the engine was made. Written by its thread only."""

    num_steps: int = 0
    num_prefill_tokens: int = 0
    """Computed tokens of rows that had more than one to compute, recomputation included."""
    num_decode_tokens: int = 0
    """Rows that had one token to compute."""
    num_generated_tokens: int = 0
    num_admissions: int = 0
    """Of waiting requests; of a preempted one, again."""
    num_preemptions: int = 0
    num_aborts: int = 0
    num_failed_steps: int = 0
    num_cache_hits: int = 0
    """Admissions that found the beginning of their tokens in the KV cache."""
    num_cached_tokens: int = 0
    """The tokens that they found there, which were not computed again."""
    last_step_seconds: float = 0.0
    busy_seconds: float = 0.0
    """Of all steps together."""
    batch_size: Histogram = field(default_factory=lambda: Histogram(COUNTS))
    """Sequences of a step."""
    queue_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """From a request's arrival to its first admission."""
    prefill_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """From there to its first token."""
    decode_seconds: Histogram = field(default_factory=lambda: Histogram(SECONDS))
    """From there to its end."""

    def histograms(self) -> dict[str, float]:
        """Return the histograms as counters travel. Any thread may call this."""
        return {
            **self.batch_size.counters("batch_size"),
            **self.queue_seconds.counters("queue_seconds"),
            **self.prefill_seconds.counters("prefill_seconds"),
            **self.decode_seconds.counters("decode_seconds"),
        }


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
        runner: Runner,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        generation_defaults: SamplingParams,
        eos_token_ids: frozenset[int],
    ) -> None:
        self.config = config
        self.model_config = model_config
        self.tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.counters = EngineCounters()
        self._vocab_size = vocab_size
        self._runner = runner
        self._pool = BlockPool(config.num_blocks)
        limit = config.max_step_seconds
        self._pace = None if limit is None else StepPace(limit)
        self._scheduler = Scheduler(
            self._pool,
            block_size=config.block_size,
            max_num_seqs=config.max_num_seqs,
            max_num_batched_tokens=config.max_num_batched_tokens,
            policy=config.scheduler_policy,
            pace=self._pace,
            chunk_size=config.chunk_size,
        )
        self._slots = SlotTable(
            max_num_seqs=config.max_num_seqs,
            max_model_len=config.max_model_len,
            block_size=config.block_size,
        )
        self._live: dict[RequestId, LiveRequest] = {}
        self._grammars = GrammarCompiler(
            tokenizer,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            model_name=config.model_name,
        )
        self._mask_filler = MaskFiller(self._grammars.num_words)
        self._choices: dict[RequestId, Choices] = {}
        """Of the requests for several answers, under their own ids."""
        self._parents: dict[RequestId, Choices] = {}
        """The same, under the ids of the children that have not ended."""
        self._siblings: dict[RequestId, list[ValidRequest]] = {}
        """Children that wait until the first, under whose id they are, has computed the prompt."""
        self._token_bytes = TokenBytes(tokenizer)
        self._checker = RequestChecker(
            config=config,
            tokenizer=tokenizer,
            vocab_size=vocab_size,
            generation_defaults=generation_defaults,
            grammars=self._grammars,
            token_bytes=self._token_bytes,
        )

    @property
    def vocab_size(self) -> int:
        """Token ids are below it. Never changes."""
        return self._vocab_size

    @property
    def generation_defaults(self) -> SamplingParams:
        """What a request that leaves temperature, top_p or top_k open gets."""
        return self._checker.generation_defaults

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

    @property
    def num_blocks_kept(self) -> int:
        """Free blocks that a prompt may find again."""
        return self._pool.num_kept

    def validate(self, request: EngineRequest) -> ValidRequest:
        """As `RequestChecker.check`."""
        return self._checker.check(request)

    def add(self, request: ValidRequest) -> list[Event]:
        """Take a request into the waiting queue. Its id must not be live.

        Returns:
            Of one that is resumed, what it had generated; and its end, if that was all of it.
        """
        assert request.request_id not in self._choices, request.request_id
        if request.num_answers == 1:
            return self._add_one(request)
        choices = Choices(request.request_id, request.sampling, prompt_lens=request.prompt_lens)
        self._choices[request.request_id] = choices
        self._parents |= dict.fromkeys(choices.child_ids, choices)
        for number, of_prompt in enumerate((request, *request.others)):
            first, *siblings = [
                replace(
                    of_prompt,
                    request_id=child,
                    sampling=child_sampling(of_prompt.sampling, index),
                    matcher=None if of_prompt.matcher is None else of_prompt.matcher.fork(),
                    others=(),
                )
                for index, child in enumerate(choices.child_ids_of(number))
            ]
            # Why not all at once: the others find in the cache what the first has computed.
            self._siblings[first.request_id] = siblings
            self._add_one(first)
        return []

    def _add_one(self, request: ValidRequest) -> list[Event]:
        assert request.request_id not in self._live, request.request_id
        live = LiveRequest.of(request, self.tokenizer, self.eos_token_ids)
        self._scheduler.add(live.sequence)
        self._live[request.request_id] = live
        return self._resume(live, request.resume_token_ids) if request.resume_token_ids else []

    def _resume(self, live: LiveRequest, token_ids: tuple[int, ...]) -> list[Event]:
        """Let an answer stand where it stood after these tokens, as if they were drawn here."""
        assert live.saved_tokens is not None, live
        live.saved_tokens = np.concatenate((live.saved_tokens, np.asarray(token_ids, np.int32)))
        events: list[Event] = []
        for token_id in token_ids:
            live.sequence.num_tokens += 1
            events += self._pass_on(live, live.tell(token_id, None, self._token_bytes))
            if isinstance(events[-1][1], Finished | Failed):
                break
        return events

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

    def end_choice(self, request_id: RequestId, choice_index: int) -> list[Event]:
        """End one answer of a request, as `abort` ends them all; no event if it has ended."""
        if request_id not in self._choices:
            return self.abort(request_id)
        live = self._live.get(child_id(request_id, choice_index))
        if live is None:
            return []
        self.counters.num_aborts += 1
        end = Finished(reason=FinishReason.ABORT, usage=live.usage)
        return self._merge(self._end(live, end))

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

        A forward that raises is run again with its rows apart, so that only those fail that raise
        alone, each with its cause. One that runs out of memory is first tried with half the tokens.

        Raises:
            torch.AcceleratorError: the device is lost to this process.
        """
        started = time.perf_counter()
        schedule = self._scheduler.schedule()
        self._place(schedule)
        released = self._release() if self._choices else []
        if not schedule.rows:
            return released
        masks = self._start_masks(schedule)
        groups, culprits = self._run_apart(schedule, masks)
        rows = tuple(row for rows, _ in groups for row in rows)
        computed = replace(schedule, rows=rows)
        self._name_full_blocks(computed)
        self._scheduler.commit(computed)
        events: list[Event] = []
        for _, found in groups:
            events += self._tell_prompts(found.prompts)
            events += self._tell_all(found.drawn, masks)
        for row, error in culprits:
            problem = f"{type(error).__name__}: {error}"
            cause = InternalError(where="the engine's step", problem=problem)
            events += self._end(self._live[row.sequence.request_id], Failed(error=cause))
        if self._choices:
            events = self._merge(events)
        self._count(computed, time.perf_counter() - started)
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
        now = time.monotonic() if schedule.admitted else 0.0
        self.counters.num_admissions += len(schedule.admitted)
        for sequence in schedule.admitted:
            live = self._live[sequence.request_id]
            if live.admitted_at is None:
                live.admitted_at = now
                self.counters.queue_seconds.observe(now - live.arrived_at)
            assert live.saved_tokens is not None, sequence
            self._slots.fill(sequence, live.saved_tokens, live.sampling)
            live.saved_tokens = None
            self.counters.num_cache_hits += sequence.num_computed > 0
            self.counters.num_cached_tokens += sequence.num_computed

    def _name_full_blocks(self, schedule: Schedule) -> None:
        """Extend the names of each sequence to the blocks that this step fills."""
        if not self.config.enable_prefix_caching:
            return
        block_size = self.config.block_size
        for row in schedule.rows:
            sequence = row.sequence
            start = len(sequence.block_hashes) * block_size
            end = sequence.num_computed + row.num_new
            if end - start >= block_size:
                assert sequence.slot is not None, sequence
                hashes = sequence.block_hashes
                hashes += next_hashes(
                    hashes[-1] if hashes else self._live[sequence.request_id].chain_start,
                    self._slots.tokens_between(sequence.slot, start, end),
                    block_size,
                )

    def _start_masks(self, schedule: Schedule) -> StepMasks | None:
        """Begin to ask the grammars of the rows that will draw; None if they have none."""
        constrained = []
        for row in schedule.rows:
            live = self._live[row.sequence.request_id]
            if live.matcher is not None and row.samples:
                constrained.append(
                    Constrained(
                        request_id=row.sequence.request_id,
                        matcher=live.matcher,
                        stop_token_ids=live.stop_token_ids,
                    )
                )
        return self._mask_filler.start(constrained) if constrained else None

    def _run_apart(
        self, schedule: Schedule, masks: StepMasks | None
    ) -> tuple[list[tuple[Items[ScheduledRow], Computed]], list[tuple[ScheduledRow, Exception]]]:
        """Run the rows of a step, as `run_apart` does; out of memory, half of them."""
        computation = Computation(
            runner=self._runner,
            slots=self._slots,
            live=self._live,
            masks=masks,
            max_model_len=self.config.max_model_len,
        )
        try:
            groups, culprits = run_apart(
                schedule.rows, computation.run, fatal=_FATAL + _OUT_OF_MEMORY
            )
        except _OUT_OF_MEMORY as error:
            logger.warning("a step ran out of memory; trying half of it: %s", error)
            is_out_of_memory = True
        else:
            is_out_of_memory = False
        if is_out_of_memory:
            # Why out here: the error held on to the tensors of the step.
            torch.cuda.empty_cache()
            rows = self._scheduler.shrink(schedule).rows
            groups, culprits = run_apart(rows, computation.run, fatal=_FATAL)
        if is_out_of_memory or culprits or len(groups) > 1:
            self.counters.num_failed_steps += 1
        return groups, culprits

    def _tell_all(self, drawn: Items[Drawn], masks: StepMasks | None) -> list[Event]:
        """Turn each sequence's new token into text, and end what is at its end."""
        events: list[Event] = []
        broken = {} if masks is None else masks.failures
        for one in drawn:
            live = self._live.get(one.sequence.request_id)
            if live is None:
                continue  # what its prompt has told was its end
            if live.sequence.request_id in broken:
                events += self._end(live, Failed(error=broken[live.sequence.request_id]))
            elif one.token_id is None:
                events += self._end(live, Failed(error=unsound()))
            else:
                self.counters.num_generated_tokens += 1
                if live.first_token_at is None:
                    self._note_first_token(live)
                events += self._pass_on(
                    live, live.tell(one.token_id, one.logprobs, self._token_bytes)
                )
        return events

    def _tell_prompts(self, found: Items[tuple[LiveRequest, RowLogprobs]]) -> list[Event]:
        events: list[Event] = []
        for live, logprobs in found:
            events += self._pass_on(live, live.tell_prompt(logprobs, self._token_bytes))
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
                assert isinstance(event, TextDelta | Finished), event
                for sibling in self._siblings.pop(request_id, ()):
                    # Why now: it has waited for the first on purpose, and not for a place.
                    self._add_one(replace(sibling, arrived_at=time.monotonic()))
                merged += choices.take(request_id, event)
                if isinstance(event, Finished):
                    del self._parents[request_id]
                    if choices.is_over and not choices.is_releasing:
                        del self._choices[choices.request_id]
        return merged

    def _forget_choices(self, choices: Choices) -> dict[RequestId, Finished]:
        """End the children that live; return how those that ran or waited here ended."""
        del self._choices[choices.request_id]
        ends = {}
        for child in choices.child_ids:
            self._parents.pop(child, None)
            self._siblings.pop(child, None)
            live = self._live.get(child)
            if live is not None:
                end = Finished(reason=FinishReason.ABORT, usage=live.usage)
                self._end(live, end)
                ends[child] = replace(end, phases=live.phases(time.monotonic()))
        return ends

    def _pass_on(self, live: LiveRequest, events: list[GenerationEvent]) -> list[Event]:
        """Return the events under the request's id; end it if the last of them is its end."""
        *told, last = events
        if not isinstance(last, Finished | Failed):
            return [(live.sequence.request_id, event) for event in events]
        return [*((live.sequence.request_id, event) for event in told), *self._end(live, last)]

    def _note_first_token(self, live: LiveRequest) -> None:
        live.first_token_at = now = time.monotonic()
        assert live.admitted_at is not None, live
        self.counters.prefill_seconds.observe(now - live.admitted_at)

    def _end(self, live: LiveRequest, event: Finished | Failed) -> list[Event]:
        request_id = live.sequence.request_id
        self._scheduler.remove(request_id)
        del self._live[request_id]
        now = time.monotonic()
        if live.first_token_at is not None:
            self.counters.decode_seconds.observe(now - live.first_token_at)
        return [(request_id, replace(event, phases=live.phases(now)))]

    def _count(self, schedule: Schedule, seconds: float) -> None:
        counters = self.counters
        num_decode_tokens = sum(row.num_new == 1 for row in schedule.rows)
        num_prefill_tokens = sum(row.num_new for row in schedule.rows) - num_decode_tokens
        if self._pace is not None:
            self._pace.observe(
                num_stream_tokens=num_decode_tokens,
                num_prompt_tokens=num_prefill_tokens,
                seconds=seconds,
            )
        counters.num_decode_tokens += num_decode_tokens
        counters.num_prefill_tokens += num_prefill_tokens
        counters.num_steps += 1
        counters.last_step_seconds = seconds
        counters.busy_seconds += seconds
        counters.batch_size.observe(len(schedule.rows))
