# SPDX-License-Identifier: Apache-2.0
"""What a model thinks, between tags, before what it says.

    <think>The user greets.</think>Hello!

The first tag may stand in the prompt already. White space beside the tags belongs to them. Only
the beginning of an answer is looked at: later tags are content.
"""

from xinference.protocol.generation import Delta, ReasoningDelta

from .reader import AnswerParser, Reader, Reading


class ReasoningReader(Reader):
    """Takes the thoughts off an answer and leaves the rest to another parser."""

    def __init__(self, start: str, end: str, *, is_open: bool, answer: AnswerParser) -> None:
        """Take the tags, and whether the prompt ends inside of them."""
        super().__init__()
        self._start = start
        self._end = end
        self.is_thinking = is_open
        self._answer = answer
        self._waiting_space = ""

    @property
    def num_complete_calls(self) -> int:
        """Calls whose arguments are whole."""
        return self._answer.num_complete_calls

    def finish(self) -> list[Delta]:
        """Return the rest, when no text will come any more."""
        return [*super().finish(), *self._answer.finish()]

    def read(self) -> Reading[None]:
        """Read the answer to its end."""
        space = yield from self._space()
        if (yield from self._at(self._start)):
            self.is_thinking = True
            yield from self._space()
        elif not self.is_thinking:
            self._pass_on(space)
        if self.is_thinking:
            if (yield from self._until((self._end,), self._think)) is None:
                self._think_space()
            self.is_thinking = False
            yield from self._space()
        yield from self._until((), self._pass_on)

    def _pass_on(self, text: str) -> None:
        if text:
            for delta in self._answer.push(text):
                self._emit(delta)

    def _think(self, text: str) -> None:
        text = self._waiting_space + text
        visible = text.rstrip()
        self._waiting_space = text[len(visible) :]
        if visible:
            self._emit(ReasoningDelta(text=visible))

    def _think_space(self) -> None:
        if self._waiting_space:
            self._emit(ReasoningDelta(text=self._waiting_space))
