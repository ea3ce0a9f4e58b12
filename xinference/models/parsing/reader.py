# SPDX-License-Identifier: Apache-2.0
"""What all grammars are made of: a program that reads text as it comes.

A grammar is one generator, written as if the whole text were there; where it is not there yet,
it yields, and goes on when more has come. Out come deltas of `xinference.protocol.generation`.

Invariants:
    The deltas, those next to each other joined, do not depend on how the text is cut in pieces.
    Text is never lost: what turns out to be no call is content, just as it was generated, but for
    the part of a call that was already told. Only white space beside calls is left out.
    Nothing raises, whatever the text is.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Protocol, TypeVar

from xinference.protocol.generation import (
    Delta,
    ReasoningDelta,
    TextDelta,
    ToolCallArguments,
    ToolCallStart,
)

from .json_text import JsonScanner
from .lark import Function, Lark

Result = TypeVar("Result")
Reading = Generator[None, None, Result]
"""A part of a program that reads; it yields wherever it needs more text."""

Take = Callable[[str], None]

MAX_NAME_CHARS = 256
NUM_CALL_ID_CHARS = 24


class AnswerParser(Protocol):
    """Text in, in pieces of any size; deltas out."""

    @property
    def num_complete_calls(self) -> int:
        """Calls whose arguments are whole."""
        ...

    @property
    def is_thinking(self) -> bool:
        """Whether what comes next is a thought, for all that is known."""
        ...

    def push(self, text: str) -> list[Delta]:
        """Return what is certain with this piece."""
        ...

    def finish(self) -> list[Delta]:
        """Return the rest, when no text will come any more."""
        ...


class Reader(ABC):
    """Runs one program, `read`, over the text of one answer."""

    def __init__(self) -> None:
        self._text = ""
        """What has come and was not taken yet."""
        self._is_last = False
        self._taken = ""
        """What was taken since the last mark, to be given back as content."""
        self._out: list[Delta] = []
        self._program = self.read()

    @abstractmethod
    def read(self) -> Reading[None]:
        """Read the answer to its end."""

    def push(self, text: str) -> list[Delta]:
        """Return what is certain with this piece."""
        self._text += text
        next(self._program, None)
        return self._told()

    def finish(self) -> list[Delta]:
        """Return the rest, when no text will come any more."""
        self._is_last = True
        for _ in self._program:
            raise AssertionError("a grammar waits for more after the last text")
        return self._told()

    def _told(self) -> list[Delta]:
        out, self._out = self._out, []
        return out

    # --- what programs are made of

    def _has(self, num_chars: int) -> Reading[bool]:
        """Wait for so many characters; return whether they are there."""
        while len(self._text) < num_chars and not self._is_last:
            yield
        return len(self._text) >= num_chars

    def _peek(self) -> Reading[str]:
        """Wait for a character and return it, untaken; empty at the end."""
        yield from self._has(1)
        return self._text[:1]

    def _take(self, num_chars: int) -> str:
        taken, self._text = self._text[:num_chars], self._text[num_chars:]
        self._taken += taken
        return taken

    def _mark(self) -> None:
        """Say that what was taken before is dealt with."""
        self._taken = ""

    def _at(self, marker: str) -> Reading[bool]:
        """Take the marker if the text goes on with it; return whether it did."""
        while len(self._text) < len(marker) and not self._is_last:
            if not marker.startswith(self._text):
                return False
            yield
        if not self._text.startswith(marker):
            return False
        self._take(len(marker))
        return True

    def _space(self) -> Reading[str]:
        """Take white space and return it."""
        taken = ""
        while True:
            length = len(self._text) - len(self._text.lstrip())
            taken += self._take(length)
            if self._text or self._is_last:
                return taken
            yield

    def _until(self, markers: tuple[str, ...], take: Take | None = None) -> Reading[str | None]:
        """Take text up to the first of the markers and the marker too, and return the marker.

        No marker may begin with another. None: the end came first.

        Args:
            take: gets the text before the marker, which then counts as dealt with.
        """
        while True:
            begin, found = _first_marker(self._text, markers, is_last=self._is_last)
            before = self._take(begin)
            if take is not None:
                self._mark()
                if before:
                    take(before)
            if found is not None:
                return self._take(len(found))
            if self._is_last:
                return None
            yield

    def _name(self, ends: tuple[str, ...]) -> Reading[str | None]:
        """Take a short text on one line, up to the marker that ends it, and return it stripped.

        None: it is none; what there is of it stays taken.
        """
        name = ""
        while True:
            begin, found = _first_marker(self._text, (*ends, "\n"), is_last=self._is_last)
            name += self._take(min(begin, MAX_NAME_CHARS + 1 - len(name)))
            if len(name) > MAX_NAME_CHARS:
                return None
            if found is not None:
                return name.strip() or None if found in ends else None
            if self._is_last:
                return None
            yield

    def _json(self, take: Take | None = None) -> Reading[str | None]:
        """Take a JSON value and return it; None if it is none, as far as it is valid taken.

        Args:
            take: gets the pieces of it, which then count as dealt with.
        """
        scanner = JsonScanner()
        value = ""
        while True:
            piece = self._take(scanner.feed(self._text))
            if take is not None:
                self._mark()
                if piece:
                    take(piece)
            value += piece
            if self._is_last:
                scanner.end()
            if scanner.is_complete:
                return value
            if scanner.is_broken or self._is_last:
                return None
            yield

    def _emit(self, delta: Delta) -> None:
        """Tell a delta, joined with the one before where they are of one kind."""
        match self._out[-1:], delta:
            case (
                ([TextDelta() as last], TextDelta(text=text))
                | ([ReasoningDelta() as last], ReasoningDelta(text=text))
                | ([ToolCallArguments() as last], ToolCallArguments(text=text))
            ):
                # Why not the index too: calls follow each other, and begin with a start.
                self._out[-1] = replace(last, text=last.text + text)
            case _:
                self._out.append(delta)


class ToolGrammar(Reader):
    """A reader that finds calls of tools. White space beside them is not content."""

    special_tokens: ClassVar[tuple[str, ...]] = ()
    """Markers that are special tokens and must be part of the text."""
    arguments_are_text: ClassVar[bool] = False
    """Whether templates take the arguments of former calls as text, not as an object."""

    def __init__(self, tools: Mapping[str, Mapping[str, Any]], new_call_id: Callable[[], str]):
        """Take what the request offers.

        Args:
            tools: the JSON schema of the parameters of each function, by its name.
            new_call_id: names a call; 24 characters, letters and digits.
        """
        super().__init__()
        self.num_complete_calls = 0
        self.is_thinking = False
        self._tools = tools
        self._new_call_id = new_call_id
        self._num_calls = 0
        self._waiting_space = ""
        self._has_content = False
        self._is_after_call = False

    @classmethod
    @abstractmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone, at least one.

        Args:
            lark: the grammar that it becomes a part of.
            functions: what may be called, at least one.
            several: whether there may be more than one call.
        """

    @classmethod
    @abstractmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which no calls but these stand; the arguments are these."""

    @classmethod
    def content(cls, lark: Lark, answer: str) -> str:
        """Return the rule of an answer whose content is `answer` and nothing else."""
        return answer

    def finish(self) -> list[Delta]:
        """Return the rest, when no text will come any more."""
        out = super().finish()
        if self._waiting_space and not self._is_after_call:
            self._emit(TextDelta(text=self._waiting_space))
            out += self._told()
        return out

    def _content(self, text: str) -> None:
        """Tell text that is for the reader. White space waits for what comes after it."""
        text = self._waiting_space + text
        visible = text.rstrip()
        self._waiting_space = text[len(visible) :]
        if self._is_after_call and not self._has_content:
            visible = visible.lstrip()
        if visible:
            self._has_content, self._is_after_call = True, False
            self._emit(TextDelta(text=visible))

    def _give_back(self) -> None:
        """Make content of what was taken since the last mark."""
        taken = self._taken
        self._mark()
        self._content(taken)

    def _rest(self) -> Reading[None]:
        """Make content of all that follows."""
        yield from self._until((), self._content)

    def _start_call(self, name: str) -> int:
        """Tell of a call; what was taken for it is dealt with. Return its index."""
        index = self._num_calls
        self._num_calls += 1
        self._mark()
        self._is_after_call = True
        if not self._has_content:
            self._waiting_space = ""
        self._emit(ToolCallStart(index=index, call_id=self._call_id(), name=name))
        return index

    def _call_id(self) -> str:
        return f"call_{self._new_call_id()}"

    def _argue(self, index: int, text: str) -> None:
        self._emit(ToolCallArguments(index=index, text=text))

    def _call(self, name: str) -> Reading[bool]:
        """Take a JSON object as the arguments of a call, and tell them as they come."""
        if (yield from self._peek()) != "{":
            return False
        index = self._start_call(name)
        value = yield from self._json(lambda piece: self._argue(index, piece))
        self.num_complete_calls += value is not None
        return value is not None

    def _call_object(self, *, only_known: bool = False) -> Reading[bool]:
        """Take {"name": …, "arguments" or "parameters": …} as a call, in any order of the keys.

        Return whether it was one. If not, `_give_back` makes content of what was not told.
        """
        if not (yield from self._at("{")):
            return False
        name: str | None = None
        early: str | None = None
        is_told = False
        while True:
            yield from self._space()
            key = yield from self._json_text()
            yield from self._space()
            if key is None or not (yield from self._at(":")):
                return False
            yield from self._space()
            if key == "name" and name is None:
                name = yield from self._json_text()
                if not name or (only_known and name not in self._tools):
                    return False
                if early is not None:
                    is_told = self._tell_call(name, early)
            elif key in ("arguments", "parameters") and early is None and not is_told:
                begin = yield from self._peek()
                if name is not None and begin == "{":
                    is_told = yield from self._call(name)
                    if not is_told:
                        return False
                else:
                    early = yield from self._json()
                    if early is None:
                        return False
                    if name is not None:
                        is_told = self._tell_call(name, early)
            elif (only_known and key not in ("type", "id")) or (yield from self._json()) is None:
                return False
            yield from self._space()
            if (yield from self._at("}")):
                break
            if not (yield from self._at(",")):
                return False
        if name is None:
            return False
        if not is_told:
            self._tell_call(name, "{}")
        self._mark()
        return True

    def _json_text(self) -> Reading[str | None]:
        """Take a JSON string and return what it says; None if it is none."""
        if (yield from self._peek()) != '"':
            return None
        value = yield from self._json()
        return None if value is None else _said(value)

    def _tell_call(self, name: str, arguments: str) -> bool:
        """Tell of a call whose arguments are all there; models write them as text, too."""
        if arguments == "null":
            arguments = "{}"
        elif arguments.startswith('"'):
            inner = _said(arguments)
            arguments = inner if inner is not None and is_json(inner) else arguments
        index = self._start_call(name)
        self._argue(index, arguments)
        self.num_complete_calls += 1
        return True


def _said(value: str) -> str | None:
    """Return what a JSON string says; None if that is no text, but half of a surrogate pair."""
    said = str(json.loads(value))
    return None if any("\ud800" <= char <= "\udfff" for char in said) else said


def is_json(text: str) -> bool:
    """Return whether this is one JSON value and nothing else."""
    scanner = JsonScanner()
    length = scanner.feed(text)
    scanner.end()
    return scanner.is_complete and length == len(text)


def _first_marker(text: str, markers: tuple[str, ...], *, is_last: bool) -> tuple[int, str | None]:
    """Return where the first marker begins, or might with more text, and which it is if certain."""
    certain = [(begin, marker) for marker in markers if (begin := text.find(marker)) >= 0]
    begin, found = min(certain) if certain else (len(text), None)
    if is_last:
        return begin, found
    longest = max(map(len, markers), default=1)
    for possible in range(max(0, len(text) - longest + 1), begin):
        if any(marker.startswith(text[possible:]) for marker in markers):
            return possible, None
    return begin, found
