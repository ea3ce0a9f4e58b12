# SPDX-License-Identifier: Apache-2.0
"""What a long prompt does to the streams beside it: the longest gap between their tokens.

Qwen2-0.5B's shape with random weights, on CPU: eight streams run; then a prompt of 4,096 tokens
comes. Gaps between the tokens of each stream are taken before it comes, and while it is computed:

    GOMP_SPINCOUNT=20000 OMP_NUM_THREADS=2 python -m benchmarks.long_prompt

The bound is three median gaps of before plus the time budget of a step (`max_step_seconds`).
`--policy prefill_first` shows the other choice, which has no such bound. `--json` prints one line.
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import time

import torch

from benchmarks.serving_loop import TimedLoop, make_random_engine
from xinference.protocol.deployment import EngineOptions, SchedulerPolicy


def main() -> None:
    """Read the flags, run once, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt-len", type=int, default=4096)
    parser.add_argument("--stream-prompt-len", type=int, default=32)
    parser.add_argument("--tokens-before", type=int, default=20)
    parser.add_argument("--layers", type=int, default=24, help="fewer for a quick look")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--policy", choices=tuple(SchedulerPolicy), default="fifo")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    options = EngineOptions(
        max_num_seqs=args.streams + 1,
        max_model_len=args.prompt_len + 128,
        scheduler_policy=SchedulerPolicy(args.policy),
    )
    engine = make_random_engine(
        args.layers, getattr(torch, args.dtype), options, num_threads=args.threads
    )
    timed = TimedLoop(engine)
    source = random.Random(0)
    names = [f"stream {number}" for number in range(args.streams)]
    for name in names:
        prompt = [source.randrange(1000, 100_000) for _ in range(args.stream_prompt_len)]
        timed.submit(name, prompt, max_tokens=args.prompt_len)
    for name in names:
        timed.wait_tokens(name, args.tokens_before)
    long_prompt = [source.randrange(1000, 100_000) for _ in range(args.prompt_len)]
    came = timed.submit("long", long_prompt, max_tokens=1)
    (ended,) = timed.wait_tokens("long", 1)
    time.sleep(0.2)
    before: list[float] = []
    beside: list[float] = []
    for name in names:
        times = timed.wait_tokens(name, 1)
        timed.abort(name)
        for earlier, later in itertools.pairwise(times):
            if later <= came:
                before.append(later - earlier)
            elif earlier <= ended:
                beside.append(later - earlier)
    timed.loop.stop(60)
    median = statistics.median(before)
    budget = engine.config.max_step_seconds
    measured = {
        "median_gap_before": median,
        "median_gap_beside": statistics.median(beside),
        "longest_gap_beside": max(beside),
        "long_prompt_seconds": ended - came,
        "max_step_seconds": budget,
        "bound": None if budget is None else 3 * median + budget,
    }
    if args.json:
        sys.stdout.write(json.dumps({**vars(args), **measured}) + "\n")
        return
    bound = measured["bound"]
    sys.stdout.write(
        f"Qwen2-0.5B shape ({args.layers} layers), {args.dtype}, {args.threads} threads, "
        f"{args.policy}: a prompt of {args.prompt_len} tokens beside {args.streams} streams\n"
        f"median gap before it    {median * 1000:7.0f} ms\n"
        f"median gap beside it    {statistics.median(beside) * 1000:7.0f} ms\n"
        f"longest gap beside it   {max(beside) * 1000:7.0f} ms"
        + (
            ""
            if bound is None
            else f"   bound {bound * 1000:.0f} ms: 3 medians + the step's budget"
        )
        + f"\nthe prompt took         {ended - came:7.1f} s\n"
    )


if __name__ == "__main__":
    main()
