# SPDX-License-Identifier: Apache-2.0
"""`autostart`: which models are launched by themselves."""

import json
from typing import Any, TextIO

import click

from .connection import connected, endpoint_options
from .output import say, show, show_json, show_table

COLUMNS = {
    "Model": "model_uid",
    "Family": "model_name",
    "Priority": "priority",
    "Enabled": "enabled",
    "Status": "status",
    "Attempts": "num_attempts",
    "Problem": "problem",
}


@click.group("autostart", short_help="List, add and remove models that start by themselves.")
def autostart_command() -> None:
    """List, add and remove models that are launched whenever the cluster runs and they do not."""


@autostart_command.command("list", short_help="List them, the first to be launched first.")
@endpoint_options
@click.option("--json", "as_json", is_flag=True, help="Print the entries with their launches.")
def list_autostart_command(endpoint: str | None, api_key: str | None, as_json: bool) -> None:
    """List the models that start by themselves, and how each is."""
    with connected(endpoint, api_key) as client:
        if as_json:
            show_json(client.get_autostart_config()["models"])
            return
        entries = client.get_autostart_model_summary()
    if not entries:
        say("No model starts by itself.")
        return
    rows = [[entry[key] for key in COLUMNS.values()] for entry in entries]
    show_table("", list(COLUMNS), rows)


@autostart_command.command("add", short_help="Let a model start by itself.")
@endpoint_options
@click.argument("file", type=click.File(encoding="utf-8"))
def add_autostart_command(endpoint: str | None, api_key: str | None, file: TextIO) -> None:
    """Let the model of the entry in FILE start by itself; "-" reads the entry from the input.

    It is JSON: {"launch": {"model_uid": …, "model_name": …, …}, "priority": 100, "max_retries": 3,
    "retry_interval_seconds": 30, "enabled": true}; all but the launch may be left out.
    """
    try:
        entry: Any = json.load(file)
    except ValueError as error:
        raise click.ClickException(f"{file.name} is not JSON: {error}") from error
    with connected(endpoint, api_key) as client:
        added = client.upsert_autostart_model(entry)
    show(f"{added['model_uid']} starts by itself.")


@autostart_command.command("remove", short_help="Let a model start by itself no more.")
@endpoint_options
@click.argument("model_uid")
def remove_autostart_command(endpoint: str | None, api_key: str | None, model_uid: str) -> None:
    """Let a model start by itself no more; it goes on if it runs."""
    with connected(endpoint, api_key) as client:
        client.remove_autostart_model(model_uid)
    show(f"{model_uid} starts by itself no more.")
