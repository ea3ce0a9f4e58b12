# SPDX-License-Identifier: Apache-2.0
"""Every error has its status, and its body loses nothing."""

import re

import pytest

from xinference import errors
from xinference.api.error_shapes import openai_body
from xinference.api.errors import error_response, invalid_request, status_of, told
from xinference.errors import (
    InvalidRequest,
    InvalidSetting,
    ModelNotReady,
    ModelOverloaded,
    PeerUnreachable,
    XinferenceError,
    concrete_errors,
)

TREE = dict(re.findall(r"(\w+)  .*?(\d{3})$", errors.__doc__ or "", flags=re.MULTILINE))


def made(cls: type[XinferenceError]) -> XinferenceError:
    """Return one without caring for its fields."""
    return cls.__new__(cls)


@pytest.mark.parametrize(
    "cls",
    [cls for cls in concrete_errors() if cls is not InvalidSetting],
    ids=lambda cls: cls.__name__,
)
def test_the_status_is_the_one_in_the_tree(cls: type[XinferenceError]) -> None:
    assert status_of(made(cls)) == int(TREE[cls.__name__])


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        (ModelOverloaded(model="m", num_waiting=3, retry_after_seconds=9), "9"),
        (ModelNotReady(model="m", state="loading", retry_after_seconds=4), "4"),
        (PeerUnreachable(peer="supervisor", problem="no answer"), "5"),
        (InvalidRequest(field="n", problem="is bad"), None),
    ],
)
def test_what_passes_by_itself_says_when_to_come_back(
    error: XinferenceError, seconds: str | None
) -> None:
    assert error_response(error).headers.get("retry-after") == seconds


def test_a_body_has_openais_shape_with_detail_beside_it() -> None:
    body = openai_body(told(InvalidRequest(field="n", problem="is bad")), "")

    assert body == {
        "error": {
            "message": "n: is bad",
            "type": "invalid_request_error",
            "param": "n",
            "code": "invalid_request",
        },
        "detail": "n: is bad",
    }


def test_a_huge_message_is_cut() -> None:
    assert len(told(InvalidRequest(field="n", problem="x" * 100_000)).message) == 2000


def test_a_finding_leads_to_the_value_and_not_through_the_branches_of_a_union() -> None:
    given = {"messages": [{"content": [{"type": "image"}]}]}
    finding = {
        "type": "literal_error",
        "loc": ("messages", 0, "content", "parts", 0, "type"),
        "msg": "Input should be 'text'",
        "input": "image",
    }

    error = invalid_request([finding], given=given)

    assert error.field == "messages[0].content[0].type"
    assert error.problem == "must be 'text', got \"image\""
