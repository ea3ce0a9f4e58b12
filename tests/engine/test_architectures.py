# SPDX-License-Identifier: Apache-2.0
"""Every architecture that `doc/engine.md` lists: how it runs, and that its tokens are right."""

import re
from pathlib import Path

import pytest

from tests.architectures import PADDED, PAGED, REFUSED
from tests.engine.test_oracle import (
    ARCHITECTURES,
    NEW_TOKENS,
    SMALLEST_SAFE_MARGIN,
    assert_equals_oracle,
    engine_of,
    prompts,
    smallest_margin,
)
from tests.engine.tiny_engines import add, run_to_end, tiny_engine
from tests.long_runs import RecordLongRun
from tests.models_tiny import make_model
from xinference.errors import LoadFailed

PAGE = Path(__file__).parents[2] / "doc" / "engine.md"


def class_of(architecture: str) -> str:
    """Return the name of the class that answers."""
    config = (PAGED | PADDED | REFUSED)[architecture]()
    return type(make_model(architecture, config=config)).__name__


@pytest.mark.parametrize("architecture", PAGED | PADDED)
def test_the_tokens_are_the_stock_ones_in_chunks_and_through_preemption(
    architecture: str, record_long_run: RecordLongRun
) -> None:
    engine = engine_of(architecture, num_blocks=7, max_num_batched_tokens=30)
    for index, prompt in enumerate(prompts()):
        add(engine, str(index), prompt, max_tokens=NEW_TOKENS)

    transcript = run_to_end(engine)

    assert engine.config.attention == ("native" if architecture in PAGED else "padded")
    assert engine.counters.num_preemptions > 0
    margin = smallest_margin(architecture)
    record_long_run("Architectures", requests=len(prompts()), smallest_margin=margin)
    assert margin > SMALLEST_SAFE_MARGIN / 100
    assert_equals_oracle(architecture, transcript)


@pytest.mark.parametrize("architecture", REFUSED)
def test_what_keeps_more_than_keys_and_values_is_refused(architecture: str) -> None:
    with pytest.raises(LoadFailed, match=r"keeps a state|cache of its own") as refused:
        tiny_engine(architecture, make_config=REFUSED[architecture])

    assert class_of(architecture) in str(refused.value)


def test_the_page_lists_every_architecture_that_is_tested_and_no_other() -> None:
    rows = re.findall(r"^\| (paged|padded|refused) \| (.*) \|", PAGE.read_text(), re.MULTILINE)

    listed = {way: set(re.findall(r"`(\w+)`", classes)) for way, classes in rows}

    assert set(ARCHITECTURES) <= (PAGED | PADDED).keys()
    assert listed == {
        "paged": set(map(class_of, PAGED)),
        "padded": set(map(class_of, PADDED)),
        "refused": set(map(class_of, REFUSED)),
    }
