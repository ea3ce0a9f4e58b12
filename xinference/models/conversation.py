# SPDX-License-Identifier: Apache-2.0
"""How a model is talked to, whatever computes it: chats become text, and its text is read.

In: a `ChatPrompt`. Out: the text to go on from, and the readers of the answers. It owns what a
family says of its chats: the template, how thoughts and calls are written, what may be switched.
"""

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from xinference.errors import AbilityMissing, InvalidRequest
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.generation import ChatPrompt, GenerationRequest, Message, ToolChoice

from .answer import AnswerReader, AnswerReaders
from .chat_template import ChatTemplate, Renderer
from .parsing.grammars import AnswerFormat
from .parsing.lark import ANSWER, Lark
from .parsing.reader import NUM_CALL_ID_CHARS


@dataclass(frozen=True, slots=True, kw_only=True)
class Chat:
    """A chat that this model can answer."""

    prompt: ChatPrompt
    """With what it left open about thinking."""
    rendered: str
    """The text up to where the model is to answer."""


class Conversation:
    """Of one model. Any thread may call any method; nothing changes."""

    def __init__(self, spec: ReplicaSpec, renderer: Renderer) -> None:
        """Take what the family says, and what renders templates.

        Raises:
            InvalidRequest: the launch limits the thoughts of a model that has none.
        """
        self._name = str(spec.replica.model)
        self._abilities = frozenset(spec.abilities)
        self.answers = AnswerFormat(
            tool_parser=spec.source.tool_parser,
            reasoning_start_tag=spec.source.reasoning_start_tag,
            reasoning_end_tag=spec.source.reasoning_end_tag,
        )
        grammar = self.answers.grammar
        self.template = ChatTemplate(
            renderer,
            template=spec.source.chat_template,
            model_name=self._name,
            arguments_are_text=grammar is not None and grammar.arguments_are_text,
        )
        self.enable_thinking = spec.engine_options.enable_thinking
        """Where a request does not say; None: as the model likes."""
        if self.enable_thinking is None and self._waits_to_be_told():
            self.enable_thinking = False
        if spec.engine_options.thinking_budget is not None:
            self._check_budget()

    def begin(self, prompt: ChatPrompt, request: GenerationRequest) -> Chat:
        """Return the chat of a request as this model is to see it.

        Raises:
            AbilityMissing: the model cannot chat, or call tools.
            InvalidRequest: it asks for what the model or its template does not do.
        """
        if "chat" not in self._abilities:
            raise AbilityMissing(model=self._name, ability="chat")
        if request.sampling.echo:
            raise InvalidRequest(field="echo", problem="a chat has no text to repeat")
        self._check_tools(prompt)
        prompt = self._with_thinking(self._with_effort(prompt))
        return Chat(prompt=prompt, rendered=self.template.render(prompt))

    def readers(self, chat: Chat, num_answers: int) -> AnswerReaders | None:
        """Return what reads the answers; None: they are content and nothing else."""
        prompt = chat.prompt
        tools = {} if prompt.tool_choice is ToolChoice.NONE else _schemas(prompt.tools)
        one_call = bool(tools) and not prompt.parallel_tool_calls

        readers = []
        for _ in range(num_answers):
            parser = self.answers.parser(
                prompt=chat.rendered,
                tools=tools,
                new_call_id=lambda: secrets.token_hex(NUM_CALL_ID_CHARS // 2),
            )
            if parser is None:
                return None
            readers.append(AnswerReader(parser, one_call=one_call))
        return AnswerReaders(readers)

    def is_bare(self, chat: Chat) -> bool:
        """Return whether an answer is its content alone: no thoughts, no form around it."""
        lark = Lark({})
        may_begin = chat.prompt.enable_thinking is not False
        thoughts = self.answers.thoughts(lark, prompt=chat.rendered, may_begin=may_begin)
        return not thoughts and self.answers.content(lark, ANSWER) == ANSWER

    def _check_tools(self, prompt: ChatPrompt) -> None:
        """Refuse tools of a model that has none."""
        has_history = any(one.tool_calls or one.role == "tool" for one in prompt.messages)
        if (prompt.tools or has_history) and (
            "tools" not in self._abilities
            or self.answers.grammar is None
            or not self.template.takes_tools
        ):
            raise AbilityMissing(model=self._name, ability="call tools")

    def _with_effort(self, prompt: ChatPrompt) -> ChatPrompt:
        """Refuse an effort that this model cannot be told; without one, it does not think.

        A template that has the variable gets it. Of a hybrid model "none" switches thinking off.
        """
        effort = prompt.reasoning_effort
        if effort is None or self.template.takes_reasoning_effort:
            return prompt
        if effort != "none":
            raise InvalidRequest(
                field="reasoning_effort", problem="this model cannot be told how much to think"
            )
        if not self._abilities & {"reasoning", "hybrid"}:
            return prompt
        if "hybrid" not in self._abilities:
            raise InvalidRequest(field="reasoning_effort", problem="this model always thinks")
        if prompt.enable_thinking:
            raise InvalidRequest(
                field="reasoning_effort", problem="none contradicts enable_thinking"
            )
        return replace(prompt, enable_thinking=False)

    def _with_thinking(self, prompt: ChatPrompt) -> ChatPrompt:
        """Complete what a request says about thinking; refuse what the model cannot do."""
        if prompt.thinking_budget is not None:
            self._check_budget()
        enable = prompt.enable_thinking
        if enable is None:
            enable = prompt.template_options.get("enable_thinking", self.enable_thinking)
            return replace(prompt, enable_thinking=enable)
        if enable and not self._can_think:
            raise InvalidRequest(field="enable_thinking", problem="this model cannot think")
        if not enable and "reasoning" in self._abilities and "hybrid" not in self._abilities:
            raise InvalidRequest(field="enable_thinking", problem="this model always thinks")
        return prompt

    def _waits_to_be_told(self) -> bool:
        """Return whether thoughts begin in the prompt, and only in that of who asks for them."""
        # Why it is looked for: a structure must leave no room for thoughts that nobody asked for.
        tags = self.answers.reasoning_tags
        if tags is None or "hybrid" not in self._abilities or not self.template.exists:
            return False
        silent = ChatPrompt(messages=(Message(role="user", content="Hello"),))
        try:
            as_it_is, off, on = (
                self.template.render(replace(silent, enable_thinking=enable))
                for enable in (None, False, True)
            )
        except InvalidRequest:
            return False
        return as_it_is == off and on.rstrip().endswith(tags[0]) and on != off

    @property
    def _can_think(self) -> bool:
        return bool(self._abilities & {"reasoning", "hybrid"})

    def _check_budget(self) -> None:
        if not self._can_think or self.answers.thought_markers is None:
            raise InvalidRequest(field="thinking_budget", problem="this model cannot think")


def _schemas(tools: tuple[dict[str, Any], ...]) -> dict[str, Mapping[str, Any]]:
    """Return the schema of the parameters of each function, by its name."""
    functions = [tool["function"] for tool in tools]
    return {function["name"]: function.get("parameters") or {} for function in functions}
