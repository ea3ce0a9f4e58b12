# SPDX-License-Identifier: Apache-2.0
"""A conversation becomes the text a model was trained on, by its chat template.

The template is the family's or the tokenizer's own, a Jinja program that `transformers` runs in
a sandbox. What it complains of is the caller's to fix and comes out as `InvalidRequest`.
"""

import inspect
import json
from collections.abc import Callable
from typing import Any, Protocol

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from xinference.errors import AbilityMissing, InvalidRequest
from xinference.protocol.generation import ChatPrompt, Message, ToolCall, ToolChoice

RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}
"""Names that steer the rendering itself; a caller's variables must not be among them."""


class Renderer(Protocol):
    """What runs templates: a tokenizer of `transformers`, or what stands in its place."""

    chat_template: Any
    """Its own, if it has one."""

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """As that of `transformers`."""
        ...


class ChatTemplate:
    """Renders conversations for one tokenizer. Any thread may call it."""

    def __init__(
        self,
        tokenizer: Renderer,
        *,
        template: str | None,
        model_name: str,
        arguments_are_text: bool = False,
    ) -> None:
        """Take the family's template, or with None the tokenizer's own, if it has one.

        Args:
            tokenizer: of the model.
            template: of the family.
            model_name: for errors.
            arguments_are_text: the template takes the arguments of calls as text, not as objects.
        """
        self._arguments_are_text = arguments_are_text
        self._tokenizer = tokenizer
        self._template = template
        self._model_name = model_name

    @property
    def exists(self) -> bool:
        """Whether this model can chat at all."""
        return bool(self._template or self._tokenizer.chat_template)

    @property
    def takes_tools(self) -> bool:
        """Whether the template does anything with tools."""
        return "tools" in str(self._template or self._tokenizer.chat_template)

    @property
    def takes_reasoning_effort(self) -> bool:
        """Whether the template tells the model how much to think."""
        return "reasoning_effort" in str(self._template or self._tokenizer.chat_template)

    def render(self, prompt: ChatPrompt) -> str:
        """Return the text up to where the model is to answer.

        Raises:
            AbilityMissing: there is no template.
            InvalidRequest: there are no messages, a variable has a reserved name, or the template
                does not take these messages.
        """
        if not self.exists:
            raise AbilityMissing(model=self._model_name, ability="chat")
        if not prompt.messages:
            raise InvalidRequest(field="messages", problem="must have at least one message")
        for name in prompt.template_options:
            if name in RESERVED:
                raise InvalidRequest(
                    field="chat_template_kwargs", problem=f"{name!r} cannot be set by a request"
                )
        messages = [self._message(message) for message in prompt.messages]
        options = dict(prompt.template_options)
        if prompt.enable_thinking is not None:
            options["enable_thinking"] = prompt.enable_thinking
        if "enable_thinking" in options:
            # Why: templates do not agree on its name.
            options.setdefault("thinking", options["enable_thinking"])
        if prompt.reasoning_effort is not None and self.takes_reasoning_effort:
            options["reasoning_effort"] = prompt.reasoning_effort
        # Why none of them: a model that does not see a tool does not call it.
        tools: list[Any] = []
        if prompt.tool_choice is not ToolChoice.NONE:
            tools = [*map(_tool, prompt.tools)]
        rendered: Any
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                tools=tools or None,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **options,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            # Why so many: a template is a program, and fails as programs do on what they get.
            raise InvalidRequest(
                field="messages", problem=f"the chat template refuses them: {error}"
            ) from error
        assert isinstance(rendered, str), "one conversation, not tokenized, is one text"
        return rendered

    def _message(self, message: Message) -> dict[str, Any]:
        """Return a message as templates read it; what it does not have is not there."""
        rendered: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.tool_calls:
            rendered["tool_calls"] = [self._call(call) for call in message.tool_calls]
        for name in ("tool_call_id", "name", "reasoning_content"):
            value = getattr(message, name)
            if value is not None:
                rendered[name] = value
        return rendered

    def _call(self, call: ToolCall) -> dict[str, Any]:
        arguments: Any = call.arguments
        if not self._arguments_are_text:
            try:
                parsed = json.loads(arguments)
            except (ValueError, RecursionError):
                parsed = None
            # Why not always: what was cut short, or is no object, is shown as it is.
            arguments = parsed if isinstance(parsed, dict) else arguments
        function = {"name": call.name, "arguments": arguments}
        return {"id": call.call_id, "type": "function", "function": function}


def _tool(tool: dict[str, Any]) -> dict[str, Any]:
    """Return a tool as models know them: how strictly its calls are held is not their business."""
    function = {name: value for name, value in tool["function"].items() if name != "strict"}
    return {**tool, "function": function}
