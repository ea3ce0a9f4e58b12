# SPDX-License-Identifier: Apache-2.0
"""Norms, gated MLPs and rotary positions in C: in which models, and that they compute the same."""

import logging

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from tests.architectures import PADDED, PAGED
from tests.engine.test_native_linear import on_its_cpu
from tests.models_tiny import VOCAB_SIZE, make_model
from xinference.engine.native.layers import GatedMlp, NativeNorm, use_native_layers

TYPES = (torch.float32, torch.bfloat16)


def logits(model: PreTrainedModel) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    token_ids = torch.randint(VOCAB_SIZE, (1, 9), generator=generator)
    with torch.inference_mode():
        found: Tensor = model(input_ids=token_ids, use_cache=False).logits
    return found.float()


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("architecture", PAGED | PADDED)
def test_a_model_of_any_family_computes_the_same(architecture: str, dtype: torch.dtype) -> None:
    model = make_model(architecture, config=(PAGED | PADDED)[architecture]()).to(dtype)
    expected = logits(model)

    use_native_layers(model)

    digits = 0.05 if dtype == torch.bfloat16 else 1e-4
    torch.testing.assert_close(
        logits(model), expected, rtol=digits, atol=digits * float(expected.std())
    )


def kinds(model: nn.Module, kind: type[nn.Module]) -> int:
    return sum(isinstance(module, kind) for module in model.modules())


@on_its_cpu
@pytest.mark.parametrize(
    ("architecture", "norms", "mlps", "rotaries"),
    [
        ("llama", 5, 2, 2),
        ("qwen2", 5, 2, 2),
        ("qwen3", 9, 2, 2),
        ("mistral", 5, 2, 2),
        ("phi3", 5, 0, 2),  # its gate and up are one layer
        ("mixtral", 5, 0, 2),  # experts
        ("gemma2", 0, 0, 2),  # norms around zero, GELU
        ("gpt2", 0, 0, 0),
    ],
)
def test_what_is_replaced(
    architecture: str,
    norms: int,
    mlps: int,
    rotaries: int,
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = make_model(architecture).bfloat16()

    with caplog.at_level(logging.INFO):
        assert use_native_layers(model) == 3 * mlps

    assert kinds(model, NativeNorm) == norms
    assert kinds(model, GatedMlp) == mlps
    assert f"{norms} norms, {mlps} MLPs and {rotaries} rotary positions are in C" in caplog.text


def test_another_model_of_the_class_stays_as_it_was() -> None:
    replaced, other = make_model("llama"), make_model("llama")
    kind = type(other.model.layers[0].self_attn)

    use_native_layers(replaced)

    assert type(other.model.layers[0].self_attn) is kind
    assert isinstance(replaced.model.layers[0].self_attn, kind)
    assert type(other.model.norm) is LlamaRMSNorm


class _DoublingRMSNorm(LlamaRMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return 2 * super().forward(hidden)


class _ClampingMlp(LlamaMLP):
    def forward(self, hidden: Tensor) -> Tensor:
        return super().forward(hidden).clamp(-0.1, 0.1)


def test_what_only_looks_alike_stays() -> None:
    model = make_model("llama").bfloat16()
    model.model.norm.__class__ = _DoublingRMSNorm
    model.model.layers[0].mlp.__class__ = _ClampingMlp
    model.model.layers[1].mlp.act_fn = nn.GELU()

    assert use_native_layers(model) == 0

    assert type(model.model.norm) is _DoublingRMSNorm
    assert type(model.model.layers[0].mlp) is _ClampingMlp


@pytest.mark.parametrize("dtype", TYPES)
def test_a_norm_takes_rows_however_they_lie(dtype: torch.dtype) -> None:
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        stock = LlamaRMSNorm(24).to(dtype)
        stock.weight += torch.randn(24).to(dtype)
        norm = NativeNorm(stock, stock.weight, stock.variance_epsilon)
        wide = torch.randn(2, 7, 5, 40).to(dtype)
        for hidden in (
            *(wide[..., :24], wide[..., :24].transpose(1, 2), wide[0, 0, :, 3:27]),
            *(wide[0, 0, 0, :24], wide[1:, :, 2:4, :24], wide[:0, ..., :24]),
            wide.transpose(2, 3)[..., :24, :].transpose(2, 3),
            torch.randn(1, 3000, 24).to(dtype),
        ):
            torch.testing.assert_close(norm(hidden), stock(hidden))
        spoilt = torch.randn(3, 24).to(dtype)
        spoilt[1, 5] = torch.nan
        assert norm(spoilt).isnan().any(1).tolist() == [False, True, False]
        # Models that compute a norm in another type than their weights have.
        torch.testing.assert_close(norm(spoilt[:1].double()), stock(spoilt[:1].double()))


def test_without_a_compiler_all_is_left_to_pytorch(
    without_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model("llama")

    with caplog.at_level(logging.INFO):
        assert use_native_layers(model) == 0

    assert kinds(model, NativeNorm) == 0
    assert "left to PyTorch: there is no C compiler" in caplog.text
