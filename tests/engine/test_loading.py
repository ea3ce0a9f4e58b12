# SPDX-License-Identifier: Apache-2.0
"""From files to an engine, and everything that must be refused on the way."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import LlamaConfig, Phi3Config, Qwen2Config
from transformers.models.bloom import BloomConfig

from tests.engine.tiny_engines import add, run_to_end
from tests.models_tiny import MAX_POSITIONS, VOCAB_SIZE, make_model, make_tokenizer, save_model
from xinference.engine import Engine, load_engine
from xinference.engine.attention.cpu import CpuAttention
from xinference.engine.attention.interface import Pages, Scoring
from xinference.engine.config import Placement
from xinference.engine.load_problem import load_problem
from xinference.engine.loading import make_engine, rope_limit
from xinference.engine.packing import JoinedLinear, PackedLinear, SharedInputs, pack_linears
from xinference.engine.padded import PaddedCache
from xinference.errors import InvalidRequest, LoadFailed
from xinference.protocol.deployment import EngineOptions

CPU = Placement(device=torch.device("cpu"), dtype=torch.float32)


def load(path: Path, **options: Any) -> Engine:
    given = {"device": "cpu", "max_model_len": 64, "max_num_seqs": 4, **options}
    return load_engine(path, EngineOptions(**given), model_name="tiny")


def test_a_directory_becomes_an_engine_that_answers(tmp_path: Path) -> None:
    save_model(tmp_path, ends=True, do_sample=True, top_k=20)
    progress: list[float] = []
    engine = load_engine(
        tmp_path, EngineOptions(device="cpu", max_model_len=64), on_progress=progress.append
    )

    add(engine, "r", engine.tokenizer.encode("hello"), max_tokens=5)

    assert run_to_end(engine).texts["r"]
    assert progress == sorted(progress)
    assert (progress[0], progress[-1]) == (0.0, 1.0)
    assert engine.config.model_name == tmp_path.name
    assert engine.config.dtype == "float32", "stored so"
    defaults = engine.generation_defaults
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (1.0, 1.0, 20)
    assert engine.eos_token_ids == {engine.tokenizer.eos_token_id}
    assert engine.model_config.model_type == "llama"


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_every_type_of_weights_passes_the_self_test(tmp_path: Path, dtype: str) -> None:
    engine = load(save_model(tmp_path, "qwen2"), dtype=dtype)

    add(engine, "r", [1, 2, 3], max_tokens=5)

    assert engine.config.dtype == dtype
    assert len(run_to_end(engine).token_ids["r"]) == 5


def test_the_kv_cache_is_as_large_as_all_contexts_need_and_no_larger(tmp_path: Path) -> None:
    config = load(save_model(tmp_path), block_size=16, max_num_seqs=3).config

    assert config.num_blocks == 3 * 64 // 16
    # Two layers, keys and values, two heads of 8 numbers of 4 bytes.
    assert config.kv_cache_bytes == config.num_blocks * 16 * 2 * 2 * 2 * 8 * 4


def test_a_kv_cache_that_does_not_hold_the_context_asked_for_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(save_model(tmp_path), kv_cache_bytes=20_000)

    assert refused.value.field == "kv_cache_bytes"


def test_a_context_longer_than_the_models_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest) as refused:
        load(save_model(tmp_path), max_model_len=MAX_POSITIONS + 1)

    assert refused.value.field == "max_model_len"


def test_a_directory_without_a_model_fails_to_load(tmp_path: Path) -> None:
    with pytest.raises(LoadFailed, match=r"config\.json"):
        load(tmp_path)


def test_damaged_weights_fail_to_load(tmp_path: Path) -> None:
    save_model(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])

    with pytest.raises(LoadFailed, match="tiny") as failed:
        load(tmp_path)

    assert f"model.safetensors in {tmp_path}: not whole, copy or download it" in str(failed.value)


def test_no_file_is_blamed_where_all_are_whole(tmp_path: Path) -> None:
    save_model(tmp_path)

    assert load_problem(tmp_path, SafetensorError("odd")) == "SafetensorError: odd"


def test_a_directory_without_a_tokenizer_fails_to_load(tmp_path: Path) -> None:
    save_model(tmp_path)
    for file in tmp_path.glob("tokenizer*"):
        file.unlink()

    with pytest.raises(LoadFailed, match=f"there are no files of a tokenizer in {tmp_path}"):
        load(tmp_path)


def test_missing_weights_fail_to_load(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    save_model(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})

    with pytest.raises(LoadFailed, match="up_proj"):
        load(tmp_path)


def test_an_unknown_architecture_fails_to_load(tmp_path: Path) -> None:
    save_model(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "model_type": "no-such-thing"}))

    with pytest.raises(LoadFailed):
        load(tmp_path)


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_a_device_that_is_not_there_is_refused(tmp_path: Path, device: str) -> None:
    if torch.cuda.is_available():
        pytest.skip("this machine has one")

    with pytest.raises(LoadFailed, match=device):
        load(save_model(tmp_path), device=device)


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="device"):
        load(save_model(tmp_path), device="toaster")


def engine_of(model: Any, **options: Any) -> Engine:
    return make_engine(
        model,
        make_tokenizer(),
        EngineOptions(**{"max_model_len": 64, **options}),
        placement=CPU,
        name="tiny",
        report=lambda _: None,
    )


class Forgetful(CpuAttention):
    """A backend with a bug: it looks at one token less."""

    def attend(
        self, pages: Pages, plan: Any, query: Tensor, key: Tensor, value: Tensor, scoring: Scoring
    ) -> Tensor:
        wrong = Scoring(scaling=scoring.scaling, window=5)
        return super().attend(pages, plan, query, key, value, wrong)


def test_what_computes_something_else_over_pages_runs_in_padded_batches() -> None:
    engine = make_engine(
        make_model("llama"),
        make_tokenizer(),
        EngineOptions(max_model_len=64),
        placement=CPU,
        name="tiny",
        report=lambda _: None,
        backend=Forgetful(),
    )

    assert engine.config.attention == "padded"


def test_what_computes_something_else_either_way_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def forgets(cache: PaddedCache, *args: Any) -> Any:
        return args[:2]

    monkeypatch.setattr(PaddedCache, "update", forgets)
    model = make_model(
        config=BloomConfig(vocab_size=VOCAB_SIZE, hidden_size=32, n_layer=1, n_head=2)
    )

    with pytest.raises(LoadFailed) as refused:
        engine_of(model)

    assert "BloomForCausalLM does not dispatch through transformers' AttentionInterface" in str(
        refused.value
    )
    assert "with padded attention: " in str(refused.value)


def test_frequencies_that_depend_on_the_batch_limit_the_context() -> None:
    shape: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
    }
    factors = [1.0 + index for index in range(4)]
    longrope = Phi3Config(
        **shape,
        max_position_embeddings=128,
        original_max_position_embeddings=48,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": factors,
            "long_factor": factors[::-1],
        },
    )
    dynamic = LlamaConfig(
        **shape,
        max_position_embeddings=96,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
    )

    assert rope_limit(Qwen2Config(**shape)) is None
    assert rope_limit(dynamic) == 96
    assert engine_of(make_model(config=longrope), max_model_len=None).config.max_model_len == 48
    with pytest.raises(InvalidRequest, match="rotary"):
        engine_of(make_model(config=longrope), max_model_len=64)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_packed_layer_computes_what_the_plain_one_did(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 8, bias=False)).to(dtype)
        hidden = torch.randn(2, 5, 24).to(dtype)
        expected = model(hidden)
        weight = model[0].weight.clone()

        num_packed = pack_linears(model)

        assert num_packed == 2
        assert isinstance(model[0], PackedLinear)
        torch.testing.assert_close(model(hidden), expected, atol=2e-2, rtol=2e-2)
        assert model(hidden[:, :0]).shape == (2, 0, 8)
        torch.testing.assert_close(model[0].weight, weight)


class _GatedBlock(nn.Module):
    """Two layers of one input, a third of their product, and one that nobody calls."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(24, 40), nn.Linear(24, 16, bias=False)
        self.down, self.idle = nn.Linear(16, 24), nn.Linear(24, 24)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.down(self.gate(hidden)[..., :16] * self.up(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_that_map_the_same_tensor_become_one_product(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        model = _GatedBlock().to(dtype)
        first, second = torch.randn(2, 1, 5, 24).to(dtype)
        weight = model.up.weight.clone()
        with SharedInputs(model) as shared_inputs:
            expected = [model(first), model(second)]

        num_packed = pack_linears(model, shared_inputs.groups())

        assert num_packed == 4
        assert isinstance(model.gate, JoinedLinear)
        assert isinstance(model.up, JoinedLinear)
        assert isinstance(model.down, PackedLinear)
        assert isinstance(model.idle, PackedLinear)
        for hidden, wanted in zip((first, second), expected, strict=True):
            torch.testing.assert_close(model(hidden), wanted, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(model.up.weight, weight)
        # One that is called alone, out of turn or again computes for the tensor that it is given.
        torch.testing.assert_close(model.up(first), first @ weight.T, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(model.up(second), second @ weight.T, atol=2e-2, rtol=2e-2)
        torch.testing.assert_close(model.up(second), second @ weight.T, atol=2e-2, rtol=2e-2)


def test_layers_that_share_a_tensor_only_now_and_then_stay_apart() -> None:
    with torch.inference_mode():
        layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))
        first, second = torch.ones(2, 1, 8)
        with SharedInputs(layers) as shared_inputs:
            for layer in layers:
                layer(first)
            for layer, hidden in zip(layers, (first, second, second), strict=True):
                layer(hidden)

        assert shared_inputs.groups() == []


def test_the_pure_parts_import_without_torch() -> None:
    code = (
        "import sys, xinference.engine, xinference.engine.scheduler\n"
        "heavy = {'torch', 'transformers', 'numpy'} & sys.modules.keys()\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )

    ended = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )

    assert ended.returncode == 0, ended.stderr
