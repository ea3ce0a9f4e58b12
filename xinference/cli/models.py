# SPDX-License-Identifier: Apache-2.0
"""`launch`, `list`, `scale` and `terminate`: the life of a model."""

import json
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import click

from .connection import connected, endpoint_options
from .output import progress_bar, say, show, show_json, show_table

if TYPE_CHECKING:
    from xinference.client import Client

POLL_SECONDS = 0.2
OUTAGE_SECONDS = 30.0
"""How long a launch is watched on while the cluster does not answer; it may be restarting."""

LIST_COLUMNS = {
    "UID": "id",
    "Type": "model_type",
    "Name": "model_name",
    "Format": "model_format",
    "Size (in billions)": "model_size_in_billions",
    "Quantization": "quantization",
    "Status": "status",
}


@click.command(
    "launch",
    context_settings={"ignore_unknown_options": True},
    short_help="Launch a model and wait until it answers.",
)
@endpoint_options
@click.option("--model-name", "-n", help="A family of the catalogue, or the id of a repository.")
@click.option("--model-type", "-t", default="LLM", show_default=True)
@click.option(
    "--model-engine",
    "-en",
    help="Such as llama.cpp. [default: transformers; sentence_transformers to embed and rerank]",
)
@click.option("--model-uid", "-u", help="What to call it. [default: the family's name]")
@click.option(
    "--size-in-billions",
    "--model-size-in-billions",
    "-s",
    "model_size_in_billions",
    help="Of the parameters: 7, 0_5, 1_8.",
)
@click.option("--model-format", "-f", help="Such as pytorch.")
@click.option("--quantization", "-q", help="Such as none.")
@click.option(
    "--model-path",
    "-mp",
    help="Files on the worker, instead of a hub's; without -n, what they are.",
)
@click.option("--download-hub", help="huggingface or modelscope; else whichever answers.")
@click.option("--replica", "-r", type=int, default=1, show_default=True, help="Copies of it.")
@click.option("--n-worker", type=int, default=1, show_default=True)
@click.option(
    "--n-gpu", default="auto", show_default=True, help='A number, "auto", or "none" for the CPU.'
)
@click.option("--gpu-idx", help='Which GPUs: "0,1".')
@click.option("--worker-ip", help="Where to run it.")
@click.option("--context-length", type=int, help="Of prompt and answer together, in tokens.")
@click.option("--trust-remote-code", type=bool, help="Run code that comes with the files.")
@click.option("--enable-thinking/--disable-thinking", default=None, help="Of hybrid models.")
@click.option(
    "--env",
    "-ev",
    "envs",
    type=(str, str),
    multiple=True,
    metavar="KEY VALUE",
    help="Set in its process.",
)
@click.option("--lora-modules", "-lm", type=(str, str), multiple=True, metavar="NAME PATH")
@click.option("--image-lora-load-kwargs", "-ld", type=(str, str), multiple=True, metavar="K V")
@click.option("--image-lora-fuse-kwargs", "-fd", type=(str, str), multiple=True, metavar="K V")
@click.option("--quantization-config", "-qc", type=(str, str), multiple=True, metavar="K V")
@click.option("--enable-virtual-env/--disable-virtual-env", default=None)
@click.option("--virtual-env-package", "-vp", "virtual_env_packages", multiple=True)
@click.option("--virtual-env-find-link", "virtual_env_find_links", multiple=True)
@click.option("--replica-config", help="A JSON array: where each replica goes.")
@click.option("--min-replicas", type=int, help="With --max-replicas: never fewer.")
@click.option("--max-replicas", type=int, help="Copies come and go with the load, up to so many.")
@click.option("--idle-timeout", type=float, help="Seconds without a request until it sleeps.")
@click.option("--autoload/--no-autoload", default=None, help="It may sleep to make room.")
@click.option("--json", "as_json", is_flag=True, help="Print the uid as JSON.")
@click.argument("engine_options", nargs=-1, type=click.UNPROCESSED)
def launch_command(endpoint: str | None, api_key: str | None, as_json: bool, **words: Any) -> None:
    """Launch a model and wait until it answers; Ctrl-C cancels the launch.

    Further pairs `--NAME VALUE` are options of the engine, such as `--max_num_seqs 32`.
    """
    fields = launch_fields(words)
    if fields["model_name"] is None and fields["model_path"] is None:
        raise click.UsageError("A launch needs --model-name, or --model-path of a model's files.")
    with connected(endpoint, api_key) as client:
        uid = None
        try:
            with _deferred_interrupt():
                uid = client.launch_model(**fields, wait_ready=False)
            with progress_bar(f"Launching {uid}") as show_progress:
                wait_until_ready(client, uid, show_progress)
        except KeyboardInterrupt:
            if uid is not None:
                _cancel(client, uid)
            raise
    if as_json:
        show_json({"model_uid": uid})
    else:
        show(f"Model uid: {uid}")


def launch_fields(words: dict[str, Any]) -> dict[str, Any]:
    """Return the arguments of `Client.launch_model` for the words of a command line.

    Raises:
        click.UsageError: a value is malformed.
    """
    fields = dict(words)
    fields["n_gpu"] = _gpus(fields.pop("n_gpu"))
    gpu_idx = fields.pop("gpu_idx")
    if gpu_idx is not None:
        fields["gpu_idx"] = [_whole_number("--gpu-idx", part) for part in gpu_idx.split(",")]
    replica_config = fields.pop("replica_config")
    if replica_config is not None:
        fields["replica_config"] = _json("--replica-config", replica_config)
    lora = {
        "lora_list": [
            {"lora_name": name, "local_path": path} for name, path in fields.pop("lora_modules")
        ],
        "image_lora_load_kwargs": _values(fields.pop("image_lora_load_kwargs")),
        "image_lora_fuse_kwargs": _values(fields.pop("image_lora_fuse_kwargs")),
    }
    if any(lora.values()):
        fields["peft_model_config"] = lora
    fields["quantization_config"] = _values(fields.pop("quantization_config"))
    fields["envs"] = dict(fields.pop("envs"))
    for name in ("virtual_env_packages", "virtual_env_find_links"):
        fields[name] = list(fields[name])
    extra = engine_options(fields.pop("engine_options"))
    for name in ("context_length", "trust_remote_code", "quantization_config", "download_hub"):
        # Why: these reach the engine as its options, where a None would be a value.
        if fields[name] in (None, {}):
            del fields[name]
    for name in ("envs", "virtual_env_packages", "virtual_env_find_links"):
        fields[name] = fields[name] or None
    return fields | extra


def engine_options(words: Sequence[str]) -> dict[str, Any]:
    """Read pairs `--name value` and words `--name=value`.

    Raises:
        click.UsageError: a word is no name, a name has no value, or it is not for the engine.
    """
    options: dict[str, Any] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or word == "--":
            raise click.UsageError(f"Unexpected word {word!r}; an engine option is --NAME VALUE.")
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            if not left or left[0].startswith("--"):
                raise click.UsageError(f"Option {word} is not one of launch, and has no value.")
            value = left.pop(0)
        name = name.replace("-", "_")
        if name == "wait_ready":
            raise click.UsageError("launch always waits; use the Python client or REST not to.")
        options[name] = _value(value)
    return options


def _value(text: str) -> Any:
    """Read None, True, False, a number or JSON; anything else is a text."""
    words = {"none": None, "true": True, "false": False}
    if text.lower() in words:
        return words[text.lower()]
    try:
        return json.loads(text)
    except ValueError:
        return text


def _values(pairs: Sequence[tuple[str, str]]) -> dict[str, Any]:
    return {name: _value(value) for name, value in pairs}


def _gpus(text: str) -> int | str | None:
    if text.lower() == "none":
        return None
    return "auto" if text.lower() == "auto" else _whole_number("--n-gpu", text)


def _whole_number(option: str, text: str) -> int:
    if not text.strip().isdecimal():
        raise click.UsageError(f"{option}: {text!r} is not a whole number.")
    return int(text)


def _json(option: str, text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise click.UsageError(f"{option}: not JSON: {error}.") from error


@contextmanager
def _deferred_interrupt() -> Iterator[None]:
    """Hold the first Ctrl-C back until the block ends.

    Why: a launch whose uid is not known yet could not be cancelled.
    """
    interrupted = False

    def remember(_number: int, _frame: FrameType | None) -> None:
        nonlocal interrupted
        if interrupted:
            raise KeyboardInterrupt
        interrupted = True

    before = signal.signal(signal.SIGINT, remember)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        raise KeyboardInterrupt


def wait_until_ready(client: "Client", uid: str, show_progress: Any) -> None:
    """Return when the model answers.

    Raises:
        click.ClickException: the launch failed, was cancelled, or cannot be watched any more.
    """
    from xinference.client import ConnectionFailed, ConnectionLost, ReplyTimeout, Unavailable

    last_reply = time.monotonic()
    while True:
        try:
            progress = client.get_launch_model_progress(uid)
            stage = progress["stage"]
            if stage == "completed":
                return
            if stage == "error":
                cause = progress.get("info") or _cause(client, uid)
                raise click.ClickException(f"{uid} could not be launched: {cause}")
            if stage == "cancelled" or (stage == "pending" and not _is_known(client, uid)):
                raise click.ClickException(f"The launch of {uid} was cancelled.")
            show_progress(stage, progress["progress"], progress.get("download_files") or ())
            last_reply = time.monotonic()
        except (ConnectionFailed, ConnectionLost, ReplyTimeout, Unavailable):
            if time.monotonic() - last_reply > OUTAGE_SECONDS:
                raise
            show_progress("waiting for the cluster", 0.0)
        time.sleep(POLL_SECONDS)


def _is_known(client: "Client", uid: str) -> bool:
    return bool(client.get_instance_info(model_uid=uid))


def _cause(client: "Client", uid: str) -> str:
    """Return why a launch failed, as its replicas say it."""
    causes = [
        replica.get("error_message")
        for model in client.get_instance_info(model_uid=uid)
        for replica in model.get("replica_statuses", ())
    ]
    return "; ".join(cause for cause in causes if cause) or "the server's log has the reason"


def _cancel(client: "Client", uid: str) -> None:
    from xinference.client import BadRequest, NotFound

    say(f"Cancelling the launch of {uid} …")
    try:
        client.cancel_launch_model(uid)
    except NotFound:
        pass
    except BadRequest:
        say(f"{uid} was ready already. Stop it: xinference terminate --model-uid {uid}")
        return
    say(f"The launch of {uid} is cancelled; nothing of it is left.")


@click.command("list", short_help="List the running models.")
@endpoint_options
@click.option("--json", "as_json", is_flag=True, help="Print everything, as JSON.")
def list_command(endpoint: str | None, api_key: str | None, as_json: bool) -> None:
    """List the running models."""
    with connected(endpoint, api_key) as client:
        models = list(client.list_models().values())
    if as_json:
        show_json(models)
    elif not models:
        say("No model is running.")
    else:
        rows = [[model.get(key) for key in LIST_COLUMNS.values()] for model in models]
        show_table("", list(LIST_COLUMNS), rows)


@click.command("scale", short_help="Change how many copies of a model run.")
@endpoint_options
@click.option("--model-uid", "-u", required=True)
@click.option("--replica", "-r", type=click.IntRange(min=1), required=True, help="Copies of it.")
@click.option("--json", "as_json", is_flag=True, help="Print the replicas, as JSON.")
def scale_command(
    endpoint: str | None, api_key: str | None, model_uid: str, replica: int, as_json: bool
) -> None:
    """Let a running model have so many copies; those that stay serve meanwhile.

    Of too many, those with the highest numbers are removed; what runs on them ends first.
    """
    with connected(endpoint, api_key) as client:
        there = _replica_ids(client, model_uid)
        if len(there) < replica:
            client.add_model_replica(model_uid, replica=replica - len(there))
        for replica_id in there[replica:]:
            client.terminate_model_replica(model_uid, replica_id)
        left = _replica_ids(client, model_uid)
    if as_json:
        show_json({"model_uid": model_uid, "replicas": left})
    else:
        show(f"{model_uid} has {len(left)} replica{'' if len(left) == 1 else 's'}.")


def _replica_ids(client: "Client", uid: str) -> list[int]:
    """Return the numbers of a model's replicas; those that are being removed are not of them."""
    replicas = client.get_model_replicas(uid)
    return sorted(one["replica_id"] for one in replicas if one["status"] != "TERMINATING")


@click.command("terminate", short_help="Stop a model.")
@endpoint_options
@click.option("--model-uid", "-u", required=True)
@click.option("--json", "as_json", is_flag=True, help="Print the uid as JSON.")
def terminate_command(
    endpoint: str | None, api_key: str | None, model_uid: str, as_json: bool
) -> None:
    """Stop a model; return when no process of it is left."""
    with connected(endpoint, api_key) as client:
        client.terminate_model(model_uid)
    if as_json:
        show_json({"model_uid": model_uid})
