# SPDX-License-Identifier: Apache-2.0
"""The forms of Mistral: a list of calls, and in newer models a marker for each.

[TOOL_CALLS] [{"name": "get_weather", "arguments": {"city": "Paris"}}]
[TOOL_CALLS]get_weather[ARGS]{"city": "Paris"}[TOOL_CALLS]get_time[ARGS]{}
"""

from collections.abc import Sequence

from .lark import Function, Lark, literal
from .reader import Reading, ToolGrammar

CALLS, ARGUMENTS, CALL_ID = "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]"
NUM_ID_CHARS = 9


class Mistral(ToolGrammar):
    """Text, and calls after a marker."""

    special_tokens = (CALLS, ARGUMENTS, CALL_ID)

    def _call_id(self) -> str:
        # Why so short: the templates refuse ids of another length when they come back.
        return self._new_call_id()[:NUM_ID_CHARS]

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        while (yield from self._until((CALLS,), self._content)) is not None:
            yield from self._space()
            match (yield from self._peek()):
                case "[":
                    yield from self._list()
                case "{":
                    yield from self._call_object()
                case _:
                    yield from self._named()
            self._give_back()

    def _list(self) -> Reading[None]:
        yield from self._at("[")
        yield from self._space()
        while (yield from self._call_object()):
            yield from self._space()
            if (yield from self._at("]")):
                self._mark()
                return
            if not (yield from self._at(",")):
                return
            yield from self._space()

    def _named(self) -> Reading[None]:
        name = yield from self._name((ARGUMENTS, CALL_ID, "{"))
        if name is None:
            return
        if (yield from self._at(CALL_ID)):
            call_id = yield from self._name((ARGUMENTS,))
            if call_id is None:
                return
        yield from self._at(ARGUMENTS)
        yield from self._space()
        yield from self._call(name)

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is calls alone."""
        return f"{lark.marker(CALLS)} {cls._after_marker(lark, functions, several=several)}"

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of a text in which these are the calls, after it."""
        after = cls._after_marker(lark, functions, several=several)
        return lark.amid_text(f"{lark.until(CALLS)} {after}", several=False)

    @classmethod
    def _after_marker(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        # Why by the token: tokenizers that have it belong to the models of the newer form.
        if lark.has_token(ARGUMENTS):
            call = lark.one_of(
                f"{literal(one.name)} {lark.marker(ARGUMENTS)} {lark.arguments(one)}"
                for one in functions
            )
            return lark.rule(lark.list_of(call, lark.marker(CALLS), several=several))
        calls = lark.list_of(lark.call_objects(functions), '", "', several=several)
        return lark.rule(f'" "? "[" {calls} "]"')
