# SPDX-License-Identifier: Apache-2.0
"""`status`: the nodes of a cluster, its models and replicas, and what happened last."""

import time
from typing import Any

import click

from .connection import connected, endpoint_options
from .output import say, show_json, show_table

MAX_EVENTS = 10
GIB = 2**30


@click.command("status", short_help="Show nodes, models, replicas and what happened last.")
@endpoint_options
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
def status_command(endpoint: str | None, api_key: str | None, as_json: bool) -> None:
    """Show the nodes of the cluster, its models with their replicas, and what happened last."""
    with connected(endpoint, api_key) as client:
        cluster = client.get_status()
        models = client.get_instance_info()
        events = [
            {"model_uid": model["model_uid"], **event}
            for model in models
            for event in client.get_model_events(model["model_uid"])
        ]
    events.sort(key=lambda event: event["event_ts"])
    if as_json:
        nodes = [{"address": address, **node} for address, node in cluster["workers"].items()]
        show_json({"uptime": cluster["uptime"], "nodes": nodes, "models": models, "events": events})
        return
    say(f"The supervisor has been up for {_duration(cluster['uptime'])}.")
    show_table("Nodes", NODE_COLUMNS, [_node_row(*node) for node in cluster["workers"].items()])
    rows = [row for model in models for row in _replica_rows(model)]
    show_table("Models", REPLICA_COLUMNS, rows)
    latest = [
        [
            time.strftime("%H:%M:%S", time.localtime(event["event_ts"])),
            event["model_uid"],
            event["event_content"],
        ]
        for event in events[-MAX_EVENTS:]
    ]
    show_table("Events", ["Time", "Model", "Event"], latest)


NODE_COLUMNS = ["Address", "State", "Replicas", "CPU", "Memory used", "GPUs: memory used"]
REPLICA_COLUMNS = ["Model", "State", "Replica", "Replica state", "Node", "GPU", "Restarts", "Why"]


def _node_row(address: str, node: dict[str, Any]) -> list[Any]:
    cpu = node["status"]["cpu"]
    memory = f"{cpu['memory_used'] / GIB:.1f} of {cpu['memory_total'] / GIB:.1f} GiB"
    gpus = [
        f"{index}: {gpu['mem_used'] / GIB:.1f} of {gpu['mem_total'] / GIB:.1f} GiB"
        + (f", quarantined: {gpu['quarantine']}" if gpu.get("quarantine") else "")
        for index, gpu in node["status"].items()
        if index != "cpu"
    ]
    return [address, node["state"], node["num_replicas"], f"{cpu['usage']:.0%}", memory, gpus]


def _replica_rows(model: dict[str, Any]) -> list[list[Any]]:
    return [
        [
            model["model_uid"],
            model["status"],
            replica["replica_id"],
            replica["state"],
            replica["worker_address"],
            replica["gpu_idx"],
            replica["num_restarts"],
            replica["error_message"],
        ]
        for replica in model["replica_statuses"]
    ]


def _duration(seconds: int) -> str:
    hours, rest = divmod(seconds, 3600)
    minutes, left = divmod(rest, 60)
    return f"{hours}:{minutes:02}:{left:02}"
