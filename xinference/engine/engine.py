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
from typing import NamedTuple

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
    TokenLogprob,
    Usage,
)

from .block_pool import BlockPool
from .choices import Choices, child_id, child_sampling, is_child
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
from .model_runner import Runner
from .pace import StepPace
from .prefix_hash import chain_start, next_hashes
from .sampler import SamplingRows, highest_logits, sample
from .sampling_defaults import resolve_sampling
from .scheduler import Schedule, ScheduledRow, Scheduler, Sequence
from .slots import SlotTable
from .thinking import LimitedThinking, ThinkingLimit
from .token_bytes import TokenBytes, word_tokens

logger = logging.getLogger(__name__)

Event = tuple[RequestId, GenerationEvent]

_OUT_OF_MEMORY = (torch.OutOfMemoryError, MemoryError)
_FATAL = (torch.AcceleratorError,)
"""After one of these the device computes nothing more in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EnginePrompt:
    """What an answer goes on from."""

    token_ids: tuple[int, ...] | list[int]
    text: str | None = None
    """What `sampling.echo` repeats. None: what the tokenizer makes of the tokens."""


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
    prompt_text: str | None = None
    """Of an `EnginePrompt`."""
    more_prompts: tuple[EnginePrompt, ...] = ()
    """Each has answers of its own, which are counted behind those of the one before."""
    resume_token_ids: tuple[int, ...] = ()
    """The beginning of the answer, as another engine generated it: this one goes on after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ValidRequest:
    """A request that was checked and completed by `Engine.validate`."""

    request_id: RequestId
    prompt: npt.NDArray[np.int32]
    sampling: SamplingParams
    """Complete: of what has a default nothing is None."""
    priority: int
    fairness_key: str
    chain_start: bytes
    """What stands before its first block's name."""
    block_hashes: tuple[bytes, ...]
    """The names of the prompt's full blocks; none where prefixes are not kept."""
    kept_token_ids: frozenset[int] = frozenset()
    matcher: Matcher | None = None
    """At the start of the answer; this request's own."""
    echo: str = ""
    """What the answer begins with."""
    bad_words: tuple[tuple[int, ...], ...] = ()
    """The token sequences of `sampling.bad_words`."""
    resume_token_ids: tuple[int, ...] = ()
    others: tuple["ValidRequest", ...] = ()
    """The same request for its other prompts."""

    @property
    def prompt_lens(self) -> list[int]:
        """In tokens, of every prompt."""
        return [len(one.prompt) for one in (self, *self.others)]

    @property
    def num_answers(self) -> int:
        """How many are made, one sequence each."""
        return (1 + len(self.others)) * self.sampling.num_made


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


@dataclass(slots=True, kw_only=True)
class _Live:
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

    @property
    def usage(self) -> Usage:
        num_prompt_tokens = self.sequence.num_prompt_tokens
        return Usage(
            num_prompt_tokens=num_prompt_tokens,
            num_completion_tokens=min(self.sequence.num_tokens, self.sequence.max_num_tokens)
            - num_prompt_tokens,
            num_cached_tokens=self.sequence.num_cached_tokens or 0,
        )


class _Drawn(NamedTuple):
    """A sequence and its new token."""

    sequence: Sequence
    token_id: int | None
    """None if the model computed no numbers to draw it from."""
    logprobs: TokenLogprobs | None = None
    """None if nobody wants them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Computed:
    """What some rows of a step brought."""

    drawn: list[_Drawn]
    prompts: list[tuple[_Live, RowLogprobs]]
    """What became known of the tokens of prompts."""


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
        first, *others = [
            self._validate_prompt(request, prompt)
            for prompt in (
                EnginePrompt(token_ids=request.prompt_token_ids, text=request.prompt_text),
                *request.more_prompts,
            )
        ]
        return replace(first, others=tuple(others)) if others else first

    def _validate_prompt(self, request: EngineRequest, asked: EnginePrompt) -> ValidRequest:
        num_prompt_tokens = len(asked.token_ids)
        given = request.sampling
        max_model_len = self.config.max_model_len
        if num_prompt_tokens == 0:
            raise InvalidRequest(field="prompt", problem="must have at least one token")
        max_tokens = given.max_tokens
        if num_prompt_tokens + (1 if max_tokens is None else max_tokens) > max_model_len:
            raise ContextLengthExceeded(
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=1 if max_tokens is None else max_tokens,
                max_model_len=max_model_len,
            )
        if max_tokens is None:
            max_tokens = max_model_len - num_prompt_tokens
        lowest, highest = min(asked.token_ids), max(asked.token_ids)
        if lowest < 0 or highest >= self._vocab_size:
            wrong = lowest if lowest < 0 else highest
            raise InvalidRequest(
                field="prompt",
                problem=f"{wrong} is not a token id; those are 0 to {self._vocab_size - 1}",
            )
        resumed = request.resume_token_ids
        if len(resumed) > max_tokens or not all(0 <= one < self._vocab_size for one in resumed):
            problem = f"must be up to {max_tokens} token ids of this model"
            raise InvalidRequest(field="resume_token_ids", problem=problem)
        if resumed and (given.num_made > 1 or request.more_prompts):
            problem = "cannot be the beginning of several answers"
            raise InvalidRequest(field="resume_token_ids", problem=problem)
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
        prompt = np.asarray(asked.token_ids, np.int32)
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
            echo=self._echo_of(asked) if given.echo else "",
            bad_words=tuple(sorted(bad_words)),
            resume_token_ids=resumed,
        )

    def _matcher(self, request: EngineRequest) -> Matcher | None:
        """Return what says which tokens may come next; None if any may."""
        grammar, frame, limit = request.sampling.grammar, request.frame, request.thinking
        inner = None
        if grammar is not None or frame is not None:
            inner = self._grammars.compile(grammar, frame)
        return inner if limit is None else LimitedThinking(limit, self._token_bytes.of, inner)

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
                self.tokenizer,
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
            prompt=PromptLogprobs(request.prompt, self.tokenizer) if wants_prompt else None,
            is_echoed=not sampling.echo,
        )
        self._scheduler.add(live.sequence)
        self._live[request.request_id] = live
        return self._resume(live, request.resume_token_ids) if request.resume_token_ids else []

    def _resume(self, live: _Live, token_ids: tuple[int, ...]) -> list[Event]:
        """Let an answer stand where it stood after these tokens, as if they were drawn here."""
        assert live.saved_tokens is not None, live
        live.saved_tokens = np.concatenate((live.saved_tokens, np.asarray(token_ids, np.int32)))
        events: list[Event] = []
        for token_id in token_ids:
            live.sequence.num_tokens += 1
            events += self._tell(live, token_id)
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
            events += self._fail(self._live[row.sequence.request_id], cause)
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
    ) -> tuple[list[tuple[Items[ScheduledRow], _Computed]], list[tuple[ScheduledRow, Exception]]]:
        """Run the rows of a step, as `run_apart` does; out of memory, half of them."""

        def run(rows: Items[ScheduledRow]) -> _Computed:
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

    def _run(self, rows: Items[ScheduledRow], masks: StepMasks | None) -> _Computed:
        """Compute these rows and draw a token for each that samples. May be repeated."""
        batch = self._slots.build(rows)
        sequences = [row.sequence for row in rows if row.samples]
        prompt_rows = self._prompt_rows(rows)
        if not prompt_rows:
            logits = self._runner.forward(batch)
            return _Computed(drawn=self._sample(logits, sequences, masks), prompts=[])
        sample_tokens = with_prompt_rows(batch, prompt_rows)
        logits = self._runner.forward(replace(batch, sample_tokens=sample_tokens))
        prompts = self._prompt_logprobs(rows, prompt_rows, logits[len(sequences) :])
        drawn = self._sample(logits[: len(sequences)], sequences, masks)
        return _Computed(drawn=drawn, prompts=prompts)

    def _sample(
        self, logits: Tensor, sequences: list[Sequence], masks: StepMasks | None
    ) -> list[_Drawn]:
        """Draw the next token of each sequence, in order, and append it to its slot."""
        if not sequences:
            return []
        # Why the maximum: it is NaN or infinite if one of them is; -inf, some models have anyway.
        is_sound = torch.isfinite(highest_logits(logits)).cpu().numpy()
        unsound: list[_Drawn] = []
        if not is_sound.all():
            sound = np.flatnonzero(is_sound)
            unsound = [_Drawn(sequences[index], None) for index in np.flatnonzero(~is_sound)]
            sequences = [sequences[index] for index in sound]
            logits = logits[torch.from_numpy(sound).to(logits.device)]
            if not sequences:
                return unsound
        slots = np.array([sequence.slot for sequence in sequences])
        positions = np.array([sequence.num_tokens for sequence in sequences])
        table = self._slots
        num_logprobs = table.num_logprobs[slots]
        has_logprobs = bool((num_logprobs >= 0).any())
        own_logits = logits
        if masks is not None:
            if has_logprobs:
                logits = logits.clone()  # masks are applied in place; logprobs are the model's own
            masks.apply(logits, [sequence.request_id for sequence in sequences])
        adjusted = np.flatnonzero(table.adjusts[slots])
        if adjusted.size:
            logits = self._adjusted(logits, sequences, adjusted, is_masked=masks is not None)
        token_ids = sample(
            logits,
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
        logprobs = logprobs_of_rows(own_logits, token_ids, num_logprobs) if has_logprobs else {}
        drawn = [
            _Drawn(sequence, token_id, logprobs.get(row))
            for row, (sequence, token_id) in enumerate(
                zip(sequences, token_ids.tolist(), strict=True)
            )
        ]
        return drawn + unsound

    def _adjusted(
        self,
        logits: Tensor,
        sequences: list[Sequence],
        rows: npt.NDArray[np.int64],
        *,
        is_masked: bool,
    ) -> Tensor:
        """Return the logits as the requests of these rows want them changed."""
        adjustments = []
        for row in rows.tolist():
            adjustment = self._live[sequences[row].request_id].adjustment
            assert adjustment is not None, sequences[row]
            adjustments.append((row, adjustment))
        adjusted = adjust(logits, adjustments)
        if is_masked:
            # Why: what min_tokens and bad_words forbid may be all that a grammar leaves.
            is_stuck = adjusted.amax(1, keepdim=True) == -torch.inf
            adjusted = torch.where(is_stuck, logits.float(), adjusted)
        return adjusted

    def _tell_all(self, drawn: Items[_Drawn], masks: StepMasks | None) -> list[Event]:
        """Turn each sequence's new token into text, and end what is at its end."""
        events: list[Event] = []
        broken = {} if masks is None else masks.failures
        for one in drawn:
            live = self._live.get(one.sequence.request_id)
            if live is None:
                continue  # what its prompt has told was its end
            if live.sequence.request_id in broken:
                events += self._fail(live, broken[live.sequence.request_id])
            elif one.token_id is None:
                events += self._fail(live, _unsound())
            else:
                self.counters.num_generated_tokens += 1
                events += self._tell(live, one.token_id, one.logprobs)
        return events

    def _tell(
        self, live: _Live, token_id: int, logprobs: TokenLogprobs | None = None
    ) -> list[Event]:
        """Return the events of one new token of one request."""
        request_id = live.sequence.request_id
        if live.adjustment is not None:
            live.adjustment.note(token_id)
        if live.sequence.num_tokens > live.sequence.max_num_tokens:
            # Why only now: what a prompt of which nothing is to come draws is not told.
            echo = [] if live.is_echoed else self._echo(live)
            end = Finished(reason=FinishReason.LENGTH, usage=live.usage)
            return [*echo, *self._end(live, end)]
        reason = None
        told: tuple[TokenLogprob, ...] = ()
        num_generated = live.sequence.num_tokens - live.sequence.num_prompt_tokens
        if token_id in live.stop_token_ids:
            # Why not pushed: the token that ends the text is not part of it.
            text, reason = live.text.flush(), FinishReason.STOP
        else:
            if live.matcher is not None:
                try:
                    live.matcher.accept(token_id)
                except Exception as error:  # noqa: BLE001  # boundary: foreign code
                    return self._fail(live, grammar_failure(request_id, error))
            if logprobs is not None:
                offset = len(live.echo) + live.text.num_chars
                told = (logprobs.told(token_id, offset, self._token_bytes),)
            is_whole = live.matcher is not None and live.matcher.is_finished
            text = live.text.push(token_id, may_stop=num_generated >= live.sampling.min_tokens)
            is_full = live.sequence.num_tokens >= live.sequence.max_num_tokens
            if not live.text.is_stopped and (is_whole or is_full):
                reason = FinishReason.STOP if is_whole else FinishReason.LENGTH
                text += live.text.flush()
            if live.text.is_stopped:
                reason = FinishReason.STOP
        events: list[Event] = [] if live.is_echoed else self._echo(live)
        events.append((request_id, TextDelta(text=text, token_ids=(token_id,), logprobs=told)))
        if reason is not None:
            stop_string = live.text.stop_string
            end = Finished(reason=reason, usage=live.usage, stop_string=stop_string)
            events += self._end(live, end)
        return events

    def _echo(self, live: _Live) -> list[Event]:
        """Return what comes before everything else of an answer."""
        live.is_echoed = True
        logprobs = () if live.prompt is None else (live.prompt.first(self._token_bytes),)
        return [(live.sequence.request_id, TextDelta(text=live.echo, logprobs=logprobs))]

    def _echo_of(self, prompt: EnginePrompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return str(self.tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True))

    def _prompt_rows(self, rows: Items[ScheduledRow]) -> list[PromptRows]:
        """Return which tokens of these rows tell how likely the prompt's next ones are."""
        found = []
        for row, scheduled in enumerate(rows):
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
        self, rows: Items[ScheduledRow], prompt_rows: list[PromptRows], logits: Tensor
    ) -> list[tuple[_Live, RowLogprobs]]:
        """Return what the logits, row after row, say of the prompts."""
        found = []
        for prompt_row in prompt_rows:
            live = self._live[rows[prompt_row.row].sequence.request_id]
            assert live.prompt is not None, prompt_row
            own, logits = logits[: prompt_row.count], logits[prompt_row.count :]
            next_ids = live.prompt.next_ids(prompt_row.count)
            found.append((live, row_logprobs(own, next_ids, live.sampling.logprobs or 0)))
        return found

    def _tell_prompts(self, found: list[tuple[_Live, RowLogprobs]]) -> list[Event]:
        events: list[Event] = []
        for live, logprobs in found:
            assert live.prompt is not None, live
            if np.isnan(logprobs.token).any():
                events += self._fail(live, _unsound())
                continue
            if not live.is_echoed:
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
                assert isinstance(event, TextDelta | Finished), event
                for sibling in self._siblings.pop(request_id, ()):
                    self._add_one(sibling)
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
                ends[child] = Finished(reason=FinishReason.ABORT, usage=live.usage)
                self._end(live, ends[child])
        return ends

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


def _unsound() -> InternalError:
    problem = "this request made it compute NaN or infinity"
    return InternalError(where="the model", problem=problem)
