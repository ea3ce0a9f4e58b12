# SPDX-License-Identifier: Apache-2.0
"""Tokens per second of the engine beside transformers' own two ways, each in its own process.

A Qwen2-0.5B with random weights, bfloat16, 16 requests at once, greedy, two threads, on CPU; 128
tokens in and 64 out, and then, as serving is mostly decoding, 32 in and 128 out:

    OMP_NUM_THREADS=2 python -m benchmarks.engine_throughput

`xinference` runs by `prefill_first`, the policy for throughput, as nobody waits for a stream here;
`--policy fifo` is what a launch gets by default, which keeps the steps of running streams short.
`static` is `generate` on one batch, all prompts of one length, so that nothing is padded.
`continuous` is `generate_batch` as it configures itself, which takes 60 % of the machine's memory;
`lean` is the same with 10 %, still many times what the load needs, and faster. `tuned` is
`generate_batch` with a cache of just the size of this load and our own token budget. Transformers
is given the environment of a replica, its huge pages and barriers; with `--peers-as-they-come` it
runs as in a program of its users. Each round runs all of them after one another; the table shows
medians over the rounds and the ratio of medians. `--json` prints the same as one line.
"""

import argparse
import copy
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Self

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig, Qwen2ForCausalLM

from benchmarks.serving_loop import make_random_engine, make_random_model
from xinference.cluster.replica_environment import DEFAULTS
from xinference.engine import Engine, EngineLoop, EngineRequest, EngineStats
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions, SchedulerPolicy
from xinference.protocol.generation import Failed, Finished, GenerationEvent, SamplingParams

PAGE_SIZE = 256
"""Of `generate_batch`: its default."""
WAYS = ("xinference", "static", "continuous", "lean", "tuned")


@dataclass(frozen=True)
class Shape:
    """How many tokens each request brings and gets."""

    prompt_len: int
    new_tokens: int

    @classmethod
    def of(cls, text: str) -> Self:
        """Read "128/64"."""
        prompt_len, new_tokens = map(int, text.split("/"))
        return cls(prompt_len, new_tokens)

    def __str__(self) -> str:
        return f"{self.prompt_len}/{self.new_tokens}"


SHAPES = (Shape(128, 64), Shape(32, 128))


def main() -> None:
    """Read the flags, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--shape", type=Shape.of, action="append", help="128/64: in, out")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--policy", choices=[*SchedulerPolicy], default="prefill_first")
    parser.add_argument("--only", choices=WAYS, action="append", help="default: all")
    parser.add_argument("--peers-as-they-come", action="store_true")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--measure", choices=WAYS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.shape = args.shape or list(SHAPES)
    if args.measure:
        sys.stdout.write(json.dumps(measure(args.measure, args)) + "\n")
        return
    rates: dict[str, list[list[float]]] = {way: [] for way in args.only or WAYS}
    for _ in range(args.rounds):
        for way, measured in rates.items():
            measured.append(measure_apart(way, as_it_comes=args.peers_as_they_come))
    for index, shape in enumerate(args.shape):
        report(args, shape, {way: [one[index] for one in rates[way]] for way in rates})


def measure_apart(way: str, *, as_it_comes: bool) -> list[float]:
    """Measure one way in a process of its own; return its tokens per second for each shape.

    Why: each thread that computes keeps an OpenMP team of its own, and with more threads in all
    than cores the runtime stops spinning at barriers, so that each way would slow the others.
    """
    command = [
        sys.executable,
        "-m",
        "benchmarks.engine_throughput",
        *sys.argv[1:],
        "--measure",
        way,
    ]
    # Why: what a replica's environment does for barriers and memory may help the others too.
    defaults = {} if as_it_comes and way != "xinference" else DEFAULTS
    environment = {**defaults, **os.environ}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return [float(rate) for rate in json.loads(done.stdout.splitlines()[-1])]


def measure(way: str, args: argparse.Namespace) -> list[float]:
    """Return one way's tokens per second for each shape."""
    if way == "xinference":
        loop = BenchmarkLoop(make_our_engine(args))
        rates = [
            measure_shape(partial(loop.run, new_tokens=shape.new_tokens), shape, args.requests)
            for shape in args.shape
        ]
        loop.loop.stop(60)
        return rates
    model = make_stock_model(args)
    rates = []
    for shape in args.shape:
        if way == "static":
            run = partial(run_static, model, new_tokens=shape.new_tokens)
        else:
            config = continuous_config(way, shape, args.requests)
            run = partial(run_continuous, model, new_tokens=shape.new_tokens, config=config)
        rates.append(measure_shape(run, shape, args.requests))
    return rates


def measure_shape(run: Callable[[list[list[int]]], int], shape: Shape, num_requests: int) -> float:
    """Run twice, on prompts of its own each time; return the second's tokens per second."""
    generator = torch.Generator().manual_seed(0)
    size = (num_requests, shape.prompt_len)
    warming, timed = (torch.randint(1000, 100_000, size, generator=generator) for _ in range(2))
    run(warming.tolist())  # allocator, thread pool, packed weights
    started = time.perf_counter()
    num_tokens = run(timed.tolist())
    seconds = time.perf_counter() - started
    if num_tokens != num_requests * shape.new_tokens:
        raise RuntimeError(f"{num_tokens} tokens were generated")
    return num_tokens / seconds


def continuous_config(way: str, shape: Shape, num_requests: int) -> ContinuousBatchingConfig:
    """Return what `generate_batch` is told of its memory."""
    if way == "lean":
        return ContinuousBatchingConfig(max_memory_percent=0.1)
    if way == "tuned":
        return ContinuousBatchingConfig(
            num_blocks=num_requests * -(-(shape.prompt_len + shape.new_tokens) // PAGE_SIZE) + 8,
            page_size=PAGE_SIZE,
            max_batch_tokens=512,
            max_requests_per_batch=num_requests,
        )
    return ContinuousBatchingConfig()


def report(args: argparse.Namespace, shape: Shape, rates: dict[str, list[float]]) -> None:
    """Print the table of a shape, or one line of JSON."""
    medians = {way: statistics.median(rates[way]) for way in rates}
    ours = medians.get("xinference")
    ratios = {way: ours / rate for way, rate in medians.items() if ours and way != "xinference"}
    if args.json:
        line = {"tokens_per_second": medians, "rates": rates, "xinference_over": ratios}
        sys.stdout.write(json.dumps({**vars(args), "shape": str(shape), **line}) + "\n")
        return
    lines = [
        f"Qwen2-0.5B shape ({args.layers} layers), {args.dtype}, {args.threads} threads: "
        f"{args.requests} requests, {shape.prompt_len} in / {shape.new_tokens} out, "
        f"{args.rounds} rounds",
        f"{'way':<12}{'tokens/s':>10}{'lowest':>10}{'highest':>10}{'ours is':>10}",
    ]
    for way, rate in medians.items():
        ratio = f"{ratios[way]:.2f}x" if way in ratios else ""
        lines.append(
            f"{way:<12}{rate:>10.1f}{min(rates[way]):>10.1f}{max(rates[way]):>10.1f}{ratio:>10}"
        )
    sys.stdout.write("\n".join(lines) + "\n")


def make_our_engine(args: argparse.Namespace) -> Engine:
    """Return an engine for the load of the flags."""
    options = EngineOptions(
        max_num_seqs=args.requests,
        max_model_len=max(1024, *(shape.prompt_len + shape.new_tokens for shape in args.shape)),
        scheduler_policy=SchedulerPolicy(args.policy),
    )
    return make_random_engine(
        args.layers, getattr(torch, args.dtype), options, num_threads=args.threads
    )


def make_stock_model(args: argparse.Namespace) -> Qwen2ForCausalLM:
    """Return the model as transformers runs it, in this thread."""
    torch.set_num_threads(args.threads)
    return make_random_model(args.layers, getattr(torch, args.dtype))


class BenchmarkLoop:
    """An engine loop, and a way to run some requests through it to their ends."""

    def __init__(self, engine: Engine) -> None:
        self.loop = EngineLoop(engine, self._take)
        self._num_tokens = 0
        self._num_open = 0
        self._is_done = threading.Event()
        self.loop.start()

    def run(self, prompts: list[list[int]], new_tokens: int) -> int:
        """Generate and return how many tokens there were."""
        self._num_tokens, self._num_open = 0, len(prompts)
        self._is_done.clear()
        for index, prompt in enumerate(prompts):
            self.loop.submit(
                EngineRequest(
                    request_id=RequestId(str(index)),
                    prompt_token_ids=prompt,
                    sampling=SamplingParams(temperature=0.0, max_tokens=new_tokens),
                )
            )
        if not self._is_done.wait(600):
            raise TimeoutError(f"not done within 600 s: {self.loop.stats()}")
        return self._num_tokens

    def stats(self) -> EngineStats:
        """Return the loop's counters."""
        return self.loop.stats()

    def _take(self, events: list[tuple[RequestId, GenerationEvent]]) -> None:
        for _, event in events:
            if isinstance(event, Failed):
                raise event.error
            if isinstance(event, Finished):
                self._num_tokens += event.usage.num_completion_tokens
                self._num_open -= 1
                if self._num_open == 0:
                    self._is_done.set()


def run_static(model: Qwen2ForCausalLM, prompts: list[list[int]], new_tokens: int) -> int:
    """Run `generate` on one batch and return how many tokens there were."""
    model.set_attn_implementation("sdpa")
    inputs = torch.tensor(prompts)
    with torch.inference_mode():
        output = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            generation_config=greedy(new_tokens),
        )
    return int((output.shape[1] - inputs.shape[1]) * len(prompts))


def run_continuous(
    model: Qwen2ForCausalLM,
    prompts: list[list[int]],
    new_tokens: int,
    config: ContinuousBatchingConfig,
) -> int:
    """Run `generate_batch` and return how many tokens there were."""
    model.set_attn_implementation("sdpa")
    outputs = model.generate_batch(
        prompts,
        generation_config=greedy(new_tokens),
        # Why a copy: it writes what it resolves into the one it is given.
        continuous_batching_config=copy.deepcopy(config),
    )
    return sum(len(output.generated_tokens) for output in outputs.values())


def greedy(new_tokens: int) -> GenerationConfig:
    """Return settings that generate exactly this many tokens."""
    return GenerationConfig(
        do_sample=False, max_new_tokens=new_tokens, min_new_tokens=None, pad_token_id=0
    )


if __name__ == "__main__":
    main()
