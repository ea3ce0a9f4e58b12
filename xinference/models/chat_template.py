# SPDX-License-Identifier: Apache-2.0
"""A conversation becomes the text a model was trained on, by its chat template.

The template is the family's or the tokenizer's own, a Jinja program that `transformers` runs in
a sandbox. What it complains of is the caller's to fix and comes out as `InvalidRequest`.
"""

import inspect
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from xinference.errors import AbilityMissing, InvalidRequest
from xinference.protocol.generation import ChatPrompt

RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages"
}
"""Names that steer the rendering itself; a caller's variables must not be among them."""


class ChatTemplate:
    """Renders conversations for one tokenizer. Any thread may call it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, *, template: str | None, model_name: str
    ) -> None:
        """Take the family's template, or with None the tokenizer's own, if it has one."""
        self._tokenizer = tokenizer
        self._template = template
        self._model_name = model_name

    @property
    def exists(self) -> bool:
        """Whether this model can chat at all."""
        return bool(self._template or self._tokenizer.chat_template)

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
        messages = [
            {"role": message.role, "content": message.content} for message in prompt.messages
        ]
        rendered: Any
        try:
            rendered = self._tokenizer.apply_chat_template(
                messages,
                chat_template=self._template,
                tokenize=False,
                add_generation_prompt=True,
                **prompt.template_options,
            )
        except (TemplateError, TypeError, ValueError, LookupError) as error:
            # Why so many: a template is a program, and fails as programs do on what they get.
            raise InvalidRequest(
                field="messages", problem=f"the chat template refuses them: {error}"
            ) from error
        assert isinstance(rendered, str), "one conversation, not tokenized, is one text"
        return rendered
