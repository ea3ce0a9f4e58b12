# SPDX-License-Identifier: Apache-2.0
"""The padded way: rows of other requests, whatever is in their contexts, change nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from tests.architectures import PADDED
from tests.engine.test_oracle import NEW_TOKENS, engine_of, oracle, prompts, stock_model
from tests.engine.tiny_engines import BLOCK_SIZE, Transcript, add, run_to_end
from xinference.engine import padded
from xinference.engine.batch import Batch


@pytest.mark.parametrize("architecture", ["bloom", "mpt", "deepseek_v3"])
def test_single_tokens_in_several_groups_give_the_stock_tokens(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(padded, "_MAX_GATHERED_TOKENS", 50)
    engine = engine_of(architecture)
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)

    told = run_to_end(engine).token_ids

    assert told == {str(index): list(answer) for index, answer in enumerate(oracle(architecture))}


@pytest.mark.parametrize("architecture", PADDED)
def test_numbers_that_are_none_in_one_context_stay_there(architecture: str) -> None:
    engine = engine_of(architecture, enable_prefix_caching=False, max_num_seqs=16)
    expected = {str(index): list(answer) for index, answer in enumerate(oracle(architecture))}
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)
    add(engine, "poisoned", [7] * 20, max_tokens=NEW_TOKENS)
    transcript = Transcript()
    transcript.take(engine.step())
    runner: Any = engine._runner
    block = engine._live["poisoned"].sequence.block_table[0]  # type: ignore[index]
    for pages in runner.cache._pages:
        size = engine.config.block_size
        pages.value[block * size : (block + 1) * size] = torch.nan

    run_to_end(engine, transcript)

    assert {name: transcript.token_ids[name] for name in expected} == expected


def test_logits_come_in_the_order_they_were_asked_for() -> None:
    engine = engine_of("bloom")
    model = stock_model("bloom")
    text = [5, 9, 40, 41, 7]
    logits = engine._runner.forward(
        Batch(
            token_ids=np.array([3, *text]),
            positions=np.array([0, *range(5)]),
            query_starts=np.array([0, 1, 6]),
            context_lens=np.array([1, 5]),
            block_tables=np.array([[1], [0]]),
            block_size=BLOCK_SIZE,
            sample_tokens=np.array([5, 0, 2]),
        )
    )

    with torch.inference_mode():
        alone = model(torch.tensor([[3]])).logits[0]
        expected = model(torch.tensor([text])).logits[0]
    wanted = torch.stack((expected[4], alone[0], expected[1]))
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
