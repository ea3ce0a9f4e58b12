# SPDX-License-Identifier: Apache-2.0
"""Writing down what an answer may look like, in the Lark that the engine's grammars understand.

The forms of `grammars.py` use it to say how a call is written; what they say is then all that a
model can write. Markers are written as tokens where the tokenizer has them, and as text as well:
models do either, and parsers read both. Pure.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

TEXT = "TEXT"
"""The name of the terminal that is any text."""
ANSWER = "@answer"
"""The name of the grammar that a request brings itself."""

# Why bounded: a model may like white space, and then never come to the end of an object.
_JSON_OPTIONS = {"whitespace_pattern": r"\n {0,16}| ?"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Function:
    """A function that may be called."""

    name: str
    parameters: Mapping[str, Any]
    """The schema of its arguments, an object."""
    strict: bool
    """Whether a keyword of the schema that cannot be followed is refused, not passed over."""


class Lark:
    """The rules of one grammar. The methods return what other rules call theirs."""

    def __init__(self, token_ids: Mapping[str, int]) -> None:
        """Take the markers that are single tokens, with their ids."""
        self._token_ids = token_ids
        self._names: dict[str, str] = {"/(?s:.*)/": TEXT}
        """Of the rules and terminals so far, by what they say."""
        self._recursive: dict[str, str] = {}
        """Bodies of the rules that may be within themselves, by their names."""
        self._recursive_names: dict[str, str] = {}

    def has_token(self, marker: str) -> bool:
        """Return whether a marker is a single token."""
        return marker in self._token_ids

    def rule(self, body: str) -> str:
        """Return the name of the rule that says this."""
        return self._names.setdefault(body, f"rule{len(self._names)}")

    def terminal(self, body: str) -> str:
        """Return the name of the terminal that says this."""
        return self._names.setdefault(body, f"TERMINAL{len(self._names)}")

    def recursive(self, key: str, body: Callable[[], str]) -> str:
        """Return a rule that may be within itself; the body is asked for once for each key."""
        name = self._recursive_names.get(key)
        if name is None:
            name = self._recursive_names[key] = f"recursive{len(self._recursive_names)}"
            self._recursive[name] = body()
        return name

    def one_of(self, bodies: Iterable[str]) -> str:
        """Return a rule that is one of these."""
        return self.rule(" | ".join(bodies))

    def marker(self, marker: str) -> str:
        """Return a marker, as a token or spelled."""
        token_id = self._token_ids.get(marker)
        spelled = literal(marker)
        return spelled if token_id is None else f"(<[{token_id}]> | {spelled})"

    def until(self, marker: str, text: str = TEXT) -> str:
        """Return a text of this terminal up to the first marker, and the marker."""
        lazy = f"{text} {literal(marker)}"
        spelled = self._names.setdefault(f"[lazy]: {lazy}", f"rule{len(self._names)}")
        token_id = self._token_ids.get(marker)
        return spelled if token_id is None else self.rule(f"{text} <[{token_id}]> | {spelled}")

    def json(self, schema: Mapping[str, Any], *, strict: bool = True) -> str:
        """Return a value of this schema."""
        options = _JSON_OPTIONS | {"lenient": not strict}
        return f"%json {json.dumps({**schema, 'x-guidance': options})}"

    def arguments(self, function: Function) -> str:
        """Return the arguments of a function, as a JSON object."""
        return self.json(function.parameters, strict=function.strict)

    def call_objects(self, functions: Iterable[Function], *, key: str = "arguments") -> str:
        """Return a call that is a JSON object of the name and, under `key`, the arguments."""
        bodies = []
        for one in functions:
            begin = literal(f'{{"name": "{one.name}", "{key}": ')
            bodies.append(f'{begin} {self.arguments(one)} "}}"')
        return self.one_of(bodies)

    def list_of(self, call: str, separator: str, *, several: bool) -> str:
        """Return one call, or with `several` any number of them with this between."""
        return f"{call} ({separator} {call})*" if several else call

    def amid_text(self, call: str, *, several: bool) -> str:
        """Return text with calls in it; a call begins with the text before it."""
        return f"({call})* {TEXT}" if several else f"{call} | {TEXT}"

    def written(self, start: str) -> str:
        """Return the grammar of which an answer is `start`."""
        lines = [f"start: {start}"]
        for body, name in self._names.items():
            lines.append(f"{name}{body}" if body.startswith("[lazy]: ") else f"{name}: {body}")
        lines += [f"{name}: {body}" for name, body in self._recursive.items()]
        return "\n".join([*lines, ""])


def literal(text: str) -> str:
    """Return what stands for exactly this text."""
    return json.dumps(text).replace("\x7f", "\\u007f")
