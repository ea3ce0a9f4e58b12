# SPDX-License-Identifier: Apache-2.0
"""`registrations`, `register`, `unregister`, `engine` and `vllm-models`: the catalogue."""

from pathlib import Path
from typing import Any

import click

from .connection import connected, endpoint_options
from .output import say, show_json, show_table

TYPE_OPTION = click.option("--model-type", "-t", default="LLM", show_default=True)


@click.command("registrations", short_help="List the models of the catalogue.")
@endpoint_options
@TYPE_OPTION
@click.option("--search", "-q", "query", help="Words of the name or the description.")
@click.option("--ability", "-a", multiple=True, help="Such as tools; may be given again.")
@click.option("--language", "-l", multiple=True, help="Such as de; may be given again.")
@click.option("--model-format", "-f", help="Such as ggufv2.")
@click.option("--min-size", type=click.FloatRange(min=0), help="Billions of parameters.")
@click.option("--max-size", type=click.FloatRange(min=0), help="Billions of parameters.")
@click.option("--fits", is_flag=True, help="Only what the cluster has memory for now.")
@click.option("--cached", is_flag=True, help="Only what needs no download.")
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
def registrations_command(
    endpoint: str | None,
    api_key: str | None,
    model_type: str,
    ability: tuple[str, ...],
    language: tuple[str, ...],
    as_json: bool,
    **asked: Any,
) -> None:
    """List the models of the catalogue: the built-in ones and those that were registered."""
    with connected(endpoint, api_key) as client:
        families = client.list_model_registrations(
            model_type, detailed=True, ability=list(ability), language=list(language), **asked
        )
    if as_json:
        show_json(families)
        return
    dimensions = ["Dimensions"] if any("dimensions" in one for one in families) else []
    rows = [
        [
            model_type,
            family["model_name"],
            family.get("model_lang", family.get("language")),
            family.get("model_ability"),
            *([family.get("dimensions")] if dimensions else []),
            family["is_builtin"],
        ]
        for family in families
    ]
    show_table("", ["Type", "Name", "Language", "Ability", *dimensions, "Is-built-in"], rows)


@click.command("register", short_help="Add a model of your own to the catalogue.")
@endpoint_options
@TYPE_OPTION
@click.option(
    "--file",
    "-f",
    "path",
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="The model as JSON.",
)
@click.option("--worker-ip", "-w")
@click.option("--persist", "-p", is_flag=True, help="Keep it over a restart.")
def register_command(
    endpoint: str | None,
    api_key: str | None,
    model_type: str,
    path: Path,
    worker_ip: str | None,
    persist: bool,
) -> None:
    """Add a model of your own to the catalogue."""
    try:
        family = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise click.ClickException(f"{path} cannot be read: {error}") from error
    with connected(endpoint, api_key) as client:
        client.register_model(model_type, family, persist, worker_ip)


@click.command("unregister", short_help="Remove a registered model from the catalogue.")
@endpoint_options
@TYPE_OPTION
@click.option("--model-name", "-n", required=True)
def unregister_command(
    endpoint: str | None, api_key: str | None, model_type: str, model_name: str
) -> None:
    """Remove a registered model from the catalogue; what runs of it goes on."""
    with connected(endpoint, api_key) as client:
        client.unregister_model(model_type, model_name)


@click.command("engine", short_help="Show the engines that can run a model.")
@endpoint_options
@click.option("--model-name", "-n", required=True)
@TYPE_OPTION
@click.option("--model-engine", "-en", help="Only this engine.")
@click.option("--model-format", "-f", help="Only this format.")
@click.option("--model-size-in-billions", "-s", help="Only this size.")
@click.option("--quantization", "-q", help="Only this quantization.")
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
def engine_command(
    endpoint: str | None,
    api_key: str | None,
    model_name: str,
    model_type: str,
    model_engine: str | None,
    as_json: bool,
    **wanted: str | None,
) -> None:
    """Show the engines that can run a model, and in which formats and sizes."""
    with connected(endpoint, api_key) as client:
        engines = client.query_engine_by_model_name(model_name, model_type)
    if model_engine is not None:
        engines = {
            name: found for name, found in engines.items() if name.lower() == model_engine.lower()
        }
    engines = {name: matching(found, wanted) for name, found in engines.items()}
    if as_json:
        show_json(engines)
        return
    rows = [
        [
            model_name,
            name,
            variant.get("model_format"),
            variant.get("model_size_in_billions"),
            variant.get("quantizations", variant.get("quantization")),
        ]
        for name, found in engines.items()
        if not isinstance(found, str)
        for variant in found
    ]
    if rows:
        columns = ["Name", "Engine", "Format", "Size (in billions)", "Quantization"]
        show_table("", columns, rows)
    else:
        say(f"No engine can run {model_name} like that.")
    for name, found in engines.items():
        if isinstance(found, str):
            say(f"{name}: {found}")


@click.command("vllm-models", short_help="List the models that vLLM can run.")
@endpoint_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def vllm_models_command(endpoint: str | None, api_key: str | None, as_json: bool) -> None:
    """List the models of the catalogue that vLLM can run, where it is installed."""
    with connected(endpoint, api_key) as client:
        models = client.vllm_models()
    if as_json:
        show_json(models)
        return
    for ability, names in models.items():
        show_table(f"To {ability}:", ["Name"], [[name] for name in names])


def matching(found: Any, wanted: dict[str, str | None]) -> Any:
    """Return the variants that are as wanted; a text, why an engine cannot be used, stays."""
    if isinstance(found, str):
        return found
    return [variant for variant in found if all(_has(variant, *one) for one in wanted.items())]


def _has(variant: dict[str, Any], field: str, value: str | None) -> bool:
    if value is None:
        return True
    here = variant.get(field, variant.get(f"{field}s"))
    choices = here if isinstance(here, list) else [here]
    return value.lower().replace(".", "_") in {
        str(choice).lower().replace(".", "_") for choice in choices
    }
