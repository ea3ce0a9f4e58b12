# SPDX-License-Identifier: Apache-2.0
"""What the wishes of requests cost: penalties, seeds and logprobs beside plain greedy, one engine.

A Qwen2-0.5B with random weights, bfloat16, 16 requests at once, two threads, on CPU:

    GOMP_SPINCOUNT=20000 OMP_NUM_THREADS=2 python -m benchmarks.sampling_cost

A round decodes with every way, one after another; the table shows the medians of the time of a
decoding step over all rounds, and what each way takes beside plain greedy. `--layers` makes the
model shallower, so that the same cost is a larger share of a step.
"""

import argparse
import statistics
import sys
import time
from typing import Any

import torch

from benchmarks.serving_loop import make_random_engine
from xinference.engine import Engine, EngineRequest
from xinference.identifiers import RequestId
from xinference.protocol.deployment import EngineOptions
from xinference.protocol.generation import SamplingParams

PENALTIES = {"repetition_penalty": 1.1, "presence_penalty": 0.5, "frequency_penalty": 0.5}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "penalties": {"temperature": 0.0, **PENALTIES},
    "seeds": {"temperature": 0.8},
    "top-k, top-p": {"temperature": 0.8, "top_k": 40, "top_p": 0.95},
    "logprobs": {"temperature": 0.0, "logprobs": 5},
    "penalties, seeds, logprobs": {"temperature": 0.8, "logprobs": 5, **PENALTIES},
}
ALL_TOGETHER = "penalties, seeds, logprobs"
LIMIT = 1.15


def main() -> None:
    """Read the flags, run the rounds, print; exit 1 beyond the limit."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--requests", type=int, default=16)
    parser.add_argument("--prompt-len", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--layers", type=int, default=24)
    args = parser.parse_args()

    engine = make_random_engine(
        args.layers,
        torch.bfloat16,
        EngineOptions(max_num_seqs=args.requests, max_model_len=1024),
        num_threads=args.threads,
    )
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(
        1000, 100_000, (args.requests, args.prompt_len), generator=generator
    ).tolist()
    run(engine, prompts, args.new_tokens, WAYS["greedy"])  # warm
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(args.rounds):
        for way, sampling in WAYS.items():
            seconds[way] += run(engine, prompts, args.new_tokens, sampling)
    medians = {way: statistics.median(values) for way, values in seconds.items()}
    lines = [
        f"Qwen2-0.5B shape ({args.layers} layers), bfloat16, {args.threads} threads, "
        f"{args.requests} requests, {args.rounds} rounds of {args.new_tokens} tokens",
        f"{'way':<28}{'ms/step':>9}{'over':>8}{'ratio':>8}",
    ]
    for way, median in medians.items():
        over, ratio = median - medians["greedy"], median / medians["greedy"]
        lines.append(f"{way:<28}{median * 1e3:>9.1f}{over * 1e3:>8.1f}{ratio:>8.3f}")
    sys.stdout.write("\n".join(lines) + "\n")
    if medians[ALL_TOGETHER] > LIMIT * medians["greedy"]:
        sys.exit(f"{ALL_TOGETHER} cost more than {LIMIT - 1:.0%}")


def run(
    engine: Engine, prompts: list[list[int]], new_tokens: int, sampling: dict[str, Any]
) -> list[float]:
    """Decode to the end and return the seconds of each step in which every request decoded."""
    for index, prompt in enumerate(prompts):
        given = SamplingParams(max_tokens=new_tokens, seed=index, **sampling)
        request = EngineRequest(
            request_id=RequestId(str(index)), prompt_token_ids=prompt, sampling=given
        )
        engine.add(engine.validate(request))
    seconds = []
    while engine.has_work:
        num_decoded = engine.counters.num_decode_tokens
        started = time.perf_counter()
        engine.step()
        elapsed = time.perf_counter() - started
        if engine.counters.num_decode_tokens - num_decoded == len(prompts):
            seconds.append(elapsed)
    return seconds


if __name__ == "__main__":
    main()
