# SPDX-License-Identifier: Apache-2.0
"""Where a JSON value ends, character by character. Pure.

It is as strict as the standard says, so what it calls complete every JSON reader reads.
"""

import re

MAX_DEPTH = 64
MAX_NUMBER_CHARS = 400

_PLAIN = re.compile(r'[^"\\\x00-\x1f]+')
_NUMBER = re.compile(r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_NUMBER_PREFIX = re.compile(
    r"-?(?:(?:0|[1-9][0-9]*)(?:\.(?:[0-9]+(?:[eE](?:[+-]?[0-9]*)?)?)?|[eE](?:[+-]?[0-9]*)?)?)?"
)
_LITERALS = {"t": "true", "f": "false", "n": "null"}
_SPACE = " \t\n\r"
_CLOSING = {"{": "}", "[": "]"}


class JsonScanner:
    """Reads one value. It begins where the first text does, without space before it.

    Invariant: what it consumes and where it stops do not depend on how the text is cut.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._expects = "value"
        self._token = ""
        """What is left of a literal, what there is of a number, or digits left of an escape."""
        self._is_key = False
        self.is_complete = False
        self.is_broken = False

    def feed(self, text: str) -> int:
        """Return how many characters of `text` belong to the value, as far as it is valid.

        Fewer than all only if the value is then complete or broken.
        """
        index = 0
        while index < len(text) and not (self.is_complete or self.is_broken):
            index = self._step(text, index)
        return index

    def end(self) -> None:
        """Say that no text follows: a number may be complete by that."""
        if self._expects == "number" and not self._open and _NUMBER.fullmatch(self._token):
            self.is_complete = True

    def _step(self, text: str, index: int) -> int:
        """Take what stands at `index`; return where to go on, or `index` if it was not taken."""
        char = text[index]
        match self._expects:
            case "string":
                return self._in_string(text, index)
            case "escape":
                if char == "u":
                    self._expects, self._token = "hex", "0000"
                elif char in '"\\/bfnrt':
                    self._expects = "string"
                else:
                    return self._break(index)
            case "hex":
                if char not in "0123456789abcdefABCDEF":
                    return self._break(index)
                self._token = self._token[1:]
                if not self._token:
                    self._expects = "string"
            case "literal":
                if char != self._token[0]:
                    return self._break(index)
                self._token = self._token[1:]
                if not self._token:
                    self._value_ends()
            case "number":
                longer = self._token + char
                if len(longer) <= MAX_NUMBER_CHARS and _NUMBER_PREFIX.fullmatch(longer):
                    self._token = longer
                elif _NUMBER.fullmatch(self._token) and char not in "+-.eE0123456789":
                    self._value_ends()
                    return index
                else:
                    return self._break(index)
            case _:
                if char in _SPACE and self._open:
                    return index + 1
                if not self._structure(char):
                    return self._break(index)
        return index + 1

    def _in_string(self, text: str, index: int) -> int:
        plain = _PLAIN.match(text, index)
        if plain is not None:
            return plain.end()
        if text[index] == "\\":
            self._expects = "escape"
        elif text[index] == '"':
            if self._is_key:
                self._is_key, self._expects = False, "colon"
            else:
                self._value_ends()
        else:
            return self._break(index)
        return index + 1

    def _structure(self, char: str) -> bool:
        """Take a character outside of strings, literals and numbers; return whether it may be."""
        expects = self._expects
        if expects == "colon":
            self._expects = "value"
            return char == ":"
        if expects == "separator":
            if char == ",":
                self._expects = "key" if self._open[-1] == "{" else "value"
                return True
            return self._closes(char)
        if expects in ("key", "first key"):
            if char == '"':
                self._is_key, self._expects = True, "string"
                return True
            return expects == "first key" and self._closes(char)
        if expects == "first value" and char == "]":
            return self._closes(char)
        return self._value_begins(char)

    def _value_begins(self, char: str) -> bool:
        if char == '"':
            self._expects = "string"
        elif char in _CLOSING:
            self._open.append(char)
            self._expects = "first key" if char == "{" else "first value"
            return len(self._open) <= MAX_DEPTH
        elif char in _LITERALS:
            self._expects, self._token = "literal", _LITERALS[char][1:]
        elif char == "-" or (char.isascii() and char.isdigit()):
            self._expects, self._token = "number", char
        else:
            return False
        return True

    def _closes(self, char: str) -> bool:
        if char != _CLOSING[self._open[-1]]:
            return False
        self._open.pop()
        self._value_ends()
        return True

    def _value_ends(self) -> None:
        self._expects = "separator"
        self.is_complete = not self._open

    def _break(self, index: int) -> int:
        self.is_broken = True
        return index
