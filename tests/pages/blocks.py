# SPDX-License-Identifier: Apache-2.0
"""A page of Markdown → its fenced blocks, with the mark before each.

A mark is a comment on the line before a fence:

    <!-- not run: it needs a GPU -->   the block is read, not run
    <!-- run by: tests/e2e/x.py -->    another test runs it
    <!-- output -->                    what the block before it printed, or the like
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (ROOT / "README.md", *sorted((ROOT / "doc").rglob("*.md")))

_FENCE = re.compile(r"^(?P<indent> *)```(?P<language>[\w-]*) *$")
_MARK = re.compile(r"^ *<!-- (?P<mark>.+?) -->$")


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One fenced block."""

    page: Path
    line: int
    """Of its fence, from 1."""
    language: str
    text: str
    mark: str
    """What the comment before it says; empty: there is none."""

    @property
    def where(self) -> str:
        """Its place, for people."""
        return f"{name_of(self.page)}:{self.line}"

    @property
    def why_not_run(self) -> str | None:
        """Why it cannot run in a test; None: it can."""
        kind, _, reason = self.mark.partition(": ")
        return reason if kind == "not run" else None

    @property
    def run_by(self) -> Path | None:
        """The test that runs it instead."""
        kind, _, test = self.mark.partition(": ")
        return ROOT / test if kind == "run by" else None

    @property
    def is_output(self) -> bool:
        """Whether it is what the block before it printed."""
        return self.mark == "output"


def name_of(page: Path) -> str:
    """Return the path of a page in the checkout."""
    return str(page.relative_to(ROOT))


def blocks_of(page: Path) -> Iterator[Block]:
    """Yield the fenced blocks of a page, in order.

    Raises:
        ValueError: a fence is not closed.
    """
    lines = page.read_text(encoding="utf-8").splitlines()
    at = 0
    while at < len(lines):
        opened = _FENCE.match(lines[at])
        if opened is None:
            at += 1
            continue
        indent = opened["indent"]
        try:
            end = lines.index(f"{indent}```", at + 1)
        except ValueError:
            raise ValueError(f"{name_of(page)}:{at + 1}: the fence is not closed") from None
        mark = _MARK.match(lines[at - 1]) if at else None
        yield Block(
            page=page,
            line=at + 1,
            language=opened["language"],
            text="\n".join(line.removeprefix(indent) for line in lines[at + 1 : end]) + "\n",
            mark=mark["mark"] if mark else "",
        )
        at = end + 1
