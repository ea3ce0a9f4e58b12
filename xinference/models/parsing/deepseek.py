# SPDX-License-Identifier: Apache-2.0
"""The forms of DeepSeek: V3 and R1 put the arguments into a code block, V3.1 does not.

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>get_weather
```json
{"city": "Paris"}
```<｜tool▁call▁end｜><｜tool▁calls▁end｜>

<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>get_weather<｜tool▁sep｜>{"city": "Paris"}…
"""

from collections.abc import Sequence

from .lark import Function, Lark, literal
from .reader import Reading, ToolGrammar

CALLS_BEGIN, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL_BEGIN, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"
FENCE = "```"


class DeepSeek(ToolGrammar):
    """Text, then calls between special tokens."""

    special_tokens = (CALLS_BEGIN, CALLS_END, CALL_BEGIN, CALL_END, SEPARATOR)
    arguments_are_text = True

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        begins = (CALLS_BEGIN, CALL_BEGIN)
        while (marker := (yield from self._until(begins, self._content))) is not None:
            yield from self._space()
            if marker == CALL_BEGIN or (yield from self._at(CALL_BEGIN)):
                yield from self._calls()
            self._give_back()

    def _calls(self) -> Reading[None]:
        while (yield from self._one()):
            self._mark()
            yield from self._space()
            if (yield from self._at(CALLS_END)):
                self._mark()
                return
            if not (yield from self._at(CALL_BEGIN)):
                return

    def _one(self) -> Reading[bool]:
        name = yield from self._name((SEPARATOR,))
        yield from self._at(SEPARATOR)
        if name is not None and (yield from self._peek()) != "{":
            name = yield from self._name(("\n",))
            yield from self._space()
            yield from self._at(f"{FENCE}json")
            yield from self._space()
        if name is None or not (yield from self._call(name)):
            return False
        yield from self._space()
        yield from self._at(FENCE)
        yield from self._space()
        return (yield from self._at(CALL_END))

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        return f"{lark.marker(CALLS_BEGIN)} {cls._after_begin(lark, functions, several=several)}"

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls, after it."""
        after = cls._after_begin(lark, functions, several=several)
        return lark.amid_text(f"{lark.until(CALLS_BEGIN)} {after}", several=False)

    @classmethod
    def _after_begin(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        bodies = lark.one_of(cls._body(lark, one) for one in functions)
        call = lark.rule(f"{lark.marker(CALL_BEGIN)} {bodies} {lark.marker(CALL_END)}")
        calls = lark.list_of(call, r'"\n"?', several=several)
        return lark.rule(f"{calls} {lark.marker(CALLS_END)}")

    @classmethod
    def _body(cls, lark: Lark, function: Function) -> str:
        name, end = literal(f"{function.name}\n{FENCE}json\n"), literal(f"\n{FENCE}")
        separator, arguments = lark.marker(SEPARATOR), lark.arguments(function)
        return f'"function" {separator} {name} {arguments} {end}'


class DeepSeek31(DeepSeek):
    """The newer form."""

    @classmethod
    def _body(cls, lark: Lark, function: Function) -> str:
        return f"{literal(function.name)} {lark.marker(SEPARATOR)} {lark.arguments(function)}"
