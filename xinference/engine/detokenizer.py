# SPDX-License-Identifier: Apache-2.0
"""Token ids to text, one at a time, and where a stop string ends it.

`TextStream.push` takes a token and returns the text that is certain by now. What is held back is
as little as can be: bytes that do not make a character yet, and the longest end of the text that
a stop string begins with. The pieces add up to what the tokenizer decodes of all the tokens at
once, however the text falls into tokens. Pure but for the tokenizer it asks.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from tokenizers.decoders import DecodeStream
from transformers import PreTrainedTokenizerBase

# Why: enough for a tokenizer to know whether its first piece continues a word.
_NUM_CONTEXT_TOKENS = 4
_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


class _Decoder(Protocol):
    def push(self, token_id: int) -> str:
        """Return the characters this token completes."""
        ...

    def flush(self) -> str:
        """Return what is left, incomplete characters as replacement characters."""
        ...


class _FastDecoder:
    """Over the stream decoder of a `tokenizers` tokenizer."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: list[int]) -> None:
        self._tokenizer = tokenizer.backend_tokenizer
        self._stream = DecodeStream(ids=context, skip_special_tokens=True)
        self._held: list[int] = []

    def push(self, token_id: int) -> str:
        self._held.append(token_id)
        text: str | None = self._stream.step(self._tokenizer, token_id)
        if text is None:
            return ""
        self._held.clear()
        return text

    def flush(self) -> str:
        text: str = self._tokenizer.decode(self._held, skip_special_tokens=True)
        self._held.clear()
        return text


class _SlowDecoder:
    """For tokenizers without a stream decoder: decodes a short window twice and compares."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, context: list[int]) -> None:
        self._tokenizer = tokenizer
        self._window = list(context)
        self._shown = self._decode(self._window)
        self._num_shown = len(self._window)

    def push(self, token_id: int) -> str:
        self._window.append(token_id)
        text = self._decode(self._window)
        if text.endswith(_INCOMPLETE) or len(text) <= len(self._shown):
            return ""
        new = text[len(self._shown) :]
        self._window = self._window[self._num_shown :]
        self._num_shown = len(self._window)
        self._shown = self._decode(self._window)
        return new

    def flush(self) -> str:
        text = self._decode(self._window)[len(self._shown) :]
        self._shown += text
        return text

    def _decode(self, token_ids: list[int]) -> str:
        text = self._tokenizer.decode(
            token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text


class _KeepingDecoder:
    """Over another decoder: special tokens that are to be kept come out as their own text."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        make: Callable[[PreTrainedTokenizerBase, list[int]], _Decoder],
        context: list[int],
        kept: frozenset[int],
    ) -> None:
        self._tokenizer = tokenizer
        self._make = make
        self._decoder = make(tokenizer, context)
        self._kept = kept

    def push(self, token_id: int) -> str:
        # Why not by the tokenizer: it has one switch for all special tokens.
        if token_id not in self._kept:
            return self._decoder.push(token_id)
        half_a_character = self.flush()
        if half_a_character:
            self._decoder = self._make(self._tokenizer, [])
        return half_a_character + str(self._tokenizer.convert_ids_to_tokens(token_id))

    def flush(self) -> str:
        return self._decoder.flush()


class TextStream:
    """The text of one sequence. After `push` has found a stop string it must not be used again."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt_token_ids: Sequence[int],
        stop: tuple[str, ...] = (),
        *,
        kept_token_ids: frozenset[int] = frozenset(),
        includes_stop: bool = False,
    ) -> None:
        context = [int(token_id) for token_id in prompt_token_ids[-_NUM_CONTEXT_TOKENS:]]
        if str(tokenizer.decode(context, skip_special_tokens=True)).endswith(_INCOMPLETE):
            context = []  # half a character of the prompt is not the answer's
        decoder = _FastDecoder if tokenizer.is_fast else _SlowDecoder
        self._decoder: _Decoder = (
            _KeepingDecoder(tokenizer, decoder, context, kept_token_ids)
            if kept_token_ids
            else decoder(tokenizer, context)
        )
        self._stop = stop
        self._includes_stop = includes_stop
        self._held = ""
        self.num_chars = 0
        """Of the text that the tokens so far make, held back or not."""
        self.stop_string: str | None = None
        """The one that came up; the text ends before it, or with it."""

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string came up."""
        return self.stop_string is not None

    def push(self, token_id: int, *, may_stop: bool = True) -> str:
        """Return the text that became certain with this token; often empty, or a few characters.

        A text that may not stop yet is not searched for stop strings.
        """
        new = self._decoder.push(token_id)
        self.num_chars += len(new)
        return self._release(new, is_last=False) if may_stop else new

    def flush(self) -> str:
        """Return the rest of the text, when no token will come any more."""
        return self._release(self._decoder.flush(), is_last=True)

    def _release(self, new: str, *, is_last: bool) -> str:
        if not self._stop:
            return new
        text = self._held + new
        found = find_stop(text, self._stop)
        if found is not None:
            self.stop_string = text[found.start : found.stop]
            self._held = ""
            return text[: found.stop if self._includes_stop else found.start]
        num_held = 0 if is_last else num_stop_prefix(text, self._stop)
        self._held = text[len(text) - num_held :]
        return text[: len(text) - num_held]


def find_stop(text: str, stop: tuple[str, ...]) -> range | None:
    """Return where the stop string that is complete first stands; None if there is none.

    Why the first to end and not the first to begin: that is the one a reader of the stream meets
    first, so the answer does not depend on how the text falls into tokens.
    """
    ends = []
    for string in stop:
        begin = text.find(string)
        if begin >= 0:
            ends.append((begin + len(string), begin))
    return range(min(ends)[1], min(ends)[0]) if ends else None


def num_stop_prefix(text: str, stop: tuple[str, ...]) -> int:
    """Return the length of the longest end of `text` that a stop string begins with."""
    longest = 0
    for string in stop:
        for length in range(min(len(string) - 1, len(text)), longest, -1):
            if text.endswith(string[:length]):
                longest = length
                break
    return longest
