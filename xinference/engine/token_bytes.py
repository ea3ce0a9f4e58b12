# SPDX-License-Identifier: Apache-2.0
"""What a single token adds to a text, in bytes; and the tokens that a word may be written with.

A token may be a piece of a character, which has no text of its own but bytes. Which those are is
said by the tokenizer's vocabulary in one of two ways: GPT-2's alphabet, where every byte is a
printable character, or `<0xE4>` for single bytes beside plain text with "▁" for spaces.
"""

import json
import re
from functools import cache

from transformers import PreTrainedTokenizerBase

_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
_SINGLE_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")


class TokenBytes:
    """Answers for one tokenizer. Any thread may call it."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._added = {
            token_id: str(token).encode()
            for token_id, token in tokenizer.added_tokens_decoder.items()
        }
        decoders = _decoders_of(tokenizer)
        self._is_byte_level = "ByteLevel" in decoders
        self._has_space_marks = not self._is_byte_level and bool(
            decoders & {"ByteFallback", "Metaspace"}
        )
        self._known: dict[int, bytes] = {}

    def of(self, token_id: int) -> bytes:
        """Return a token's bytes; empty for an id without a token."""
        known = self._known.get(token_id)
        if known is None:
            known = self._known[token_id] = self._find(token_id)
        return known

    def _find(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id]
        token = self._tokenizer.convert_ids_to_tokens(token_id)
        if not isinstance(token, str):
            return b""
        if self._is_byte_level:
            alphabet = _byte_of_character()
            if all(character in alphabet for character in token):
                return bytes(alphabet[character] for character in token)
            return token.encode()
        if self._has_space_marks:
            single = _SINGLE_BYTE.fullmatch(token)
            if single:
                return bytes([int(single[1], 16)])
            return token.replace(_SPACE, " ").encode()
        return str(self._tokenizer.decode([token_id])).encode()


def word_tokens(tokenizer: PreTrainedTokenizerBase, word: str) -> set[tuple[int, ...]]:
    """Return the token sequences that a word is written with, at the start of a text and inside."""
    ways = set()
    for text in (word, f" {word}"):
        token_ids = tuple(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if token_ids:
            ways.add(token_ids)
    return ways


def _decoders_of(tokenizer: PreTrainedTokenizerBase) -> set[str]:
    """Return the names of the steps by which the tokenizer makes text of tokens."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or backend.decoder is None:
        return set()
    state = json.loads(backend.decoder.__getstate__())
    return {step["type"] for step in (state, *state.get("decoders", ()))}


@cache
def _byte_of_character() -> dict[str, int]:
    """Return GPT-2's alphabet: printable bytes stand for themselves, others come from 256 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    characters = {chr(byte): byte for byte in printable}
    return characters | {chr(256 + rank): byte for rank, byte in enumerate(others)}
