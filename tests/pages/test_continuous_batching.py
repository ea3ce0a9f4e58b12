# SPDX-License-Identifier: Apache-2.0
"""The page on continuous batching says of every option of transformers' own what stands for it."""

import dataclasses
import re

from transformers import ContinuousBatchingConfig
from transformers.generation.continuous_batching.continuous_api import (
    ContinuousBatchingManager,
    ContinuousMixin,
)

from tests.pages.blocks import ROOT
from xinference.api.admin.schema import LaunchRequest
from xinference.api.openai.schema import ChatRequest
from xinference.cli.main import COMMANDS
from xinference.client import Client
from xinference.protocol.deployment import EngineOptions, SchedulerPolicy
from xinference.settings import VARIABLES

PAGE = (ROOT / "doc" / "continuous-batching.md").read_text(encoding="utf-8")
THEIRS = {"max_new_tokens", "streaming", "eos_token_id", "torch.compile"}
"""Words of theirs that the page explains in passing."""


def table(head: str) -> dict[str, str]:
    """Return the rows of a table: each name in the first column, and what is said of it."""
    _, _, rest = PAGE.partition(f"| {head} | here |\n|---|---|\n")
    rows = [line.strip("| ").split(" | ", 1) for line in rest.partition("\n\n")[0].splitlines()]
    return {name: here for names, here in rows for name in re.findall(r"`(\w+)`", names)}


def test_every_option_of_transformers_has_its_row() -> None:
    options = {field.name for field in dataclasses.fields(ContinuousBatchingConfig)}

    assert set(table("`ContinuousBatchingConfig`")) == options


def test_everything_that_the_manager_and_the_models_do_has_its_row() -> None:
    done = {
        name
        for of_class in (ContinuousBatchingManager, ContinuousMixin)
        for name in vars(of_class)
        if not name.startswith("_") and callable(getattr(of_class, name))
    }

    assert set(table("manager and model")) == done


def test_what_stands_for_them_is_there() -> None:
    ours = {
        *LaunchRequest.model_fields,
        *(field.name for field in dataclasses.fields(EngineOptions)),
        *ChatRequest.model_fields,
        *COMMANDS,
        *dir(Client),
        *VARIABLES,
        *(policy.value for policy in SchedulerPolicy),
    }

    rows = {**table("`ContinuousBatchingConfig`"), **table("manager and model")}
    named = {word for here in rows.values() for word in re.findall(r"`([\w.]+)`", here)}

    assert sorted(named - ours - THEIRS) == []
