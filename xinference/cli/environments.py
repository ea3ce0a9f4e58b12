# SPDX-License-Identifier: Apache-2.0
"""`virtual-env`: the virtual environments of models, on every worker."""

import click

from .connection import connected, endpoint_options
from .output import say, show_json, show_table

COLUMNS = {
    "Model": "model_name",
    "Engine": "model_engine",
    "Python": "python_version",
    "Worker": "actor_ip_address",
    "Packages": "packages",
    "Replicas": "replicas",
    "Path": "path",
}
MODEL = "--model-name", "-n"
ENGINE = click.option("--model-engine", "-en", help="Of this engine alone.")
WORKER = click.option("--worker-ip", help="On this worker alone.")
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.group("virtual-env", short_help="List and remove virtual environments of models.")
def virtual_env_command() -> None:
    """List and remove virtual environments of models.

    A launch makes them: --virtual-env-package NAME==VERSION.
    """


@virtual_env_command.command("list", short_help="List them.")
@endpoint_options
@click.option(*MODEL, help="Of this model alone.")
@ENGINE
@WORKER
@JSON
def list_command(
    endpoint: str | None,
    api_key: str | None,
    model_name: str | None,
    model_engine: str | None,
    worker_ip: str | None,
    as_json: bool,
) -> None:
    """List the virtual environments that models run in, or did."""
    with connected(endpoint, api_key) as client:
        found = client.list_virtual_envs(model_name, model_engine, worker_ip)
    if as_json:
        show_json(found)
        return
    for one in found:
        one["packages"] = [f"{name} {version}" for name, version in one["packages"].items()]
    show_table("", list(COLUMNS), [[one[key] for key in COLUMNS.values()] for one in found])


@virtual_env_command.command("remove", short_help="Remove those of a model.")
@endpoint_options
@click.option(*MODEL, required=True, help="Whose.")
@ENGINE
@click.option("--python-version", help="Of this version alone, such as 3.11.")
@WORKER
def remove_command(
    endpoint: str | None,
    api_key: str | None,
    model_name: str,
    model_engine: str | None,
    python_version: str | None,
    worker_ip: str | None,
) -> None:
    """Remove the virtual environments of a model that nothing runs in."""
    with connected(endpoint, api_key) as client:
        is_removed = client.remove_virtual_envs(model_name, model_engine, python_version, worker_ip)
    if is_removed:
        say(f"The virtual environments of {model_name} are removed.")
    else:
        say(f"{model_name} has no virtual environment there.")
