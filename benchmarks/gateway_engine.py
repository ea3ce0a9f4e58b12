# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/gateway.py --engine` measures: an engine alone, and behind a gateway."""

import queue
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import torch

from xinference.engine import EngineLoop, EngineRequest
from xinference.engine.loading import load_engine
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.generation import Failed, Finished, GenerationEvent, SamplingParams

from . import http_load
from .serving_loop import make_random_model, make_random_tokenizer
from .startup import platform, wait_until_ready

CLIENTS, REQUESTS_EACH = 32, 3
"""Why several: requests that come at once come within one step when they are submitted, and within
some over HTTP, and prompts that find streams running take turns with them. That is the scheduler's
doing and not the gateway's, and there is as much of it on both sides when clients come back."""
PROMPT_LEN, NEW_TOKENS = 16, 24
MODEL = "random"
MAX_MODEL_LEN = 256
NUM_LAYERS = 24


def model_directory(parent: Path) -> Path:
    """Write a model of Qwen2-0.5B's shape with random weights, and its tokenizer."""
    directory = parent / "model"
    make_random_model(NUM_LAYERS, torch.bfloat16).save_pretrained(directory)
    make_random_tokenizer().save_pretrained(directory)
    return directory


def prompt() -> list[int]:
    """Return token ids."""
    return list(range(1000, 1000 + PROMPT_LEN))


def measure_directly(directory: str) -> float:
    """Return the tokens per second of the engine in this process."""
    # Why in a thread: as in a replica, the OpenMP team that loads ends before another computes.
    with ThreadPoolExecutor(max_workers=1) as loader:
        engine = loader.submit(
            load_engine,
            Path(directory),
            EngineOptions(max_num_seqs=CLIENTS, max_model_len=MAX_MODEL_LEN),
            on_progress=lambda _: None,
            model_name=MODEL,
        ).result()
    ended: queue.SimpleQueue[RequestId] = queue.SimpleQueue()

    def take(events: list[tuple[RequestId, GenerationEvent]]) -> None:
        for request_id, event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                ended.put(request_id)

    loop = EngineLoop(engine, take)
    loop.start()
    _ask(loop, ended, "warming")
    started = time.perf_counter()
    _ask(loop, ended, "timed")
    seconds = time.perf_counter() - started
    loop.stop(60)
    return CLIENTS * REQUESTS_EACH * NEW_TOKENS / seconds


def _ask(loop: EngineLoop, ended: "queue.SimpleQueue[RequestId]", name: str) -> None:
    """Let each client send its requests, the next one when the one before has ended."""

    def submit(client: str, number: int) -> None:
        request_id = RequestId(f"{name} {client} {number}")
        loop.submit(
            EngineRequest(
                request_id=request_id,
                prompt_token_ids=prompt(),
                sampling=SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True),
                cache_salt=request_id,
            )
        )

    for client in range(CLIENTS):
        submit(str(client), 1)
    num_open = CLIENTS
    while num_open:
        _, client, number = ended.get(timeout=300).split()
        if int(number) < REQUESTS_EACH:
            submit(client, int(number) + 1)
        else:
            num_open -= 1


def measure_in_platform(directory: Path) -> dict[str, float]:
    """Return the tokens per second over HTTP, of whole answers and of streams."""
    with tempfile.TemporaryDirectory() as home, platform(home) as (endpoint, _):
        wait_until_ready(endpoint)
        _launch(endpoint, directory)
        port = int(endpoint.rpartition(":")[2])
        _rate(port, stream=False)  # warms up
        return {"whole": _rate(port, stream=False), "streamed": _rate(port, stream=True)}


def _launch(endpoint: str, directory: Path) -> None:
    launch = {
        "model_name": "qwen2.5",
        "model_engine": "transformers",
        "model_size_in_billions": "0_5",
        "model_uid": MODEL,
        "model_path": str(directory),
        "max_num_seqs": CLIENTS,
        "max_model_len": MAX_MODEL_LEN,
    }
    httpx.post(f"{endpoint}/v1/models", json=launch, timeout=120).raise_for_status()


def _rate(port: int, *, stream: bool) -> float:
    """Return the tokens per second of the same requests over HTTP."""
    body = {
        "model": MODEL,
        "prompt": prompt(),
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        "ignore_eos": True,
        "stream": stream,
    }
    load = http_load.run(
        port, body, path="/v1/completions", num_connections=CLIENTS, num_requests=REQUESTS_EACH
    )
    return CLIENTS * REQUESTS_EACH * NEW_TOKENS / load.seconds
