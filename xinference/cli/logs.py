# SPDX-License-Identifier: Apache-2.0
"""`logs`: what a model or a host has logged, and what it goes on to log."""

import json
import re
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from .connection import connected, endpoint_options
from .output import say, show

if TYPE_CHECKING:
    from xinference.client import Client

LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
CONTROLS = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|[\x00-\x08\x0b-\x1f\x7f-\x9f]")
COLORS = {"DEBUG": "bright_black", "WARNING": "yellow", "ERROR": "red", "CRITICAL": "red"}


@click.command("logs", short_help="Show what a model or a host has logged.")
@click.argument("model_uid", required=False)
@endpoint_options
@click.option("--model-uid", "-u", "given_uid", help="Another way to name the model.")
@click.option("--node", metavar="HOST", help='A worker\'s host, or "supervisor", for its own log.')
@click.option("--replica", type=click.IntRange(0), help="Only this one of the model.")
@click.option("--level", type=click.Choice(LEVELS, case_sensitive=False), default="DEBUG")
@click.option(
    "--lines", "-n", type=click.IntRange(0, 10_000), default=100, show_default=True, help="The last"
)
@click.option("--follow", "-f", is_flag=True, help="Go on with what comes, until Ctrl-C.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object for each line.")
def logs_command(
    model_uid: str | None,
    endpoint: str | None,
    api_key: str | None,
    given_uid: str | None,
    node: str | None,
    replica: int | None,
    follow: bool,
    as_json: bool,
    **words: Any,
) -> None:
    """Show what the replicas of a model have logged, on all workers, by its time.

    With --node, what the host's own processes have: supervisor, worker, gateways and downloads.
    """
    uid = model_uid or given_uid
    if (uid is None) == (node is None):
        raise click.UsageError("Name a model, or a host with --node.")
    if node is not None and replica is not None:
        raise click.UsageError("--replica goes with a model.")
    of_what = {"model_uid": uid, "replica": replica} if node is None else {"node": node}
    told: set[str] = set()
    with connected(endpoint, api_key) as client:
        for batch in _batches(client, {**of_what, **words}, follow=follow):
            _say_who_is_silent(batch["silent"], told)
            for line in batch["lines"]:
                show(json.dumps(line, ensure_ascii=False) if as_json else text_of(line))


def _batches(client: "Client", asked: dict[str, Any], *, follow: bool) -> Iterator[dict[str, Any]]:
    """Yield what there is, and with `follow` what comes, for as long as anybody wants it."""
    is_node = "node" in asked
    if not follow:
        yield client.get_node_logs(**asked) if is_node else client.get_model_logs(**asked)
        return
    while True:
        stream = client.follow_node_logs(**asked) if is_node else client.follow_model_logs(**asked)
        with stream:
            for batch in stream:
                yield batch
                # The server ends a stream after a while; the next one goes on from here.
                asked = {**asked, "cursor": batch["cursor"]}


def _say_who_is_silent(silent: list[dict[str, str]], told: set[str]) -> None:
    """Tell once of each host whose lines are missing, and again when it was back meanwhile."""
    for host in silent:
        if host["node"] not in told:
            say(f"No lines of {host['node']}: {host['problem']}")
    told.clear()
    told.update(host["node"] for host in silent)


def text_of(line: dict[str, Any]) -> str:
    """Return a line as people read it."""
    seconds, fraction = divmod(line["time"], 1)
    when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    level = click.style(f"{line['level']:<8}", fg=COLORS.get(line["level"]))
    who = line["replica"] or " ".join(filter(None, (line["node"], line["process"])))
    about = f" [{line['request_id']}]" if line["request_id"] else ""
    source = f" {line['logger']}" if line["logger"] else ""
    # Why: some servers colour their lines, and what a terminal obeys is not for others to say.
    message = CONTROLS.sub("", line["message"])
    return f"{when}.{int(fraction * 1000):03} {level}{who}{source}{about}: {message}"
