# SPDX-License-Identifier: Apache-2.0
"""Where the host's pip looks for packages, as options of `uv`, which does not read its files."""

import ast
import re
from collections.abc import Iterator

READ_PIP_CONFIG = """
import json, subprocess, sys
try:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=20,
    )
    said = "" if done.returncode else done.stdout
except subprocess.TimeoutExpired:
    said = ""
print(json.dumps(said))
"""
"""What `pip config list` says, as JSON on one line; an empty text where there is no pip.

Why a program: it takes half a second, and the worker kills children that no replica has started.
"""
_LINE = re.compile(r"(?::env:|global|install|site|user)\.(?P<name>[a-z-]+)=(?P<value>.*)")
_FLAGS = {
    "index-url": "--default-index",
    "extra-index-url": "--index",
    "find-links": "--find-links",
    "trusted-host": "--allow-insecure-host",
}


def options_of(listing: str) -> tuple[list[str], dict[str, str]]:
    """Return options and environment for `uv` that mean the same.

    Args:
        listing: lines of `pip config list`, which has the last word last.
    """
    options: list[str] = []
    environment: dict[str, str] = {}
    for name, value in _settings(listing):
        if name == "cert":
            environment["SSL_CERT_FILE"] = value
        elif name == "no-index" and value.casefold() in ("1", "true", "yes", "on"):
            options.append("--no-index")
        elif name == "index-url":
            _drop(options, _FLAGS[name])
            options += [_FLAGS[name], value]
        elif name in _FLAGS:
            for one in value.split():
                options += [_FLAGS[name], one]
    return options, environment


def _settings(listing: str) -> Iterator[tuple[str, str]]:
    for line in listing.splitlines():
        found = _LINE.fullmatch(line.strip())
        if found is None:
            continue
        try:
            value = ast.literal_eval(found["value"])
        except (ValueError, SyntaxError):
            continue
        if isinstance(value, str) and value.strip():
            yield found["name"], value.strip()


def _drop(options: list[str], flag: str) -> None:
    if flag in options:
        place = options.index(flag)
        del options[place : place + 2]
