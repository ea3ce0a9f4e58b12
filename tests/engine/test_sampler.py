# SPDX-License-Identifier: Apache-2.0
"""Draws are a function of (logits, parameters, seed, position), and follow the right law."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import TypicalLogitsWarper

from xinference.engine.sampler import SamplingRows, highest_tokens, sample, uniform

NUM_DRAWS = 4000


def rows(count: int, **given: Any) -> SamplingRows:
    """Return parameters of `count` rows: a value for all, or a list."""
    fields = {
        "temperature": (1.0, np.float32),
        "top_p": (1.0, np.float32),
        "top_k": (0, np.int64),
        "seed": (1, np.uint64),
        "position": (range(count), np.int64),
        "min_p": (0.0, np.float32),
        "typical_p": (1.0, np.float32),
    }
    arrays = {}
    for name, (default, dtype) in fields.items():
        value = given.get(name, default)
        values = [value] * count if isinstance(value, int | float) else list(value)
        arrays[name] = np.array(values, dtype)
    return SamplingRows(**arrays)


def draw(logits: Tensor, **given: Any) -> list[int]:
    return sample(logits, rows(len(logits), **given)).tolist()


def law(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    typical_p: float = 1.0,
) -> np.ndarray:
    """The probabilities of one row, computed by sorting, in float64."""
    scores = (logits.double() / temperature).numpy()
    order = np.argsort(-scores, kind="stable")
    if top_k:
        scores[scores < scores[order[min(top_k, len(order)) - 1]]] = -np.inf
    weights = np.exp(scores - scores.max())
    weights /= weights.sum()
    before = np.cumsum(weights[order]) - weights[order]
    kept = order[before < top_p]
    weights[weights < weights[kept].min()] = 0
    weights[weights < min_p * weights.max()] = 0
    if typical_p < 1:
        # transformers' own, on what is left.
        scores = torch.from_numpy(weights).log().unsqueeze(0)
        left = TypicalLogitsWarper(typical_p)(torch.zeros(1, 0, dtype=torch.long), scores)
        weights = left.softmax(-1)[0].numpy()
    return weights / weights.sum()


def chi_square_fits(drawn: list[int], probabilities: np.ndarray) -> bool:
    """Whether counts fit, at five standard deviations of the statistic."""
    counts = np.bincount(drawn, minlength=len(probabilities)).astype(float)
    expected = probabilities * len(drawn)
    if counts[expected == 0].sum() > 0:
        return False
    common = expected >= 5
    statistic = ((counts - expected)[common] ** 2 / expected[common]).sum()
    rare = expected[~common].sum()
    if rare > 5:
        statistic += (counts[~common].sum() - rare) ** 2 / rare
    degrees = max(1, int(common.sum()))
    return bool(statistic < degrees + 5 * np.sqrt(2 * degrees))


LAWS = [
    {},
    {"temperature": 0.5},
    {"temperature": 1.7},
    {"top_k": 1},
    {"top_k": 5},
    {"top_p": 0.1},
    {"top_p": 0.8},
    {"top_k": 7, "top_p": 0.6},
    {"temperature": 1.5, "top_k": 20, "top_p": 0.9},
    {"temperature": 0.7, "top_p": 0.95},
    {"top_k": 200, "top_p": 0.99},
    {"min_p": 0.1},
    {"min_p": 1.0},
    {"typical_p": 0.3},
    {"typical_p": 0.9},
    {"temperature": 1.5, "min_p": 0.02},
    {"top_p": 0.9, "min_p": 0.05},
    {"top_k": 30, "typical_p": 0.7},
    {"temperature": 1.4, "min_p": 0.01, "typical_p": 0.8},
    {"temperature": 0.8, "top_k": 100, "top_p": 0.95, "min_p": 0.01, "typical_p": 0.9},
]


@pytest.mark.parametrize("parameters", LAWS, ids=str)
@pytest.mark.parametrize("vocab_size", [40, 2000])
def test_draws_follow_the_law_of_their_parameters(
    parameters: dict[str, float], vocab_size: int
) -> None:
    logits = torch.randn(vocab_size, generator=torch.Generator().manual_seed(3)) * 2

    drawn = draw(logits.expand(NUM_DRAWS, -1), **parameters)

    assert chi_square_fits(drawn, law(logits, **parameters))  # type: ignore[arg-type]


FLAT_LAWS = [
    {"top_p": 0.9},
    {"top_k": 1800},
    {"top_k": 2000, "top_p": 0.8},
    {"temperature": 2.0, "top_p": 0.95, "min_p": 0.9},
    {"top_k": 1500, "top_p": 0.9, "typical_p": 0.7},
]


@pytest.mark.parametrize("parameters", FLAT_LAWS, ids=str)
def test_a_flat_law_wider_than_the_candidates_is_still_exact(parameters: dict[str, float]) -> None:
    logits = torch.randn(3000, generator=torch.Generator().manual_seed(5)) * 0.05

    drawn = draw(logits.expand(1000, -1), **parameters)

    probabilities = law(logits, **parameters)  # type: ignore[arg-type]
    assert (probabilities > 0).sum() > 900
    assert chi_square_fits(drawn, probabilities)


@pytest.mark.parametrize("scale", [0.1, 1.0, 4.0])
@pytest.mark.parametrize("parameters", [*LAWS, *FLAT_LAWS], ids=str)
def test_every_draw_inverts_the_law_at_its_number(
    parameters: dict[str, float], scale: float
) -> None:
    logits = torch.randn(4100, generator=torch.Generator().manual_seed(11)) * scale
    count = 100

    drawn = np.array(draw(logits.expand(count, -1), **parameters))

    probabilities = law(logits, **parameters)  # type: ignore[arg-type]
    above = np.cumsum(probabilities)[drawn]
    below = above - probabilities[drawn]
    number = uniform(np.ones(count, np.uint64), np.arange(count))
    assert (probabilities[drawn] > 0).all()
    assert (below - 1e-5 <= number).all()
    assert (number <= above + 1e-5).all()


def test_ties_at_the_threshold_are_all_kept() -> None:
    logits = torch.tensor([0.0, 5.0, 5.0, 5.0, 1.0])

    drawn = draw(logits.expand(300, -1), top_k=2)

    assert set(drawn) == {1, 2, 3}


@pytest.mark.parametrize("vocab_size", [500, 5000])
def test_a_seed_gives_the_same_token_alone_and_in_any_batch(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, vocab_size, generator=generator).bfloat16()
    parameters = {
        "temperature": [0.0, 0.7, 1.3] * 20,
        "top_p": [1.0, 0.9, 0.5, 0.999] * 15,
        "top_k": [0, 0, 40, 3, 400, 2000] * 10,
        "min_p": [0.0, 0.01, 0.0, 0.2] * 15,
        "typical_p": [1.0, 0.9, 1.0, 0.5, 1.0, 1.0] * 10,
        "seed": range(60),
        "position": range(100, 160),
    }
    order = np.random.default_rng(0).permutation(60)

    together = draw(logits, **parameters)
    shuffled = draw(
        logits[order], **{name: [list(v)[i] for i in order] for name, v in parameters.items()}
    )
    alone = [
        draw(logits[i : i + 1], **{name: [list(v)[i]] for name, v in parameters.items()})[0]
        for i in range(60)
    ]

    assert together == alone
    assert [together[i] for i in order] == shuffled


def test_greedy_rows_take_the_best_token_and_depend_on_no_seed() -> None:
    logits = torch.randn(20, 1500, generator=torch.Generator().manual_seed(1))

    first = draw(logits, temperature=0.0, seed=1)
    second = draw(logits, temperature=0.0, seed=2, top_k=3, top_p=0.2)

    assert first == second == logits.argmax(-1).tolist()


@pytest.mark.parametrize("vocab_size", [1, 511, 512, 513, 1024, 3001])
def test_the_highest_token_is_the_first_of_the_highest(vocab_size: int) -> None:
    generator = torch.Generator().manual_seed(vocab_size)
    logits = torch.randint(-3, 4, (50, vocab_size), generator=generator).bfloat16()
    # Several equal maxima per row.
    expected = [row.tolist().index(row.max().item()) for row in logits]

    assert highest_tokens(logits).tolist() == expected


def test_numbers_are_uniform_and_unrelated_between_seeds_and_positions() -> None:
    positions = np.arange(5000)
    one = uniform(np.full(5000, 1, np.uint64), positions)
    two = uniform(np.full(5000, 2, np.uint64), positions)
    across = uniform(np.arange(5000, dtype=np.uint64), np.full(5000, 7))

    for numbers in (one, two, across):
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = np.histogram(numbers, bins=50, range=(0, 1))[0]
        assert ((counts - 100) ** 2 / 100).sum() < 100
        assert abs(np.corrcoef(numbers[:-1], numbers[1:])[0, 1]) < 0.06
    assert abs(np.corrcoef(one, two)[0, 1]) < 0.06


def test_the_generator_is_philox_as_published() -> None:
    # The vector of Random123's known answers for philox4x32-10 with counter and key 0:
    # 6627e8d5 e169c58d bc57ac4c 9b00dbd8.
    number = uniform(np.zeros(1, np.uint64), np.zeros(1, np.int64))[0]

    assert number == (0x6627E8D5E169C58D >> 11) * 2.0**-53


def test_the_last_token_with_any_weight_is_the_last_that_can_be_drawn() -> None:
    logits = torch.full((200, 700), -torch.inf)
    logits[:, 3] = 0.0
    logits[:, 5] = 0.0

    assert set(draw(logits)) == {3, 5}
    assert set(draw(logits, top_p=0.99)) == {3, 5}
