# SPDX-License-Identifier: Apache-2.0
"""`cal-model-mem`: what is printed, with no server."""

import json

import pytest

from tests.cli.conftest import Run

MEMORY = ("cal-model-mem", "-f", "pytorch", "-c", "4096")


def test_the_parts_are_printed_as_users_know_them(run: Run) -> None:
    printed = run(*MEMORY, "-n", "qwen2.5-instruct", "-s", "7")

    lines = printed.stdout.splitlines()
    assert printed.exit_code == 0
    assert lines[:6] == [
        "model_name: qwen2.5-instruct",
        "kv_cache_dtype: 16",
        "model size: 7.0 B",
        "quant: None",
        "context: 4096",
        "gpu mem usage:",
    ]
    assert lines[6] == "  model mem: 13352 MB"
    assert [line.split(":")[0].strip() for line in lines[7:11]] == [
        "kv_cache", "overhead", "active", "total",
    ]  # fmt: skip
    assert "this machine: " in lines[11]


def test_json_has_bytes_and_says_where_the_numbers_are_from(run: Run) -> None:
    typical = json.loads(run(*MEMORY, "-s", "0_5", "--json").stdout)
    guide = json.loads(run(*MEMORY, "-n", "xinference-guide", "-s", "0.002", "--json").stdout)
    many = json.loads(run(*MEMORY, "-s", "0_5", "--max-num-seqs", "4", "--json").stdout)

    assert typical["shape"] == "typical"
    assert guide["shape"] == "config.json"
    assert guide["kv_cache_bytes"] == 4096 * 4 * 2 * 3 * 32 * 2
    assert many["kv_cache_bytes"] == 4 * typical["kv_cache_bytes"]
    assert typical["total_bytes"] == sum(
        typical[part]
        for part in ("weights_bytes", "kv_cache_bytes", "activation_bytes", "overhead_bytes")
    )
    assert typical["fits"] == (typical["total_bytes"] <= typical["free_bytes"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("-n", "qwen2.5-instrct", "-s", "7"), "did you mean qwen2.5-instruct"),
        (("-n", "qwen2.5-instruct", "-s", "8"), "there is no variant of 8B"),
        (("-s", "big"), "must be as 7, 0_5 or 0.5"),
        (("-s", "7", "--kv-cache-dtype", "12"), "12"),
    ],
)
def test_what_there_is_not_is_refused(run: Run, words: tuple[str, ...], expected: str) -> None:
    refused = run(*MEMORY, *words)

    assert refused.exit_code == 2
    assert expected in refused.stderr
