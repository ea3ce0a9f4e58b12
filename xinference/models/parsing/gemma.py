# SPDX-License-Identifier: Apache-2.0
"""The forms of FunctionGemma and Gemma 4: neither names nor texts are quoted as in JSON.

    <|tool_call>call:get_weather{city:<|"|>Paris<|"|>,days:3}<tool_call|>
    <start_function_call>call:get_weather{city:<escape>Paris<escape>}<end_function_call>

Earlier models of the family were not taught a form.
"""

import json
from collections.abc import Sequence

from .json_text import MAX_DEPTH
from .lark import Function, Lark, literal
from .reader import Reading, ToolGrammar, is_json
from .unquoted import Notation

FORMS = {
    "<|tool_call>": ("<tool_call|>", '<|"|>'),
    "<start_function_call>": ("<end_function_call>", "<escape>"),
}
"""By what begins a call: what ends it, and what stands around a text."""


class Gemma(ToolGrammar):
    """Text, and calls between special tokens."""

    special_tokens = tuple(token for begin, form in FORMS.items() for token in (begin, *form))

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        while (begin := (yield from self._until(tuple(FORMS), self._content))) is not None:
            end, quote = FORMS[begin]
            if (yield from self._at("call:")):
                name = yield from self._name(("{",))
                if name is not None:
                    index = self._start_call(name)
                    if (yield from self._map(index, quote, depth=1)):
                        self.num_complete_calls += 1
                        if (yield from self._at(end)):
                            self._mark()
            self._give_back()

    def _tell(self, index: int, text: str) -> None:
        self._mark()
        self._argue(index, text)

    def _map(self, index: int, quote: str, *, depth: int) -> Reading[bool]:
        """Take {name:value,…} and tell it as a JSON object; return whether it is whole."""
        yield from self._at("{")
        self._tell(index, "{")
        separator = ""
        while not (yield from self._at("}")):
            if separator and not (yield from self._at(",")):
                return False
            yield from self._space()
            key = yield from self._name((":",))
            if key is None:
                return False
            yield from self._at(":")
            self._tell(index, separator + json.dumps(key, ensure_ascii=False) + ": ")
            if not (yield from self._value(index, quote, depth=depth)):
                return False
            separator = ", "
        self._tell(index, "}")
        return True

    def _list(self, index: int, quote: str, *, depth: int) -> Reading[bool]:
        """Take [value,…] and tell it as a JSON list; return whether it is whole."""
        yield from self._at("[")
        self._tell(index, "[")
        separator = ""
        while not (yield from self._at("]")):
            if separator and not (yield from self._at(",")):
                return False
            if separator:
                self._tell(index, separator)
            if not (yield from self._value(index, quote, depth=depth)):
                return False
            separator = ", "
        self._tell(index, "]")
        return True

    def _value(self, index: int, quote: str, *, depth: int) -> Reading[bool]:
        yield from self._space()
        begin = yield from self._peek()
        if begin in ("{", "["):
            if depth == MAX_DEPTH:
                return False
            inner = self._map if begin == "{" else self._list
            is_whole = yield from inner(index, quote, depth=depth + 1)
        elif (yield from self._at(quote)):
            self._tell(index, '"')
            found = yield from self._until((quote,), lambda piece: self._text_of(index, piece))
            is_whole = found is not None
            if is_whole:
                self._tell(index, '"')
        else:
            bare = yield from self._name((",", "}", "]"))
            is_whole = bare is not None
            if bare is not None:
                plain = bare if is_json(bare) else json.dumps(bare, ensure_ascii=False)
                self._tell(index, plain)
        yield from self._space()
        return is_whole

    def _text_of(self, index: int, piece: str) -> None:
        self._argue(index, json.dumps(piece, ensure_ascii=False)[1:-1])

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        begin = cls._begin(lark)
        call = lark.rule(f"{lark.marker(begin)} {cls._after_begin(lark, functions, begin)}")
        return f"{call}+" if several else call

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls."""
        begin = cls._begin(lark)
        call = f"{lark.until(begin)} {cls._after_begin(lark, functions, begin)}"
        return lark.amid_text(call, several=several)

    @classmethod
    def _begin(cls, lark: Lark) -> str:
        """Return what begins a call of this model: what it has a token for."""
        return next((begin for begin in FORMS if lark.has_token(begin)), next(iter(FORMS)))

    @classmethod
    def _after_begin(cls, lark: Lark, functions: Sequence[Function], begin: str) -> str:
        end, quote = FORMS[begin]
        bodies = lark.one_of(
            f"{literal(f'call:{one.name}')} {Notation(lark, one, quote).arguments()}"
            for one in functions
        )
        return lark.rule(f"{bodies} {lark.marker(end)}")
