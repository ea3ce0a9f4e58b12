# SPDX-License-Identifier: Apache-2.0
"""The Hermes form, which Qwen and many others write.

<tool_call>
{"name": "get_weather", "arguments": {"city": "Paris"}}
</tool_call>
"""

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
