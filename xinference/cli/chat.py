# SPDX-License-Identifier: Apache-2.0
"""`chat` and `generate`: talk to a model, turn by turn."""

import sys
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from typing import TYPE_CHECKING, Any

import click

from .connection import connected, endpoint_options
from .output import say, show

if TYPE_CHECKING:
    from xinference.client import Stream

Ask = Callable[[str], "dict[str, Any] | Stream"]
Keep = Callable[[str, str], None]


def talk_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add the options that both commands have."""
    for option in (
        click.option(
            "--stream", type=bool, default=True, show_default=True, help="Show it as it comes."
        ),
        click.option("--max-tokens", type=int, default=512, show_default=True),
        click.option("--model-uid", "-u", required=True),
        endpoint_options,
    ):
        command = option(command)
    return command


@click.command("chat", short_help="Chat with a model.")
@talk_options
def chat_command(
    endpoint: str | None, api_key: str | None, model_uid: str, max_tokens: int, stream: bool
) -> None:
    """Chat with a model; it remembers what was said.

    An empty line or Ctrl-D ends the chat, Ctrl-C stops an answer. Without a terminal, each line of
    the input is a turn.
    """
    from xinference.client import ChatModelHandle

    config = {"max_tokens": max_tokens, "stream": stream}
    messages: list[dict[str, str]] = []
    with connected(endpoint, api_key) as client:
        model = client.get_model(model_uid)
        if not isinstance(model, ChatModelHandle):
            raise click.ClickException(_cannot_chat(model, model_uid))

        def ask(text: str) -> "dict[str, Any] | Stream":
            return model.chat(
                [*messages, {"role": "user", "content": text}], generate_config=config
            )

        def keep(text: str, answer: str) -> None:
            messages.append({"role": "user", "content": text})
            messages.append({"role": "assistant", "content": answer})

        _talk(ask, keep, prompt="User: ", answer_prompt="Assistant: ")


def _cannot_chat(model: Any, model_uid: str) -> str:
    from xinference.client import EmbeddingModelHandle, RerankModelHandle

    commands = {EmbeddingModelHandle: "embed", RerankModelHandle: "rerank"}
    command = commands.get(type(model), "generate")
    return f"{model_uid} cannot chat; try: xinference {command} --model-uid {model_uid}"


@click.command("generate", short_help="Let a model go on from a text.")
@talk_options
def generate_command(
    endpoint: str | None, api_key: str | None, model_uid: str, max_tokens: int, stream: bool
) -> None:
    """Let a model go on from a text; each text stands alone.

    An empty line or Ctrl-D ends, Ctrl-C stops an answer. Without a terminal, each line of the
    input is a text.
    """
    from xinference.client import GenerateModelHandle

    config = {"max_tokens": max_tokens, "stream": stream}
    with connected(endpoint, api_key) as client:
        model = client.get_model(model_uid)
        if not isinstance(model, GenerateModelHandle):
            raise click.ClickException(f"{model_uid} does not generate text")
        _talk(
            lambda text: model.generate(text, generate_config=config),
            lambda _text, _answer: None,
            prompt="Prompt: ",
            answer_prompt="Completion: ",
        )


def _talk(ask: Ask, keep: Keep, *, prompt: str, answer_prompt: str) -> None:
    """Read a line, show its answer, and again, until the input ends.

    Raises:
        ClientError: (without a terminal) a turn failed. With one, it is shown and the talk goes on.
    """
    from xinference.client import ClientError

    is_terminal = sys.stdin.isatty()
    for text in _lines(prompt if is_terminal else None):
        if is_terminal:
            say_inline(answer_prompt)
        try:
            answer, is_whole = _show_answer(ask, text)
        except ClientError as error:
            if not is_terminal:
                raise
            say(f"\nError: {error}")
            continue
        if answer or is_whole:
            keep(text, answer)
        if not is_whole and not is_terminal:
            raise KeyboardInterrupt


def say_inline(text: str) -> None:
    """Print chatter without ending the line."""
    click.echo(text, nl=False, err=True)


def _lines(prompt: str | None) -> Iterator[str]:
    """Yield what is typed until an empty line or the end; without `prompt`, every line piped in."""
    if prompt is None:
        yield from (line for line in (line.strip() for line in sys.stdin) if line)
        return
    with suppress(ImportError):
        import readline  # noqa: F401  # its import gives `input` line editing and a history
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            say("")
            return
        if not line:
            return
        yield line


def _show_answer(ask: Ask, text: str) -> tuple[str, bool]:
    """Print an answer; return it, and whether it is whole. Ctrl-C ends it early."""
    pieces: list[str] = []
    try:
        reply = ask(text)
        if isinstance(reply, dict):
            pieces.append(text_of(reply))
            show(pieces[0])
            return pieces[0], True
        with closing(reply):
            for chunk in reply:
                piece = text_of(chunk)
                pieces.append(piece)
                show(piece, nl=False)
    except KeyboardInterrupt:
        say("\n[stopped]")
        return "".join(pieces), False
    show("")
    return "".join(pieces), True


def text_of(reply: dict[str, Any]) -> str:
    """Return the text of the first choice of a reply or of a chunk of one."""
    for choice in reply.get("choices") or ():
        said = choice.get("message") or choice.get("delta") or choice
        return said.get("content") or said.get("text") or ""
    return ""
