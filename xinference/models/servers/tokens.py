# SPDX-License-Identifier: Apache-2.0
"""Text ⇄ token ids for the model of a server, and the template of its chats.

Where the files have a tokenizer of `transformers`, that is used, in this process. A GGUF has its
own, which only its server reads, so that is asked.
"""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

import httpx

from xinference.errors import ReplicaLost

ASK_SECONDS = 60.0
"""A prompt of megabytes takes seconds."""


class Tokens(Protocol):
    """Text ⇄ token ids. Any thread may call it; it may block."""

    chat_template: Any

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Return the ids of a text; with `special` those around a whole text, too."""
        ...

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of some ids."""
        ...

    @property
    def apply_chat_template(self) -> Callable[..., Any]:
        """As that of `transformers`."""
        ...


class ServerTokens:
    """The tokenizer in a GGUF, by the routes of llama.cpp's server. Implements `Tokens`."""

    def __init__(self, client: httpx.Client, facts: Mapping[str, Any], *, model_name: str) -> None:
        """Take what the server says at `/props`."""
        self._client = client
        self._model_name = model_name
        self.chat_template: str | None = facts.get("chat_template") or None
        self._special = {name: facts.get(name) or "" for name in ("bos_token", "eos_token")}

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Return the ids of a text.

        Raises:
            ReplicaLost: the server does not answer.
        """
        body = {"content": text, "add_special": special, "parse_special": True}
        return tuple(self._ask("/tokenize", body)["tokens"])

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of some ids.

        Raises:
            ReplicaLost: the server does not answer.
        """
        return str(self._ask("/detokenize", {"tokens": [*token_ids]})["content"])

    def apply_chat_template(
        self, conversation: Any, tools: Any, chat_template: Any, **options: Any
    ) -> Any:
        """Return a conversation as text."""
        from transformers.utils.chat_template_utils import render_jinja_template

        del options["tokenize"]
        template = chat_template or self.chat_template
        variables: dict[str, Any] = {**self._special, **options}
        rendered: Any = render_jinja_template(
            [conversation], tools=tools, chat_template=template, **variables
        )
        return rendered[0][0]  # the only conversation's

    def _ask(self, path: str, body: Any) -> Any:
        try:
            return self._client.post(path, json=body, timeout=ASK_SECONDS).raise_for_status().json()
        except (httpx.HTTPError, ValueError) as error:
            raise ReplicaLost(
                model=self._model_name, problem=f"its engine's server does not answer: {error}"
            ) from error


class FileTokens:
    """The tokenizer in a directory of `transformers`. Implements `Tokens`."""

    def __init__(self, directory: Path, *, trust_remote_code: bool) -> None:
        """Load it.

        Raises:
            OSError, ValueError: there is none, or it does not load.
        """
        # Why here: it takes seconds, and a GGUF needs none of it.
        from transformers import AutoTokenizer

        self._tokenizer: Any = AutoTokenizer.from_pretrained(
            str(directory), trust_remote_code=trust_remote_code, local_files_only=True
        )
        self.chat_template = self._tokenizer.chat_template

    def encode(self, text: str, *, special: bool) -> tuple[int, ...]:
        """Return the ids of a text."""
        # Why a list of one: for a batch the tokenizer lets go of the interpreter's lock.
        encoded = self._tokenizer([text], add_special_tokens=special, verbose=False)
        return tuple(encoded["input_ids"][0])

    def decode(self, token_ids: Iterable[int]) -> str:
        """Return the text of some ids."""
        return str(self._tokenizer.decode([*token_ids], skip_special_tokens=False))

    def apply_chat_template(
        self, conversation: Any, tools: Any, chat_template: Any, **options: Any
    ) -> Any:
        """Return a conversation as text."""
        return self._tokenizer.apply_chat_template(
            conversation, tools=tools, chat_template=chat_template, **options
        )
