# SPDX-License-Identifier: Apache-2.0
"""Writes `doc/api-parameters.md`: every parameter of OpenAI's text APIs, and the test of each.

The parameters are those of the installed `openai` package, so a new one shows up as a failing
test. `python -m tests.api.parameter_table` writes the page; `test_parameter_table.py` compares.
"""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from openai.types import completion_create_params
from openai.types.chat import ChatCompletionStreamOptionsParam
from openai.types.chat import completion_create_params as chat_create_params
from openai.types.responses import response_create_params

from xinference.api.fields import Body
from xinference.api.openai.responses.schema import ResponseRequest, ResponseStreamOptions
from xinference.api.openai.schema import ChatRequest, CompletionRequest, StreamOptions

from . import test_chat, test_parameters, test_responses, test_stored_chats

PAGE = Path(__file__).parents[2] / "doc" / "api-parameters.md"
COMMAND = "python -m tests.api.parameter_table"
STREAM = ("stream", "stream_options")

Test = Callable[..., Any]

ROUTES: dict[str, tuple[Any, Any, type[Body], type[Body]]] = {
    "/v1/chat/completions": (
        chat_create_params.CompletionCreateParamsBase,
        ChatCompletionStreamOptionsParam,
        ChatRequest,
        StreamOptions,
    ),
    "/v1/completions": (
        completion_create_params.CompletionCreateParamsBase,
        ChatCompletionStreamOptionsParam,
        CompletionRequest,
        StreamOptions,
    ),
    "/v1/responses": (
        response_create_params.ResponseCreateParamsBase,
        response_create_params.StreamOptions,
        ResponseRequest,
        ResponseStreamOptions,
    ),
}
"""OpenAI's parameters and stream options, and ours."""

OWN_TESTS: dict[str, Test] = {
    "store": test_stored_chats.test_a_stored_chat_is_what_was_sent_with_its_labels,
    "metadata": test_stored_chats.test_a_stored_chat_is_what_was_sent_with_its_labels,
    "prompt_cache_key": test_stored_chats.test_a_stored_chat_is_what_was_sent_with_its_labels,
}
"""Of parameters of chats that are in no table of tests."""

RESPONSE_TESTS: dict[str, Test] = {
    "model": test_responses.test_a_text_is_answered_in_openais_form,
    "previous_response_id": test_responses.test_a_response_goes_on_from_a_stored_one,
    "include": test_responses.test_an_answer_may_be_sent_back_as_it_came,
    "stream_options": test_responses.test_with_obfuscation_sizes_tell_nothing,
}
"""The same of responses."""

STREAM_OPTION_TESTS: dict[str, Test] = {
    "include_usage": test_chat.test_include_usage_adds_one_chunk_without_choices,
    "include_obfuscation": test_chat.test_with_obfuscation_sizes_tell_nothing,
}


def page() -> str:
    """Return what the page has to say."""
    parts = [
        "# Every parameter of OpenAI's text APIs",
        f"Written by `{COMMAND}`, from the types of OpenAI's own client and the tests.",
        "A parameter is honoured, or refused with a 400 that names it; null, and the values in "
        "the second column, ask for nothing and pass. [The HTTP API](api.md) says what each does, "
        "and lists Xinference's own.",
    ]
    for route in ROUTES:
        parts.append(f"## `{route}`")
        parts.append("\n".join(["| parameter | here | test |", "|---|---|---|", *_rows(route)]))
    return "\n\n".join(parts) + "\n"


def _rows(route: str) -> Iterator[str]:
    theirs, their_options, ours, our_options = ROUTES[route]
    for name in [*theirs.__annotations__, "stream"]:
        assert name in ours.model_fields, f"{route} does not know {name}"
        yield _row(name, ours, name, _test_of(route, name))
    for name in their_options.__annotations__:
        assert name in our_options.model_fields, f"stream_options do not know {name}"
        test = STREAM_OPTION_TESTS[name]
        if ours is ResponseRequest:
            test = test_responses.test_with_obfuscation_sizes_tell_nothing
        yield _row(f"stream_options.{name}", our_options, name, test)


def _row(shown: str, schema: type[Body], name: str, test: Test) -> str:
    here = "honoured"
    mark = test_parameters.refused(schema).get(name)
    if mark is not None:
        passing = " ".join(f"`{json.dumps(value)}`" for value in mark.neutral)
        here = f"refused, but for {passing}" if passing else "refused"
    module = test.__module__.rpartition(".")[2]
    return f"| `{shown}` | {here} | `{module}.py::{test.__name__}` |"


def _test_of(route: str, name: str) -> Test:
    """Return the test that shows what is done with a parameter."""
    if route == "/v1/responses":
        if name in test_parameters.refused(ResponseRequest):
            return test_responses.test_what_is_not_honoured_is_refused_by_name
        if name in test_responses.CHANGED:
            return test_responses.test_what_is_honoured_changes_something
        return RESPONSE_TESTS[name]
    if (route, name) in test_parameters.MARKED:
        return test_parameters.test_what_is_not_honoured_is_refused_by_name
    if (route, name) in test_parameters.HONOURED:
        return test_parameters.test_what_is_honoured_changes_something
    return OWN_TESTS[name]


if __name__ == "__main__":
    PAGE.write_text(page())
