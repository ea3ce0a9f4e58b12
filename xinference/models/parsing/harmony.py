# SPDX-License-Identifier: Apache-2.0
"""Harmony, the form of gpt-oss: an answer is messages on channels.

    <|channel|>analysis<|message|>I must look.<|end|><|start|>assistant<|channel|>commentary
    to=functions.get_weather <|constrain|>json<|message|>{"city": "Paris"}<|call|>

(on one line). What is said on `analysis` is reasoning, a message to a function is a call, and all
else is content.
"""

import re

from xinference.protocol.generation import ReasoningDelta

from .reader import Reading, ToolGrammar

START, CHANNEL, MESSAGE, CONSTRAIN = "<|start|>", "<|channel|>", "<|message|>", "<|constrain|>"
ENDS = ("<|end|>", "<|call|>", "<|return|>")

_CHANNEL = re.compile(r"<\|channel\|>\s*(\w+)")
_RECIPIENT = re.compile(r"\bto=([^\s<]+)")
_FUNCTIONS = "functions."


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
        if (yield from self._until(ENDS, self._think if is_thought else self._content)):
            self._mark()

    def _think(self, text: str) -> None:
        self._emit(ReasoningDelta(text=text))
