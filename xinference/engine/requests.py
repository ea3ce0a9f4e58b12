# SPDX-License-Identifier: Apache-2.0
"""What the engine is asked, and what it makes of that before anything runs.

`RequestChecker` holds a request against the model and fills in what it leaves open, in the
caller's thread; nothing of it knows the scheduler, slots or blocks.
"""

import secrets
import time
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
from transformers import PreTrainedTokenizerBase

from xinference.errors import ContextLengthExceeded, InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.generation import SamplingParams

from .config import EngineConfig
from .grammar import Frame, GrammarCompiler, Matcher
from .prefix_hash import chain_start, next_hashes
from .sampling_defaults import resolve_sampling
from .thinking import LimitedThinking, ThinkingLimit
from .token_bytes import TokenBytes, word_tokens


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
    """A request that was checked and completed by `RequestChecker`."""

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
    arrived_at: float = field(default_factory=time.monotonic)

    @property
    def prompt_lens(self) -> list[int]:
        """In tokens, of every prompt."""
        return [len(one.prompt) for one in (self, *self.others)]

    @property
    def num_answers(self) -> int:
        """How many are made, one sequence each."""
        return (1 + len(self.others)) * self.sampling.num_made


class RequestChecker:
    """Checks requests to one model. `check` may be called from any thread."""

    def __init__(
        self,
        *,
        config: EngineConfig,
        tokenizer: PreTrainedTokenizerBase,
        vocab_size: int,
        generation_defaults: SamplingParams,
        grammars: GrammarCompiler,
        token_bytes: TokenBytes,
    ) -> None:
        self._config = config
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self.generation_defaults = generation_defaults
        self._grammars = grammars
        self._token_bytes = token_bytes

    def check(self, request: EngineRequest) -> ValidRequest:
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
            self._check_prompt(request, prompt)
            for prompt in (
                EnginePrompt(token_ids=request.prompt_token_ids, text=request.prompt_text),
                *request.more_prompts,
            )
        ]
        return replace(first, others=tuple(others)) if others else first

    def _check_prompt(self, request: EngineRequest, asked: EnginePrompt) -> ValidRequest:
        num_prompt_tokens = len(asked.token_ids)
        given = request.sampling
        max_model_len = self._config.max_model_len
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
            bad_words |= word_tokens(self._tokenizer, word)
        sampling = replace(
            resolve_sampling(given, self.generation_defaults),
            max_tokens=max_tokens,
            seed=secrets.randbits(64) if given.seed is None else given.seed,
        )
        prompt = np.asarray(asked.token_ids, np.int32)
        start = chain_start(request.cache_salt)
        # Why here: this runs in the caller's thread, and a long prompt has many blocks.
        hashes = (
            next_hashes(start, prompt, self._config.block_size)
            if self._config.enable_prefix_caching
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

    def _echo_of(self, prompt: EnginePrompt) -> str:
        if prompt.text is not None:
            return prompt.text
        return str(self._tokenizer.decode(list(prompt.token_ids), skip_special_tokens=True))
