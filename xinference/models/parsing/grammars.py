# SPDX-License-Identifier: Apache-2.0
"""Which grammar is whose, and the parser of one answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xinference.protocol.generation import Delta, TextDelta

from .deepseek import DeepSeek, DeepSeek31
from .gemma import Gemma
from .glm import Glm4, Glm45
from .harmony import LAST_MESSAGE, NEXT_MESSAGE, THOUGHTS, Harmony
from .hermes import Hermes
from .lark import Lark
from .llama3 import Llama3
from .mistral import Mistral
from .reader import AnswerParser, ToolGrammar
from .reasoning import ReasoningReader

GRAMMARS: Mapping[str, type[ToolGrammar]] = {
    "qwen": Hermes,
    "hermes": Hermes,
    "llama3": Llama3,
    "mistral": Mistral,
    "deepseek-r1": DeepSeek,
    "deepseek-v3": DeepSeek,
    "deepseek-v3.1": DeepSeek31,
    "glm4": Glm4,
    "glm4.5": Glm45,
    "glm5": Glm45,
    "harmony": Harmony,
    "gemma": Gemma,
}
"""By the names that families give in `tool_parser`."""

_SPACE = r"/\n{0,2}/"
"""What may stand between the thoughts and the answer."""

ALWAYS = frozenset({"harmony"})
"""Grammars that every answer is written in, tools or not."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerFormat:
    """How a model writes answers that are more than text. None and empty: it does not."""

    tool_parser: str | None = None
    reasoning_start_tag: str | None = None
    reasoning_end_tag: str | None = None

    @property
    def grammar(self) -> type[ToolGrammar] | None:
        """Of its calls; None too if nothing here reads them."""
        return GRAMMARS.get(self.tool_parser or "")

    @property
    def reasoning_tags(self) -> tuple[str, str] | None:
        """What its thoughts stand between. Harmony has messages for them, whatever is given."""
        start, end = self.reasoning_start_tag, self.reasoning_end_tag
        return (start, end) if start and end and self.grammar is not Harmony else None

    @property
    def thought_markers(self) -> tuple[str, str] | None:
        """What stands around a thought: the tags, or the head and the end of a message."""
        return THOUGHTS if self.grammar is Harmony else self.reasoning_tags

    def closing(self, *, may_call: bool) -> str:
        """Return what a model writes that stops thinking and begins to answer."""
        if self.grammar is Harmony:
            # Why not the last message's head: a call has another.
            return NEXT_MESSAGE if may_call else NEXT_MESSAGE + LAST_MESSAGE
        assert self.reasoning_tags is not None, self
        return f"\n{self.reasoning_tags[1]}\n\n"

    def content(self, lark: Lark, answer: str) -> str:
        """Return the rule of an answer, after its thoughts, whose content is `answer`."""
        return answer if self.grammar is None else self.grammar.content(lark, answer)

    def thoughts(self, lark: Lark, *, prompt: str, may_begin: bool) -> str:
        """Return the rule of the thoughts in tags before an answer; empty if there are none.

        Args:
            lark: the grammar that it becomes a part of.
            prompt: what the answer goes on from; it may end inside of the thoughts, or after them.
            may_begin: whether the answer itself may begin with thoughts.
        """
        if self.reasoning_tags is None:
            return ""
        start, end = self.reasoning_tags
        rest = f"{lark.until(end)} {lark.terminal(_SPACE)}"
        so_far = prompt.rstrip()
        if so_far.endswith(start):
            return lark.rule(rest)
        if so_far.endswith(end) or not may_begin:
            return ""
        return f"{lark.rule(f'{lark.marker(start)} {rest}')}?"

    @property
    def special_tokens(self) -> tuple[str, ...]:
        """Markers that must not be left out of the text."""
        return (
            *(self.grammar.special_tokens if self.grammar else ()),
            *(self.reasoning_tags or ()),
        )

    def parser(
        self,
        *,
        prompt: str,
        tools: Mapping[str, Mapping[str, Any]],
        new_call_id: Callable[[], str],
    ) -> AnswerParser | None:
        """Return the parser of one answer; None if all of it is content.

        Args:
            prompt: what the answer goes on from; it may end inside of the thoughts.
            tools: the JSON schema of the parameters of each function, by its name.
            new_call_id: names a call; 24 characters, letters and digits.
        """
        grammar = self.grammar
        answer: AnswerParser | None = None
        if grammar is not None and (tools or self.tool_parser in ALWAYS):
            answer = grammar(tools, new_call_id)
        if self.reasoning_tags is None:
            return answer
        start, end = self.reasoning_tags
        return ReasoningReader(
            start, end, is_open=prompt.rstrip().endswith(start), answer=answer or Plain()
        )


class Plain:
    """The parser of answers that are content and nothing else."""

    num_complete_calls = 0
    is_thinking = False

    def push(self, text: str) -> list[Delta]:
        """Return the text."""
        return [TextDelta(text=text)] if text else []

    def finish(self) -> list[Delta]:
        """Return nothing: nothing is held back."""
        return []
