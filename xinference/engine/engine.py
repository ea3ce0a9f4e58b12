# SPDX-License-Identifier: Apache-2.0
"""One step at a time: schedule, build, run, sample, append, tell.

`Engine` owns the scheduler, the slots, the model runner and the text of every live request. It is
synchronous and belongs to one thread; `loop.py` gives it that thread. Requests come in as token
ids, events go out in the words of `xinference.protocol.generation`.
"""

import logging
import secrets
import time
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
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
    Usage,
)

from .block_pool import BlockPool
from .config import EngineConfig
from .detokenizer import TextStream
from .grammar import (
    Constrained,
    Frame,
    GrammarCompiler,
    MaskFiller,
    Matcher,
    StepMasks,
    grammar_failure,
)
from .isolation import run_apart
from .model_runner import ModelRunner
from .pace import StepPace
from .prefix_hash import chain_start, next_hashes
from .sampler import SamplingRows, sample
from .sampling_defaults import resolve_sampling
from .scheduler import Schedule, ScheduledRow, Scheduler, Sequence
from .slots import SlotTable
from .thinking import LimitedThinking, ThinkingLimit
from .token_bytes import TokenBytes

logger = logging.getLogger(__name__)

Event = tuple[RequestId, GenerationEvent]

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_FATAL = (torch.AcceleratorError,)
"""After one of these the device computes nothing more in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What the engine is asked. `sampling` may leave things open."""

    request_id: RequestId
    prompt_token_ids: tuple[int, ...] | list[int]
    sampling: SamplingParams = field(default_factory=SamplingParams)
    priority: int = 0
    """Lower is earlier."""
    fairness_key: str = ""
    """Requests of one priority take turns by it."""
    cache_salt: str = ""
    """Only prompts with the same one share blocks."""
    kept_token_ids: frozenset[int] = frozenset()
    """Special tokens that are part of the text; others are left out of it."""
    frame: Frame | None = None
    """What stands around `sampling.grammar`, or takes its place."""
    thinking: ThinkingLimit | None = None
    """None: thoughts may be as long as the answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that was checked and completed by `Engine.validate`."""

    request_id: RequestId
    prompt: npt.NDArray[np.int32]
    sampling: SamplingParams
    """Complete: nothing is None but `grammar`."""
    priority: int
    fairness_key: str
    chain_start: bytes
    """What stands before its first block's name."""
    block_hashes: tuple[bytes, ...]
    """The names of the prompt's full blocks; none where prefixes are not kept."""
    kept_token_ids: frozenset[int] = frozenset()
    matcher: Matcher | None = None
    """At the start of the answer; this request's own."""


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
    num_cache_hits: int = 0
    """Admissions that found the beginning of their tokens in the KV cache."""
    num_cached_tokens: int = 0
    """The tokens that they found there, which were not computed again."""
    last_step_seconds: float = 0.0


_Drawn = tuple[Sequence, int | None]
"""A sequence and its new token; None if the model computed no numbers to draw it from."""


@dataclass(slots=True, kw_only=True)
class _Live:
    """An accepted request that has not ended."""

    sequence: Sequence
    sampling: SamplingParams
    chain_start: bytes
    stop_token_ids: frozenset[int]
    max_num_tokens: int
    """Prompt and answer."""
    text: TextStream
    saved_tokens: npt.NDArray[np.int32] | None
    """Its tokens while it has no slot."""
    matcher: Matcher | None
    """Where it is in its grammar; a preemption changes nothing about that."""

    @property
    def usage(self) -> Usage:
        num_prompt_tokens = self.sequence.num_prompt_tokens
        return Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=self.sequence.num_tokens - num_prompt_tokens,
            num_cached_tokens=self.sequence.num_cached_tokens or 0,
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
        self._live: dict[RequestId, _Live] = {}
        self._grammars = GrammarCompiler(
            tokenizer,
            vocab_size=vocab_size,
            eos_token_ids=eos_token_ids,
            model_name=config.model_name,
        )
        self._mask_filler = MaskFiller(self._grammars.num_words)
        self._token_bytes = TokenBytes(tokenizer)

    @property
    def vocab_size(self) -> int:
        """Token ids are below it. Never changes."""
        return self._vocab_size

    @property
    def has_work(self) -> bool:
        return self._scheduler.has_work

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
        """Check a request against the model and fill in what it leaves open. Changes nothing.

        Takes the time that its grammar needs to compile, at most a few seconds.

        Raises:
            InvalidRequest: the prompt is empty, a token id is not the model's, or the grammar
                cannot be compiled.
            AbilityMissing, ModelOverloaded: of the grammar, as `GrammarCompiler.compile`.
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
        sampling = replace(
            resolve_sampling(given, self.generation_defaults),
            max_tokens=max_tokens,
            seed=secrets.randbits(64) if given.seed is None else given.seed,
        )
        prompt = np.asarray(request.prompt_token_ids, np.int32)
        start = chain_start(request.cache_salt)
        # Why here: this runs in the caller's thread, and a long prompt has many blocks.
        hashes = (
            next_hashes(start, prompt, self.config.block_size)
            if self.config.enable_prefix_caching
            else ()
        )
        return ValidRequest(
            request_id=request.request_id,
            prompt=prompt,
            sampling=sampling,
            priority=request.priority,
            fairness_key=request.fairness_key,
            chain_start=start,
            block_hashes=tuple(hashes),
            kept_token_ids=request.kept_token_ids,
            matcher=self._matcher(request),
        )

    def _matcher(self, request: EngineRequest) -> Matcher | None:
        """Return what says which tokens may come next; None if any may."""
        grammar, frame, limit = request.sampling.grammar, request.frame, request.thinking
        inner = None
        if grammar is not None or frame is not None:
            inner = self._grammars.compile(grammar, frame)
        return inner if limit is None else LimitedThinking(limit, self._token_bytes.of, inner)

    def add(self, request: ValidRequest) -> None:
        """Take a request into the waiting queue. Its id must not be live."""
        assert request.request_id not in self._live, request.request_id
        assert request.sampling.max_tokens is not None, request
        num_tokens = len(request.prompt)
        live = _Live(
            sequence=Sequence(
                request_id=request.request_id,
                num_prompt_tokens=num_tokens,
                num_tokens=num_tokens,
                priority=request.priority,
                fairness_key=request.fairness_key,
                block_hashes=list(request.block_hashes),
            ),
            sampling=request.sampling,
            chain_start=request.chain_start,
            stop_token_ids=self.eos_token_ids | frozenset(request.sampling.stop_token_ids),
            max_num_tokens=num_tokens + request.sampling.max_tokens,
            text=TextStream(
                self.tokenizer,
                request.prompt.tolist(),
                request.sampling.stop,
                request.kept_token_ids,
            ),
            saved_tokens=request.prompt,
            matcher=request.matcher,
        )
        self._scheduler.add(live.sequence)
        self._live[request.request_id] = live

    def abort(self, request_id: RequestId) -> list[Event]:
        """End a request, waiting or running; its slot and blocks are free when this returns.

        Returns:
            Its last events; none if it is not live.
        """
        live = self._live.get(request_id)
        if live is None:
            return []
        self.counters.num_aborts += 1
        return self._end(live, Finished(reason=FinishReason.ABORT, usage=live.usage))

    def fail_all(self, error: XinferenceError) -> list[Event]:
        """End every live request with `error`."""
        return [event for live in list(self._live.values()) for event in self._fail(live, error)]

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
        if not schedule.rows:
            return []
        masks = self._start_masks(schedule)
        groups, culprits = self._run_apart(schedule, masks)
        computed = replace(schedule, rows=tuple(row for rows, _ in groups for row in rows))
        self._name_full_blocks(computed)
        self._scheduler.commit(computed)
        events = self._tell_all([one for _, drawn in groups for one in drawn], masks)
        for row, error in culprits:
            problem = f"{type(error).__name__}: {error}"
            cause = InternalError(where="the engine's step", problem=problem)
            events += self._fail(self._live[row.sequence.request_id], cause)
        self._count(computed, time.perf_counter() - started)
        return events

    def check_invariants(self) -> None:
        """Raise `AssertionError` if queues, slots, blocks and live requests contradict."""
        self._scheduler.check_invariants()
        known = {sequence.request_id for sequence in self._scheduler.sequences()}
        assert known == self._live.keys(), (known, self._live.keys())
        for live in self._live.values():
            assert (live.saved_tokens is None) == (live.sequence.slot is not None), live

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
    ) -> tuple[
        list[tuple[Items[ScheduledRow], list[_Drawn]]], list[tuple[ScheduledRow, Exception]]
    ]:
        """Run the rows of a step, as `run_apart` does; out of memory, half of them."""

        def run(rows: Items[ScheduledRow]) -> list[_Drawn]:
            return self._run(rows, masks)

        try:
            groups, culprits = run_apart(schedule.rows, run, fatal=_FATAL + _OUT_OF_MEMORY)
        except _OUT_OF_MEMORY as error:
            logger.warning("a step ran out of memory; trying half of it: %s", error)
            is_out_of_memory = True
        else:
            is_out_of_memory = False
        if is_out_of_memory:
            # Why out here: the error held on to the tensors of the step.
            torch.cuda.empty_cache()
            groups, culprits = run_apart(self._scheduler.shrink(schedule).rows, run, fatal=_FATAL)
        if is_out_of_memory or culprits or len(groups) > 1:
            self.counters.num_failed_steps += 1
        return groups, culprits

    def _run(self, rows: Items[ScheduledRow], masks: StepMasks | None) -> list[_Drawn]:
        """Compute these rows and draw a token for each that samples. May be repeated."""
        logits = self._runner.forward(self._slots.build(rows))
        return self._sample(logits, [row.sequence for row in rows if row.samples], masks)

    def _sample(
        self, logits: Tensor, sequences: list[Sequence], masks: StepMasks | None
    ) -> list[_Drawn]:
        """Draw the next token of each sequence, in order, and append it to its slot."""
        if not sequences:
            return []
        # Why the maximum: it is NaN or infinite if one of them is; -inf, some models have anyway.
        is_sound = torch.isfinite(logits.amax(-1)).cpu().numpy()
        unsound: list[_Drawn] = []
        if not is_sound.all():
            sound = np.flatnonzero(is_sound)
            unsound = [(sequences[index], None) for index in np.flatnonzero(~is_sound)]
            sequences = [sequences[index] for index in sound]
            logits = logits[torch.from_numpy(sound).to(logits.device)]
            if not sequences:
                return unsound
        if masks is not None:
            masks.apply(logits, [sequence.request_id for sequence in sequences])
        slots = np.array([sequence.slot for sequence in sequences])
        positions = np.array([sequence.num_tokens for sequence in sequences])
        table = self._slots
        token_ids = sample(
            logits,
            SamplingRows(
                temperature=table.temperature[slots],
                top_p=table.top_p[slots],
                top_k=table.top_k[slots],
                seed=table.seed[slots],
                position=positions,
            ),
        )
        # Why not the last token of a context: nothing will ever read it, and it has no place.
        inside = positions < self.config.max_model_len
        table.append(slots[inside], positions[inside], token_ids[inside])
        return [*zip(sequences, token_ids.tolist(), strict=True), *unsound]

    def _tell_all(self, drawn: Items[_Drawn], masks: StepMasks | None) -> list[Event]:
        """Turn each sequence's new token into text, and end what is at its end."""
        events: list[Event] = []
        broken = {} if masks is None else masks.failures
        for sequence, token_id in drawn:
            live = self._live[sequence.request_id]
            if sequence.request_id in broken:
                events += self._fail(live, broken[sequence.request_id])
            elif token_id is None:
                problem = "this request made it compute NaN or infinity"
                events += self._fail(live, InternalError(where="the model", problem=problem))
            else:
                self.counters.num_generated_tokens += 1
                events += self._tell(live, token_id)
        return events

    def _tell(self, live: _Live, token_id: int) -> list[Event]:
        """Return the events of one new token of one request."""
        request_id = live.sequence.request_id
        reason = None
        if token_id in live.stop_token_ids:
            # Why not pushed: the token that ends the text is not part of it.
            text, reason = live.text.flush(), FinishReason.STOP
        else:
            if live.matcher is not None:
                try:
                    live.matcher.accept(token_id)
                except Exception as error:  # noqa: BLE001  # boundary: foreign code
                    return self._fail(live, grammar_failure(request_id, error))
            is_whole = live.matcher is not None and live.matcher.is_finished
            text = live.text.push(token_id)
            is_full = live.sequence.num_tokens >= live.max_num_tokens
            if not live.text.is_stopped and (is_whole or is_full):
                reason = FinishReason.STOP if is_whole else FinishReason.LENGTH
                text += live.text.flush()
            if live.text.is_stopped:
                reason = FinishReason.STOP
        events: list[Event] = [(request_id, TextDelta(text=text, token_ids=(token_id,)))]
        if reason is not None:
            events += self._end(live, Finished(reason=reason, usage=live.usage))
        return events

    def _fail(self, live: _Live, error: XinferenceError) -> list[Event]:
        return self._end(live, Failed(error=error))

    def _end(self, live: _Live, event: Finished | Failed) -> list[Event]:
        request_id = live.sequence.request_id
        self._scheduler.remove(request_id)
        del self._live[request_id]
        return [(request_id, event)]

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
