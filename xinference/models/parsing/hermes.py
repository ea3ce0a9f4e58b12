# SPDX-License-Identifier: Apache-2.0
"""The Hermes form, which Qwen and many others write.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

from collections.abc import Sequence

from .lark import Function, Lark
from .reader import Reading, ToolGrammar

BEGIN, END = "<tool_call>", "</tool_call>"


class Hermes(ToolGrammar):
    """Text, and JSON objects in tags between it."""

    special_tokens = (BEGIN, END)

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        while (yield from self._until((BEGIN,), self._content)) is not None:
            yield from self._space()
            while (yield from self._call_object()):
                yield from self._space()
                if (yield from self._peek()) != "{":
                    if (yield from self._at(END)):
                        self._mark()
                    break
            self._give_back()

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        call = lark.rule(f"{lark.marker(BEGIN)} {cls._after_begin(lark, functions)}")
        return lark.list_of(call, r'"\n"', several=several)

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls."""
        call = f"{lark.until(BEGIN)} {cls._after_begin(lark, functions)}"
        return lark.amid_text(call, several=several)

    @classmethod
    def _after_begin(cls, lark: Lark, functions: Sequence[Function]) -> str:
        return lark.rule(rf'"\n" {lark.call_objects(functions)} "\n" {lark.marker(END)}')
