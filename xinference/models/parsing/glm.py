# SPDX-License-Identifier: Apache-2.0
"""The forms of GLM: GLM-4 writes a name and JSON, GLM-4.5 and later a tag for each argument.

get_weather
{"city": "Paris"}

<tool_call>get_weather
<arg_key>city</arg_key>
<arg_value>Paris</arg_value>
</tool_call>
"""

import json
import re
from collections.abc import Mapping, Sequence

from .lark import Function, Lark, literal
from .reader import Reading, ToolGrammar, is_json
from .unquoted import Unquoted

NEXT_TURN = "<|assistant|>"
BEGIN, END = "<tool_call>", "</tool_call>"
KEY, KEY_END = "<arg_key>", "</arg_key>"
VALUE, VALUE_END = "<arg_value>", "</arg_value>"

_NEWLINE = r'"\n"'


class Glm4(ToolGrammar):
    """Calls at the beginning, and after a marker; only of functions that the request offers."""

    special_tokens = (NEXT_TURN,)

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        yield from self._calls()
        while (yield from self._until((NEXT_TURN,), self._content)) is not None:
            yield from self._calls()

    def _calls(self) -> Reading[None]:
        yield from self._space()
        while (name := (yield from self._known_line())) is not None:
            yield from self._space()
            if not (yield from self._call(name)):
                break
            yield from self._space()
        self._give_back()

    def _known_line(self) -> Reading[str | None]:
        """Take the name of a function that stands on a line of its own, and return it."""
        while True:
            for name in self._tools:
                if self._text.startswith(f"{name}\n"):
                    self._take(len(name) + 1)
                    return name
            if self._is_last or not any(f"{name}\n".startswith(self._text) for name in self._tools):
                return None
            yield

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        call = lark.one_of(
            f"{literal(one.name)} {_NEWLINE} {lark.arguments(one)}" for one in functions
        )
        return lark.list_of(call, lark.marker(NEXT_TURN), several=several)

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls: what begins as one is one."""
        names = "|".join(re.escape(one.name) for one in functions)
        marker = re.escape(NEXT_TURN)
        text = lark.terminal(rf"/(?s:.*)/ & ~/\s*({names})\n(?s:.*)/ & ~/(?s:.*){marker}(?s:.*)/")
        calls = lark.rule(cls.calls(lark, functions, several=several))
        return f"{calls} | {text} ({lark.marker(NEXT_TURN)} {calls})?"


class Glm45(ToolGrammar):
    """Text, and calls in tags; what is no text by its schema is JSON."""

    special_tokens = (BEGIN, END, KEY, KEY_END, VALUE, VALUE_END)

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        while (yield from self._until((BEGIN,), self._content)) is not None:
            name = yield from self._name(("\n", KEY, END))
            if name is not None:
                yield from self._arguments(name)
            self._give_back()

    def _arguments(self, name: str) -> Reading[None]:
        index: int | None = None
        while True:
            yield from self._space()
            if (yield from self._at(END)):
                if index is None:
                    index = self._start_call(name)
                    self._argue(index, "{")
                self._argue(index, "}")
                self._mark()
                self.num_complete_calls += 1
                return
            key = yield from self._tagged(KEY, KEY_END)
            if key is None:
                return
            yield from self._space()
            separator = "{" if index is None else ", "
            if index is None:
                if not (yield from self._has(len(VALUE))) or not self._text.startswith(VALUE):
                    return
                index = self._start_call(name)
            quoted = separator + json.dumps(key, ensure_ascii=False) + ": "
            if not (yield from self._value(index, quoted, is_text=self._is_text(name, key))):
                return

    def _value(self, index: int, quoted: str, *, is_text: bool) -> Reading[bool]:
        """Take a value and tell it as JSON; text as it comes."""
        if not is_text:
            value = yield from self._tagged(VALUE, VALUE_END)
            if value is None:
                return False
            plain = value.strip()
            value = plain if is_json(plain) else json.dumps(value, ensure_ascii=False)
            self._mark()
            self._argue(index, quoted + value)
            return True
        if not (yield from self._at(VALUE)):
            return False
        self._mark()
        self._argue(index, f'{quoted}"')

        def tell(piece: str) -> None:
            self._argue(index, json.dumps(piece, ensure_ascii=False)[1:-1])

        if (yield from self._until((VALUE_END,), tell)) is None:
            return False
        self._mark()
        self._argue(index, '"')
        return True

    def _tagged(self, begin: str, end: str) -> Reading[str | None]:
        """Take what stands between two tags, and return it."""
        if not (yield from self._at(begin)):
            return None
        start = len(self._taken)
        if (yield from self._until((end,))) is None:
            return None
        return self._taken[start : -len(end)]

    def _is_text(self, name: str, key: str) -> bool:
        properties = self._tools.get(name, {}).get("properties")
        schema = properties.get(key) if isinstance(properties, Mapping) else None
        return isinstance(schema, Mapping) and schema.get("type") == "string"

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        call = lark.rule(f"{lark.marker(BEGIN)} {cls._after_begin(lark, functions)}")
        return lark.list_of(call, _NEWLINE, several=several)

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls."""
        call = f"{lark.until(BEGIN)} {cls._after_begin(lark, functions)}"
        return lark.amid_text(call, several=several)

    @classmethod
    def _after_begin(cls, lark: Lark, functions: Sequence[Function]) -> str:
        bodies = lark.one_of(
            f"{literal(one.name)} {_NEWLINE} {cls._pairs(lark, one)}" for one in functions
        )
        return lark.rule(f"{bodies} {lark.marker(END)}")

    @classmethod
    def _pairs(cls, lark: Lark, function: Function) -> str:
        schema = Unquoted(lark, function)
        arguments = schema.arguments()
        if schema.is_open(arguments):
            pair = cls._pair(lark, lark.until(KEY_END), f"{lark.json({})} {lark.marker(VALUE_END)}")
            return f"{pair}*"
        pairs = []
        for name, (inner, is_required) in schema.properties(arguments).items():
            is_text = inner.get("type") == "string"
            value = (
                schema.text_until(VALUE_END, inner)
                if is_text
                else f"{schema.json(inner)} {lark.marker(VALUE_END)}"
            )
            key = f"{literal(name)} {lark.marker(KEY_END)}"
            pairs.append(cls._pair(lark, key, value) + ("" if is_required else "?"))
        return " ".join(pairs)

    @classmethod
    def _pair(cls, lark: Lark, key: str, value: str) -> str:
        body = f"{lark.marker(KEY)} {key} {_NEWLINE} {lark.marker(VALUE)} {value} {_NEWLINE}"
        return lark.rule(body)
