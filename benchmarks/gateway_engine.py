# SPDX-License-Identifier: Apache-2.0
"""What `benchmarks/gateway.py --engine` measures: an engine alone, and behind a gateway."""

import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from xinference.engine import EngineLoop, EngineRequest
from xinference.engine.loading import load_engine
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.generation import Failed, Finished, GenerationEvent, SamplingParams

from . import http_load

REQUESTS, PROMPT_LEN, NEW_TOKENS = 32, 16, 24
MODEL = "random"
MAX_MODEL_LEN = 256
VOCABULARY = 151_646


def model_directory(parent: Path) -> Path:
    """Write Qwen2-0.5B's shape with random weights and a tokenizer of as many tokens."""
    config = Qwen2Config(
        vocab_size=151_936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        max_position_embeddings=32768,
        rope_parameters={"rope_type": "default", "rope_theta": 1_000_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(0)
    directory = parent / "model"
    Qwen2ForCausalLM._from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
    vocabulary = {f"t{token_id}": token_id for token_id in range(VOCABULARY)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(directory)
    return directory


def prompt() -> list[int]:
    """Return token ids."""
    return list(range(1000, 1000 + PROMPT_LEN))


def measure_directly(directory: str) -> float:
    """Return the tokens per second of the engine in this process."""
    engine = load_engine(
        Path(directory),
        EngineOptions(max_num_seqs=REQUESTS, max_model_len=MAX_MODEL_LEN),
        on_progress=lambda _: None,
        model_name=MODEL,
    )
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


def measure_in_platform(directory: Path, port: int) -> dict[str, float]:
    """Return the tokens per second over HTTP, of whole answers and of streams."""
    with tempfile.TemporaryDirectory() as home:
        process = subprocess.Popen(
            [Path(sys.executable).with_name("xinference-local"), "-p", str(port)],
            env=os.environ | {"XINFERENCE_HOME": home},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        try:
            _launch(f"http://127.0.0.1:{port}", directory)
            _rate(port, stream=False)  # warms up
            return {"whole": _rate(port, stream=False), "streamed": _rate(port, stream=True)}
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(30)


def _launch(endpoint: str, directory: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if httpx.get(f"{endpoint}/status", timeout=5).json()["workers"]:
                break
        except httpx.TransportError:
            time.sleep(0.05)
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
