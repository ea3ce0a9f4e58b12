# SPDX-License-Identifier: Apache-2.0
"""`ServedModel`: a language model whose engine is a server of its own.

In: `GenerationRequest`. Out: the same events as of the `transformers` engine, read by the same
parsers. It owns the server's process, its key, and what becomes of a request; `loop.py` asks.
"""

import logging
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace

import httpx

from xinference.errors import (
    ContextLengthExceeded,
    DuplicateRequest,
    InvalidRequest,
)
from xinference.identifiers import RequestId
from xinference.models.answer import AnswerReaders
from xinference.models.base import Sink, expect
from xinference.models.conversation import Chat, Conversation
from xinference.models.parameters import with_own_stops, within_total
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import (
    Accepted,
    ChatPrompt,
    Failed,
    Finished,
    FinishReason,
    GenerationEvent,
    GenerationRequest,
    SamplingParams,
    TextDelta,
    TextPrompt,
    TokenPrompt,
    ToolChoice,
    Usage,
)
from xinference.protocol.vectors import ModelRequest

from .dialect import Ask, Dialect, Facts
from .loop import Branch, ServerLoop, ServerRequest
from .process import ServerProcess
from .tokens import Tokens

logger = logging.getLogger(__name__)


class ServedModel:
    """Implements `Model`; any thread may call any method."""

    def __init__(
        self,
        spec: ReplicaSpec,
        dialect: Dialect,
        process: ServerProcess,
        *,
        client: httpx.Client,
        facts: Facts,
        tokens: Tokens,
    ) -> None:
        """Take a server that is healthy."""
        self._name = str(spec.replica.model)
        self._source = spec.source
        self._options = spec.engine_options
        self._dialect = dialect
        self._process = process
        self._client = client
        self._facts = facts
        self._tokens = tokens
        self._conversation = Conversation(spec, tokens)
        self._readers: dict[RequestId, AnswerReaders | None] = {}
        """Of every live request."""
        self._loop: ServerLoop | None = None
        self._sink: Sink | None = None

    @property
    def context_length(self) -> int:
        """Prompt and answer, in tokens."""
        return self._facts.context_length

    @property
    def max_num_seqs(self) -> int:
        """Answers that are computed at once."""
        return self._facts.max_num_seqs

    @property
    def is_alive(self) -> bool:
        """Whether the server runs."""
        return self._loop is not None and self._loop.alive

    def description(self) -> Mapping[str, str | int | float | bool | None]:
        """Return what the server was started with, by name."""
        return {
            "engine": self._dialect.name,
            "max_model_len": self._facts.context_length,
            "max_num_seqs": self._facts.max_num_seqs,
            "max_queue_size": self._options.max_queue_size,
        }

    def counters(self) -> dict[str, float]:
        """Return what it has done and has to do."""
        return {} if self._loop is None else self._loop.counters()

    def start(self, sink: Sink) -> None:
        """Begin to ask the server; events go to `sink`, in a thread of its own."""
        assert self._loop is None, "start() was called before"
        self._sink = sink
        self._loop = ServerLoop(
            self._dialect,
            self._process,
            url=str(self._client.base_url),
            headers={"Authorization": self._client.headers["Authorization"]},
            model_name=self._name,
            max_num_seqs=self._facts.max_num_seqs,
            max_queue_size=self._options.max_queue_size,
            retokenize=lambda text: self._tokens.encode(text, special=False),
            read=self._read,
            sink=sink,
        )
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
        prepared, readers = self.prepare(request)
        if request.count_only:
            return self._count(request, prepared.num_prompt_tokens)
        # Why so: it must not be replaced for a request of this id that lives.
        if self._readers.setdefault(request.request_id, readers) is not readers:
            raise DuplicateRequest(request_id=request.request_id)
        try:
            return self._loop.submit(prepared)
        except DuplicateRequest:
            raise  # the readers, None both times, are the live request's
        except BaseException:
            self._readers.pop(request.request_id, None)
            raise

    def abort(self, request_id: RequestId) -> bool:
        """Ask for the end of a request; return whether it was live."""
        return self._loop is not None and self._loop.abort(request_id)

    def stop(self, timeout_seconds: float) -> None:
        """End every request, the thread and the server.

        Raises:
            TimeoutError: a request did not end in time.
        """
        if self._process.has_ended:
            logger.critical("%s", self._process.describe_end())
        try:
            if self._loop is not None:
                self._loop.stop(timeout_seconds)
        finally:
            self._process.stop(timeout_seconds)
            self._client.close()

    def prepare(self, request: GenerationRequest) -> tuple[ServerRequest, AnswerReaders | None]:
        """Return what the server is to be asked, and who reads its answers. Changes nothing.

        Raises:
            AbilityMissing, InvalidRequest, ContextLengthExceeded
        """
        sampling, readers = request.sampling, None
        kept: tuple[str, ...] = ()
        self._check(sampling)
        prompt = request.prompt
        if isinstance(prompt, ChatPrompt):
            chat = self._conversation.begin(prompt, request)
            self._check_chat(chat, sampling)
            prompts = [(self._encode(chat.rendered, "messages", special=False), "")]
            readers = self._conversation.readers(chat, sampling.n)
            kept = () if readers is None else self._conversation.answers.special_tokens
        else:
            prompts = [self._plain(one, sampling) for one in (prompt, *request.more_prompts)]
        seed = secrets.randbits(32) if sampling.seed is None else sampling.seed
        resumed = request.resume_token_ids
        if resumed and request.num_made > 1:
            problem = "cannot be the beginning of several answers"
            raise InvalidRequest(field="resume_token_ids", problem=problem)
        branches: list[Branch] = []
        for token_ids, text in prompts:
            sampling = with_own_stops(
                within_total(request, len(token_ids), self.context_length),
                self._source.stop,
                self._source.stop_token_ids if self._dialect.takes_stop_tokens else (),
            )
            room = self._room(len(token_ids), sampling.max_tokens)
            for number in range(sampling.n):
                wanted = replace(sampling, max_tokens=room - len(resumed), seed=seed + number, n=1)
                ask = Ask(
                    token_ids=token_ids + resumed,
                    sampling=wanted,
                    kept=kept,
                    cache_salt=request.cache_salt,
                )
                body = self._dialect.body(ask)
                branches.append(
                    Branch(
                        index=len(branches),
                        body=body if room > len(resumed) else None,
                        echo=text,
                        adds_stop=sampling.include_stop_str_in_output,
                    )
                )
        return ServerRequest(
            request_id=request.request_id,
            branches=tuple(branches),
            num_prompt_tokens=sum(len(token_ids) for token_ids, _ in prompts),
            priority=request.priority,
            fairness_key=request.fairness_key,
            resumed=resumed,
            resumed_text=self._tokens.decode(resumed) if resumed else "",
        ), readers

    def _count(self, request: GenerationRequest, num_prompt_tokens: int) -> Accepted:
        """End a request whose prompt alone was of interest; the server does not hear of it."""
        usage = Usage(num_prompt_tokens=num_prompt_tokens, num_completion_tokens=0)
        assert self._sink is not None, "start() comes first"
        self._sink([(request.request_id, Finished(reason=FinishReason.STOP, usage=usage))])
        return Accepted(num_prompt_tokens=num_prompt_tokens)

    def _plain(
        self, prompt: TextPrompt | TokenPrompt | ChatPrompt, sampling: SamplingParams
    ) -> tuple[tuple[int, ...], str]:
        """Return a prompt's tokens, and what its answers begin with."""
        if isinstance(prompt, TokenPrompt):
            self._check_tokens("prompt", prompt.token_ids)
            text = self._tokens.decode(prompt.token_ids) if sampling.echo else ""
            return prompt.token_ids, text
        assert isinstance(prompt, TextPrompt), "a chat is no completion"
        if not prompt.text:
            raise InvalidRequest(field="prompt", problem="must not be empty")
        token_ids = self._encode(prompt.text, "prompt", special=True)
        return token_ids, prompt.text if sampling.echo else ""

    def _encode(self, text: str, field: str, *, special: bool) -> tuple[int, ...]:
        token_ids = self._tokens.encode(text, special=special)
        if not token_ids:
            raise InvalidRequest(field=field, problem="has no tokens")
        return token_ids

    def _check_tokens(self, field: str, token_ids: Sequence[int]) -> None:
        size = self._facts.vocab_size
        if not token_ids:
            raise InvalidRequest(field=field, problem="must have at least one token")
        if min(token_ids) < 0 or (size is not None and max(token_ids) >= size):
            limit = "" if size is None else f"; those are 0 to {size - 1}"
            raise InvalidRequest(field=field, problem=f"has ids that are no tokens{limit}")

    def _check(self, sampling: SamplingParams) -> None:
        """Refuse what no server does the way that callers know it."""
        if sampling.best_of is not None and sampling.best_of != sampling.n:
            raise InvalidRequest(
                field="best_of", problem=f"{self._dialect.name} does not choose among answers"
            )
        if sampling.echo and sampling.logprobs is not None:
            raise InvalidRequest(
                field="logprobs", problem=f"{self._dialect.name} tells none of a prompt"
            )

    def _check_chat(self, chat: Chat, sampling: SamplingParams) -> None:
        """Refuse what needs a hold on every token that only the engine of our own has."""
        name, prompt = self._dialect.name, chat.prompt
        if prompt.thinking_budget is not None:
            raise InvalidRequest(
                field="thinking_budget", problem=f"{name} cannot end thoughts; leave it out"
            )
        is_strict = any(tool["function"].get("strict") for tool in prompt.tools)
        if prompt.tool_choice is ToolChoice.REQUIRED or prompt.allowed_tools is not None:
            problem = f"{name} cannot be held to calls; it is auto or none"
            raise InvalidRequest(field="tool_choice", problem=problem)
        if is_strict and prompt.tool_choice is not ToolChoice.NONE:
            raise InvalidRequest(field="tools", problem=f"{name} cannot be held to strict ones")
        if sampling.grammar is None:
            return
        field = sampling.grammar.field
        if prompt.tools and prompt.tool_choice is not ToolChoice.NONE:
            problem = f"{name} cannot choose between a structure and a call; leave out tools"
            raise InvalidRequest(field=field, problem=problem)
        if not self._conversation.is_bare(chat):
            problem = f"{name} cannot think before a structure; set enable_thinking to false"
            raise InvalidRequest(field=field, problem=problem)

    def _room(self, num_prompt_tokens: int, max_tokens: int | None) -> int:
        """Return how many tokens an answer may have."""
        limit = self._facts.context_length
        wanted = 1 if max_tokens is None else max_tokens
        if num_prompt_tokens + wanted > limit:
            raise ContextLengthExceeded(
                num_prompt_tokens=num_prompt_tokens, max_tokens=wanted, max_model_len=limit
            )
        return limit - num_prompt_tokens if max_tokens is None else max_tokens

    def _read(
        self, request_id: RequestId, event: GenerationEvent, num_tokens: int
    ) -> list[GenerationEvent]:
        """Return what callers are told of an event. In the loop's thread."""
        readers = self._readers.get(request_id)
        if isinstance(event, Finished | Failed):
            # Invariant: before anyone hears of the end, who may then use the id again.
            self._readers.pop(request_id, None)
        if readers is None:
            return [event]
        told = readers.read(event, num_tokens=num_tokens if isinstance(event, TextDelta) else None)
        for index in readers.take_to_end():
            assert self._loop is not None, "events come of the loop"
            self._loop.end_choice(request_id, index)
        return told
