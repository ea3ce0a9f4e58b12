# SPDX-License-Identifier: Apache-2.0
"""How long a sequence may think before it has to answer.

`LimitedThinking` is a `Matcher` around another, or around none. It counts the tokens between two
markers, and when they are as many as they may be, only the tokens that close the thoughts can be
drawn. Everything before and after is as the matcher inside of it says, or as the model likes.
"""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass
from enum import Enum, auto

from .grammar import Bits, Matcher


@dataclass(frozen=True, slots=True, kw_only=True)
class ThinkingLimit:
    """Where thoughts are in a text, and how many tokens they may have."""

    num_tokens: int
    """Between the markers, of all thoughts together."""
    start: str
    end: str
    closing_token_ids: tuple[int, ...]
    """What is written when the limit is reached; it has `end` in it."""
    is_open: bool
    """Whether the prompt ends inside of the thoughts."""
    is_first: bool
    """Whether thoughts are at the beginning of an answer or nowhere."""


class _Place(Enum):
    BEFORE = auto()
    THINKING = auto()
    CLOSING = auto()
    AFTER = auto()


class LimitedThinking:
    """A `Matcher` that ends thoughts. One thread at a time."""

    def __init__(
        self, limit: ThinkingLimit, bytes_of: Callable[[int], bytes], inner: Matcher | None
    ) -> None:
        """Take a limit, what each token adds to a text, and a matcher for the whole answer."""
        self._limit = limit
        self._bytes_of = bytes_of
        self._inner = inner
        self._start, self._end = limit.start.encode(), limit.end.encode()
        self._seen = b""
        """The end of the text, as much of it as a marker may begin in."""
        self._num_thought = 0
        self._num_closed = 0
        """Of the closing tokens."""
        self._place = _Place.THINKING if limit.is_open else _Place.BEFORE
        self._close_in_time()

    @property
    def is_finished(self) -> bool:
        """Whether the answer is whole and nothing can follow."""
        return self._inner is not None and self._inner.is_finished

    @property
    def is_accepting(self) -> bool:
        """Whether the answer is whole as it stands."""
        if self._place is _Place.CLOSING:
            return False
        return self._inner is None or self._inner.is_accepting

    def fill(self, bits: Bits) -> None:
        """Write which tokens may come next."""
        if self._inner is None:
            bits[:] = ~bits.dtype.type(0)
        else:
            self._inner.fill(bits)
        if self._place is _Place.CLOSING and not _ends_inside_character(self._seen):
            token_id = self._limit.closing_token_ids[self._num_closed]
            bit = bits.dtype.type(1 << (token_id % 32))
            # Why only then: the matcher inside may want to end a piece of its own first.
            if bits[token_id // 32] & bit:
                bits[:] = 0
                bits[token_id // 32] = bit

    def accept(self, token_id: int) -> None:
        """Go on by one token."""
        if self._inner is not None:
            self._inner.accept(token_id)
        self._seen += self._bytes_of(token_id)
        match self._place:
            case _Place.BEFORE | _Place.AFTER:
                self._look_for_start()
            case _Place.THINKING:
                self._num_thought += 1
                self._look_for_end()
            case _Place.CLOSING:
                if token_id == self._limit.closing_token_ids[self._num_closed]:
                    self._num_closed += 1
                if self._num_closed == len(self._limit.closing_token_ids):
                    self._place, self._seen = _Place.AFTER, b""
        self._close_in_time()

    def fork(self) -> "LimitedThinking":
        """Return one that goes its own way from here."""
        fork = copy(self)
        fork._inner = None if self._inner is None else self._inner.fork()
        return fork

    def _look_for_start(self) -> None:
        if not self._limit.is_first:
            _, found, after = self._seen.partition(self._start)
            if found:
                self._place, self._seen = _Place.THINKING, after
            else:
                self._seen = self._seen[-len(self._start) :]
        elif self._place is _Place.BEFORE:
            text = self._seen.lstrip()
            if text.startswith(self._start):
                self._place, self._seen = _Place.THINKING, text[len(self._start) :]
            elif not self._start.startswith(text):
                self._place = _Place.AFTER
        else:
            self._seen = b""

    def _look_for_end(self) -> None:
        if self._end in self._seen:
            self._place, self._seen = _Place.AFTER, b""
        else:
            self._seen = self._seen[-len(self._end) :]

    def _close_in_time(self) -> None:
        if self._place is _Place.THINKING and self._num_thought >= self._limit.num_tokens:
            self._place, self._num_closed = _Place.CLOSING, 0


def _ends_inside_character(text: bytes) -> bool:
    """Return whether the last character of a text in UTF-8 is not whole."""
    for num_bytes in range(1, min(len(text), 3) + 1):
        byte = text[-num_bytes]
        if byte >= 0xC0:  # the first of two, three or four
            return num_bytes < 2 + (byte >= 0xE0) + (byte >= 0xF0)
        if byte < 0x80:
            return False
    return False
