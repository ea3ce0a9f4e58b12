# SPDX-License-Identifier: Apache-2.0
"""`keys`, `usage` and `login`: who may use a gateway, and what they have used."""

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from xinference.errors import XinferenceError

from .connection import connected, endpoint_options, read_settings
from .logins import save_login
from .output import say, show, show_json, show_table

if TYPE_CHECKING:
    from xinference.api.keys.store import KeyStore

SCOPES = ("invoke", "monitor", "admin")
UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

KEY_COLUMNS = {
    "Id": "id",
    "Name": "name",
    "Status": "status",
    "Scopes": "scopes",
    "Models": "models",
    "Requests/min": "requests_per_minute",
    "Tokens/min": "tokens_per_minute",
    "Created": "created_at",
    "Expires": "expires_at",
}
USAGE_COLUMNS = {
    "Key": "key_name",
    "Model": "model",
    "Requests": "requests",
    "Prompt tokens": "prompt_tokens",
    "Cached": "cached_tokens",
    "Completion tokens": "completion_tokens",
    "Reasoning": "reasoning_tokens",
}

OFFLINE = click.option(
    "--offline",
    is_flag=True,
    help="Work on XINFERENCE_HOME of this host; needs no running gateway, and no key.",
)
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


def duration(text: str) -> int:
    """Return a time such as 90s, 15m, 12h or 30d as seconds."""
    found = re.fullmatch(r"([1-9]\d*)([smhd])", text)
    if found is None:
        raise click.BadParameter(f"{text!r} is not a time such as 90s, 15m, 12h or 30d")
    return int(found[1]) * UNITS[found[2]]


@click.group("keys", short_help="Make, list and revoke API keys.")
def keys_command() -> None:
    """Make, list and revoke API keys.

    A gateway is open until its first key is made, which needs the scope admin. A change reaches
    every gateway process of the host within a second.
    """


@keys_command.command("create", short_help="Make a key and print it.")
@endpoint_options
@click.option("--name", "-n", required=True, help="What to call it.")
@click.option(
    "--scope",
    "-s",
    "scopes",
    multiple=True,
    type=click.Choice(SCOPES),
    help="What it is for; may be repeated. [default: invoke]",
)
@click.option(
    "--model", "-m", "models", multiple=True, metavar="UID", help="May ask only these models."
)
@click.option("--expires", "expires_in_seconds", type=duration, help="After 90s, 15m, 12h or 30d.")
@click.option("--requests-per-minute", type=click.IntRange(min=1))
@click.option("--tokens-per-minute", type=click.IntRange(min=1))
@OFFLINE
@JSON
def create_key_command(
    endpoint: str | None, api_key: str | None, offline: bool, as_json: bool, **words: Any
) -> None:
    """Make a key and print it; it is shown this once."""
    words["scopes"] = list(words["scopes"]) or None
    words["models"] = list(words["models"]) or None
    if offline:
        made = _create_offline(words)
    else:
        with connected(endpoint, api_key) as client:
            made = client.create_api_key(**words)
    if as_json:
        show_json(made)
        return
    show(made["key"])
    say("Keep it: it is not shown again.")


@keys_command.command("list", short_help="List the keys.")
@endpoint_options
@click.option("--ended", is_flag=True, help="Those that expired or were revoked, too.")
@OFFLINE
@JSON
def list_keys_command(
    endpoint: str | None, api_key: str | None, ended: bool, offline: bool, as_json: bool
) -> None:
    """List the keys; their secrets are kept nowhere."""
    if offline:
        items = _list_offline(ended=ended)
    else:
        with connected(endpoint, api_key) as client:
            items = client.list_api_keys(ended=ended)
    if as_json:
        show_json(items)
    else:
        rows = [[_cell(name, item[name]) for name in KEY_COLUMNS.values()] for item in items]
        show_table("", list(KEY_COLUMNS), rows)


@keys_command.command("revoke", short_help="Revoke a key for good.")
@endpoint_options
@OFFLINE
@click.argument("key_id")
def revoke_key_command(
    endpoint: str | None, api_key: str | None, offline: bool, key_id: str
) -> None:
    """Revoke the key with this id for good."""
    if offline:
        with _store() as store:
            name = store.revoke(key_id).spec.name
    else:
        with connected(endpoint, api_key) as client:
            name = client.revoke_api_key(key_id)["name"]
    show(f"Revoked: {name}")


@click.command("usage", short_help="Show what was used, by key and model.")
@endpoint_options
@click.option("--since", metavar="DAY", help="Such as 2026-01-31, in UTC.")
@click.option("--until", metavar="DAY", help="The last day. [default: today]")
@JSON
def usage_command(
    endpoint: str | None, api_key: str | None, since: str | None, until: str | None, as_json: bool
) -> None:
    """Show what was used, by key and model; for a key without the scope monitor its own."""
    with connected(endpoint, api_key) as client:
        rows = client.get_usage(since=since, until=until)
    if as_json:
        show_json(rows)
    else:
        cells = [[row[name] for name in USAGE_COLUMNS.values()] for row in rows]
        show_table("", list(USAGE_COLUMNS), cells)


@click.command("login", short_help="Keep an API key for further commands.")
@click.option("--endpoint", "-e", metavar="URL", help="Of the cluster.")
@click.option("--username", required=True, help="The name or the id of an API key.")
@click.option("--password", required=True, help="The key.")
def login_command(endpoint: str | None, username: str, password: str) -> None:
    """Check an API key, and send it with every further command to this endpoint."""
    settings = read_settings()
    with connected(endpoint, None) as client:
        if not client.needs_api_key():
            say(f"{client.base_url} asks for no API keys; there is nothing to log in to.")
            return
        client.login(username, password)
    path = save_login(settings.home, endpoint or settings.endpoint, password)
    say(f"Logged in; the key is in {path}.")


def _create_offline(words: dict[str, Any]) -> dict[str, Any]:
    from xinference.api.keys.key import KeySpec, Scope

    lifetime = words["expires_in_seconds"]
    with _store() as store:
        spec = KeySpec(
            name=words["name"],
            scopes=frozenset(map(Scope, words["scopes"] or [Scope.INVOKE])),
            models=None if words["models"] is None else frozenset(words["models"]),
            expires_ts=None if lifetime is None else int(time.time()) + lifetime,
            requests_per_minute=words["requests_per_minute"],
            tokens_per_minute=words["tokens_per_minute"],
        )
        text, key = store.create(spec)
    return key.as_item(now=time.time()) | {"key": text}


def _list_offline(*, ended: bool) -> list[dict[str, Any]]:
    with _store() as store:
        items = [key.as_item(now=time.time()) for key in store.all_keys()]
    return [item for item in items if ended or item["status"] == "active"]


@contextmanager
def _store() -> "Iterator[KeyStore]":
    """Give the store of this host; an error ends the command with exit code 1."""
    import sqlite3

    from xinference.api.keys.store import KeyStore

    home = read_settings().home
    try:
        store = KeyStore.open(home)
        try:
            yield store
        finally:
            store.close()
    except XinferenceError as error:
        raise click.ClickException(str(error)) from error
    except (OSError, sqlite3.Error) as error:
        raise click.ClickException(f"the API keys in {home} cannot be used: {error}") from error


def _cell(name: str, value: Any) -> Any:
    if name.endswith("_at") and value is not None:
        return time.strftime("%Y-%m-%d %H:%M", time.localtime(value))
    return value
