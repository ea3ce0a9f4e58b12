# SPDX-License-Identifier: Apache-2.0
"""The form of Llama 3: the answer is a call, or goes over to one.

    {"name": "get_weather", "parameters": {"city": "Paris"}}
    Let me look. <|python_tag|>{"name": …}; {"name": …}

An answer that is JSON for other reasons is content: without the tag, only a name that the request
offers makes a call, and only at the beginning.
"""

from collections.abc import Sequence

from .lark import Function, Lark
from .reader import Reading, ToolGrammar

TAG = "<|python_tag|>"

_NO_OBJECT = r"/(\s*[^{\s](?s:.*))?/"


class Llama3(ToolGrammar):
    """JSON objects, bare at the beginning or after a tag."""

    special_tokens = (TAG,)

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        yield from self._space()
        if (yield from self._peek()) == "{":
            yield from self._objects(only_known=True)
        self._give_back()
        while (yield from self._until((TAG,), self._content)) is not None:
            yield from self._space()
            yield from self._objects(only_known=False)
            self._give_back()

    def _objects(self, *, only_known: bool) -> Reading[None]:
        while (yield from self._call_object(only_known=only_known)):
            yield from self._space()
            yield from self._at(";")
            yield from self._space()
            if not (yield from self._peek()):
                self._mark()

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        call = lark.call_objects(functions, key="parameters")
        return lark.list_of(call, '"; "', several=several)

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls: what begins as one is one."""
        calls = lark.rule(cls.calls(lark, functions, several=several))
        text = lark.terminal(_NO_OBJECT)
        return f"{calls} | {text} | {lark.until(TAG, text)} {calls}"
