# SPDX-License-Identifier: Apache-2.0
"""The guide's text tells the truth: every command, option, route and variable it names is there."""

import random
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import click
import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import xinference
from tests.fakes.cluster import FakeCluster
from training.guide_text import Grammar
from training.tool_text import draw_tool_turns, tools_prompt
from training.train_guide import Cutter, encode
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
    return AutoTokenizer.from_pretrained(GUIDE)


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
    for _ in range(20):
        tools, turns = draw_tool_turns(rng)
        conversation = [{"role": "system", "content": tools_prompt(tools)}, *turns]
        asked = tokenizer.apply_chat_template(
            turns[:1], tools=tools, add_generation_prompt=True, tokenize=False
        )
        written = tokenizer.decode(encode(conversation[:2], tokenizer, 0.0).token_ids)

        assert asked == written + "<|im_start|>assistant\n"


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
