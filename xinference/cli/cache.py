# SPDX-License-Identifier: Apache-2.0
"""`cached`, `remove-cache` and `download`: what the workers keep of models."""

import time
from typing import TYPE_CHECKING, Any

import click

from .connection import connected, endpoint_options
from .output import progress_bar, say, show, show_json, show_table, size_of

if TYPE_CHECKING:
    from xinference.client import Client

POLL_SECONDS = 0.5
WORKER_OPTION = click.option("--worker-ip", help='Only on this worker: its host, or "host:port".')
VERSION_OPTION = click.option(
    "--model-version", "-n", required=True, help="As `xinference cached` has it."
)


@click.command("cached", short_help="List what the workers keep of models.")
@endpoint_options
@click.option("--model-name", "-n", help="Only of this family.")
@WORKER_OPTION
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
def cached_command(
    endpoint: str | None,
    api_key: str | None,
    model_name: str | None,
    worker_ip: str | None,
    as_json: bool,
) -> None:
    """List what the workers keep of models, and how much of their disks it takes."""
    with connected(endpoint, api_key) as client:
        kept = client.list_cached_models(model_name, worker_ip)
    if as_json:
        show_json(kept)
    elif not kept:
        say("There are no cache files.")
    else:
        columns = ["Version", "Size", "Complete", "Used by", "Worker", "Path"]
        show_table("cached_model:", columns, [_row(model) for model in kept])
    if kept.unanswered:
        say(f"What {', '.join(kept.unanswered)} keeps is not among it: no answer.")


def _row(model: dict[str, Any]) -> list[Any]:
    return [
        model["model_version"],
        size_of(model["size_bytes"]),
        "yes" if model["is_complete"] else "no",
        model["used_by"],
        model["actor_ip_address"],
        model["path"],
    ]


@click.command("remove-cache", short_help="Remove what the workers keep of a model.")
@endpoint_options
@VERSION_OPTION
@WORKER_OPTION
@click.option("--check", is_flag=True, help="Do not ask whether that is wanted.")
@click.option("--force", is_flag=True, help="Remove what a model runs from, too.")
@click.option("--json", "as_json", is_flag=True, help="Print what was removed, as JSON.")
def remove_cache_command(
    endpoint: str | None,
    api_key: str | None,
    model_version: str,
    worker_ip: str | None,
    check: bool,
    force: bool,
    as_json: bool,
) -> None:
    """Remove what one version of a model alone needs; what another one needs, too, stays."""
    with connected(endpoint, api_key) as client:
        found = client.list_deletable_models(model_version, worker_ip)
        for path in found["paths"]:
            say(path)
        if found["used_by"]:
            say(f"In use by {', '.join(found['used_by'])}.")
        if found.get("unanswered"):
            say(f"May be kept by {', '.join(found['unanswered'])}, too, which does not answer.")
        if not check:
            size = size_of(found["freed_bytes"])
            click.confirm(f"Remove these files ({size})?", abort=True, err=True)
        removed = client.confirm_and_remove_model(model_version, worker_ip, force=force)
    if as_json:
        show_json({"result": removed, **found})
    else:
        show(f"{model_version} is removed; {size_of(found['freed_bytes'])} are free again.")


@click.command("download", short_help="Download a model without launching it.")
@endpoint_options
@click.option("--model-name", "-n", required=True, help="A family; see `registrations`.")
@click.option("--model-type", "-t", default="LLM", show_default=True)
@click.option("--model-engine", "-en", help="The engine that it is for.")
@click.option("--size-in-billions", "-s", "model_size_in_billions", help="4, 0.5 or 0_5.")
@click.option("--model-format", "-f")
@click.option("--quantization", "-q")
@click.option("--download-hub", help="huggingface or modelscope; else whichever answers.")
@click.option("--worker-ip", help="The worker that is to have it; else every one.")
@click.option("--json", "as_json", is_flag=True, help="Print where it is, as JSON.")
def download_command(
    endpoint: str | None, api_key: str | None, as_json: bool, **words: Any
) -> None:
    """Download a model to every worker, or to one; Ctrl-C cancels, and what has arrived is kept."""
    with connected(endpoint, api_key) as client:
        cache_uid = client.download_model(**words)
        try:
            with progress_bar(f"Downloading {cache_uid}") as show_progress:
                wait_until_there(client, cache_uid, show_progress)
        except KeyboardInterrupt:
            say(f"Cancelling the download of {cache_uid} …")
            client.cancel_download(cache_uid)
            raise
        kept = client.list_cached_models(worker_ip=words["worker_ip"])
    there = [model for model in kept if model["model_version"] == cache_uid]
    if as_json:
        show_json(there)
    else:
        for model in there:
            show(f"{model['path']} on {model['actor_ip_address']}: {size_of(model['size_bytes'])}")


def wait_until_there(client: "Client", cache_uid: str, show_progress: Any) -> None:
    """Return when a download is complete wherever it runs.

    Raises:
        click.ClickException: it failed, or was cancelled.
    """
    while True:
        progress = client.get_download_progress(cache_uid)
        stage = progress["stage"]
        if stage == "error":
            raise click.ClickException(progress["info"])
        if stage in ("cancelled", "pending"):
            # Pending: the worker was started again, and knows nothing of it.
            raise click.ClickException(f"The download of {cache_uid} was cancelled.")
        show_progress(stage, progress["progress"], progress["download_files"])
        if stage == "completed":
            return
        time.sleep(POLL_SECONDS)
