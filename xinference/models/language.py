# SPDX-License-Identifier: Apache-2.0
"""A language model that is ready to answer: prompts become token ids, the engine does the rest.

In: `GenerationRequest`. Out: the engine's events; those of a chat are read as the model writes its
thoughts and calls (`conversation.py`). It owns what the family adds to every request (stop texts
and tokens), and the engine's thread; it knows no sockets and no event loop.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace

from transformers import PreTrainedTokenizerBase

from xinference.catalog.family import GUIDE_URI
from xinference.engine import (
    Engine,
    EngineLoop,
    EnginePrompt,
    EngineRequest,
    Frame,
    ThinkingLimit,
    load_engine,
)
from xinference.errors import InvalidRequest
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions, ReplicaSpec
from xinference.protocol.generation import (
    Accepted,
    ChatPrompt,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    TextPrompt,
    TokenPrompt,
    Usage,
)
from xinference.protocol.vectors import ModelRequest

from .answer import AnswerReaders, reading
from .base import OnProgress, Sink, expect
from .constraint import frame_of
from .conversation import Chat, Conversation
from .files import model_directory
from .heap import KEPT_IDLE_BYTES, Heap
from .parameters import with_own_stops, within_total

logger = logging.getLogger(__name__)

IMPORTS_SHARE = 0.3
"""Of the time that loading takes, what the imports before it take."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prepared:
    """What the engine is to be asked, and who reads what it answers."""

    request: EngineRequest
    readers: AnswerReaders | None
    """None: the events are passed on as they are."""


class LanguageModel:
    """A loaded language model. Implements `Model`; any thread may call any method."""

    def __init__(self, engine: Engine, spec: ReplicaSpec) -> None:
        self._engine = engine
        self._tokenizer: PreTrainedTokenizerBase = engine.tokenizer
        self._name = str(spec.replica.model)
        self._stop = spec.source.stop
        self._stop_token_ids = self._known_tokens(spec.source.stop_token_ids)
        self.conversation = Conversation(spec, self._tokenizer)
        self._answers = self.conversation.answers
        self._marker_ids = self._tokens_of(self._answers.special_tokens)
        self._kept_token_ids = self._special(self._marker_ids.values())
        self._thinking_budget = spec.engine_options.thinking_budget
        self._readers: dict[RequestId, AnswerReaders | None] = {}
        """Of every live request, by the id that the engine knows it by."""
        self._max_prompt_chars = _max_chars(self._tokenizer, engine.config.max_model_len)
        self._loop: EngineLoop | None = None
        self._sink: Sink | None = None

    @property
    def context_length(self) -> int:
        """Prompt and answer, in tokens."""
        return self._engine.config.max_model_len

    @property
    def max_num_seqs(self) -> int:
        """Requests that run at once."""
        return self._engine.config.max_num_seqs

    @property
    def is_alive(self) -> bool:
        """Whether the engine's thread runs."""
        return self._loop is not None and self._loop.alive

    def description(self) -> Mapping[str, str | int | float | bool | None]:
        """Return the engine's config, by name."""
        return asdict(self._engine.config)

    def counters(self) -> dict[str, float]:
        """Return the fields of the engine's statistics, and its histograms."""
        if self._loop is None:
            return {}
        stats = {name: float(value) for name, value in asdict(self._loop.stats()).items()}
        return {**stats, **self._loop.histograms()}

    def start(self, sink: Sink) -> None:
        """Start the engine's thread; events go to `sink`, in that thread."""
        assert self._loop is None, "start() was called before"
        self._sink = sink

        def read(events: list[tuple[RequestId, GenerationEvent]]) -> None:
            sink(self._read(events))

        heap = Heap(kept_bytes=KEPT_IDLE_BYTES)
        self._loop = EngineLoop(self._engine, read, when_idle=heap.give_back)
        self._loop.start()

    def submit(self, request: ModelRequest) -> Accepted:
        """Turn the prompt into tokens and enqueue it. Takes time that grows with the prompt.

        Raises:
            AbilityMissing: the model cannot chat, or the request is not for text.
            InvalidRequest, ContextLengthExceeded, ModelOverloaded, DuplicateRequest
            In every case nothing was enqueued.
        """
        assert self._loop is not None, "start() comes first"
        request = expect(request, GenerationRequest, model_name=self._name)
        prepared = self.prepare(request)
        if request.count_only:
            return self._count(request, prepared)
        with reading(self._readers, request.request_id, prepared.readers):
            return self._loop.submit(prepared.request)

    def _count(self, request: GenerationRequest, prepared: Prepared) -> Accepted:
        """End a request whose prompt alone was of interest; the engine does not hear of it."""
        usage = Usage(
            num_prompt_tokens=len(prepared.request.prompt_token_ids), num_completion_tokens=0
        )
        assert self._sink is not None, "start() comes first"
        self._sink([(request.request_id, Finished(reason=FinishReason.STOP, usage=usage))])
        return Accepted(num_prompt_tokens=usage.num_prompt_tokens)

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a request, within one step; return whether it was live."""
        return self._loop is not None and self._loop.abort(request_id)

    def stop(self, timeout_seconds: float) -> None:
        """End every request and the engine's thread.

        Raises:
            TimeoutError: a step did not end in time.
        """
        if self._loop is not None:
            self._loop.stop(timeout_seconds)

    def prepare(self, request: GenerationRequest) -> Prepared:
        """Return what the engine is to be asked, and who reads the answer. Changes nothing.

        Raises:
            AbilityMissing, InvalidRequest, ContextLengthExceeded
        """
        prompt = request.prompt
        readers: AnswerReaders | None = None
        frame: Frame | None = None
        thinking: ThinkingLimit | None = None
        match prompt:
            case ChatPrompt():
                chat = self.conversation.begin(prompt, request)
                # Why no special tokens: the template has written those that it wants.
                token_ids = self._encode(chat.rendered, field="messages", special_tokens=False)
                readers = self.conversation.readers(chat, request.sampling.n)
                asked = EnginePrompt(token_ids=token_ids)
                thinking = self._thinking_limit(chat)
                frame = frame_of(
                    chat.prompt,
                    has_grammar=request.sampling.grammar is not None,
                    answers=self._answers,
                    rendered=chat.rendered,
                    token_ids=self._marker_ids,
                )
            case TextPrompt() | TokenPrompt():
                asked = self._engine_prompt(prompt)
        return Prepared(
            request=EngineRequest(
                request_id=request.request_id,
                prompt_token_ids=asked.token_ids,
                sampling=with_own_stops(
                    within_total(request, len(asked.token_ids), self.context_length),
                    self._stop,
                    self._stop_token_ids,
                ),
                priority=request.priority,
                fairness_key=request.fairness_key,
                cache_salt=request.cache_salt,
                kept_token_ids=self._kept_token_ids if readers is not None else frozenset(),
                prompt_text=asked.text,
                more_prompts=tuple(map(self._engine_prompt, request.more_prompts)),
                frame=frame,
                thinking=thinking,
                resume_token_ids=request.resume_token_ids,
            ),
            readers=readers,
        )

    def _engine_prompt(self, prompt: TextPrompt | TokenPrompt) -> EnginePrompt:
        if isinstance(prompt, TokenPrompt):
            return EnginePrompt(token_ids=prompt.token_ids)  # the engine checks them
        if not prompt.text:
            raise InvalidRequest(field="prompt", problem="must not be empty")
        token_ids = self._encode(prompt.text, field="prompt", special_tokens=True)
        return EnginePrompt(token_ids=token_ids, text=prompt.text)

    def _read(
        self, events: list[tuple[RequestId, GenerationEvent]]
    ) -> list[tuple[RequestId, GenerationEvent]]:
        """Return what callers are told of the events of a step. In the engine's thread."""
        told: list[tuple[RequestId, GenerationEvent]] = []
        for request_id, event in events:
            readers = self._readers.get(request_id)
            if isinstance(event, Finished | Failed):
                # Invariant: before anyone hears of the end, who may then use the id again.
                self._readers.pop(request_id, None)
            if readers is None:
                told.append((request_id, event))
                continue
            told += [(request_id, one) for one in readers.read(event)]
            for choice_index in readers.take_to_end():
                assert self._loop is not None, "events come of the loop"
                self._loop.end_choice(request_id, choice_index)
        return told

    def _thinking_limit(self, chat: Chat) -> ThinkingLimit | None:
        """Return how long an answer may think; None if that is its own affair."""
        budget = chat.prompt.thinking_budget
        if budget is None:
            budget = self._thinking_budget
        markers = self._answers.thought_markers
        if budget is None or markers is None:
            return None
        start, end = markers
        closing = self._answers.closing(may_call=bool(chat.prompt.tools))
        return ThinkingLimit(
            num_tokens=budget,
            start=start,
            end=end,
            closing_token_ids=tuple(
                self._tokenizer(closing, add_special_tokens=False)["input_ids"]
            ),
            is_open=chat.rendered.rstrip().endswith(start),
            is_first=self._answers.reasoning_tags == markers,
        )

    def _encode(self, text: str, *, field: str, special_tokens: bool) -> list[int]:
        if self._max_prompt_chars is not None and len(text) > self._max_prompt_chars:
            raise InvalidRequest(
                field=field,
                problem=f"{len(text)} characters cannot fit a context of "
                f"{self.context_length} tokens",
            )
        # Why a list of one: for a batch the tokenizer lets go of the interpreter's lock, so a long
        # prompt keeps neither the engine's thread nor the event loop from running.
        encoded = self._tokenizer(
            [text],
            add_special_tokens=special_tokens,
            return_attention_mask=False,
            return_token_type_ids=False,
            verbose=False,
        )
        token_ids: list[int] = encoded["input_ids"][0]
        return token_ids

    def _tokens_of(self, texts: tuple[str, ...]) -> dict[str, int]:
        """Return the ids of those texts that are single tokens."""
        vocabulary = self._tokenizer.get_vocab()
        return {text: vocabulary[text] for text in texts if text in vocabulary}

    def _special(self, token_ids: Iterable[int]) -> frozenset[int]:
        """Return those that are special tokens, so not part of a text."""
        added = self._tokenizer.added_tokens_decoder.items()
        special = {one for one, token in added if token.special}
        special |= {*self._tokenizer.all_special_ids}
        return frozenset(special.intersection(token_ids))

    def _known_tokens(self, token_ids: tuple[int, ...]) -> tuple[int, ...]:
        """Leave out what is not a token of the files.

        A registered model takes its family's stop tokens over, but may have a smaller vocabulary.
        """
        known = tuple(one for one in token_ids if 0 <= one < self._engine.vocab_size)
        if known != token_ids:
            logger.warning(
                "%s: of the family's stop tokens %s only %s are tokens of these files",
                self._name,
                list(token_ids),
                list(known),
            )
        return known


def _max_chars(tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> int | None:
    """Return how many characters so many tokens can be at most; None if there is no telling.

    A prompt beyond that need not be counted, which for tens of megabytes would take a minute.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.normalizer is not None:
        return None  # a normalizer may shorten the text before it is cut
    return max_model_len * max(map(len, tokenizer.get_vocab()))


def load_language_model(spec: ReplicaSpec, *, on_progress: OnProgress) -> LanguageModel:
    """Load tokenizer and weights.

    Raises:
        LoadFailed: the files are not there or do not load.
        InvalidRequest: an option asks for what this model or machine cannot do.
    """
    name = str(spec.replica.model)
    path = model_directory(spec.source.path, model_name=name)
    on_progress(IMPORTS_SHARE, "loading", "reading the weights")
    engine = load_engine(
        path,
        engine_options(spec),
        on_progress=lambda done: on_progress(
            IMPORTS_SHARE + (1.0 - IMPORTS_SHARE) * done, "loading", "loading the model"
        ),
        model_name=name,
    )
    return LanguageModel(engine, spec)


def engine_options(spec: ReplicaSpec) -> EngineOptions:
    """Return the launch's options, with what the packaged model wants where they are silent."""
    options = spec.engine_options
    if spec.source.path == GUIDE_URI and options.dtype == "auto":
        # Why: it is small enough for the caches, where float32 is the faster type on CPU, and its
        # answers are then the same on every machine.
        return replace(options, dtype="float32")
    return options
