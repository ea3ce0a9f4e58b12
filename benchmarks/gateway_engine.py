# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/gateway.py --engine` measures: an engine alone, and behind a gateway."""

import tempfile
import threading
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
from .serving_loop import numbering_tokenizer, random_model
from .startup import platform, wait_until_ready

REQUESTS, PROMPT_LEN, NEW_TOKENS = 32, 16, 24
MODEL = "random"
MAX_MODEL_LEN = 256
NUM_LAYERS = 24


def model_directory(parent: Path) -> Path:
    """Write a model of Qwen2-0.5B's shape with random weights, and its tokenizer."""
    directory = parent / "model"
    random_model(NUM_LAYERS, torch.bfloat16).save_pretrained(directory)
    numbering_tokenizer().save_pretrained(directory)
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
            EngineOptions(max_num_seqs=REQUESTS, max_model_len=MAX_MODEL_LEN),
            on_progress=lambda _: None,
            model_name=MODEL,
        ).result()
    is_done = threading.Event()
    num_open = 0

    def take(events: list[tuple[RequestId, GenerationEvent]]) -> None:
        nonlocal num_open
        for _, event in events:
            if isinstance(event, Failed):
                raise event.error
            num_open -= isinstance(event, Finished)
        if num_open == 0:
            is_done.set()

    loop = EngineLoop(engine, take)
    loop.start()
    seconds = 0.0
    for turn in range(2):  # the first one warms up
        num_open = REQUESTS
        is_done.clear()
        started = time.perf_counter()
        for number in range(REQUESTS):
            sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
            loop.submit(
                EngineRequest(
                    request_id=RequestId(f"{turn}-{number}"),
                    prompt_token_ids=prompt(),
                    sampling=sampling,
                    cache_salt=f"{turn}-{number}",
                )
            )
        if not is_done.wait(300):
            raise TimeoutError("the engine did not end")
        seconds = time.perf_counter() - started
    loop.stop(60)
    return REQUESTS * NEW_TOKENS / seconds


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
        "max_num_seqs": REQUESTS,
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
        port, body, path="/v1/completions", num_connections=REQUESTS, num_requests=1
    )
    return REQUESTS * NEW_TOKENS / load.seconds
