# SPDX-License-Identifier: Apache-2.0
"""A launch's options become the words of a command line. Pure."""

import json
from collections.abc import Mapping
from typing import Any

from xinference.protocol.deployment import EngineOptions
from xinference.protocol.servers import ServerOptions


def shared_flags(
    options: EngineOptions, given: tuple[str, ...], names: Mapping[str, str]
) -> list[str]:
    """Return the words for those of our own options that a launch gives.

    Args:
        options: their values.
        given: those that the launch sets.
        names: the server's flag for each of ours that it has one for.
    """
    words: list[str] = []
    for name in given:
        value = getattr(options, name)
        if name not in names or value is False:
            continue
        words += [names[name]] if value is True else [names[name], str(value)]
    return words


def own_flags(options: ServerOptions, *, dash: str, denial: str | None) -> list[str]:
    """Return the words for the server's own options.

    Args:
        options: of the launch.
        dash: what its flags have between words.
        denial: what a flag begins with that is denied; None: such a flag is left out.
    """
    words: list[str] = []
    for name, value in options.flags.items():
        flag = name.replace("_", dash).replace("-", dash)
        if value is False:
            words += [] if denial is None else [f"--{denial}{flag}"]
        elif value is True:
            words.append(f"--{flag}")
        elif isinstance(value, list):
            words += [f"--{flag}", *map(_word, value)]
        else:
            words += [f"--{flag}", _word(value)]
    return words


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
