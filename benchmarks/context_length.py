# SPDX-License-Identifier: Apache-2.0
"""How decoding slows down as contexts grow: tokens per second at 128 and at 1,024 tokens.

Qwen2-0.5B's shape with random weights, bfloat16, 16 streams at once, two threads, on CPU:

    GOMP_SPINCOUNT=20000 OMP_NUM_THREADS=2 python -m benchmarks.context_length

All prompts are computed first; then the time of each step in which every stream gets a token is
taken. A round measures every length, one after another; the table shows medians over all rounds
and the speed relative to the first length. `--json` prints the same as one line.
"""

import argparse
import json
import random
import statistics
import sys
import time

import torch

from benchmarks.serving_loop import make_random_engine
from xinference.engine import Engine, EngineRequest
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions, SchedulerPolicy
from xinference.protocol.generation import SamplingParams


def main() -> None:
    """Read the flags, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=16)
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 1024])
    parser.add_argument("--steps", type=int, default=20, help="timed steps a round")
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = EngineOptions(
        max_num_seqs=args.streams,
        max_model_len=max(args.lengths) + args.steps + 1,
        scheduler_policy=SchedulerPolicy.PREFILL_FIRST,
    )
    engine = make_random_engine(
        args.layers, getattr(torch, args.dtype), options, num_threads=args.threads
    )
    # Prompts are the same in each round, so that from the second on the prefix cache has them.
    seconds: dict[int, list[float]] = {length: [] for length in args.lengths}
    for _ in range(args.rounds):
        for length, measured in seconds.items():
            measured += decode(engine, args.streams, length, args.steps)
    rates = {length: args.streams / statistics.median(seconds[length]) for length in seconds}
    relative = {length: rate / rates[args.lengths[0]] for length, rate in rates.items()}
    if args.json:
        line = {"tokens_per_second": rates, "relative": relative}
        sys.stdout.write(json.dumps({**vars(args), **line}) + "\n")
        return
    lines = [
        f"Qwen2-0.5B shape ({args.layers} layers), {args.dtype}, {args.threads} threads: "
        f"{args.streams} streams, {args.rounds} rounds of {args.steps} steps",
        f"{'context':>8}{'step, ms':>10}{'tokens/s':>10}{'relative':>10}",
    ]
    for length, rate in rates.items():
        step_ms = statistics.median(seconds[length]) * 1000
        lines.append(f"{length:>8}{step_ms:>10.1f}{rate:>10.1f}{relative[length]:>10.2f}")
    sys.stdout.write("\n".join(lines) + "\n")


def decode(engine: Engine, num_streams: int, length: int, num_steps: int) -> list[float]:
    """Return the seconds of each step that gave every stream one token, and end the streams."""
    source = random.Random(length)
    for index in range(num_streams):
        request = EngineRequest(
            request_id=RequestId(str(index)),
            prompt_token_ids=[source.randrange(1000, 100_000) for _ in range(length)],
            sampling=SamplingParams(temperature=0.0, max_tokens=num_steps + 1),
        )
        engine.add(engine.validate(request))
    seconds = []
    while engine.has_work:
        decoded = engine.counters.num_decode_tokens
        started = time.perf_counter()
        engine.step()
        if engine.counters.num_decode_tokens - decoded == num_streams:
            seconds.append(time.perf_counter() - started)
    return seconds


if __name__ == "__main__":
    main()
