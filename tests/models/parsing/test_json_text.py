# SPDX-License-Identifier: Apache-2.0
"""Where a JSON value ends is where every JSON reader says it does."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xinference.models.parsing.json_text import JsonScanner
from xinference.models.parsing.reader import is_json

values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=12,
)


@given(
    value=values, after=st.sampled_from(["", " ", "}", ",", "x", '"', "]"]), escapes=st.booleans()
)
def test_a_value_ends_where_it_ends(value: Any, after: str, escapes: bool) -> None:
    text = json.dumps(value, ensure_ascii=escapes)
    scanner = JsonScanner()

    length = sum(scanner.feed(char) for char in text)
    length += scanner.feed(after)
    scanner.end()

    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    assert scanner.is_complete or (is_number and after in ("x", '"'))
    assert length == len(text)


@settings(max_examples=500)
@given(st.text(alphabet='{}[]",:\\ 0123-+.eEtrufalsn/b\n', max_size=14))
def test_it_agrees_with_pythons_reader_about_every_text(text: str) -> None:
    try:
        json.loads(text, parse_constant=lambda name: 1 / 0)
        expected = text.strip() == text
    except (ValueError, ZeroDivisionError):
        expected = False

    assert is_json(text) == expected


@pytest.mark.parametrize("text", ["[" * 65 + "]" * 65, "1" * 500, '"\x01"', "01", "1.", ".5", "+1"])
def test_what_is_no_json_or_too_much_of_it_is_broken(text: str) -> None:
    assert not is_json(text)
