# SPDX-License-Identifier: Apache-2.0
"""What every command shares: the settings, the endpoint and its options, a client to it."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeVar

import click

from xinference.errors import InvalidSetting
from xinference.settings import Settings

from .logins import saved_login
from .output import say

if TYPE_CHECKING:
    from xinference.client import Client

Command = TypeVar("Command", bound=Callable[..., object])


def _with_dashes(token: str) -> str:
    """Let `--model_uid` mean `--model-uid`, as scripts of today write some options."""
    return token.replace("_", "-")


CONTEXT_SETTINGS: dict[str, Any] = {
    "help_option_names": ["-h", "--help"],
    "token_normalize_func": _with_dashes,
    "max_content_width": 100,
}
"""Of every command that is an executable; commands below inherit it."""


def read_settings() -> Settings:
    """Read the environment; warn of names that are none.

    Raises:
        click.UsageError: a value is malformed.
    """
    try:
        settings, warnings = Settings.from_environ(os.environ)
    except InvalidSetting as error:
        raise click.UsageError(str(error)) from error
    for warning in warnings:
        say(f"Warning: {warning}")
    return settings


def endpoint_options(command: Command) -> Command:
    """Add `--endpoint` and `--api-key`."""
    command = click.option(
        "--api-key",
        "-ak",
        metavar="KEY",
        help="Sent to the endpoint. [env: XINFERENCE_API_KEY; else that of `xinference login`]",
    )(command)
    return click.option(
        "--endpoint",
        "-e",
        metavar="URL",
        help="Of the cluster. [env: XINFERENCE_ENDPOINT; default: http://127.0.0.1:9997]",
    )(command)


@contextmanager
def connected(endpoint: str | None, api_key: str | None) -> Iterator["Client"]:
    """Give a client of the endpoint; an error of a call ends the command with exit code 1."""
    # Why here: httpx takes a tenth of a second, which `--help` should not.
    from xinference.client import Client, ClientError

    settings = read_settings()
    endpoint = endpoint or settings.endpoint
    try:
        client = Client(
            endpoint, api_key or settings.api_key or saved_login(settings.home, endpoint)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    with client:
        try:
            yield client
        except ClientError as error:
            raise click.ClickException(str(error)) from error
