# SPDX-License-Identifier: Apache-2.0
"""What a forward is said to take, and what a process takes for many long documents."""

import json
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

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


@pytest.mark.timeout(240)
def test_a_process_stays_below_the_ceiling_however_long_the_documents() -> None:
    # Why a process: only a fresh one can say how much it has grown.
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.embedding", "--memory", "--documents", "100"],
        capture_output=True,
        text=True,
        check=True,
    )

    found = json.loads(done.stdout.splitlines()[-1])
    assert found["documents"] == 100
    assert found["tokens"] > 20_000
    assert found["grown_mib"] < found["ceiling_mib"]
