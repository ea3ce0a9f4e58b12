# SPDX-License-Identifier: Apache-2.0
"""Which grammar is whose, and the parser of one answer."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from xinference.protocol.generation import Delta, TextDelta

from .deepseek import DeepSeek
from .gemma import Gemma
from .glm import Glm4, Glm45
from .harmony import Harmony
from .hermes import Hermes
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
    "deepseek-v3.1": DeepSeek,
    "glm4": Glm4,
    "glm4.5": Glm45,
    "glm5": Glm45,
    "harmony": Harmony,
    "gemma": Gemma,
}
"""By the names that families give in `tool_parser`."""

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
        """What its thoughts stand between."""
        start, end = self.reasoning_start_tag, self.reasoning_end_tag
        return (start, end) if start and end else None

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

    def push(self, text: str) -> list[Delta]:
        """Return the text."""
        return [TextDelta(text=text)] if text else []

    def finish(self) -> list[Delta]:
        """Return nothing: nothing is held back."""
        return []
