# SPDX-License-Identifier: Apache-2.0
"""Time to the first token of a prompt whose beginning is in the cache, beside a cold one.

Qwen2-0.5B's shape with random weights, on CPU: prompts of a shared prefix (1,024 tokens) and a tail
of their own (32). Cold is the same prompt in an engine whose cache never saw the prefix:

    GOMP_SPINCOUNT=20000 OMP_NUM_THREADS=2 python -m benchmarks.prefix_cache

Prints the median over the rounds of each, and their ratio; `--json` prints it as one line.
"""

import argparse
import json
import random
import statistics
import sys

import torch

from benchmarks.serving_loop import TimedLoop, make_random_engine
from xinference.protocol.deployment import EngineOptions


def main() -> None:
    """Read the flags, run the rounds, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--prefix-len", type=int, default=1024)
    parser.add_argument("--tail-len", type=int, default=32)
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = EngineOptions(max_num_seqs=4, max_model_len=2048)
    timed = TimedLoop(
        make_random_engine(
            args.layers, getattr(torch, args.dtype), options, num_threads=args.threads
        )
    )
    source = random.Random(0)

    def tokens(count: int) -> list[int]:
        return [source.randrange(1000, 100_000) for _ in range(count)]

    def first_token_seconds(prompt: list[int], num_cached_tokens: int) -> float:
        started = timed.submit("r", prompt, max_tokens=1)
        (came,) = timed.wait_tokens("r", 1)
        usage = timed.wait_end("r").usage
        if usage.num_cached_tokens != num_cached_tokens:
            raise RuntimeError(f"{usage.num_cached_tokens} cached, not {num_cached_tokens}")
        return came - started

    first_token_seconds(tokens(args.prefix_len), 0)  # warm: allocator, thread pool, pages
    cold, warm = [], []
    for _ in range(args.rounds):
        prefix = tokens(args.prefix_len)
        cold.append(first_token_seconds(prefix + tokens(args.tail_len), 0))
        shared = args.prefix_len // 128 * 128
        warm.append(first_token_seconds(prefix + tokens(args.tail_len), shared))
    timed.loop.stop(60)
    medians = {"cold": statistics.median(cold), "warm": statistics.median(warm)}
    ratio = medians["warm"] / medians["cold"]
    if args.json:
        line = {"first_token_seconds": medians, "cold": cold, "warm": warm, "ratio": ratio}
        sys.stdout.write(json.dumps({**vars(args), **line}) + "\n")
        return
    sys.stdout.write(
        f"Qwen2-0.5B shape ({args.layers} layers), {args.dtype}, {args.threads} threads, prompts "
        f"of {args.prefix_len} shared + {args.tail_len} own tokens, {args.rounds} rounds\n"
        f"first token cold {medians['cold'] * 1000:8.0f} ms  ({_span(cold)})\n"
        f"first token warm {medians['warm'] * 1000:8.0f} ms  ({_span(warm)})\n"
        f"warm over cold   {ratio:8.1%}\n"
    )


def _span(seconds: list[float]) -> str:
    return f"{min(seconds) * 1000:.0f} to {max(seconds) * 1000:.0f}"


if __name__ == "__main__":
    main()
