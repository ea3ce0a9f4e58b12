# SPDX-License-Identifier: Apache-2.0
"""Linear layers by the kernel in C: what they compute, alone and in company, and when."""

import logging
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from xinference.engine.native.linear import NativeWeights, can_be_native
from xinference.engine.packing import pack_linears

_FLAGS = Path("/proc/cpuinfo").read_text().split()
# Why a skip: no installation brings these instructions. By the CPU's own word and not `is_native`,
# which a broken kernel would turn into a skip.
on_its_cpu = pytest.mark.skipif(
    "avx512_bf16" not in _FLAGS or "amx_bf16" in _FLAGS, reason="linear.c is not for this CPU"
)


@pytest.fixture(autouse=True)
def inference() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), torch.inference_mode():
        torch.manual_seed(0)
        yield


def randn(*shape: int) -> Tensor:
    return torch.randn(*shape).bfloat16()


@on_its_cpu
@pytest.mark.parametrize("num_rows", [*range(1, 18), 31, 33, 130, 300])
def test_it_is_the_product_in_float_rounded_once(num_rows: int) -> None:
    for num_out, num_in in ((1, 2), (15, 34), (16, 32), (17, 258), (70, 512), (400, 64)):
        weight, bias, hidden = randn(num_out, num_in), randn(num_out), randn(num_rows, num_in)
        product = hidden.float() @ weight.float().T

        for given, expected in ((None, product), (bias, product + bias.float())):
            mapped = NativeWeights(weight, given).map(hidden)

            assert mapped.dtype == torch.bfloat16
            torch.testing.assert_close(mapped.float(), expected, atol=1e-2, rtol=5e-3)


@on_its_cpu
def test_a_row_is_the_same_in_any_batch_and_a_nan_stays_with_its_row() -> None:
    weights, hidden = NativeWeights(randn(200, 96), randn(200)), randn(77, 96)
    alone = torch.cat([weights.map(row.unsqueeze(0)) for row in hidden])
    spoilt = hidden.clone()
    spoilt[40, 3] = torch.nan

    assert torch.equal(weights.map(hidden), alone)
    assert torch.equal(weights.map(hidden[5:25]), alone[5:25])
    mapped = weights.map(spoilt)
    assert mapped[40].isnan().all()
    assert torch.equal(mapped[41:], alone[41:])
    assert torch.equal(mapped[:40], alone[:40])


@on_its_cpu
def test_it_takes_rows_however_they_lie() -> None:
    weights, hidden = NativeWeights(randn(24, 8), None), randn(3, 5, 8)
    expected = weights.map(hidden)

    assert expected.shape == (3, 5, 24)
    assert torch.equal(weights.map(hidden.transpose(0, 1)), expected.transpose(0, 1))
    assert torch.equal(weights.map(hidden[:, 1:3]), expected[:, 1:3])
    assert weights.map(hidden[:0]).shape == (0, 5, 24)


@on_its_cpu
def test_the_plain_matrix_comes_back() -> None:
    weight = randn(21, 10)

    assert torch.equal(NativeWeights(weight, None).plain(), weight)


@on_its_cpu
def test_which_layers_it_is_for() -> None:
    assert can_be_native(randn(3, 4))
    assert not can_be_native(randn(3, 5))
    assert not can_be_native(torch.ones(3, 4))


def test_without_a_compiler_pytorch_computes_and_the_log_says_why(
    without_compiler: None, caplog: pytest.LogCaptureFixture
) -> None:
    layer, hidden = nn.Sequential(nn.Linear(8, 24)).bfloat16(), randn(3, 8)
    expected = layer(hidden)

    with caplog.at_level(logging.INFO):
        assert pack_linears(layer) == 1

    assert "left to PyTorch's own kernel: there is no C compiler" in caplog.text
    torch.testing.assert_close(layer(hidden), expected, atol=1e-2, rtol=1e-2)
