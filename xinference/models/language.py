# SPDX-License-Identifier: Apache-2.0
"""A language model that is ready to answer: prompts become token ids, the engine does the rest.

In: `GenerationRequest`. Out: the engine's events; those of a chat are read as the model writes its
thoughts and calls (`answer.py`). It owns the chat template, what the family adds to every request
(stop texts and tokens), and the engine's thread; it knows no sockets and no event loop.
"""

import logging
import secrets
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

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
from xinference.errors import (
    AbilityMissing,
    ContextLengthExceeded,
    DuplicateRequest,
    InvalidRequest,
)
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions, ReplicaSpec
from xinference.protocol.generation import (
    MAX_STOP_STRINGS,
    Accepted,
    ChatPrompt,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    SamplingParams,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
    Usage,
)
from xinference.protocol.vectors import ModelRequest

from .answer import AnswerReader, AnswerReaders
from .base import OnProgress, Sink, expect
from .chat_template import ChatTemplate
from .constraint import frame_of
from .files import model_directory
from .parsing.grammars import AnswerFormat
from .parsing.reader import NUM_CALL_ID_CHARS

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
        self._abilities = frozenset(spec.abilities)
        self._name = str(spec.replica.model)
        self._stop = spec.source.stop
        self._stop_token_ids = self._known_tokens(spec.source.stop_token_ids)
        self._answers = AnswerFormat(
            tool_parser=spec.source.tool_parser,
            reasoning_start_tag=spec.source.reasoning_start_tag,
            reasoning_end_tag=spec.source.reasoning_end_tag,
        )
        grammar = self._answers.grammar
        self._template = ChatTemplate(
            self._tokenizer,
            template=spec.source.chat_template,
            model_name=self._name,
            arguments_are_text=grammar is not None and grammar.arguments_are_text,
        )
        self._marker_ids = self._tokens_of(self._answers.special_tokens)
        self._kept_token_ids = self._special(self._marker_ids.values())
        self._enable_thinking = spec.engine_options.enable_thinking
        self._thinking_budget = spec.engine_options.thinking_budget
        if self._thinking_budget is not None:
            self._check_budget()
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
        """Return the fields of the engine's statistics."""
        if self._loop is None:
            return {}
        return {name: float(value) for name, value in asdict(self._loop.stats()).items()}

    def start(self, sink: Sink) -> None:
        """Start the engine's thread; events go to `sink`, in that thread."""
        assert self._loop is None, "start() was called before"
        self._sink = sink

        def read(events: list[tuple[RequestId, GenerationEvent]]) -> None:
            sink(self._read(events))

        self._loop = EngineLoop(self._engine, read)
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
        # Why so: it must not be replaced for a request of this id that lives. Setting and looking
        # are one step under the interpreter's lock.
        if self._readers.setdefault(request.request_id, prepared.readers) is not prepared.readers:
            raise DuplicateRequest(request_id=request.request_id)
        try:
            return self._loop.submit(prepared.request)
        except DuplicateRequest:
            raise  # the readers, None both times, are the live request's
        except BaseException:
            self._readers.pop(request.request_id, None)
            raise

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
                if "chat" not in self._abilities:
                    raise AbilityMissing(model=self._name, ability="chat")
                if request.sampling.echo:
                    raise InvalidRequest(field="echo", problem="a chat has no text to repeat")
                self._check_tools(prompt)
                prompt = self._with_thinking(self._with_effort(prompt))
                rendered = self._template.render(prompt)
                # Why no special tokens: the template has written those that it wants.
                token_ids = self._encode(rendered, field="messages", special_tokens=False)
                readers = self._new_readers(prompt, rendered, request.sampling)
                asked = EnginePrompt(token_ids=token_ids)
                thinking = self._thinking_limit(prompt, rendered)
                frame = frame_of(
                    prompt,
                    has_grammar=request.sampling.grammar is not None,
                    answers=self._answers,
                    rendered=rendered,
                    token_ids=self._marker_ids,
                )
            case TextPrompt() | TokenPrompt():
                asked = self._engine_prompt(prompt)
        return Prepared(
            request=EngineRequest(
                request_id=request.request_id,
                prompt_token_ids=asked.token_ids,
                sampling=self._with_own_stops(self._within_total(request, len(asked.token_ids))),
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

    def _within_total(self, request: GenerationRequest, num_prompt_tokens: int) -> SamplingParams:
        """Return the parameters, with an answer that ends where the request's total does."""
        total = request.max_total_tokens
        if total is None:
            return request.sampling
        if total > self.context_length:
            raise InvalidRequest(
                field="max_total_tokens",
                problem=f"must be at most the model's context, {self.context_length}, got {total}",
            )
        max_tokens = request.sampling.max_tokens
        room = total - num_prompt_tokens
        if room < 1:
            raise ContextLengthExceeded(
                num_prompt_tokens=num_prompt_tokens,
                max_tokens=max_tokens or 1,
                max_model_len=total,
            )
        return replace(request.sampling, max_tokens=min(max_tokens or room, room))

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

    def _new_readers(
        self, prompt: ChatPrompt, rendered: str, sampling: SamplingParams
    ) -> AnswerReaders | None:
        tools = {} if prompt.tool_choice is ToolChoice.NONE else _schemas(prompt.tools)
        one_call = bool(tools) and not prompt.parallel_tool_calls

        readers = []
        for _ in range(sampling.n):
            parser = self._answers.parser(
                prompt=rendered,
                tools=tools,
                new_call_id=lambda: secrets.token_hex(NUM_CALL_ID_CHARS // 2),
            )
            if parser is None:
                return None
            readers.append(AnswerReader(parser, one_call=one_call))
        return AnswerReaders(readers)

    def _check_tools(self, prompt: ChatPrompt) -> None:
        """Refuse tools of a model that has none."""
        has_history = any(one.tool_calls or one.role == "tool" for one in prompt.messages)
        if (prompt.tools or has_history) and (
            "tools" not in self._abilities
            or self._answers.grammar is None
            or not self._template.takes_tools
        ):
            raise AbilityMissing(model=self._name, ability="call tools")

    def _with_effort(self, prompt: ChatPrompt) -> ChatPrompt:
        """Refuse an effort that this model cannot be told; without one, it does not think.

        A template that has the variable gets it. Of a hybrid model "none" switches thinking off.
        """
        effort = prompt.reasoning_effort
        if effort is None or self._template.takes_reasoning_effort:
            return prompt
        if effort != "none":
            raise InvalidRequest(
                field="reasoning_effort", problem="this model cannot be told how much to think"
            )
        if not self._abilities & {"reasoning", "hybrid"}:
            return prompt
        if "hybrid" not in self._abilities:
            raise InvalidRequest(field="reasoning_effort", problem="this model always thinks")
        if prompt.enable_thinking:
            raise InvalidRequest(
                field="reasoning_effort", problem="none contradicts enable_thinking"
            )
        return replace(prompt, enable_thinking=False)

    def _with_thinking(self, prompt: ChatPrompt) -> ChatPrompt:
        """Complete what a request says about thinking; refuse what the model cannot do."""
        if prompt.thinking_budget is not None:
            self._check_budget()
        enable = prompt.enable_thinking
        if enable is None:
            enable = prompt.template_options.get("enable_thinking", self._enable_thinking)
            return replace(prompt, enable_thinking=enable)
        if enable and not self._can_think:
            raise InvalidRequest(field="enable_thinking", problem="this model cannot think")
        if not enable and "reasoning" in self._abilities and "hybrid" not in self._abilities:
            raise InvalidRequest(field="enable_thinking", problem="this model always thinks")
        return prompt

    @property
    def _can_think(self) -> bool:
        return bool(self._abilities & {"reasoning", "hybrid"})

    def _check_budget(self) -> None:
        if not self._can_think or self._answers.thought_markers is None:
            raise InvalidRequest(field="thinking_budget", problem="this model cannot think")

    def _thinking_limit(self, prompt: ChatPrompt, rendered: str) -> ThinkingLimit | None:
        """Return how long an answer may think; None if that is its own affair."""
        budget = prompt.thinking_budget
        if budget is None:
            budget = self._thinking_budget
        markers = self._answers.thought_markers
        if budget is None or markers is None:
            return None
        start, end = markers
        closing = self._answers.closing(may_call=bool(prompt.tools))
        return ThinkingLimit(
            num_tokens=budget,
            start=start,
            end=end,
            closing_token_ids=tuple(
                self._tokenizer(closing, add_special_tokens=False)["input_ids"]
            ),
            is_open=rendered.rstrip().endswith(start),
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

    def _with_own_stops(self, sampling: SamplingParams) -> SamplingParams:
        """Add what the family stops at to what the request does, if it heeds it."""
        if sampling.ignore_eos:
            return sampling
        stop = tuple(dict.fromkeys((*sampling.stop, *self._stop)))
        stop_token_ids = tuple(dict.fromkeys((*sampling.stop_token_ids, *self._stop_token_ids)))
        if len(stop) > MAX_STOP_STRINGS:
            raise InvalidRequest(
                field="stop",
                problem=f"with the {len(self._stop)} of the model itself these are more "
                f"than {MAX_STOP_STRINGS}",
            )
        return replace(sampling, stop=stop, stop_token_ids=stop_token_ids)


def _schemas(tools: tuple[dict[str, Any], ...]) -> dict[str, Mapping[str, Any]]:
    """Return the schema of the parameters of each function, by its name."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}


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
