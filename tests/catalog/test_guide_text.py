# SPDX-License-Identifier: Apache-2.0
"""The guide's text tells the truth: every command, option, route and variable it names is there."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import click
import pytest
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import xinference
from tests.fakes.cluster import FakeCluster
from training.guide_text import Grammar
from training.tool_text import draw_tool_turns, tools_prompt
from training.train_guide import TEMPLATE_FILE, Cutter, attend, encode
from xinference.api.app import create_app
from xinference.cli import main, serve
from xinference.client import Client
from xinference.protocol.deployment import EngineOptions
from xinference.settings import OBSOLETE, VARIABLES

ROOT = Path(__file__).parents[2]
GUIDE = Path(xinference.__file__).parent / "catalog" / "guide"
SERVERS = {
    "xinference-local": serve.local_command,
    "xinference-supervisor": serve.supervisor_command,
    "xinference-worker": serve.worker_command,
}
ENGINE_OPTIONS = {option.name.replace("_", "-") for option in fields(EngineOptions)}
# A stand-in for options in general, and an option of pip's.
NO_OPTIONS = {"--NAME", "-e"}


@pytest.fixture(scope="module")
def grammar() -> Grammar:
    return Grammar()


@pytest.fixture(scope="module")
def answers(grammar: Grammar) -> dict[str, str]:
    return {topic.name: topic.answer for topic in grammar.topics.values()}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """The guide's, with the template that it would be trained with today."""
    tokenizer = AutoTokenizer.from_pretrained(GUIDE)
    tokenizer.chat_template = TEMPLATE_FILE.read_text(encoding="utf-8")
    return tokenizer


def commands() -> dict[str, click.Command]:
    """Every command by what one types, such as `xinference keys create`."""
    found: dict[str, click.Command] = dict(SERVERS)
    context = click.Context(main.program)
    for name in main.COMMANDS:
        command = main.program.get_command(context, name)
        assert command is not None
        found[f"xinference {name}"] = command
        if isinstance(command, click.Group):
            found |= {f"xinference {name} {inner}": it for inner, it in command.commands.items()}
    return found


def options_of(command: click.Command) -> set[str]:
    return {
        option
        for parameter in command.params
        for option in (*parameter.opts, *parameter.secondary_opts)
        if option.startswith("-")
    }


def spans(text: str) -> list[str]:
    """What the text has in backticks, of one line."""
    return re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)


def commands_named(text: str) -> Iterator[str]:
    for span in spans(text):
        for part in re.split(r" && | \| ", span):
            if match := re.search(r"(?:^|[ ]|bin/)(xinference(?:-[a-z]+)?(?: .*)?)$", part):
                yield match[1]


def test_every_command_that_an_answer_names_exists_with_its_options(
    answers: dict[str, str],
) -> None:
    known = commands()
    wrong = []
    for topic, answer in answers.items():
        for line in commands_named(answer):
            words = line.split()
            name = next(
                (
                    " ".join(words[:length])
                    for length in (3, 2, 1)
                    if " ".join(words[:length]) in known
                ),
                None,
            )
            if name is None:
                if line not in ("xinference", "xinference --help", "xinference --version"):
                    wrong.append((topic, line))
                continue
            allowed = options_of(known[name]) | {"--help"}
            allowed |= {f"--{option}" for option in ENGINE_OPTIONS} if "launch" in name else set()
            for word in words:
                flag = word.replace("_", "-") if word.startswith("--") else word
                if re.fullmatch(r"--?[a-z][a-z_-]*", word, re.IGNORECASE) and flag not in allowed:
                    wrong.append((topic, f"{name} {word}"))

    assert wrong == []


def test_every_option_that_an_answer_names_belongs_to_some_command(
    answers: dict[str, str],
) -> None:
    known = {option for command in commands().values() for option in options_of(command)}
    known |= {f"--{option}" for option in ENGINE_OPTIONS} | {"--help", "--version", *NO_OPTIONS}
    wrong = [
        (topic, flag)
        for topic, answer in answers.items()
        for span in spans(answer)
        if span.startswith("--")
        for flag in re.findall(r"--[A-Za-z_-]+", span)
        if flag.replace("_", "-") not in known
    ]

    assert wrong == []


def test_every_route_that_an_answer_names_is_served(answers: dict[str, str]) -> None:
    paths = {
        re.sub(r"\{[^}]+\}", "*", path) for path in create_app(FakeCluster()).openapi()["paths"]
    }
    patterns = [re.compile(re.escape(path).replace(r"\*", "[^/]+")) for path in paths]
    extra = {"/docs", "/metrics"}
    wrong = []
    for topic, answer in answers.items():
        for route in re.findall(
            r"(?<![\w.])(/(?:v1|v2|api|docs|metrics|health|ready)[\w/.-]*)", answer
        ):
            path = re.sub(r"[A-Z_]{2,}|my-1", "x", route).rstrip(".")
            if path not in {"/v1"} | extra and not any(p.fullmatch(path) for p in patterns):
                wrong.append((topic, route))

    assert wrong == []


def test_every_variable_that_an_answer_names_is_a_setting(answers: dict[str, str]) -> None:
    named = {
        name for answer in answers.values() for name in re.findall(r"XINFERENCE_[A-Z_]+", answer)
    }

    assert named <= {*VARIABLES, *OBSOLETE}


def test_every_file_that_an_answer_names_is_in_the_checkout(answers: dict[str, str]) -> None:
    named = {
        path
        for answer in answers.values()
        for path in re.findall(r"`((?:doc|deploy|training|xinference)(?:/[\w./-]+)?)`", answer)
    }

    assert [path for path in named if not (ROOT / path).exists() and path != "xinference"] == []


def test_every_method_of_the_client_that_an_answer_names_exists(answers: dict[str, str]) -> None:
    named = {
        name for answer in answers.values() for name in re.findall(r"\bclient\.([a-z_]+)\(", answer)
    }

    assert [name for name in sorted(named) if not hasattr(Client, name)] == []


def test_a_conversation_with_tools_is_written_as_the_template_writes_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rng = random.Random(7)
    for _ in range(200):
        tools, turns = draw_tool_turns(rng)
        conversation = [{"role": "system", "content": tools_prompt(tools)}, *turns]
        asked = tokenizer.apply_chat_template(
            turns[:1], tools=tools, add_generation_prompt=True, tokenize=False
        )
        written = tokenizer.decode(encode(conversation[:2], tokenizer, 0.0).token_ids)

        assert asked == written + "<|im_start|>assistant\n"


def test_a_thought_is_trained_as_the_template_asks_for_it(
    grammar: Grammar, tokenizer: PreTrainedTokenizerFast
) -> None:
    topic = grammar.topics["stop_model"]
    question = {"role": "user", "content": "How do I stop it?"}
    _, _, after_thought = topic.forms
    example = encode([question, {"role": "assistant", "content": after_thought}], tokenizer, 0.0)
    asked = tokenizer.apply_chat_template(
        [question], add_generation_prompt=True, tokenize=False, enable_thinking=True
    )
    start = example.weights.index(1.0)

    assert tokenizer.decode(example.token_ids[:start]) == asked
    said = tokenizer.decode(example.token_ids[start:])
    assert said.count("<think>") == 0
    assert said.partition("</think>\n\n")[2] == f"{topic.answer}<|im_end|>\n"


def test_training_never_draws_what_the_examination_of_calls_asks_for() -> None:
    def calls(rng: random.Random, num: int, *, is_examination: bool) -> list[dict[str, Any]]:
        drawn = []
        for _ in range(num):
            _, turns = draw_tool_turns(rng, is_examination=is_examination)
            drawn.append(json.loads(turns[1]["content"].strip().splitlines()[1]))
        return drawn

    examined = calls(random.Random(2026), 60, is_examination=True)
    trained = calls(random.Random(3), 5000, is_examination=False)

    def values(drawn: list[dict[str, Any]]) -> set[object]:
        return {value for call in drawn for value in call["arguments"].values()}

    assert not {call["name"] for call in examined} & {call["name"] for call in trained}
    assert not values(examined) & values(trained)


def test_the_attention_of_the_training_is_what_torch_computes() -> None:
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, 6, 5, 8, generator=generator)
    key, value = torch.randn(2, 2, 3, 5, 8, generator=generator)
    ours, _ = attend(torch.nn.Module(), query, key, value, None, 8**-0.5)
    torchs = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )

    torch.testing.assert_close(ours, torchs.transpose(1, 2))


def test_an_answer_is_cut_where_it_is_told_from_the_others(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    answers = ["Run it now, please.", "Run it later.", "Stop."]
    cutter = Cutter(answers, tokenizer)
    question = {"role": "user", "content": "How?"}
    kept = []
    for answer in answers:
        example = encode([question, {"role": "assistant", "content": answer}], tokenizer, 0.0)
        part = cutter.cut(example, 0)
        assert part.token_ids == example.token_ids[: len(part.token_ids)]
        kept.append(
            tokenizer.decode([at for at, w in zip(part.token_ids, part.weights, strict=True) if w])
        )

    assert kept[0].startswith("Run it n")
    assert kept[1].startswith("Run it l")
    assert "Stop".startswith(kept[2])


def test_a_call_of_a_tool_is_never_cut(tokenizer: PreTrainedTokenizerFast) -> None:
    cutter = Cutter(["Run it now, please.", "Stop."], tokenizer)
    _, turns = draw_tool_turns(random.Random(1))
    example = encode(turns[:2], tokenizer, 0.0)

    assert cutter.cut(example, 0) == example
