# SPDX-License-Identifier: Apache-2.0
"""`quickstart`: from nothing to a streamed answer of the model inside the package."""

import os
import signal
from dataclasses import replace

import click

from .addresses import port_to_listen_on, url_of
from .chat import text_of
from .connection import read_settings
from .logins import saved_login
from .models import wait_until_ready
from .output import progress_bar, say, show
from .serve import (
    LOG_LEVEL_OPTION,
    PORT_OPTION,
    GatewayOptions,
    gateway_banner,
    guard,
    host_option,
    is_chosen,
    local_configs,
    warn_if_open,
)

MODEL = "xinference-guide"
QUESTION = "What is Xinference?"
FAILED = 1
INTERRUPTED = 130


@click.command("quickstart", short_help="Start a cluster and chat with its guide.")
@click.option("--exit", "exits", is_flag=True, help="Stop everything after the answer.")
@click.option("--question", default=QUESTION, show_default=True, help="What to ask.")
@host_option("127.0.0.1")
@PORT_OPTION
@LOG_LEVEL_OPTION
def quickstart_command(
    exits: bool, question: str, host: str, port: int, log_level: str | None
) -> None:
    """Start a local cluster, launch the model inside the package and ask it something.

    The cluster stays up until Ctrl-C. Exit code 1: something failed, and nothing is left running.
    """
    settings = read_settings()
    port = port_to_listen_on(host, port, is_chosen=is_chosen("port"))
    warn_if_open(host, settings.home)
    endpoint = url_of(host, port)
    api_key = settings.api_key or saved_login(settings.home, endpoint)
    is_answered = has_failed = False

    def on_ready() -> None:
        from xinference.client import ClientError

        nonlocal is_answered, has_failed
        try:
            first_chat(endpoint, question, api_key=api_key)
            is_answered = True
            show(gateway_banner(endpoint, settings.home))
        except click.ClickException as error:
            has_failed = True
            error.show()
        except ClientError as error:
            has_failed = True
            say(f"Error: {error}")
        if exits or has_failed:
            # The guardian's own way to end: it stops what it started, then returns.
            os.kill(os.getpid(), signal.SIGTERM)

    say(f"Starting a cluster at {endpoint} …")
    status = guard(
        *local_configs(
            replace(settings, log_level=log_level or "WARNING"),
            GatewayOptions(host=host, port=port),
        ),
        on_ready=on_ready,
    )
    if status == 0 and not is_answered:
        status = FAILED if has_failed else INTERRUPTED
    raise SystemExit(status)


def first_chat(endpoint: str, question: str, *, api_key: str | None = None) -> None:
    """Launch the guide and ask it through the OpenAI endpoint; print the answer as it comes.

    Raises:
        ClientError, click.ClickException: there is no whole answer.
    """
    from xinference.client import ChatModelHandle, Client, Stream

    with Client(endpoint, api_key) as client:
        # It may run already: what was launched before comes back with a start.
        if MODEL not in client.list_models():
            client.launch_model(MODEL, model_engine="transformers", wait_ready=False)
        with progress_bar(f"Launching {MODEL}") as show_progress:
            wait_until_ready(client, MODEL, show_progress)
        model = client.get_model(MODEL)
        assert isinstance(model, ChatModelHandle), "the guide can chat"
        messages = [{"role": "user", "content": question}]
        say(f"POST {endpoint}/v1/chat/completions\n\n{question}\n")
        answer = model.chat(messages, generate_config={"stream": True})
        assert isinstance(answer, Stream), "it was asked for"
        with answer:
            for chunk in answer:
                show(text_of(chunk), nl=False)
        show("")
