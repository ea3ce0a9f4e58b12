# SPDX-License-Identifier: Apache-2.0
"""The memory estimate against what the engine allocates, and what published files weigh."""

from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from tests.architectures import PADDED, PAGED
from tests.engine.tiny_engines import tiny_engine
from tests.models_tiny import make_model
from xinference.catalog import Catalog, directory_of
from xinference.catalog.family import Variant
from xinference.catalog.launch_memory import least_memory_bytes
from xinference.catalog.memory import (
    MIB,
    OVERHEAD_BYTES,
    ModelShape,
    bits_of,
    estimate,
    shape_of,
    typical_shape,
    weights_bytes,
)
from xinference.catalog.model_files import DirectoryFiles, shape_in, weights_in
from xinference.protocol.deployment import EngineOptions, LaunchSpec

LLAMA_8B = {
    "num_hidden_layers": 32, "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
}  # fmt: skip
QWEN_7B = {
    "num_hidden_layers": 28, "hidden_size": 3584, "intermediate_size": 18944,
    "num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 152064,
}  # fmt: skip
QWEN3_8B = {
    "num_hidden_layers": 36, "hidden_size": 4096, "intermediate_size": 12288, "head_dim": 128,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
}  # fmt: skip
GPT2 = {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257}
DEEPSEEK_V3 = {
    "num_hidden_layers": 61, "hidden_size": 7168, "num_attention_heads": 128, "vocab_size": 129280,
    "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128,
}  # fmt: skip


def known(config: dict[str, Any]) -> ModelShape:
    shape = shape_of(config)
    assert shape is not None
    return shape


@pytest.mark.parametrize(
    "architecture", ["llama", "qwen3", "gpt2", "qwen3_moe", "deepseek_v3", "falcon", "gemma3"]
)
def test_the_cache_is_counted_as_the_engine_allocates_it(architecture: str) -> None:
    make_config = (PAGED | PADDED)[architecture]

    engine = tiny_engine(architecture, make_config=make_config)

    per_token = engine.config.kv_cache_bytes / (engine.config.num_blocks * engine.config.block_size)
    num_bytes = {"float32": 4, "bfloat16": 2}[engine.config.dtype]
    assert known(make_config().to_dict()).kv_elements_per_token * num_bytes == per_token


def test_the_weights_are_counted_as_they_are_in_the_files(tmp_path: Path) -> None:
    model = make_model("qwen3")
    model.save_pretrained(tmp_path)

    weights = weights_in(tmp_path)

    assert weights is not None
    assert weights.num_parameters == sum(one.numel() for one in model.parameters())
    assert weights.dtype == "float32"
    assert weights.bytes_as("auto") == sum(
        file.stat().st_size for file in tmp_path.glob("*.safetensors")
    )
    assert weights.bytes_as("bfloat16") == weights.num_parameters * 2
    assert shape_in(tmp_path) == known(model.config.to_dict())


@pytest.mark.parametrize(
    "content", [b"", b"\xff" * 20, b"\x02\0\0\0\0\0\0\0{}", b"\x05\0\0\0\0\0\0\0"]
)
def test_broken_files_say_how_large_they_are_and_no_more(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(content)
    (tmp_path / "config.json").write_bytes(content)

    weights = weights_in(tmp_path)

    assert weights is not None
    assert (weights.num_bytes, weights.num_parameters) == (len(content), None)
    assert shape_in(tmp_path) is None
    assert weights_in(tmp_path / "none") is None


@pytest.mark.parametrize(
    ("config", "kibibytes"),
    [(LLAMA_8B, 128), (QWEN_7B, 56), (QWEN3_8B, 144), (GPT2, 36), (DEEPSEEK_V3, 68.625)],
)
def test_a_token_takes_what_the_configs_of_known_models_say(
    config: dict[str, Any], kibibytes: float
) -> None:
    needed = estimate(known(config), weights_bytes=0, context_length=1024)

    assert needed.kv_cache_bytes == 1024 * kibibytes * 1024
    assert needed.total_bytes > needed.kv_cache_bytes + needed.activation_bytes


def test_contexts_sequences_and_the_bits_of_the_cache_multiply() -> None:
    shape = known(LLAMA_8B)
    one = estimate(shape, weights_bytes=7, context_length=1000)

    many = estimate(shape, weights_bytes=7, context_length=2000, num_sequences=3, kv_bits=8)

    assert many.kv_cache_bytes == one.kv_cache_bytes * 3
    assert many.weights_bytes == one.weights_bytes == 7


@pytest.mark.parametrize(
    ("billions", "model_format", "quantization", "config", "gigabytes"),
    [
        ("8.03", "pytorch", "none", LLAMA_8B, 16.06),
        ("8.03", "awq", "Int4", LLAMA_8B, 5.74),
        ("8.03", "ggufv2", "Q4_K_M", LLAMA_8B, 4.92),
        ("8.03", "ggufv2", "q8_0", LLAMA_8B, 8.54),
        ("8.03", "mlx", "4bit", LLAMA_8B, 4.52),
        ("7.62", "gptq", "Int4", QWEN_7B, 5.58),
        ("7.62", "gptq", "Int8", QWEN_7B, 8.87),
        ("8.19", "fp8", "fp8", QWEN3_8B, 9.44),
    ],
)
def test_published_files_weigh_what_is_estimated(
    billions: str, model_format: str, quantization: str, config: dict[str, Any], gigabytes: float
) -> None:
    found = weights_bytes(Decimal(billions), model_format, quantization, known(config))

    assert found / 1e9 == pytest.approx(gigabytes, rel=0.05)


@pytest.mark.parametrize(
    ("name", "bits"),
    [("Int4", 4), ("4-bit", 4), ("8bit", 8), ("fp8", 8), ("q4_0", 4), ("none", None)],
)
def test_the_name_of_a_quantization_says_its_bits(name: str, bits: int | None) -> None:
    assert bits_of(name) == bits


@pytest.mark.parametrize(("size", "config"), [("7", QWEN_7B), ("8", LLAMA_8B), ("8", QWEN3_8B)])
def test_a_typical_model_is_not_far_from_the_known_ones(size: str, config: dict[str, Any]) -> None:
    typical, real = typical_shape(Decimal(size)), known(config)

    assert 0.8 <= typical.kv_elements_per_token / real.kv_elements_per_token < 2.5


def variant(size: str) -> Variant:
    return Variant(
        model_format="pytorch",
        size=Decimal(size),
        quantization="none",
        model_hub="huggingface",
        model_id="a/b",
    )


def test_the_least_is_the_process_the_weights_and_the_cache_that_was_asked_for() -> None:
    guide = directory_of("package:guide")
    file_bytes = (guide / "model.safetensors").stat().st_size

    files = DirectoryFiles(guide)
    least = least_memory_bytes(variant("7"), EngineOptions(), files)
    with_context = least_memory_bytes(variant("7"), EngineOptions(max_model_len=2048), files)
    with_cache = least_memory_bytes(variant("7"), EngineOptions(kv_cache_bytes=10 * MIB), files)

    assert file_bytes < least - OVERHEAD_BYTES < 2 * file_bytes
    assert with_context - least > 2048 * 4 * 2 * 3 * 32 * 2 - 1
    assert with_cache == least + 10 * MIB
    assert least_memory_bytes(variant("7"), EngineOptions(), None) > 14e9
    assert least_memory_bytes(variant("7"), EngineOptions(dtype="float32"), None) > 28e9


def test_what_fits_is_said_largest_first(tmp_path: Path) -> None:
    catalog = Catalog.load(tmp_path)
    wanted = LaunchSpec(model_name="qwen2.5-instruct", model_path="/no/where")

    assert catalog.resolve(wanted).description.memory_bytes < 2e9
    assert catalog.fitting(wanted, int(20e9)) == [
        "7B pytorch", "3B pytorch", "1.5B pytorch", "0.5B pytorch",
    ]  # fmt: skip
    assert catalog.fitting(wanted, 1000) == []

    brings_code = LaunchSpec(model_name="chatglm3")
    trusted = replace(brings_code, engine_options=EngineOptions(trust_remote_code=True))
    assert catalog.fitting(brings_code, int(90e9)) == []
    assert catalog.fitting(trusted, int(90e9)) == ["6B pytorch"]
