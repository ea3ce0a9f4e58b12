# SPDX-License-Identifier: Apache-2.0
"""Sums over the vocabulary in C: the same as PyTorch's, and PyTorch's without a compiler."""

import numpy as np
import pytest
import torch

from tests.engine.test_sampler import rows
from xinference.engine.logprobs import row_logprobs
from xinference.engine.native.sampling import native_chunk_sums
from xinference.engine.sampler import sample


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("vocab_size", [7, 512, 513, 3000])
def test_the_sums_are_those_of_the_weights(vocab_size: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = (torch.randn(5, vocab_size + 3, generator=generator) * 20).to(dtype)[:, 1:-2]
    logits[:, 1::3] = -torch.inf
    logits[2, 4] = logits[2].max() - 300
    temperature = torch.tensor([0.3, 0.7, 1.0, 2.0, 5.0])
    exact = logits.double()
    weights = ((exact - exact.amax(1, keepdim=True)) / temperature.unsqueeze(1)).exp()
    expected = [chunk.sum(1) for chunk in weights.split(100, dim=1)]

    sums = native_chunk_sums(logits, logits.amax(1), temperature, chunk=100)

    assert sums is not None
    torch.testing.assert_close(sums, torch.stack(expected, dim=1), rtol=1e-5, atol=1e-37)


def test_what_is_forbidden_weighs_nothing() -> None:
    logits = torch.full((1, 20), -torch.inf)
    logits[0, 3] = 5.0

    sums = native_chunk_sums(logits, logits.amax(1), torch.ones(1), chunk=2)

    assert sums is not None
    assert sums.tolist() == [[0.0, 1.0] + [0.0] * 8]


def test_without_a_compiler_the_same_tokens_are_drawn(request: pytest.FixtureRequest) -> None:
    logits = torch.randn(200, 3000, generator=torch.Generator().manual_seed(0)) * 2
    wanted = rows(200, temperature=0.8)
    tokens = sample(logits, wanted)
    logprobs = row_logprobs(logits, tokens, 3)
    request.getfixturevalue("without_compiler")
    again = sample(logits, wanted)
    same = row_logprobs(logits, tokens, 3)
    assert native_chunk_sums(logits, logits.amax(1), torch.ones(200), chunk=64) is None

    assert again.tolist() == tokens.tolist()
    np.testing.assert_allclose(same.top, logprobs.top, rtol=1e-5)
