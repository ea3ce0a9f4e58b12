# SPDX-License-Identifier: Apache-2.0
"""The examples of the pages and of the README run, page by page, from above.

One platform serves all of them. Its hub is a stand-in that has tiny models under the names of
real ones; what lies in `/models` is there, too. A block that cannot run here says why in the
page (`<!-- not run: ... -->`), and is read instead.
"""

import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import httpx
import pytest

from tests.e2e.platform import Platform, started
from tests.fakes.hub import serving
from tests.pages.blocks import PAGES, Block, blocks_of, name_of
from tests.pages.session import Session, compare
from xinference.cli.main import program
from xinference.cli.serve import local_command, supervisor_command, worker_command

BLOCKS = {page: tuple(blocks_of(page)) for page in PAGES}
EXAMPLES = ("bash", "python")
BY_CI = ("run", "test")
"""Marks of the README's blocks that are what CI is made of."""
RUNNING = [
    page
    for page, blocks in BLOCKS.items()
    if any(block.language in EXAMPLES and block.mark in ("", "output") for block in blocks)
]
LANGUAGES = {"", "bash", "python", "json", "text", "yaml", "xml", "diff"}
SERVERS = {
    "xinference-local": local_command,
    "xinference-supervisor": supervisor_command,
    "xinference-worker": worker_command,
}
ENDPOINT = "http://127.0.0.1:9997"
"""What stands in the pages; each test has another port."""

HUB_RECITERS = ("Qwen/Qwen2.5-0.5B-Instruct", "Qwen/Qwen3-0.6B")
HUB_RERANKER = "BAAI/bge-reranker-base"
LAUNCHES = {
    "xinference-guide": "xinference launch -n xinference-guide",
    "qwen2.5-instruct": "xinference launch -n qwen2.5-instruct -s 0_5",
    "qwen3": "xinference launch -n qwen3 -s 0_6",
    "all-MiniLM-L6-v2": "xinference launch -n all-MiniLM-L6-v2 -t embedding",
    "bge-reranker-base": "xinference launch -n bge-reranker-base -t rerank",
    "my-model": "xinference launch --model-path /models/my-model",
}
"""How the models that pages need are launched; they run on for the pages that come later."""
OWN_GATEWAY = "a gateway of its own"
"""What a page needs that changes the gateway for all who come after it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """What the examples run on."""

    platform: Platform
    models: Path
    """What stands for `/models`."""

    def here(self, text: str) -> str:
        """Return an example with the places of this test."""
        text = text.replace(ENDPOINT, self.platform.endpoint)
        return re.sub(r"(?<!\w)/models/", f"{self.models}/", text)

    def running(self) -> set[str]:
        """Return the uids of all models."""
        found = httpx.get(f"{self.platform.endpoint}/v1/models/instances", timeout=30)
        found.raise_for_status()
        return {one["model_uid"] for one in found.json()}

    def once(self, text: str) -> str:
        """Return commands without the launches of `LAUNCHES` whose model runs.

        Why: a launch takes seconds, and many pages begin with the same one.
        """
        there = self.running()
        done = {line: uid for uid, line in LAUNCHES.items() if uid in there}
        lines = text.splitlines()
        return "\n".join(f"echo Model uid: {done[one]}" if one in done else one for one in lines)

    def clear(self, later: Sequence[Path]) -> None:
        """Terminate what is of no use to the pages that come later."""
        used = {name for page in later for name in models_of(page)}
        for uid in self.running() - used:
            url = f"{self.platform.endpoint}/v1/models/{uid}"
            httpx.delete(url, timeout=60).raise_for_status()


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    # Why here: they import torch, which the tests that only read can do without.
    from tests.e2e.reciting_model import save_reciting_model
    from tests.encoders_tiny import save_cross_encoder
    from tests.gguf_tiny import save_gguf

    models = tmp_path_factory.mktemp("models")
    reciter = save_reciting_model(models / "my-model")
    shutil.copytree(reciter, models / "Qwen2.5-0.5B-Instruct")
    save_gguf(models / "my-model.gguf")
    reranker = save_cross_encoder(tmp_path_factory.mktemp("reranker"), max_tokens=128)
    home = tmp_path_factory.mktemp("home")
    with serving() as hub:
        for repository in HUB_RECITERS:
            hub.add_directory(repository, reciter)
        hub.add_directory(HUB_RERANKER, reranker)
        with started(home, variables=hub.environment()) as platform:
            yield Stage(platform=platform, models=models)


def needs_of(page: Path) -> set[str]:
    """Return the models that a page says are running."""
    found = re.search(r"^<!-- needs: (.+) -->$", page.read_text(), re.MULTILINE)
    return set(found[1].split(", ")) if found else set()


def models_of(page: Path) -> set[str]:
    """Return the models of `LAUNCHES` that a page needs or launches."""
    text = page.read_text(encoding="utf-8")
    return needs_of(page) | {name for name, line in LAUNCHES.items() if f"\n{line}\n" in text}


@pytest.mark.timeout(300)
@pytest.mark.parametrize("page", RUNNING, ids=name_of)
def test_the_examples_of_a_page_run(page: Path, stage: Stage, tmp_path: Path) -> None:
    if needs_of(page) == {OWN_GATEWAY}:
        with started(tmp_path / "own") as platform:
            run(page, Stage(platform=platform, models=stage.models), tmp_path)
    else:
        run(page, stage, tmp_path)
        stage.clear(RUNNING[RUNNING.index(page) + 1 :])


def run(page: Path, stage: Stage, directory: Path) -> None:
    """Run the blocks of a page, and compare what they print with what it shows."""
    variables = {
        "XINFERENCE_ENDPOINT": stage.platform.endpoint,
        "XINFERENCE_HOME": str(directory / "home"),
    }
    session = Session(directory / "here", variables)
    printed = ""
    try:
        for name in sorted(needs_of(page) - {OWN_GATEWAY}):
            session.bash(stage.here(stage.once(LAUNCHES[name])))
        for block in BLOCKS[page]:
            if block.is_output:
                try:
                    compare(block.text, printed, block.language)
                except AssertionError as error:
                    raise AssertionError(f"{block.where}: {error}") from None
            elif block.language in EXAMPLES and runs(block):
                try:
                    if block.language == "python":
                        printed = session.python(stage.here(block.text))
                    else:
                        printed = session.bash(stage.here(stage.once(block.text)))
                except (AssertionError, subprocess.TimeoutExpired) as error:
                    raise AssertionError(f"{block.where}: {error}") from None
    finally:
        session.close()


def runs(block: Block) -> bool:
    """Whether a block is run here: it can be, and neither CI nor another test does it."""
    return not (block.why_not_run or block.run_by or block.mark in BY_CI)


def starts_a_cluster(words: list[str]) -> bool:
    """Whether a command starts one, of which there is one here."""
    return words[0] in SERVERS or words[:2] == ["xinference", "quickstart"]


def commands_of(block: Block) -> list[list[str]]:
    """Return the words of each of our commands in a block of bash."""
    found = []
    if block.language == "bash":
        text = block.text.replace("\\\n", " ")
        for line in text.splitlines():
            for part in re.split(r"\s(?:\||&&|;|&)(?:\s|$)", line):
                words = shlex.split(part, comments=True) if part.count("'") % 2 == 0 else []
                while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                    words = words[1:]
                if words and Path(words[0]).name in {"xinference", *SERVERS}:
                    found.append([Path(words[0]).name, *words[1:]])
    return found


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_block_of_a_page_can_be_read(page: Path) -> None:
    for block in BLOCKS[page]:
        assert block.language in LANGUAGES, block.where
        assert not (block.mark.startswith("not run") and not block.why_not_run), block.where
        assert block.run_by is None or block.run_by.is_file(), block.where
        if any(starts_a_cluster(words) for words in commands_of(block)):
            assert not runs(block), f"{block.where}: mark it with what runs it, or why nothing does"
        if block.language == "python":
            compile(block.text, block.where, "exec")
        elif block.language == "json" and "…" not in block.text:
            json.loads(block.text)
        elif block.language == "bash":
            subprocess.run(["bash", "-n", "-c", block.text], check=True, timeout=20)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_our_commands_in_a_page_have_options_that_there_are(page: Path) -> None:
    for block in BLOCKS[page]:
        for words in commands_of(block):
            read(words, block.where)


def read(words: list[str], where: str) -> None:
    """Read a command line as the command would."""
    command: click.Command = SERVERS.get(words[0], program)
    rest = words[1:]
    while isinstance(command, click.Group) and rest and not rest[0].startswith("-"):
        below = command.get_command(click.Context(command), rest[0])
        assert below is not None, f"{where}: {' '.join(words)}"
        command, rest = below, rest[1:]
    context = click.Context(command, **command.context_settings)
    parser = command.make_parser(context)
    try:
        parser.parse_args(list(rest))
    except click.UsageError as error:
        raise AssertionError(f"{where}: {' '.join(words)}: {error}") from None


def test_most_examples_run() -> None:
    examples = [
        block for blocks in BLOCKS.values() for block in blocks if block.language in EXAMPLES
    ]
    not_run = [block for block in examples if block.why_not_run]

    assert len(not_run) < len(examples) / 4, [(one.where, one.why_not_run) for one in not_run]
