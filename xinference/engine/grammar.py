# SPDX-License-Identifier: Apache-2.0
"""Holding an answer to a grammar: which tokens may come next, for each sequence that has one.

`GrammarCompiler` turns a `Grammar` into a `Matcher` before its request is accepted; what cannot
be compiled is that request's refusal. A matcher is the state of one sequence: it says which
tokens may come next and takes the one that was drawn. `MaskFiller` asks all matchers of a step in
a thread of its own while the model computes, and `StepMasks.apply` closes the logits of every
other token. A sequence without a grammar has no part in any of this.

The only home of llguidance, which loads with the first grammar: without it everything else works.
"""

import json
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from xinference.errors import (
    AbilityMissing,
    InternalError,
    InvalidRequest,
    ModelOverloaded,
    XinferenceError,
)
from xinference.identifiers import RequestId
from xinference.protocol.generation import Grammar, GrammarKind

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer

logger = logging.getLogger(__name__)

COMPILE_SECONDS = 5.0
COMPILE_THREADS = 2
RETRY_AFTER_SECONDS = 1
NUM_CACHED = 128
"""Grammars that are kept compiled. Clients send the same one again and again."""
MAX_PROBLEM_CHARS = 400

# Why bounded: a model may like white space, and then never come to the end of an object.
_WHITESPACE = r"\n {0,16}| ?"
_TOO_COMPLEX = ("ParserTooComplex", "LexerTooComplex")

Bits = npt.NDArray[np.uint32]
"""One bit per token id, lowest first: whether the token may come next."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What stands around an answer's grammar, which is called `@answer` in it; or stands alone."""

    text: str
    """Rules in Lark. Trusted: they are not a caller's."""
    field: str
    """The field of the request that asks for it, if no grammar does; an error names it."""


class Matcher(Protocol):
    """How far one answer has come in its grammar. One thread at a time."""

    @property
    def is_finished(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        ...

    @property
    def is_accepting(self) -> bool:
        """Whether the answer is whole as it stands; more may follow."""
        ...

    def fill(self, bits: Bits) -> None:
        """Write which tokens may come next, those that end a turn included.

        Raises:
            XinferenceError: the grammar broke; the request cannot go on.
        """
        ...

    def accept(self, token_id: int) -> None:
        """Go on by one token.

        Raises:
            XinferenceError: the token may not come here, or the grammar broke.
        """
        ...

    def fork(self) -> "Matcher":
        """Return one that goes its own way from here."""
        ...


class _LLMatcher:
    """A `Matcher` over llguidance's."""

    def __init__(self, matcher: "LLMatcher", field: str) -> None:
        self._matcher = matcher
        self._field = field

    @property
    def is_finished(self) -> bool:
        # Why both: a matcher that broke has stopped, too.
        return self._matcher.is_stopped() and self._matcher.is_accepting()

    @property
    def is_accepting(self) -> bool:
        return self._matcher.is_accepting()

    def fill(self, bits: Bits) -> None:
        self._matcher.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        self._check()

    def accept(self, token_id: int) -> None:
        if not self._matcher.consume_token(token_id):
            self._check()
            raise InternalError(
                where="the grammar", problem=f"token {token_id} was drawn, but may not come here"
            )

    def fork(self, field: str | None = None) -> "_LLMatcher":
        """Return a matcher that goes its own way from here, for another field if one is named."""
        return _LLMatcher(self._matcher.deep_copy(), field or self._field)

    def _check(self) -> None:
        matcher = self._matcher
        if not matcher.is_error():
            return
        # Why: work per token is bounded, and only the caller can ask for less of it.
        if matcher.stop_reason() in _TOO_COMPLEX:
            raise InvalidRequest(
                field=self._field, problem="asks for a grammar that is too complex to follow"
            )
        raise InternalError(where="the grammar", problem=_first_line(matcher.get_error()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Constrained:
    """One request of a step that has a grammar."""

    request_id: RequestId
    matcher: Matcher
    stop_token_ids: frozenset[int]
    """May be drawn wherever the answer is whole."""


class GrammarCompiler:
    """Makes matchers for one model. Any thread may call `compile`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        vocab_size: int,
        eos_token_ids: frozenset[int],
        model_name: str,
        compile_seconds: float = COMPILE_SECONDS,
    ) -> None:
        """Note what to compile for; nothing is loaded before the first grammar.

        Args:
            tokenizer: the model's.
            vocab_size: of the model, which may have more rows than the tokenizer has tokens.
            eos_token_ids: the tokens that end a turn; empty leaves it to the tokenizer.
            model_name: for messages.
            compile_seconds: how long a grammar may take.
        """
        self._tokenizer = tokenizer
        self._num_words = -(-max(vocab_size, len(tokenizer)) // 32)
        self._eos_token_ids = sorted(eos_token_ids)
        self._model_name = model_name
        self._compile_seconds = compile_seconds
        self._workers = ThreadPoolExecutor(COMPILE_THREADS, thread_name_prefix="grammar")
        self._lock = threading.Lock()
        # Guarded by the lock:
        self._ll_tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[tuple[Grammar | None, str], _LLMatcher] = OrderedDict()

    @property
    def num_words(self) -> int:
        """Length of the `Bits` that matchers fill."""
        return self._num_words

    def compile(self, grammar: Grammar | None, frame: Frame | None = None) -> Matcher:
        """Return a matcher at the start of the grammar, or of the frame around it.

        Raises:
            InvalidRequest: the grammar is malformed, uses what is not supported, allows no text at
                all, or takes too long; names its field.
            AbilityMissing: this model's tokenizer cannot be held to a grammar, or llguidance is
                not installed.
            ModelOverloaded: other grammars keep the compiler busy.
        """
        key, field = _key_and_field(grammar, frame)
        with self._lock:
            known = self._compiled.get(key)
            if known is not None:
                self._compiled.move_to_end(key)
                return known.fork(field)
            ll_tokenizer = self._ll_tokenizer = self._ll_tokenizer or self._load()
        compiling = self._workers.submit(self._compile, grammar, frame, ll_tokenizer)
        try:
            fresh = compiling.result(self._compile_seconds)
        except TimeoutError as error:
            if compiling.cancel():
                raise ModelOverloaded(
                    model=self._model_name,
                    num_waiting=COMPILE_THREADS,
                    retry_after_seconds=RETRY_AFTER_SECONDS,
                ) from error
            raise InvalidRequest(
                field=field,
                problem=f"takes more than {self._compile_seconds:g} s to compile",
            ) from error
        with self._lock:
            self._compiled[key] = fresh
            while len(self._compiled) > NUM_CACHED:
                self._compiled.popitem(last=False)
            return fresh.fork(field)

    def _load(self) -> "LLTokenizer":
        """Bring the tokenizer into llguidance's form; takes a second for a large vocabulary."""
        try:
            from llguidance import LLTokenizer
        except ImportError as error:
            raise self._unable("llguidance is not installed") from error
        if not self._tokenizer.is_fast:
            raise self._unable("its tokenizer is a slow one, in Python")
        try:
            return LLTokenizer(
                self._tokenizer.backend_tokenizer.to_str(),
                n_vocab=self._num_words * 32,
                eos_token=self._eos_token_ids or self._tokenizer.eos_token_id,
            )
        except ValueError as error:
            raise self._unable(f"its tokenizer is not supported: {error}") from error

    def _compile(
        self, grammar: Grammar | None, frame: Frame | None, ll_tokenizer: "LLTokenizer"
    ) -> _LLMatcher:
        from llguidance import LLMatcher

        _, field = _key_and_field(grammar, frame)
        try:
            definition = _definition(grammar, frame)
            raw = LLMatcher(ll_tokenizer, definition, log_level=0, limits=_limits())
        except (ValueError, TypeError) as error:
            raise _refusal(field, str(error)) from error
        if raw.is_error():
            raise _refusal(field, raw.get_error())
        # Why: a grammar that allows no text is found out only when it is asked.
        bits = np.zeros(self._num_words, np.uint32)
        raw.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
        if raw.is_error() or not bits.any():
            raise _refusal(field, "no text at all would follow it")
        return _LLMatcher(raw, field)

    def _unable(self, why: str) -> AbilityMissing:
        return AbilityMissing(model=self._model_name, ability=f"follow a grammar: {why}")


class StepMasks:
    """Which tokens each constrained row of one step may draw."""

    def __init__(
        self,
        rows: dict[RequestId, int],
        is_open: "Future[npt.NDArray[np.bool_]]",
        failures: dict[RequestId, XinferenceError],
    ) -> None:
        self._rows = rows
        self._is_open = is_open
        self.failures = failures
        """By request, why its grammar broke; complete once `apply` has returned."""

    def apply(self, logits: Tensor, request_ids: Sequence[RequestId]) -> None:
        """Set the logits of what may not be drawn to -inf, in place; waits for the masks.

        Args:
            logits: (R, V); rows of requests without a grammar stay as they are.
            request_ids: of the R rows.
        """
        constrained = [
            (index, self._rows[request_id])
            for index, request_id in enumerate(request_ids)
            if request_id in self._rows
        ]
        if not constrained:
            return
        index, row = np.array(constrained).T
        is_closed = torch.from_numpy(~self._is_open.result()[row, : logits.shape[1]])
        at = torch.from_numpy(index).to(logits.device)
        with torch.inference_mode():
            logits[at] = logits[at].masked_fill_(is_closed.to(logits.device), -torch.inf)


class MaskFiller:
    """Fills the masks of a step while the model computes it.

    Invariant: a matcher is asked between two of its tokens, never while it takes one: the engine's
    thread waits for the masks of a step before it draws.
    """

    def __init__(self, num_words: int) -> None:
        self._num_words = num_words
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="masks")

    def start(self, constrained: Sequence[Constrained]) -> StepMasks:
        """Begin to ask the matchers of these requests."""
        rows = {one.request_id: row for row, one in enumerate(constrained)}
        failures: dict[RequestId, XinferenceError] = {}
        is_open = self._worker.submit(self._fill, constrained, failures)
        return StepMasks(rows, is_open, failures)

    def _fill(
        self, constrained: Sequence[Constrained], failures: dict[RequestId, XinferenceError]
    ) -> npt.NDArray[np.bool_]:
        """Return (rows, at least V) whether each token may be drawn."""
        bits = np.zeros((len(constrained), self._num_words), np.uint32)
        may_end = np.zeros(len(constrained), bool)
        for row, one in enumerate(constrained):
            try:
                one.matcher.fill(bits[row])
                may_end[row] = one.matcher.is_accepting
            except Exception as error:  # noqa: BLE001  # boundary: foreign code
                failures[one.request_id] = grammar_failure(one.request_id, error)
        is_open = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little").view(np.bool_)
        for row, one in enumerate(constrained):
            if one.request_id in failures:
                is_open[row] = True  # the row must have something to draw; nobody is told of it
            elif may_end[row]:
                is_open[row, list(one.stop_token_ids)] = True
        return is_open


def grammar_failure(request_id: RequestId, error: Exception) -> XinferenceError:
    """Return what to tell a request whose matcher raised: its own words, or a bug of ours."""
    if isinstance(error, XinferenceError):
        return error
    logger.error("the grammar of request %s broke", request_id, exc_info=error)
    return InternalError(where="the grammar", problem=f"{type(error).__name__}: {error}")


def _json_schema(text: str) -> str:
    definition: str = _ll().LLMatcher.grammar_from_json_schema(
        text, overrides={"whitespace_pattern": _WHITESPACE, "lenient": False}
    )
    return definition


def _choice(text: str) -> str:
    choices = json.loads(text)
    if not isinstance(choices, list) or not choices:
        raise ValueError("must be a list of at least one text")
    definition: str = _ll().grammar_from("choice", text)
    return definition


def _ll() -> Any:
    import llguidance

    return llguidance


_DEFINITIONS: dict[GrammarKind, Callable[[str], str]] = {
    GrammarKind.JSON_SCHEMA: _json_schema,
    GrammarKind.REGEX: lambda text: _ll().grammar_from("regex", text),
    GrammarKind.CHOICE: _choice,
    GrammarKind.GRAMMAR: lambda text: _ll().grammar_from("grammar", text),
}


def _limits() -> "LLParserLimits":
    """Return llguidance's own bounds on work and memory, without grammars in its messages."""
    limits: LLParserLimits = _ll().LLParserLimits(verbose_errors=False)
    return limits


def _key_and_field(
    grammar: Grammar | None, frame: Frame | None
) -> tuple[tuple[Grammar | None, str], str]:
    """Return what makes a matcher the same as another, and what errors name."""
    text = "" if frame is None else frame.text
    if grammar is not None:
        # Why without its field: two fields may ask for the same.
        return (replace(grammar, field=""), text), grammar.field
    assert frame is not None, "a grammar, a frame or both"
    return (None, text), frame.field


def _definition(grammar: Grammar | None, frame: Frame | None) -> str:
    """Return a grammar in its frame, as llguidance reads them."""
    if grammar is None:
        assert frame is not None, "a grammar, a frame or both"
        return frame.text
    definition = _DEFINITIONS[grammar.kind](grammar.text)
    if frame is None:
        return definition
    try:
        answer = json.loads(definition)["grammars"][0]
    except ValueError:
        answer = {"lark_grammar": definition}
    return json.dumps({"grammars": [{"lark_grammar": frame.text}, {**answer, "name": "answer"}]})


def _refusal(field: str, problem: str) -> InvalidRequest:
    return InvalidRequest(field=field, problem=f"cannot be compiled: {_first_line(problem)}")


def _first_line(text: str) -> str:
    line = text.strip().partition("\n")[0]
    return line if len(line) <= MAX_PROBLEM_CHARS else f"{line[:MAX_PROBLEM_CHARS]}…"
