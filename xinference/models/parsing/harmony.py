# SPDX-License-Identifier: Apache-2.0
"""Harmony, the form of gpt-oss: an answer is messages on channels.

    <|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary
    to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

(on one line). What is said on `analysis` is reasoning, a message to a function is a call, and all
else is content.
"""

import re
from collections.abc import Sequence

from xinference.protocol.generation import ReasoningDelta

from .lark import TEXT, Function, Lark, literal
from .reader import Reading, ToolGrammar

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."
_END = ENDS[0]

THOUGHTS = (f"{CHANNEL}analysis{MESSAGE}", _END)
"""What a thought stands between."""
NEXT_MESSAGE = f"{_END}{START}assistant"
"""What ends a message that is not the last one, and begins another."""
LAST_MESSAGE = f"{CHANNEL}final{MESSAGE}"


class Harmony(ToolGrammar):
    """Messages, each with a head that says what it is."""

    special_tokens = (START, CHANNEL, MESSAGE, CONSTRAIN, *ENDS)

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        # Why there may be a recipient first: the prompt ends inside of the first head.
        yield from self._space()
        if (yield from self._at(CHANNEL)) or (yield from self._at("to=")):
            yield from self._message()
        self._give_back()
        while (yield from self._until((START, CHANNEL), self._content)) is not None:
            yield from self._message()
            self._give_back()

    def _message(self) -> Reading[None]:
        """Take a message whose head has begun."""
        if (yield from self._until((MESSAGE, *ENDS))) != MESSAGE:
            return
        channel = _CHANNEL.search(self._taken)
        recipient = _RECIPIENT.search(self._taken)
        if recipient is not None:
            called = recipient[1]
            yield from self._space()
            is_function = bool(self._tools) and called.startswith(_FUNCTIONS)
            if is_function and (yield from self._call(called.removeprefix(_FUNCTIONS))):
                yield from self._space()
                for end in ENDS:
                    if (yield from self._at(end)):
                        self._mark()
                        return
            self._give_back()
        self._mark()
        is_thought = recipient is None and channel is not None and channel[1] == "analysis"
        self.is_thinking = is_thought
        if (yield from self._until(ENDS, self._think if is_thought else self._content)):
            self._mark()
        self.is_thinking = False

    def _think(self, text: str) -> None:
        self._emit(ReasoningDelta(text=text))

    @classmethod
    def calls(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of an answer that is a call: the message that has one is the last."""
        return f"{cls._before(lark, 'analysis')} {cls._call_message(lark, functions)}"

    @classmethod
    def mixed(cls, lark: Lark, functions: Sequence[Function], *, several: bool) -> str:
        """Return the rule of messages of which the last may be a call."""
        last = lark.one_of(
            [cls._call_message(lark, functions), cls._message_of(lark, "final", TEXT)]
        )
        return f"{cls._before(lark, 'analysis', 'commentary')} {last}"

    @classmethod
    def content(cls, lark: Lark, answer: str) -> str:
        """Return the rule of thoughts and a message that is this."""
        return f"{cls._before(lark, 'analysis')} {cls._message_of(lark, 'final', answer)}"

    @classmethod
    def _before(cls, lark: Lark, *channels: str) -> str:
        rest = f'{lark.until(_END)} {lark.marker(START)} "assistant"'
        return f"{lark.one_of(cls._message_of(lark, channel, rest) for channel in channels)}*"

    @classmethod
    def _call_message(cls, lark: Lark, functions: Sequence[Function]) -> str:
        bodies = []
        for one in functions:
            head = literal(f"commentary to={_FUNCTIONS}{one.name} ")
            kind = f'{lark.marker(CONSTRAIN)} "json" {lark.marker(MESSAGE)}'
            bodies.append(f"{lark.marker(CHANNEL)} {head} {kind} {lark.arguments(one)}")
        return lark.one_of(bodies)

    @classmethod
    def _message_of(cls, lark: Lark, channel: str, body: str) -> str:
        return f"{lark.marker(CHANNEL)} {literal(channel)} {lark.marker(MESSAGE)} {body}"
