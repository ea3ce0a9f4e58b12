# SPDX-License-Identifier: Apache-2.0
"""Choices that a launch leaves to the engine, and their limits."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from xinference.engine.config import (
    EngineConfig,
    ModelFacts,
    Placement,
    backend_names,
    free_memory_bytes,
    resolve,
    resolve_placement,
)
from xinference.errors import InvalidRequest, LoadFailed
from xinference.protocol.deployment import EngineOptions, SchedulerPolicy

CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)
CUDA = Placement(device=torch.device("cuda"), dtype=torch.bfloat16)
KIB = 1024


def settle(
    options: EngineOptions,
    *,
    placement: Placement = CPU,
    free_bytes: int = 1000 * 128 * KIB,
    max_positions: int | None = 1024,
    rope_limit: int | None = None,
) -> EngineConfig:
    """Resolve with tokens of 1 KiB."""
    return resolve(
        options,
        model_name="m",
        placement=placement,
        facts=ModelFacts(
            max_positions=max_positions,
            rope_limit=rope_limit,
            bytes_per_token=KIB,
            attention=backend_names(placement)[0],
        ),
        free_bytes=free_bytes,
        num_threads=2,
    )


def place(
    options: EngineOptions,
    stored: torch.dtype = torch.bfloat16,
    *,
    has_cuda: bool = False,
    native: bool = True,
) -> Placement:
    return resolve_placement(
        options,
        model_name="m",
        stored_dtype=stored,
        has_cuda=has_cuda,
        has_native_bfloat16=native,
    )


def test_on_cpu_the_kv_cache_takes_a_quarter_of_the_free_memory_at_most() -> None:
    assert settle(EngineOptions(), free_bytes=200 * 128 * KIB).num_blocks == 50
    assert settle(EngineOptions(), free_bytes=10_000 * 128 * KIB).num_blocks == 16 * 8


def test_what_is_given_is_taken() -> None:
    config = settle(
        EngineOptions(
            max_num_seqs=3,
            max_model_len=100,
            max_num_batched_tokens=7,
            kv_cache_bytes=10 * 64 * KIB,
            block_size=64,
        )
    )

    assert (config.max_num_seqs, config.max_model_len, config.max_num_batched_tokens) == (3, 100, 7)
    assert (config.block_size, config.num_blocks, config.kv_cache_bytes) == (64, 10, 640 * KIB)


def test_steps_beside_streams_are_short_unless_prompts_go_first() -> None:
    assert settle(EngineOptions()).max_step_seconds == 0.5
    assert settle(EngineOptions(), placement=CUDA).max_step_seconds == 0.04
    assert settle(EngineOptions(max_step_seconds=1)).max_step_seconds == 1
    assert settle(EngineOptions.from_mapping({"scheduler_policy": "prefill_first"})) == replace(
        settle(EngineOptions()),
        scheduler_policy=SchedulerPolicy.PREFILL_FIRST,
        max_step_seconds=None,
    )


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"scheduler_policy": "lifo"}, "scheduler_policy"),
        ({"scheduler_policy": 1}, "scheduler_policy"),
        ({"enable_prefix_caching": "yes"}, "enable_prefix_caching"),
        ({"max_step_seconds": 0}, "max_step_seconds"),
        ({"max_step_seconds": True}, "max_step_seconds"),
        ({"max_step_seconds": "fast"}, "max_step_seconds"),
        ({"max_step_seconds": float("nan")}, "max_step_seconds"),
        ({"max_step_seconds": 0.1, "scheduler_policy": "prefill_first"}, "max_step_seconds"),
        ({"max_step_seconds": 0.1, "deterministic": True}, "max_step_seconds"),
        ({"deterministic": 1}, "deterministic"),
        ({"deterministic": True, "dtype": "bfloat16"}, "dtype"),
    ],
)
def test_a_wish_for_the_scheduler_that_cannot_be_is_refused_by_name(
    given: dict[str, Any], named: str
) -> None:
    with pytest.raises(InvalidRequest) as refused:
        EngineOptions.from_mapping(given)

    assert refused.value.field == named


def test_the_context_shrinks_to_what_memory_holds_unless_it_was_asked_for() -> None:
    little = 4 * 2 * 128 * KIB

    assert settle(EngineOptions(), free_bytes=little).max_model_len == 256
    with pytest.raises(LoadFailed, match="hold 256 tokens"):
        settle(EngineOptions(max_model_len=1024), free_bytes=little)
    with pytest.raises(LoadFailed):
        settle(EngineOptions(), free_bytes=0)


def test_the_context_ends_where_rotary_frequencies_begin_to_depend_on_the_batch() -> None:
    assert settle(EngineOptions(), rope_limit=300).max_model_len == 300
    with pytest.raises(InvalidRequest, match="rotary"):
        settle(EngineOptions(max_model_len=301), rope_limit=300)


def test_a_model_that_does_not_say_its_context_gets_a_careful_one() -> None:
    assert settle(EngineOptions(), max_positions=None).max_model_len == 2048


def test_each_device_has_its_own_attention_and_block_size() -> None:
    on_cpu, on_cuda = settle(EngineOptions()), settle(EngineOptions(), placement=CUDA)

    assert (on_cpu.attention, on_cpu.block_size) == ("native", 128)
    assert (on_cuda.attention, on_cuda.block_size) == (backend_names(CUDA)[0], 32)


@pytest.mark.parametrize(
    ("found", "names"), [(object(), ("triton", "reference")), (None, ("reference",))]
)
def test_cuda_uses_triton_where_it_is_installed(
    monkeypatch: pytest.MonkeyPatch, found: object, names: tuple[str, ...]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)

    assert backend_names(CUDA) == names
    assert backend_names(CPU) == ("native", "cpu")


@pytest.mark.parametrize(
    ("stored", "has_cuda", "native", "expected"),
    [
        (torch.float32, False, True, torch.float32),
        (torch.bfloat16, False, True, torch.bfloat16),
        (torch.float16, False, True, torch.bfloat16),
        (torch.bfloat16, False, False, torch.float32),
        (torch.float16, True, True, torch.float16),
        (torch.bfloat16, True, True, torch.bfloat16),
        (torch.bfloat16, True, False, torch.float16),
        (torch.float32, True, True, torch.float32),
    ],
)
def test_the_type_of_the_weights_follows_the_files_and_the_hardware(
    stored: torch.dtype, has_cuda: bool, native: bool, expected: torch.dtype
) -> None:
    placed = place(EngineOptions(), stored, has_cuda=has_cuda, native=native)

    assert placed.dtype == expected
    assert placed.device.type == ("cuda" if has_cuda else "cpu")


def test_a_type_that_is_asked_for_is_taken() -> None:
    assert place(EngineOptions(dtype="float16"), native=False).dtype == torch.float16


def test_deterministic_is_float32_in_chunks_of_a_block_whatever_the_clock_says() -> None:
    options = EngineOptions(deterministic=True)
    config = settle(options)

    assert place(options, torch.bfloat16).dtype == torch.float32
    assert (config.chunk_size, config.max_step_seconds) == (config.block_size, None)
    assert settle(EngineOptions()).chunk_size is None


def test_deterministic_needs_steps_that_hold_a_block_beside_every_stream() -> None:
    def step(size: int) -> EngineConfig:
        return settle(
            EngineOptions(
                deterministic=True, block_size=32, max_num_seqs=8, max_num_batched_tokens=size
            )
        )

    assert step(40).chunk_size == 32
    with pytest.raises(InvalidRequest, match="at least 40, got 39") as refused:
        step(39)
    assert refused.value.field == "max_num_batched_tokens"


def test_free_memory_is_read_from_the_machine() -> None:
    assert free_memory_bytes(torch.device("cpu")) > 2**20
