# SPDX-License-Identifier: Apache-2.0
"""Starts an engine's server and waits until it can answer."""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Mapping
from importlib import import_module

import httpx

from xinference.errors import LoadFailed
from xinference.models.base import OnProgress
from xinference.protocol.deployment import ReplicaSpec
from xinference.protocol.servers import ServerEngine

from .dialect import LIMITS, Dialect
from .model import ServedModel
from .process import ServerProcess, free_port

logger = logging.getLogger(__name__)

START_SECONDS = 3000.0
"""For a server to load its model and answer; below what a launch may take as a whole."""
LOOK_SECONDS = 0.1
TELL_SECONDS = 1.0
ANSWER_SECONDS = 5.0
STOP_SECONDS = 2.0
STARTED_SHARE = 0.1
"""Of the way to a loaded model, when its server was started."""

DIALECTS: Mapping[ServerEngine, tuple[str, str]] = {
    ServerEngine.LLAMA_CPP: ("llama_cpp", "LlamaCpp"),
    ServerEngine.VLLM: ("vllm", "Vllm"),
    ServerEngine.SGLANG: ("sglang", "SgLang"),
    ServerEngine.TRT_LLM: ("trt_llm", "TrtLlm"),
}
"""Module of this package and class."""


def dialect_of(engine: ServerEngine) -> Dialect:
    """Return how an engine's server is started, asked and understood."""
    module, name = DIALECTS[engine]
    dialect: Dialect = getattr(import_module(f"xinference.models.servers.{module}"), name)()
    return dialect


def load_served_model(
    spec: ReplicaSpec, *, on_progress: OnProgress, start_seconds: float = START_SECONDS
) -> ServedModel:
    """Start the server of a model and wait until it is healthy.

    Raises:
        LoadFailed: the engine or the files are not there, or the server ends or takes too long.
        InvalidRequest: an option has a value that the engine does not have.
    """
    assert spec.server_options is not None, "it is launched as a server"
    dialect = dialect_of(spec.server_options.engine)
    name = str(spec.replica.model)
    reason = dialect.missing(spec)
    if reason is not None:
        raise LoadFailed(model=name, problem=f"{dialect.name}: {reason}")
    path = dialect.files(spec.source.path, model_name=name)
    port, key = free_port(), secrets.token_urlsafe(32)
    started = dialect.start(spec, path, port=port, key=key)
    environment = {**os.environ, **started.environment}
    with contextlib.ExitStack() as undo:
        process = ServerProcess(
            dialect.name,
            started.command,
            environment,
            secrets=(key, *spec.server_options.secrets),
        )
        undo.callback(process.stop, STOP_SECONDS)
        # Why: it would write a line for every request.
        logging.getLogger("httpx").setLevel(logging.WARNING)
        client = httpx.Client(
            base_url=f"http://127.0.0.1:{port}",
            headers={"Authorization": f"Bearer {key}"},
            timeout=ANSWER_SECONDS,
            limits=LIMITS,
            trust_env=False,
        )
        undo.callback(client.close)
        _wait_healthy(client, process, dialect, on_progress, name, start_seconds)
        try:
            facts, tokens = dialect.open(client, spec, path)
        except (httpx.HTTPError, OSError, ValueError, KeyError, TypeError) as error:
            problem = f"the server of {dialect.name} is not understood: {error!r}"
            raise LoadFailed(model=name, problem=problem) from error
        model = ServedModel(spec, dialect, process, client=client, facts=facts, tokens=tokens)
        undo.pop_all()
        return model


def _wait_healthy(
    client: httpx.Client,
    process: ServerProcess,
    dialect: Dialect,
    on_progress: OnProgress,
    model_name: str,
    start_seconds: float,
) -> None:
    """Return when the server answers that it is well.

    Raises:
        LoadFailed: it ended, or does not say so in time.
    """
    began = told_at = time.monotonic()
    on_progress(STARTED_SHARE, "loading", f"{dialect.name} starts")
    while True:
        if process.wait(LOOK_SECONDS):
            raise LoadFailed(model=model_name, problem=process.describe_end())
        try:
            if client.get("/health").status_code == 200:
                return
        except httpx.TransportError:
            pass  # it does not listen yet
        now = time.monotonic()
        if now - began > start_seconds:
            problem = f"its server does not answer after {start_seconds:.0f} s"
            last = f"; it wrote last: {process.last_line}" if process.last_line else ""
            raise LoadFailed(model=model_name, problem=f"{dialect.name}: {problem}{last}")
        if now - told_at >= TELL_SECONDS:
            told_at = now
            info = f"{dialect.name} loads the model, {now - began:.0f} s: {process.last_line}"
            on_progress(STARTED_SHARE, "loading", info)
