# SPDX-License-Identifier: Apache-2.0
"""A page's examples as somebody runs them who reads it from above: a shell, and one Python.

Commands run one block at a time, in a directory of the page. Python keeps its names from block to
block, in a process of its own.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tests.pages.blocks import ROOT

PYTHON = """
import json, sys, traceback
names = {"__name__": "__main__"}
for line in sys.stdin:
    try:
        exec(compile(json.loads(line), "<example>", "exec"), names)
        print("\\0", flush=True)
    except BaseException:
        traceback.print_exc(file=sys.stdout)
        print("\\0failed", flush=True)
"""
"""Runs the blocks that come as lines of JSON, and says of each when it has ended."""
TIMEOUT_SECONDS = 200
COMMANDS = ("xinference", "xinference-local", "xinference-supervisor", "xinference-worker")


class ExampleFailed(AssertionError):
    """A block did not do what it shows."""


class Session:
    """Runs the blocks of one page; close it at its end."""

    def __init__(self, directory: Path, variables: Mapping[str, str]) -> None:
        for place in (directory, Path(variables["XINFERENCE_HOME"])):
            place.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        paths = [write_commands(directory / "bin"), *os.environ["PATH"].split(":")]
        self._environment = {
            **os.environ,
            **variables,
            "PATH": ":".join(str(path) for path in paths),
            "PYTHONPATH": str(ROOT),
        }
        self._python: subprocess.Popen[str] | None = None

    def bash(self, text: str) -> str:
        """Run commands; return what they printed.

        Raises:
            ExampleFailed: one of them did not end with 0.
        """
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self._directory,
            env=self._environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=TIMEOUT_SECONDS,
            check=False,
        )
        if done.returncode != 0:
            raise ExampleFailed(f"exit {done.returncode}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def python(self, text: str) -> str:
        """Run statements after those before; return what they printed.

        Raises:
            ExampleFailed: they raised.
        """
        if self._python is None:
            self._python = subprocess.Popen(
                [sys.executable, "-c", PYTHON],
                cwd=self._directory,
                env=self._environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        assert self._python.stdin is not None
        assert self._python.stdout is not None
        self._python.stdin.write(json.dumps(text) + "\n")
        self._python.stdin.flush()
        printed = ""
        for line in self._python.stdout:
            before, ended, how = line.partition("\0")
            printed += before
            if ended:
                if how.strip():
                    raise ExampleFailed(printed)
                return printed
        raise ExampleFailed(f"Python ended\n{printed}")

    def close(self) -> None:
        """End the Python."""
        if self._python is not None:
            assert self._python.stdin is not None
            assert self._python.stdout is not None
            self._python.stdin.close()
            self._python.wait(20)
            self._python.stdout.close()


def write_commands(directory: Path) -> Path:
    """Write our commands as those of this checkout; return their directory."""
    directory.mkdir(parents=True, exist_ok=True)
    for name in COMMANDS:
        function = "main" if name == "xinference" else name.removeprefix("xinference-")
        call = f"from xinference.cli.main import {function} as run; run()"
        path = directory / name
        code = f"import sys; sys.argv[0] = '{name}'; {call}"
        path.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{code}" "$@"\n')
        path.chmod(0o755)
    return directory


def compare(shown: str, printed: str, language: str) -> None:
    """Compare what a page shows with what was printed.

    Numbers may differ, and `…` stands for anything. JSON is compared by its keys and the kinds of
    its values.

    Raises:
        ExampleFailed: it has another shape.
    """
    if language == "json":
        wanted, found = shape_of(json.loads(shown)), shape_of(json.loads(printed))
        if not is_within(wanted, found):
            raise ExampleFailed(f"shown: {wanted}\nprinted: {printed}")
        return
    pattern = re.escape(shown.strip()).replace("…", ".*")
    pattern = re.sub(r"\d+", r"\\d+", pattern)
    if not re.fullmatch(pattern, printed.strip(), re.DOTALL):
        raise ExampleFailed(f"shown: {shown}\nprinted: {printed}")


def shape_of(value: Any) -> Any:
    """Return the keys and kinds of a JSON value; of a list, of its first."""
    if isinstance(value, dict):
        return {key: shape_of(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [shape_of(inner) for inner in value[:1]]
    return "number" if isinstance(value, int | float) else type(value).__name__


def is_within(wanted: Any, found: Any) -> bool:
    """Whether all that is shown is there, of the same kinds."""
    if isinstance(wanted, dict):
        return isinstance(found, dict) and all(
            key in found and is_within(inner, found[key]) for key, inner in wanted.items()
        )
    if isinstance(wanted, list):
        return isinstance(found, list) and (
            not wanted or (bool(found) and is_within(wanted[0], found[0]))
        )
    return bool(wanted == found)
