# SPDX-License-Identifier: Apache-2.0
"""What a forward is said to take, and what a process takes for many long documents."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from tests.long_runs import RecordLongRun
from xinference.cluster.replica_environment import DEFAULTS
from xinference.models.encoder_memory import CPU_BATCH_TOKENS, MAX_BATCH_BYTES, batch_limits
from xinference.protocol.encoding import EncoderOptions

CONFIG = SimpleNamespace(
    hidden_size=64, intermediate_size=128, num_attention_heads=4, _attn_implementation="sdpa"
)


def limits(config: Any = CONFIG, *, free_bytes: int = 2**40, **options: Any) -> Any:
    given = EncoderOptions(batch_size=8, **options)
    return batch_limits(given, config, item_bytes=4, free_bytes=free_bytes, on_cpu=True)


def test_what_a_launch_says_holds() -> None:
    found = limits(max_batch_bytes=1000, max_batch_tokens=77)

    assert (found.max_items, found.max_bytes, found.max_tokens) == (8, 1000, 77)


def test_without_a_word_a_batch_takes_a_share_of_what_is_free_but_not_too_much() -> None:
    assert limits(free_bytes=4000).max_bytes == 1000
    assert limits().max_bytes == MAX_BATCH_BYTES
    assert limits().max_tokens == CPU_BATCH_TOKENS


def test_attention_that_is_not_fused_counts_every_pair_of_tokens_alone_too() -> None:
    eager = SimpleNamespace(**{**vars(CONFIG), "_attn_implementation": "eager"})

    assert limits().num_bytes(1, 100) < limits(eager).num_bytes(1, 100)
    assert limits().num_bytes(2, 100) > 2 * limits().num_bytes(1, 100)


def test_a_config_that_says_little_is_taken_for_a_large_model() -> None:
    assert limits(SimpleNamespace()).bytes_per_token > limits().bytes_per_token


def test_on_a_cpu_the_pairs_of_tokens_of_a_batch_are_few() -> None:
    on_gpu = batch_limits(
        EncoderOptions(batch_size=8), CONFIG, item_bytes=4, free_bytes=2**40, on_cpu=False
    )

    assert limits().allow(8, 512, 8 * 512)
    assert not limits().allow(2, 4000, 8000)
    assert on_gpu.allow(2, 4000, 8000)


@pytest.mark.timeout(600)
def test_a_process_stays_below_the_ceiling_however_long_the_documents(
    is_long: bool, record_long_run: RecordLongRun
) -> None:
    num_documents = 10_000 if is_long else 100

    # Why a process: only a fresh one can say how much it has grown.
    done = subprocess.run(
        [
            *(sys.executable, "-m", "benchmarks.embedding", "--memory"),
            *("--documents", str(num_documents)),
        ],
        capture_output=True,
        text=True,
        check=True,
    )

    found = json.loads(done.stdout.splitlines()[-1])
    record_long_run(
        "Memory of long documents",
        documents=num_documents,
        tokens=found["tokens"],
        largest_growth_in_mib=found["grown_mib"],
        smallest_ceiling_in_mib=found["ceiling_mib"],
    )
    assert found["documents"] == num_documents
    assert found["tokens"] > 200 * num_documents
    assert found["grown_mib"] < found["ceiling_mib"]


def told_by(program: str) -> float:
    """Return the number that a program prints last, in the environment of a replica."""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**DEFAULTS, **os.environ},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return float(done.stdout.split()[-1])


def test_a_batch_like_the_one_before_takes_no_new_pages() -> None:
    assert told_by(COUNT_FAULTS) < 500


# By itself the C library gives what a batch took back when it ends: 5,000 pages of 4 KiB.
COUNT_FAULTS = """
import resource
from benchmarks.embedding import SOURCE, TEXTS, Callers, load
from xinference.protocol.encoding import EncoderOptions

def count_faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

model = load(SOURCE, EncoderOptions())
callers = Callers(model, TEXTS["sentence"])
callers.run(64, 4)
counts = []
for _ in range(3):  # a larger batch than any before, as chance gathers callers, takes pages once
    before = count_faults()
    callers.run(64, 4)
    counts.append(count_faults() - before)
print(min(counts) / 8)
model.stop(10.0)
"""


def test_kernels_for_ever_new_numbers_of_rows_do_not_pile_up() -> None:
    assert told_by(GROW_BY_SHAPES) < 100


# By itself oneDNN keeps 0.7 MB for each number of rows: 260 MB here.
GROW_BY_SHAPES = """
from pathlib import Path
import torch
from xinference.engine.packing import PackedLinear

def resident_mib():
    return int(Path("/proc/self/statm").read_text().split()[1]) / 256

packed = PackedLinear(torch.nn.Linear(384, 384))
with torch.inference_mode():
    packed(torch.ones(400, 384))
    before = resident_mib()
    for num_rows in range(1, 400):
        packed(torch.ones(num_rows, 384))
print(resident_mib() - before)
"""
